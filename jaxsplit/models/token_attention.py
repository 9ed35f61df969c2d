"""Attention of single tokens, from their projections to what a product reads, in one kernel for
GPUs.

Heads are turned, the new key and value are put into the cache, the keys before are split among
programs, and the last of them to end joins and stores what they have ("Flash-Decoding", Dao et al.
2023). One launch instead of three: with little context, a launch takes as long as its work.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.models import flash, placing
from jaxsplit.models.cache import AttentionCache, Batch
from jaxsplit.models.layers import Norm, rope_factors
from jaxsplit.models.mixer_config import AttentionConfig, NormConfig, RopeConfig
from jaxsplit.models.online_softmax import (
    FEW,
    LOG2_E,
    NONE,
    Sums,
    in_pairs,
    in_parts,
    joined,
    more_keys,
    padded,
    parts_of,
    scores_of,
    wide,
    without_pairs,
)
from jaxsplit.quant import (
    BLOCK,
    Late,
    Launch,
    Plain,
    Reader,
    block_elements,
)

_LEAST = 128
"""Keys of a split, or more."""

_JOINED = 4096
"""Numbers of splits that are joined at a time."""


def supports(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: Array | jax.ShapeDtypeStruct,
) -> bool:
    """Whether `attend` can do what a layer needs, for queries `[batch, time, heads * width]`."""
    return (
        batch.positions.shape[1] == 1
        and placing.supports(config, batch, cache, query.dtype)
        and flash.supports(query, cache, config)
        and query.shape[-1] // config.head_dim <= FEW * cache.keys.shape[1]
        and config.lends is None
        and cache.values.shape[-1] % BLOCK == 0
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Attended(Late):
    """Rows that were stored for a reader where they were computed."""

    rows: Any
    reader: Reader
    sequences: int
    columns: int
    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """`[sequences, 1, columns]`."""
        return self.sequences, 1, self.columns

    def prepared(self, reader: Reader, launch: Launch) -> Any:
        if reader != self.reader:
            raise ValueError(f"the rows were stored for {self.reader}, not for {reader}")
        return self.rows


def attend(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    config: AttentionConfig,
    norms: tuple[Norm | None, Norm | None],
    sinks: Array | None = None,
    *,
    dtype: jnp.dtype,
    reader: Reader | None = None,
    launch: Launch = Launch(),  # noqa: B008
) -> tuple[Array | Late, AttentionCache]:
    """What tokens read from those before them and themselves, and the cache with them.

    Args:
      query, key, value: projections, `[terms, batch, 1, heads * width]`, to be added up.
      batch: where the tokens belong; nothing is written for padding.
      cache: of earlier tokens.
      config: one that is supported.
      norms: of queries and of keys.
      sinks: float32 `[heads]`, or None.
      dtype: of activations.
      reader: of the rows, the only one; None: they are an array.
      launch: of the kernel.

    Returns:
      `[batch, 1, heads * value_dim]`, and the cache.
    """
    c, sequences, (kv_heads, length) = config, query.shape[1], cache.keys.shape[1:3]
    value_dim = cache.values.shape[-1]
    query = query.reshape(
        -1, sequences, kv_heads, query.shape[-1] // (kv_heads * c.head_dim), c.head_dim
    )
    group = query.shape[3]
    cos, sin = rope_factors(batch.positions, c.rope, batch.rope_factors.get(c.rope.factors))
    inputs = (
        query,
        *(x.reshape(*x.shape[:2], kv_heads, -1) for x in (key, value)),
        batch.positions.reshape(-1),
        batch.slots,
        cos.reshape(sequences, -1),
        sin.reshape(sequences, -1),
        [None if n is None or n.scale is None else n.scale.get_value() for n in norms],
        sinks,
        # Programs that have ended, by sequence and head: the last leaves zeros, as it has found.
        jnp.zeros((sequences, kv_heads), jnp.int32),
    )
    leaves, structure = jax.tree.flatten(inputs)
    kept, cache_structure = jax.tree.flatten(in_pairs(cache))
    width = pl.next_power_of_2(max(c.head_dim, value_dim))
    tiling = flash.tiling_of(group, length, width)
    of_splits = (tiling.splits, sequences, kv_heads, group)
    if reader is None:  # what is no kernel may read before this one has ended
        stores, launch = Plain(dtype), dataclasses.replace(launch, overlap=False)
    else:
        stores = reader
    columns = kv_heads * group * value_dim
    outs = [
        jax.ShapeDtypeStruct((*of_splits, value_dim), jnp.float32),
        *[jax.ShapeDtypeStruct(of_splits, jnp.float32)] * 2,
        *stores.shapes(sequences, columns),
    ]
    results = pl.pallas_call(
        partial(
            _kernel,
            structures=(structure, cache_structure),
            tiling=tiling,
            config=c,
            dtype=dtype,
            reader=stores,
            launch=launch,
        ),
        grid=(tiling.splits, kv_heads, sequences),
        out_shape=[*outs, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept]],
        input_output_aliases={len(leaves) + i: len(outs) + i for i in range(len(kept))},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=launch.interpret,
        name="attend_token",
    )(*leaves, *kept)
    rows, kept = stores.of(results[3 : len(outs)], None), results[len(outs) :]
    cache = without_pairs(jax.tree.unflatten(cache_structure, kept))
    if reader is None:
        return rows.rows.reshape(sequences, 1, columns), cache
    return _Attended(rows, reader, sequences, columns, dtype), cache


class _Heads:
    """Loads heads of a token, normalized and turned.

    Args:
      head_dim: of each.
      columns: of the arrays that they are loaded into.
      rope: by which they turn.
      cos, sin: references `[sequences, rope / 2]`.
      sequence: which.
    """

    def __init__(
        self,
        head_dim: int,
        columns: int,
        rope: RopeConfig,
        cos: jax.Ref,
        sin: jax.Ref,
        sequence: Array,
    ):
        self.head_dim = head_dim
        self.column = jnp.arange(columns)
        self.inside = self.column < head_dim
        if rope.interleaved:
            self.other, pair = self.column ^ 1, self.column >> 1
            sign = jnp.where(self.column % 2 == 0, -1.0, 1.0)
        else:
            first = self.column < rope.dim // 2
            self.other = jnp.where(first, self.column + rope.dim // 2, self.column - rope.dim // 2)
            pair = jnp.where(first, self.column, self.column - rope.dim // 2)
            sign = jnp.where(first, -1.0, 1.0)
        self.turns = self.column < rope.dim
        self.cos = plgpu.load(cos.at[sequence, pair], mask=self.turns, other=1.0)
        self.sin = sign * plgpu.load(sin.at[sequence, pair], mask=self.turns, other=0.0)

    def load(
        self,
        ref: jax.Ref,
        rows: Sequence[Array],
        inside: Array | None,
        norm: NormConfig | None,
        scale: jax.Ref | None,
    ) -> Array:
        """float32 `[head_dim]`, padded, or `[rows, head_dim]`.

        Args:
          ref: projections, `[terms, ..., head_dim]`, which are added up.
          rows: the indices before, of which the last may be an array `[rows]`.
          inside: which rows there are; None: there is a single one.
          norm: if any.
          scale: its reference `[head_dim]`, if it has one.
        """
        shape = self.column.shape if inside is None else (*inside.shape, *self.column.shape)

        def of(column: Array, mask: Array) -> Array:
            column, mask = (wide(x, shape, len(shape) - 1) for x in (column, mask))
            at = rows
            if inside is not None:
                at, mask = (*rows[:-1], wide(rows[-1], shape, 0)), mask & wide(inside, shape, 0)
            return _load_sum(ref, (*at, column), mask)

        x, y = of(self.column, self.inside), of(self.other, self.turns)
        if norm is not None:
            squares = jnp.sum(x * x, axis=-1, keepdims=True)
            factor = lax.rsqrt(squares / self.head_dim + norm.epsilon)
            x, y = x * factor, y * factor
            if scale is not None:
                x *= plgpu.load(scale.at[self.column], mask=self.inside, other=0.0)
                y *= plgpu.load(scale.at[self.other], mask=self.turns, other=0.0)
        return x * self.cos + y * self.sin


def _load_sum(ref: jax.Ref, at: tuple, mask: Array) -> Array:
    """What is at a place of `[terms, ...]`, added up: float32."""
    zero = jnp.zeros((), ref.dtype)
    read = [plgpu.load(ref.at[(i, *at)], mask=mask, other=zero) for i in range(ref.shape[0])]
    return sum(x.astype(jnp.float32) for x in read)


def _kernel(
    *refs: jax.Ref,
    structures: tuple[Any, Any],
    tiling: flash.Tiling,
    config: AttentionConfig,
    dtype: jnp.dtype,
    reader: Reader,
    launch: Launch,
) -> None:
    """One head of keys of one token, with all queries that share it: a split of the keys."""
    structure, cache_structure = structures
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    positions, slots = inputs[3:5]
    length = refs[-1].shape[2]
    split, head = pl.program_id(0), pl.program_id(1)
    sequence = launch.next_from(pl.program_id(2))
    position = positions[sequence]
    slot = sequence if slots is None else slots[sequence]
    filled = jnp.clip(position, 0, length)  # places of earlier tokens
    share = jnp.maximum(pl.cdiv(filled, tiling.splits), _LEAST)
    share = pl.cdiv(share, tiling.keys) * tiling.keys
    used = jnp.maximum(pl.cdiv(filled, share), 1)

    @pl.when(split < used)
    def _() -> None:
        outs = refs[structure.num_leaves + cache_structure.num_leaves :]
        count = len(outs) - cache_structure.num_leaves
        results, kept = outs[:count], outs[count:]
        _attend_split(
            inputs,
            jax.tree.unflatten(cache_structure, kept),
            results,
            (split, head, sequence, slot, position),
            (filled, share, used),
            tiling,
            config,
            dtype,
            reader,
            launch,
        )


def _attend_split(
    inputs: tuple,
    cache: AttentionCache,
    results: Sequence[jax.Ref],
    place: tuple[Array, Array, Array, Array, Array],
    sizes: tuple[Array, Array, Array],
    tiling: flash.Tiling,
    config: AttentionConfig,
    dtype: jnp.dtype,
    reader: Reader,
    launch: Launch,
) -> None:
    """A split of the keys.

    Args:
      inputs: of the kernel.
      cache: of references.
      results: values, largest scores and sums of weights of the splits; what is stored of rows.
      place: split, head, sequence, slot and position.
      sizes: places of earlier tokens, those of a split, and splits that have any.
      tiling: of the work.
      config: of the attention.
      dtype: of activations.
      reader: of the rows.
      launch: of the kernel.
    """
    query, key, value, _, _, cos, sin, scales, sinks, ended = inputs
    values_ref, largest_ref, total_ref, *stored = results
    split, head, sequence, slot, position = place
    filled, share, used = sizes
    c, group = config, query.shape[3]
    length, head_dim, value_dim = cache.keys.shape[2], key.shape[-1], value.shape[-1]
    parts = parts_of(cache)
    heads = _Heads(head_dim, padded(head_dim, parts), c.rope, cos, sin, sequence)
    row = jnp.arange(tiling.rows)
    q = heads.load(query, (sequence, head, row), row < group, c.query_norm, scales[0])
    q = q.astype(dtype)
    queries = in_parts(q, parts)
    scale = head_dim**-0.5 if c.scale is None else c.scale

    score = partial(scores_of, config=c, scale=scale)
    new_key = heads.load(key, (sequence, head), None, c.key_norm, scales[1])
    of_value = jnp.arange(padded(value_dim, parts))
    new_value = _load_sum(value, (sequence, head, of_value), of_value < value_dim)
    new_key, key_codes, key_scale = _as_kept(new_key, cache.keys.dtype, dtype)
    new_value, value_codes, value_scale = _as_kept(new_value, cache.values.dtype, dtype)

    @pl.when(split == 0)
    def _() -> None:
        ring = c.window is not None
        spot = jnp.maximum(position, 0) % length
        exists = (position >= 0) & (ring | (position < length))
        for ref, codes, width in (
            (cache.keys, key_codes, head_dim),
            (cache.values, value_codes, value_dim),
        ):
            column = jnp.arange(codes.shape[0])
            mask = (column < width // parts) & exists
            plgpu.store(ref.at[slot, head, spot, column], codes, mask=mask)
        for ref, of_head in ((cache.key_scale, key_scale), (cache.value_scale, value_scale)):
            if ref is not None:
                at = (slot, head, spot + jnp.arange(1))
                plgpu.store(ref.at[at], jnp.full(1, of_head), mask=jnp.full(1, exists))

    # The first split begins with the token itself, the others with nothing.
    out_shape = (tiling.rows, padded(value_dim, parts))
    own = score(jnp.sum(q.astype(jnp.float32) * new_key[None], axis=1))
    carry = (
        jnp.where(split == 0, own, NONE),
        jnp.where(split == 0, jnp.ones_like(own), 0),
        in_parts(jnp.broadcast_to(jnp.where(split == 0, new_value, 0)[None], out_shape), parts),
    )
    start = split * share
    stop = jnp.minimum(start + share, filled)

    def step(i: Array, carry: Sums) -> Sums:
        """Some more keys."""
        place = start + i * tiling.keys + jnp.arange(tiling.keys)
        seen = place < stop
        if c.window is not None:
            behind = position % length - place
            behind = jnp.where(behind < 0, behind + length, behind)
            seen &= (behind > 0) & (behind < c.window) & (behind <= position)
        at = slot, head, place
        return more_keys(carry, queries, cache, at, seen, seen[None], score, launch)

    steps = jnp.maximum(pl.cdiv(stop - start, tiling.keys), 0)
    largest, total, values = lax.fori_loop(0, steps, step, carry)
    values = joined(values)

    column = wide(jnp.arange(out_shape[1]), out_shape, 1)
    member = wide(row, out_shape, 0)
    mask = (member < group) & (column < value_dim)
    plgpu.store(values_ref.at[split, sequence, head, member, column], values, mask=mask)
    for ref, x in ((largest_ref, largest), (total_ref, total)):
        plgpu.store(ref.at[split, sequence, head, row], x, mask=row < group)
    if not launch.interpret:
        plgpu.debug_barrier()  # all threads have stored before one of them says so
    before = lax.cond(
        used > 1,
        lambda: plgpu.atomic_add(ended, (sequence, head), jnp.ones((), jnp.int32)),
        lambda: used - 1,
    )

    @pl.when(before == used - 1)
    def _() -> None:
        plgpu.store(ended.at[sequence, head + jnp.arange(1)], jnp.zeros(1, jnp.int32))
        splits = values_ref, largest_ref, total_ref
        _join(splits, sinks, stored, reader, sequence, head, used)


def _as_kept(x: Array, kept: jnp.dtype, dtype: jnp.dtype) -> tuple[Array, Array, Array | None]:
    """What attention sees of a new key or value `[width]` in a cache: float32, what is stored, and
    its scale if it has one."""
    if jnp.issubdtype(kept, jnp.floating):
        stored = x.astype(kept)
        return stored.astype(dtype).astype(jnp.float32), stored, None
    scale = jnp.max(jnp.abs(x)) / 127
    codes = jnp.floor(x / jnp.where(scale > 0, scale, 1) + 0.5)
    seen = codes * scale
    if kept == jnp.int16:  # two of 8 bits
        first, second = in_parts(codes.astype(jnp.int32), 2)
        codes = (first & 0xFF) | (second << 8)
    return seen, codes.astype(kept), scale


def _join(
    splits: Sequence[jax.Ref],
    sinks: jax.Ref | None,
    stored: Sequence[jax.Ref],
    reader: Reader,
    sequence: Array,
    head: Array,
    used: Array,
) -> None:
    """Puts together what the splits have for one head of keys, and stores it.

    Args:
      splits: values, largest scores and sums of weights.
      sinks: as in `attend`.
      stored: results.
      reader: of them.
      sequence, head: which.
      used: splits that have anything.
    """
    values_ref, largest_ref, total_ref = splits
    most, _, _, group, value_dim = values_ref.shape
    blocks = value_dim // BLOCK
    member, block = jnp.arange(pl.next_power_of_2(group)), jnp.arange(pl.next_power_of_2(blocks))
    at_once = min(most, max(1, _JOINED // (len(member) * len(block) * BLOCK)))
    rows = (len(member), *block_elements(block).shape)
    shape = (at_once, *rows)
    element = jnp.broadcast_to(block_elements(block)[None, None], shape)
    exists = wide(member < group, shape, 1) & wide(block < blocks, shape, 2)

    def load(ref: jax.Ref, at: tuple, mask: Array, other: float) -> Array:
        # What other programs have written is not in this one's cache.
        return plgpu.load(ref.at[at], mask=mask, other=other, volatile=True)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, values = carry
        split = i * at_once + jnp.arange(at_once)
        of_row = (at_once, len(member))
        mask = wide(split < used, of_row, 0) & wide(member < group, of_row, 1)
        at = (wide(split, of_row, 0), sequence, head, wide(member, of_row, 1))
        more = load(largest_ref, at, mask, NONE)
        now_largest = jnp.maximum(largest, jnp.max(more, axis=0))
        weight, fade = jnp.exp2(more - now_largest[None]), jnp.exp2(largest - now_largest)
        total = total * fade + jnp.sum(weight * load(total_ref, at, mask, 0.0), axis=0)
        at = (wide(split, shape, 0), sequence, head, wide(member, shape, 1), element)
        more = load(values_ref, at, exists & wide(split < used, shape, 0), 0.0)
        weight = jnp.broadcast_to(weight[..., None, None, None, None], shape)
        fade = jnp.broadcast_to(fade[:, None, None, None, None], rows)
        return now_largest, total, values * fade + jnp.sum(more * weight, axis=0)

    carry = (
        jnp.full(len(member), NONE, jnp.float32),
        jnp.zeros(len(member), jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    largest, total, values = lax.fori_loop(0, pl.cdiv(used, at_once), step, carry)
    if sinks is not None:
        at = head * group + member
        sink = plgpu.load(sinks.at[at], mask=member < group, other=0.0) * LOG2_E
        final = jnp.maximum(largest, sink)
        fade = jnp.exp2(largest - final)
        values *= jnp.broadcast_to(fade[:, None, None, None, None], rows)
        total = total * fade + jnp.exp2(sink - final)
    total = jnp.maximum(total, 1e-30)
    y = values / jnp.broadcast_to(total[:, None, None, None, None], rows)
    of_head = (len(member), len(block))
    at = (head * group + wide(member, of_head, 0)) * blocks + wide(block, of_head, 1)
    inside = wide(member < group, of_head, 0) & wide(block < blocks, of_head, 1)
    reader.store(stored, sequence, at, inside, y)
