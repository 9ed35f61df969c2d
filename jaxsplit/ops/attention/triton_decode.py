"""Attention of single tokens, from their projections to the rows that a matmul reads: one kernel
for GPUs.

It rotates the heads, writes the new key and value to the cache, splits the earlier keys among
programs, and lets the last of these to end combine the results ("Flash-Decoding", Dao et al. 2023).
One launch instead of three: with little context, a launch takes as long as its work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.cache.contiguous import AttentionCache, Batch
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.int8 import largest_magnitude
from jaxsplit.ops.activations.layout import (
    BLOCK,
    ActivationLayout,
    Activations,
    PlainLayout,
    block_elements,
    store_layouts,
    wrap_layouts,
)
from jaxsplit.ops.attention import triton_flash, triton_rope_cache_update
from jaxsplit.ops.attention.rope import RopeConfig, rope_cos_sin
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.attention.triton_softmax import (
    LOG2_E,
    MASK_VALUE,
    MIN_MMA_M,
    SoftmaxState,
    broadcast_along,
    concatenated,
    in_pairs,
    in_parts,
    load_kv,
    padded,
    parts_of,
    scores_of,
    softmax_update,
    without_pairs,
)
from jaxsplit.ops.launch import launch_dependents
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.pallas import pl, plgpu

_LEAST = 128
"""Keys of a split, or more."""

_JOINED = 4096
"""Numbers of splits that are joined at a time."""

_PROGRAMS = 1024
"""As many keep a GPU busy: more heads of more sequences have fewer splits. Little context needs
one, and the others take time all the same."""

_AT_ONCE = 256
"""Programs that a large GPU runs at a time if each has many registers."""


def supports(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: Array | jax.ShapeDtypeStruct,
) -> bool:
    """Whether `decode_attention` can do what a layer needs, for queries `[batch, time, heads *
    width]`."""
    return (
        batch.positions.shape[1] == 1
        and triton_rope_cache_update.supports(config, batch, cache, query.dtype)
        and triton_flash.supports(query, cache, config)
        and query.shape[-1] // config.head_dim <= MIN_MMA_M * cache.keys.shape[1]
        and config.kv_donor is None
        and cache.values.shape[-1] % BLOCK == 0
    )


def decode_attention(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    *,
    config: AttentionConfig,
    params: AttentionParams,
    dtype: jnp.dtype,
    layouts: Sequence[ActivationLayout] = (),
) -> tuple[Activations, AttentionCache]:
    """Attention of one new token of each sequence, and the cache with these tokens.

    Args:
      query, key, value: projections, `[parts, batch, 1, heads * width]`, summed over parts here.
      batch: where the tokens belong; nothing is written for padding.
      cache: of earlier tokens.
      config: one that is supported.
      params: parameters of norms, and sinks.
      dtype: of activations.
      layouts: of the result; none: it is an array.

    Returns:
      `[batch, 1, heads * value_dim]`, and the cache.
    """
    c, sequences, (kv_heads, length) = config, query.shape[1], cache.keys.shape[1:3]
    value_dim = cache.values.shape[-1]
    query = query.reshape(
        -1, sequences, kv_heads, query.shape[-1] // (kv_heads * c.head_dim), c.head_dim
    )
    group = query.shape[3]
    cos, sin = _factors(batch.positions, c, batch.freq_factors.get(c.rope.freq_factors))
    inputs = (
        query,
        *(x.reshape(*x.shape[:2], kv_heads, -1) for x in (key, value)),
        batch.positions.reshape(-1),
        batch.slots,
        cos,
        sin,
        list(params.norm_scales),
        params.sinks,
        # Programs that have ended, by sequence and head: the last one resets its counter to zero.
        jnp.zeros((sequences, kv_heads), jnp.int32),
    )
    leaves, structure = jax.tree.flatten(inputs)
    kept, cache_structure = jax.tree.flatten(in_pairs(cache))
    width = pl.next_power_of_2(max(c.head_dim, value_dim))
    tiling = _tiling_of(group, length, width, sequences * kv_heads)
    of_splits = (tiling.splits, sequences, kv_heads, group)
    stored_in = tuple(layouts) or (PlainLayout(dtype),)
    columns = kv_heads * group * value_dim
    outs = [
        jax.ShapeDtypeStruct((*of_splits, value_dim), jnp.float32),
        *[jax.ShapeDtypeStruct(of_splits, jnp.float32)] * 2,
        *(shape for layout in stored_in for shape in layout.shapes(sequences, columns)),
    ]
    results = pl.pallas_call(
        partial(
            _decode_attention_kernel,
            structures=(structure, cache_structure),
            tiling=tiling,
            config=c,
            dtype=dtype,
            layouts=stored_in,
            early=bool(layouts),  # XLA's kernels must not start before this one has ended
        ),
        # Splits last: the first of each head, which has something to do, does not wait for others.
        grid=(kv_heads, sequences, tiling.splits),
        out_shape=[*outs, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept]],
        input_output_aliases={len(leaves) + i: len(outs) + i for i in range(len(kept))},
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpreted(),
        name="decode_attention",
    )(*leaves, *kept)
    arrays, kept = results[3 : len(outs)], results[len(outs) :]
    cache = without_pairs(jax.tree.unflatten(cache_structure, kept))
    if not layouts:
        return Activations(arrays[0].reshape(sequences, 1, columns)), cache
    like = jax.ShapeDtypeStruct((sequences, 1, columns), dtype)
    stored = wrap_layouts(stored_in, arrays, sequences, columns)
    return Activations(None, stored_in, stored, like=like), cache


def _tiling_of(group: int, length: int, width: int, heads: int) -> triton_flash.Tiling:
    """As `flash.tiling_of`, for so many heads of keys of all sequences.

    With one stage, a program has the keys of its next step on the way to registers while it
    multiplies those of this. Many programs hide one another's waits, and do better with fewer
    registers."""
    tiling = triton_flash.tiling_of(group, length, width)
    splits = min(tiling.splits, max(1, _PROGRAMS // heads))
    stages = 1 if splits * heads <= _AT_ONCE else tiling.stages
    return dataclasses.replace(tiling, splits=splits, stages=stages)


class _Heads:
    """Loads heads of a token, which are normalized and turned when they are needed.

    Args:
      head_dim: of each.
      columns: of the arrays that they are loaded into.
      rope: by which they turn.
      cos, sin: references `[sequences, head_dim]`, as of `_factors`.
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
            other = self.column ^ 1
        else:
            half = rope.dim // 2
            other = jnp.where(self.column < half, self.column + half, self.column - half)
        self.other = jnp.where(self.column < rope.dim, other, self.column)
        self.factors, self.sequence = (cos, sin), sequence

    def load(
        self,
        ref: jax.Ref,
        rows: Sequence[Array],
        inside: Array | None,
        norm: NormConfig | None,
        scale: jax.Ref | None,
    ) -> Callable[[], Array]:
        """float32 `[head_dim]`, padded, or `[rows, head_dim]`: asked for now, made when called.

        Args:
          ref: projections, `[terms, ..., head_dim]`, which are added up.
          rows: the indices before, of which the last may be an array `[rows]`.
          inside: which rows there are; None: there is a single one.
          norm: if any.
          scale: its reference `[head_dim]`, if it has one.
        """
        shape = self.column.shape if inside is None else (*inside.shape, *self.column.shape)
        column, other, mask = (
            broadcast_along(x, shape, len(shape) - 1)
            for x in (self.column, self.other, self.inside)
        )
        at, exists = rows, mask
        if inside is not None:
            at, exists = (
                (*rows[:-1], broadcast_along(rows[-1], shape, 0)),
                mask & broadcast_along(inside, shape, 0),
            )

        def of_column(ref: jax.Ref, column: Array, *before: Array) -> Array:
            return plgpu.load(ref.at[(*before, column)], mask=mask, other=0.0)

        terms = [_load_terms(ref, (*at, x), exists) for x in (column, other)]
        cos, sin = (of_column(x, column, self.sequence) for x in self.factors)
        scales = [] if scale is None else [of_column(scale, x) for x in (column, other)]

        def make() -> Array:
            x, y = map(_added_up, terms)
            if norm is not None:
                squares = jnp.sum(x * x, axis=-1, keepdims=True)
                factor = lax.rsqrt(squares / self.head_dim + norm.epsilon)
                x, y = x * factor, y * factor
                if scales:
                    x, y = x * scales[0], y * scales[1]
            return x * cos + y * sin

        return make


def _factors(positions: Array, config: AttentionConfig, factors: Array | None) -> list[Array]:
    """What the dimensions of a head and those with which they turn are multiplied with: float32
    `[sequences, head_dim]` each."""
    cos, sin = (x[:, 0] for x in rope_cos_sin(positions, config.rope, factors))
    axis = -1 if config.rope.interleaved else -2
    rest = config.head_dim - config.rope.dim
    pairs = (jnp.stack(x, axis).reshape(len(cos), -1) for x in ((cos, cos), (-sin, sin)))
    return [
        jnp.pad(x, ((0, 0), (0, rest)), constant_values=still)
        for x, still in zip(pairs, (1.0, 0.0), strict=True)
    ]


def _load_terms(ref: jax.Ref, at: tuple, mask: Array) -> list[Array]:
    """What is at a place of `[terms, ...]`."""
    zero = jnp.zeros((), ref.dtype)
    return [plgpu.load(ref.at[(i, *at)], mask=mask, other=zero) for i in range(ref.shape[0])]


def _added_up(terms: list[Array]) -> Array:
    """float32."""
    return sum(x.astype(jnp.float32) for x in terms)


def _decode_attention_kernel(
    *refs: jax.Ref,
    structures: tuple[Any, Any],
    tiling: triton_flash.Tiling,
    config: AttentionConfig,
    dtype: jnp.dtype,
    layouts: Sequence[ActivationLayout],
    early: bool,
) -> None:
    """One head of keys of one token, with all queries that share it: a split of the keys.

    The token itself is the first key, those in the cache follow it.
    """
    structure, cache_structure = structures
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    query, key, value, positions, slots, cos, sin, scales, sinks, ended = inputs
    outs = refs[structure.num_leaves + cache_structure.num_leaves :]
    count = len(outs) - cache_structure.num_leaves
    cache = jax.tree.unflatten(cache_structure, outs[count:])
    *splits, stored = *outs[:3], outs[3:count]
    c, group, length = config, query.shape[3], cache.keys.shape[2]
    head_dim, value_dim, parts = key.shape[-1], value.shape[-1], parts_of(cache)
    head, split = pl.program_id(0), pl.program_id(2)
    sequence = launch_dependents(pl.program_id(1), early)

    # All loads are asked for before any is waited for.
    position = positions[sequence]
    slot = sequence if slots is None else slots[sequence]
    heads = _Heads(head_dim, padded(head_dim, parts), c.rope, cos, sin, sequence)
    row, of_value = jnp.arange(tiling.rows), jnp.arange(padded(value_dim, parts))
    make_queries = heads.load(query, (sequence, head, row), row < group, c.query_norm, scales[0])
    make_key = heads.load(key, (sequence, head), None, c.key_norm, scales[1])
    new_value = _load_terms(value, (sequence, head, of_value), of_value < value_dim)

    keys = jnp.clip(position, 0, length) + 1
    share = jnp.maximum(pl.cdiv(keys, tiling.splits), _LEAST)
    share = pl.cdiv(share, tiling.keys) * tiling.keys
    used = pl.cdiv(keys, share)
    start = split * share
    stop = jnp.minimum(start + share, keys)
    ahead = tiling.stages == 1

    def load_step(step: Array | int) -> tuple[AttentionCache, Array]:
        """Keys and values of a step, and which are seen; if it is `ahead`, the token's own are
        among these, and still to come."""
        number = start + step * tiling.keys + jnp.arange(tiling.keys)
        place, seen = number - 1, number < stop
        if c.window is not None:
            behind = position % length - place
            behind = jnp.where(behind < 0, behind + length, behind)
            seen &= (number == 0) | ((behind > 0) & (behind < c.window) & (behind <= position))
        kept = seen & (number > 0)
        return load_kv(cache, (slot, head, place), kept), seen if ahead else kept

    @pl.when(split < used)
    def _() -> None:
        earlier = load_step(0) if ahead else None
        q = make_queries().astype(dtype)
        queries = in_parts(q, parts)
        scale = head_dim**-0.5 if c.scale is None else c.scale
        score = partial(scores_of, config=c, scale=scale)
        own_key, kept_key, key_scale = _as_kept(make_key(), cache.keys.dtype)
        own_value, kept_value, value_scale = _as_kept(_added_up(new_value), cache.values.dtype)
        new = AttentionCache(kept_key, kept_value, key_scale, value_scale)

        @pl.when(split == 0)
        def _() -> None:
            exists = (position >= 0) & ((position < length) | (c.window is not None))
            place = jnp.maximum(position, 0) % length
            _put(cache, new, (slot, head, place), exists)

        def with_new(x: Array, y: Array) -> Array:
            # So that the compiler sees which threads may have it.
            first = (jnp.arange(len(x)) == 0) & (split == 0)
            return jnp.where(broadcast_along(first, x.shape, 0), jnp.broadcast_to(y, x.shape), x)

        steps, shape = pl.cdiv(stop - start, tiling.keys), (tiling.rows, padded(value_dim, parts))

        def some_keys(
            i: Array, carry: tuple[SoftmaxState, AttentionCache, Array]
        ) -> tuple[SoftmaxState, AttentionCache, Array]:
            """Those that are there; the next are asked for before."""
            sums, there, seen = carry
            after = load_step(i + 1)
            return softmax_update(sums, queries, there, seen[None], score), *after

        def some_keys_read(i: Array, sums: SoftmaxState) -> SoftmaxState:
            there, seen = load_step(i)
            return softmax_update(sums, queries, there, seen[None], score)

        if ahead:
            state = SoftmaxState.empty(*shape, parts)
            carry = (state, jax.tree.map(with_new, earlier[0], new), earlier[1])
            state, *_ = lax.fori_loop(0, steps, some_keys, carry)
        else:
            own = score(jnp.sum(q.astype(jnp.float32) * own_key[None], axis=1))
            values = jnp.broadcast_to(jnp.where(split == 0, own_value, 0)[None], shape)
            state = SoftmaxState(
                jnp.where(split == 0, own, MASK_VALUE),
                jnp.where(split == 0, jnp.ones_like(own), 0),
                in_parts(values, parts),
            )
            state = lax.fori_loop(0, steps, some_keys_read, state)
        largest, total, values = state.m, state.total, concatenated(state.acc)
        shape = values.shape
        column, member = (
            broadcast_along(jnp.arange(shape[1]), shape, 1),
            broadcast_along(row, shape, 0),
        )
        at, mask = (split, sequence, head), (member < group) & (column < value_dim)
        plgpu.store(splits[0].at[(*at, member, column)], values, mask=mask)
        for ref, x in zip(splits[1:], (largest, total), strict=True):
            plgpu.store(ref.at[(*at, row)], x, mask=row < group)
        if not interpreted():
            plgpu.debug_barrier()  # all threads have stored before one of them says so
        before = lax.cond(
            used > 1,
            lambda: plgpu.atomic_add(ended, (sequence, head), jnp.ones((), jnp.int32)),
            lambda: used - 1,
        )

        @pl.when(before == used - 1)
        def _() -> None:
            plgpu.store(ended.at[sequence, head + jnp.arange(1)], jnp.zeros(1, jnp.int32))
            _combine_splits(splits, sinks, stored, layouts, sequence, head, used)


def _put(
    cache: AttentionCache, new: AttentionCache, at: tuple[Array, Array, Array], exists: Array
) -> None:
    """Stores a token's key and value in a cache of references, at a slot, head and place."""
    for ref, x in ((cache.keys, new.keys), (cache.values, new.values)):
        column = jnp.arange(x.shape[0])
        plgpu.store(ref.at[(*at, column)], x, mask=(column < ref.shape[-1]) & exists)
    slot, head, place = at
    for ref, x in ((cache.key_scale, new.key_scale), (cache.value_scale, new.value_scale)):
        if ref is not None:
            plgpu.store(ref.at[slot, head, place + jnp.arange(1)], x, mask=jnp.full(1, exists))


def _as_kept(x: Array, kept: jnp.dtype) -> tuple[Array, Array, Array | None]:
    """A key or value `[width]` as attention sees it, float32, as it is in a cache, and its scale
    `[1]` if it has one."""
    if jnp.issubdtype(kept, jnp.floating):
        x = x.astype(kept)
        return x.astype(jnp.float32), x, None
    scale = largest_magnitude(x, 0, keepdims=True) / 127
    codes = jnp.floor(x / jnp.where(scale > 0, scale, 1) + 0.5).astype(jnp.int32)
    seen = codes.astype(jnp.float32) * scale
    if kept == jnp.int16:  # two of 8 bits
        first, second = in_parts(codes, 2)
        codes = (first & 0xFF) | (second << 8)
    return seen, codes.astype(kept), scale


def _combine_splits(
    splits: Sequence[jax.Ref],
    sinks: jax.Ref | None,
    stored: Sequence[jax.Ref],
    layouts: Sequence[ActivationLayout],
    sequence: Array,
    head: Array,
    used: Array,
) -> None:
    """Puts together what the splits have for one head of keys, and stores it.

    Args:
      splits: values, largest scores and sums of weights.
      sinks: as in `attend`.
      stored: results.
      layouts: of the results.
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
    exists = broadcast_along(member < group, shape, 1) & broadcast_along(block < blocks, shape, 2)

    def load(ref: jax.Ref, at: tuple, mask: Array, other: float) -> Array:
        # What other programs have written is not in this one's cache.
        return plgpu.load(ref.at[at], mask=mask, other=other, volatile=True)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        largest, total, values = carry
        split = i * at_once + jnp.arange(at_once)
        of_row = (at_once, len(member))
        mask = broadcast_along(split < used, of_row, 0) & broadcast_along(member < group, of_row, 1)
        at = (broadcast_along(split, of_row, 0), sequence, head, broadcast_along(member, of_row, 1))
        more = load(largest_ref, at, mask, MASK_VALUE)
        now_largest = jnp.maximum(largest, jnp.max(more, axis=0))
        weight, fade = jnp.exp2(more - now_largest[None]), jnp.exp2(largest - now_largest)
        total = total * fade + jnp.sum(weight * load(total_ref, at, mask, 0.0), axis=0)
        at = (
            broadcast_along(split, shape, 0),
            sequence,
            head,
            broadcast_along(member, shape, 1),
            element,
        )
        more = load(values_ref, at, exists & broadcast_along(split < used, shape, 0), 0.0)
        weight = jnp.broadcast_to(weight[..., None, None, None, None], shape)
        fade = _of_rows(fade, rows)
        return now_largest, total, values * fade + jnp.sum(more * weight, axis=0)

    carry = (
        jnp.full(len(member), MASK_VALUE, jnp.float32),
        jnp.zeros(len(member), jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    largest, total, values = lax.fori_loop(0, pl.cdiv(used, at_once), step, carry)
    if sinks is not None:
        at = head * group + member
        sink = plgpu.load(sinks.at[at], mask=member < group, other=0.0) * LOG2_E
        final = jnp.maximum(largest, sink)
        fade = jnp.exp2(largest - final)
        values *= _of_rows(fade, rows)
        total = total * fade + jnp.exp2(sink - final)
    y = values * _of_rows(1 / jnp.maximum(total, 1e-30), rows)
    of_head = rows[:2]
    at = (head * group + broadcast_along(member, of_head, 0)) * blocks + broadcast_along(
        block, of_head, 1
    )
    inside = broadcast_along(member < group, of_head, 0) & broadcast_along(
        block < blocks, of_head, 1
    )
    store_layouts(layouts, stored, sequence, at, inside, y)


def _of_rows(x: Array, shape: tuple[int, ...]) -> Array:
    """`[rows]` as `[rows, blocks, 2, 4, 4]`."""
    return jnp.broadcast_to(x[:, None, None, None, None], shape)
