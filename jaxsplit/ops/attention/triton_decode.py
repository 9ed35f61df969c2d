"""Decode attention in a single Triton kernel, from projections to the input of the next matmul.

It normalizes and rotates the heads, writes the new key and value to the cache, and splits the
earlier keys among programs (split-K, "Flash-Decoding", Dao et al. 2023). The last program of a head
to finish combines the splits. This replaces three launches: with a short context, a launch takes as
long as its work.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.cache.layers import AttentionCache, Batch
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
from jaxsplit.ops.attention import triton_flash
from jaxsplit.ops.attention.kernels import decode_inputs, supports_decode
from jaxsplit.ops.attention.rope import RopeConfig
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
    locate,
    padded,
    parts_of,
    scores_of,
    softmax_update,
    without_pairs,
)
from jaxsplit.ops.launch import launch_dependents
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.pallas import pl, plgpu

_MIN_SPLIT_KEYS = 128
"""Fewest keys of a split."""

_COMBINED_ELEMENTS = 4096
"""Elements of the splits that are combined at a time."""

_MAX_PROGRAMS = 1024
"""Enough to keep a GPU busy: with more heads and sequences there are fewer splits. A short context
uses one split, but the idle programs of the others take time, too."""

_RESIDENT_PROGRAMS = 256
"""Programs that a large GPU runs at a time when each uses many registers."""


def supports(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: Array | jax.ShapeDtypeStruct,
) -> bool:
    """Whether `decode_attention` supports a layer, for queries `[batch, time, heads * width]`."""
    return (
        supports_decode(config, batch, cache, query)
        and cache is not None
        and query.shape[-1] // config.head_dim <= MIN_MMA_M * cache.keys.shape[1]
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
    biases: Sequence[Array | None] = (None, None, None),
    layouts: Sequence[ActivationLayout] = (),
) -> tuple[Activations, AttentionCache]:
    """Attention for one new token of each sequence, which it adds to the cache.

    Args:
      query, key, value: projections, `[parts, batch, 1, heads * width]`; the kernel sums the
        split-K parts.
      batch: positions and pages of the tokens; nothing is written for padding.
      cache: keys and values of earlier tokens.
      config: a supported layer.
      params: parameters of the norms, and sinks.
      dtype: of activations.
      biases: of the projections, float32 `[heads * width]` or None each, which the kernel adds.
      layouts: in which to store the result; empty: it is an array.

    Returns:
      `[batch, 1, heads * value_dim]`, and the cache.
    """
    sequences, kv_heads = query.shape[1], cache.keys.shape[1]
    value_dim = cache.own_values.shape[-1]
    pages = batch.pages_of(ring=config.window is not None)
    length = _length_of(cache, pages)
    projections = query, key, value
    inputs = decode_inputs(projections, batch, pages, config, params, kv_heads, biases)
    group = inputs[0].shape[3]
    leaves, structure = jax.tree.flatten(inputs)
    cache_leaves, cache_structure = jax.tree.flatten(in_pairs(cache))
    width = pl.next_power_of_2(max(config.head_dim, value_dim))
    tiling = _tiling_for(group, length, width, sequences * kv_heads)
    split_shape = (tiling.splits, sequences, kv_heads, group)
    out_layouts = tuple(layouts) or (PlainLayout(dtype),)
    columns = kv_heads * group * value_dim
    out_shapes = [
        jax.ShapeDtypeStruct((*split_shape, value_dim), jnp.float32),
        *[jax.ShapeDtypeStruct(split_shape, jnp.float32)] * 2,
        *(shape for layout in out_layouts for shape in layout.shapes(sequences, columns)),
    ]
    results = pl.pallas_call(
        partial(
            _decode_attention_kernel,
            structures=(structure, cache_structure),
            tiling=tiling,
            config=config,
            dtype=dtype,
            layouts=out_layouts,
            early=bool(layouts),  # XLA's kernels must not start before this one has finished
        ),
        # The axis of splits is the slowest: the first splits, which always have keys, start first.
        grid=(kv_heads, sequences, tiling.splits),
        out_shape=[*out_shapes, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache_leaves]],
        input_output_aliases={
            len(leaves) + i: len(out_shapes) + i for i in range(len(cache_leaves))
        },
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpreted(),
        name="decode_attention",
    )(*leaves, *cache_leaves)
    arrays, cache_leaves = results[3 : len(out_shapes)], results[len(out_shapes) :]
    cache = without_pairs(jax.tree.unflatten(cache_structure, cache_leaves))
    if not layouts:
        return Activations(arrays[0].reshape(sequences, 1, columns)), cache
    like = jax.ShapeDtypeStruct((sequences, 1, columns), dtype)
    stored = wrap_layouts(out_layouts, arrays, sequences, columns)
    return Activations(like, out_layouts, stored), cache


def _length_of(cache: AttentionCache, pages: Array | jax.Ref | None) -> int:
    """Positions of a sequence's pages."""
    return cache.keys.shape[2] * (1 if pages is None else pages.shape[1])


def _tiling_for(group: int, length: int, width: int, heads: int) -> triton_flash.Tiling:
    """The tiling for a number of KV heads, summed over all sequences.

    With one stage, the kernel prefetches the keys of the next step into registers while it
    multiplies those of the current step. Where many programs hide one another's latency, fewer
    registers are better.
    """
    tiling = triton_flash.tiling_of(group, length, width)
    splits = min(tiling.splits, max(1, _MAX_PROGRAMS // heads))
    stages = 1 if splits * heads <= _RESIDENT_PROGRAMS else tiling.stages
    return dataclasses.replace(tiling, splits=splits, stages=stages)


class _Heads:
    """Loads heads of a token, which are normalized and rotated later.

    Args:
      head_dim: columns of a head.
      columns: the same, padded.
      rope: the rotation.
      factors: references to the cosines and sines, as of `decode_inputs`.
      sequence: index of the sequence.
    """

    def __init__(
        self,
        head_dim: int,
        columns: int,
        rope: RopeConfig,
        factors: tuple[jax.Ref, jax.Ref],
        sequence: Array,
    ):
        self.head_dim = head_dim
        self.column = jnp.arange(columns)
        self.mask = self.column < head_dim
        if rope.interleaved:
            other = self.column ^ 1
        else:
            half = rope.dim // 2
            other = jnp.where(self.column < half, self.column + half, self.column - half)
        self.other = jnp.where(self.column < rope.dim, other, self.column)  # rotated with `column`
        self.factors, self.sequence = factors, sequence

    def load(
        self,
        ref: jax.Ref,
        bias: jax.Ref | None,
        index: Sequence[Array],
        row_mask: Array | None,
        norm: NormConfig | None,
        scale: jax.Ref | None,
    ) -> Callable[[], Array]:
        """Issues the loads of heads, and returns the function that computes with them.

        Args:
          ref: projections, `[parts, sequences, ..., head_dim]`.
          bias: of the projections, `[..., head_dim]`, or None.
          index: between parts and columns; the last one may be an array `[rows]`.
          row_mask: the rows that exist; None: `index` is a single head.
          norm: of heads, or None.
          scale: of the norm, a reference `[head_dim]`, or None.

        Returns:
          a function without arguments that returns the heads, float32 `[columns]` or `[rows,
          columns]`.
        """
        shape = self.column.shape if row_mask is None else (*row_mask.shape, *self.column.shape)
        column, other, column_mask = (
            broadcast_along(x, shape, len(shape) - 1) for x in (self.column, self.other, self.mask)
        )
        mask = column_mask
        if row_mask is not None:
            index, mask = (
                (*index[:-1], broadcast_along(index[-1], shape, 0)),
                column_mask & broadcast_along(row_mask, shape, 0),
            )

        def load_vector(ref: jax.Ref, column: Array, *leading: Array) -> Array:
            return plgpu.load(ref.at[(*leading, column)], mask=column_mask, other=0.0)

        parts = [_load_parts(ref, bias, (*index, x), mask) for x in (column, other)]
        cos, sin = (load_vector(x, column, self.sequence) for x in self.factors)
        scales = [] if scale is None else [load_vector(scale, x) for x in (column, other)]

        def compute() -> Array:
            x, y = map(_sum_parts, parts)
            if norm is not None:
                squares = jnp.sum(x * x, axis=-1, keepdims=True)
                factor = lax.rsqrt(squares / self.head_dim + norm.epsilon)
                x, y = x * factor, y * factor
                if scales:
                    x, y = x * scales[0], y * scales[1]
            return x * cos + y * sin

        return compute


def _load_parts(ref: jax.Ref, bias: jax.Ref | None, index: tuple, mask: Array) -> list[Array]:
    """Loads the split-K parts of elements of `[parts, sequences, ...]`, and their bias of `[...]`,
    if there is one."""
    zero = jnp.zeros((), ref.dtype)
    parts = [plgpu.load(ref.at[(i, *index)], mask=mask, other=zero) for i in range(ref.shape[0])]
    if bias is not None:
        parts.append(plgpu.load(bias.at[index[1:]], mask=mask, other=0.0))
    return parts


def _sum_parts(parts: list[Array]) -> Array:
    """The sum of split-K parts, float32."""
    return reduce(add, (x.astype(jnp.float32) for x in parts))


class _Splits(NamedTuple):
    """References to the softmax states of the splits, and the counters of finished splits.

    Attributes:
      acc: weighted sums of values, float32 `[splits, sequences, kv_heads, group, value_dim]`.
      m: largest scores, float32 `[splits, sequences, kv_heads, group]`.
      total: sums of weights, shaped as `m`.
      finished: int32 `[sequences, kv_heads]`.
    """

    acc: jax.Ref
    m: jax.Ref
    total: jax.Ref
    finished: jax.Ref


def _decode_attention_kernel(
    *refs: jax.Ref,
    structures: tuple[Any, Any],
    tiling: triton_flash.Tiling,
    config: AttentionConfig,
    dtype: jnp.dtype,
    layouts: Sequence[ActivationLayout],
    early: bool,
) -> None:
    """Attends to one split of the keys, with all query heads of one KV head of one token.

    Key 0 is the new token itself; key `i + 1` is index `i` of the cache.

    Args:
      *refs: inputs and the cache; then the splits, the result in its layouts and, aliased, the
        cache.
      structures: of the inputs and of the cache.
      tiling: of a program.
      config: the layer.
      dtype: of tensor core operands.
      layouts: of the result.
      early: as in `launch_dependents`.
    """
    structure, cache_structure = structures
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    query, key, value, biases, positions, pages, cos, sin, scales, sinks, finished = inputs
    outs = refs[structure.num_leaves + cache_structure.num_leaves :]
    count = len(outs) - cache_structure.num_leaves
    cache = jax.tree.unflatten(cache_structure, outs[count:])
    splits, out_refs = _Splits(*outs[:3], finished=finished), outs[3:count]
    c, group, length = config, query.shape[3], _length_of(cache, pages)
    head_dim, value_dim, parts = key.shape[-1], value.shape[-1], parts_of(cache)
    head, split = pl.program_id(0), pl.program_id(2)
    sequence = launch_dependents(pl.program_id(1), early)

    # All loads are issued before any of their results is used.
    position = positions[sequence]
    assert c.rope is not None  # see `supports`
    heads = _Heads(head_dim, padded(head_dim, parts), c.rope, (cos, sin), sequence)
    row, value_column = jnp.arange(tiling.rows), jnp.arange(padded(value_dim, parts))
    row_mask = row < group
    token = _Token(
        heads.load(query, biases[0], (sequence, head, row), row_mask, c.query_norm, scales[0]),
        heads.load(key, biases[1], (sequence, head), None, c.key_norm, scales[1]),
        _load_parts(value, biases[2], (sequence, head, value_column), value_column < value_dim),
    )

    used, start, stop = _split_range(position, length, split, tiling)
    keys = _SplitKeys(cache, pages, sequence, head, position, start, stop, tiling, c.window)

    @pl.when(split < used)
    def _() -> None:
        state = _attend_split(keys, split, token, config, dtype)
        _store_split(splits, state, (split, sequence, head), row)

        @pl.when(_finished_splits(splits, used, sequence, head) == used - 1)
        def _() -> None:
            index = sequence, head + jnp.arange(1)
            plgpu.store(splits.finished.at[index], jnp.zeros(1, jnp.int32))
            _combine_splits(splits, sinks, out_refs, layouts, index=(sequence, head), used=used)


def _split_range(
    position: Array, length: int, split: Array, tiling: triton_flash.Tiling
) -> tuple[Array, Array, Array]:
    """How many splits have keys, and the range of keys of one of them.

    Args:
      position: of the new token.
      length: of the cache.
      split: index of the split.
      tiling: of a program.

    Returns:
      the number of splits that have keys, and the first key and the end of this split.
    """
    keys = jnp.clip(position, 0, length) + 1
    split_keys = jnp.maximum(pl.cdiv(keys, tiling.splits), _MIN_SPLIT_KEYS)
    split_keys = pl.cdiv(split_keys, tiling.keys) * tiling.keys
    used = pl.cdiv(keys, split_keys)
    start = split * split_keys
    return used, start, jnp.minimum(start + split_keys, keys)


class _SplitKeys(NamedTuple):
    """The keys and values of a split.

    Attributes:
      cache: references to the cache.
      pages: reference to the pages of each sequence, or None, as of `Batch.pages_of`.
      sequence, head: indices of the sequence and of the KV head.
      position: of the new token.
      start, stop: range of keys.
      tiling: of a program.
      window: as in `AttentionConfig`.
    """

    cache: AttentionCache
    pages: jax.Ref | None
    sequence: Array
    head: Array
    position: Array
    start: Array
    stop: Array
    tiling: triton_flash.Tiling
    window: int | None

    @property
    def prefetch(self) -> bool:
        """Whether a step loads the keys of the next one before it multiplies its own."""
        return self.tiling.stages == 1

    @property
    def length(self) -> int:
        """Positions of the sequence's pages."""
        return _length_of(self.cache, self.pages)

    def at(self, index: Array) -> tuple[Array, Array, Array]:
        """Page, head and place in the page of positions."""
        page, place = locate(self.pages, self.sequence, index, self.cache.keys.shape[2])
        return page, self.head, place

    def load(self, step: Array | int) -> tuple[AttentionCache, Array]:
        """Loads the keys and values of a step, and computes the mask of the visible keys.

        With `prefetch` the mask includes key 0, which `_replace_first` fills in.
        """
        position, length = self.position, self.length
        key = self.start + step * self.tiling.keys + jnp.arange(self.tiling.keys)
        index, visible = key - 1, key < self.stop
        if self.window is not None:
            distance = position % length - index
            distance = jnp.where(distance < 0, distance + length, distance)
            visible &= (key == 0) | (
                (distance > 0) & (distance < self.window) & (distance <= position)
            )
        cached = visible & (key > 0)
        kv = load_kv(self.cache, self.at(index), cached)
        return kv, visible if self.prefetch else cached


def _replace_first(loaded: Array, new: Array, *, split: Array) -> Array:
    """In split 0, replaces the first of the loaded keys (or values, or scales) by the new one.

    Selecting by a mask instead of a store at an index shows the compiler which threads may hold it.
    """
    first = (jnp.arange(len(loaded)) == 0) & (split == 0)
    mask = broadcast_along(first, loaded.shape, 0)
    return jnp.where(mask, jnp.broadcast_to(new, loaded.shape), loaded)


class _Token(NamedTuple):
    """The heads of the new token, whose loads have been issued.

    Attributes:
      queries, key: compute them, as returned by `_Heads.load`.
      value: split-K parts of the value, `[columns]` each.
    """

    queries: Callable[[], Array]
    key: Callable[[], Array]
    value: list[Array]


def _attend_split(
    keys: _SplitKeys, split: Array, token: _Token, config: AttentionConfig, dtype: jnp.dtype
) -> SoftmaxState:
    """Attends to the keys of a split; in split 0, also stores the new token in the cache.

    Args:
      keys: of the split.
      split: its index.
      token: the new token.
      config: the layer.
      dtype: of tensor core operands.
    """
    cache, position, parts = keys.cache, keys.position, parts_of(keys.cache)
    first = keys.load(0) if keys.prefetch else None
    q = token.queries().astype(dtype)
    q_parts = in_parts(q, parts)
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    score = partial(scores_of, config=config, scale=scale)
    rounded_key, stored_key, key_scale = _quantize(token.key(), cache.keys.dtype)
    value = _sum_parts(token.value)
    rounded_value, stored_value, value_scale = _quantize(value, cache.own_values.dtype)
    new = AttentionCache(stored_key, stored_value, key_scale, value_scale)

    @pl.when(split == 0)
    def _() -> None:
        exists = (position >= 0) & ((position < keys.length) | (config.window is not None))
        _store_token(cache, new, keys.at(jnp.maximum(position, 0) % keys.length), exists)

    def update(state: SoftmaxState, kv: AttentionCache, visible: Array) -> SoftmaxState:
        return softmax_update(state, q_parts, kv, visible[None], score)

    steps, shape = pl.cdiv(keys.stop - keys.start, keys.tiling.keys), (len(q), len(value))
    if first is not None:
        state = SoftmaxState.empty(*shape, parts)
        kv = jax.tree.map(partial(_replace_first, split=split), first[0], new)
        return _attend_prefetched(keys, steps, update, state, (kv, first[1]))
    # The new token, the only key that is not in the cache, initializes the state of split 0.
    own_score = score(jnp.sum(q.astype(jnp.float32) * rounded_key[None], axis=1))
    values = jnp.broadcast_to(jnp.where(split == 0, rounded_value, 0)[None], shape)
    state = SoftmaxState(
        jnp.where(split == 0, own_score, MASK_VALUE),
        jnp.where(split == 0, jnp.ones_like(own_score), 0),
        in_parts(values, parts),
    )
    return lax.fori_loop(0, steps, lambda i, s: update(s, *keys.load(i)), state)


def _attend_prefetched(
    keys: _SplitKeys,
    steps: Array,
    update: Callable[[SoftmaxState, AttentionCache, Array], SoftmaxState],
    state: SoftmaxState,
    loaded: tuple[AttentionCache, Array],
) -> SoftmaxState:
    """Attends to all keys of a split; every step first issues the loads of the next one.

    Args:
      keys: of the split.
      steps: number of steps.
      update: attends to the loaded keys of a step, given their mask.
      state: before the first step.
      loaded: keys, values and mask of the first step.
    """

    def step(
        i: Array, carry: tuple[SoftmaxState, AttentionCache, Array]
    ) -> tuple[SoftmaxState, AttentionCache, Array]:
        state, kv, visible = carry
        following = keys.load(i + 1)
        return update(state, kv, visible), *following

    state, *_ = lax.fori_loop(0, steps, step, (state, *loaded))
    return state


def _store_split(
    splits: _Splits, state: SoftmaxState, index: tuple[Array, Array, Array], row: Array
) -> None:
    """Stores the softmax state of a split.

    Args:
      splits: where to store it.
      state: of all rows of the tile.
      index: split, sequence and KV head.
      row: indices of the rows of the tile; those past the group are padding.
    """
    *_, group, value_dim = splits.acc.shape
    acc = concatenated(state.acc)
    shape = acc.shape
    column, member = (
        broadcast_along(jnp.arange(shape[1]), shape, 1),
        broadcast_along(row, shape, 0),
    )
    mask = (member < group) & (column < value_dim)
    plgpu.store(splits.acc.at[(*index, member, column)], acc, mask=mask)
    for ref, x in ((splits.m, state.m), (splits.total, state.total)):
        plgpu.store(ref.at[(*index, row)], x, mask=row < group)


def _finished_splits(splits: _Splits, used: Array, sequence: Array, head: Array) -> Array:
    """Counts this split as finished, and returns how many finished before it."""
    if not interpreted():
        plgpu.debug_barrier()  # all threads must have stored before one of them counts
    return lax.cond(
        used > 1,
        lambda: plgpu.atomic_add(splits.finished, (sequence, head), jnp.ones((), jnp.int32)),
        lambda: used - 1,
    )


def _store_token(
    cache: AttentionCache, new: AttentionCache, index: tuple[Array, Array, Array], exists: Array
) -> None:
    """Stores the key and value of a token in the cache, at page, head and index in the page."""
    for ref, x in ((cache.keys, new.keys), (cache.own_values, new.own_values)):
        column = jnp.arange(x.shape[0])
        plgpu.store(ref.at[(*index, column)], x, mask=(column < ref.shape[-1]) & exists)
    page, head, position = index
    for ref, x in ((cache.key_scale, new.key_scale), (cache.value_scale, new.value_scale)):
        if ref is not None:
            plgpu.store(ref.at[page, head, position + jnp.arange(1)], x, mask=jnp.full(1, exists))


def _quantize(x: Array, dtype: jnp.dtype) -> tuple[Array, Array, Array | None]:
    """Converts a key or value to the dtype of the cache.

    Args:
      x: float32 `[width]`.
      dtype: floating-point, int8, or int16 for pairs of int8.

    Returns:
      the value that attention will read back, float32 `[width]`; the elements to store; and their
      scale, float32 `[1]`, or None.
    """
    if jnp.issubdtype(dtype, jnp.floating):
        x = x.astype(dtype)
        return x.astype(jnp.float32), x, None
    scale = largest_magnitude(x, 0, keepdims=True) / 127
    codes = jnp.floor(x / jnp.where(scale > 0, scale, 1) + 0.5).astype(jnp.int32)
    rounded = codes.astype(jnp.float32) * scale
    if dtype == jnp.int16:
        even, odd = in_parts(codes, 2)
        codes = (even & 0xFF) | (odd << 8)
    return rounded, codes.astype(dtype), scale


def _combine_splits(
    splits: _Splits,
    sinks: jax.Ref | None,
    out_refs: Sequence[jax.Ref],
    layouts: Sequence[ActivationLayout],
    *,
    index: tuple[Array, Array],
    used: Array,
) -> None:
    """Combines the softmax states of all splits of one KV head, and stores the result.

    Args:
      splits: their states.
      sinks: as in `attend`.
      out_refs: the result in its layouts.
      layouts: of the result.
      index: sequence and KV head.
      used: number of splits that have keys.
    """
    sequence, head = index
    _, _, _, group, value_dim = splits.acc.shape
    blocks = value_dim // BLOCK
    member, block = jnp.arange(pl.next_power_of_2(group)), jnp.arange(pl.next_power_of_2(blocks))
    m, total, acc = _reduce_splits(splits, index, member, block, used)
    rows = acc.shape
    if sinks is not None:
        query_head = head * group + member
        sink = plgpu.load(sinks.at[query_head], mask=member < group, other=0.0) * LOG2_E
        final = jnp.maximum(m, sink)
        rescale = jnp.exp2(m - final)
        acc *= _per_row(rescale, rows)
        total = total * rescale + jnp.exp2(sink - final)
    y = acc * _per_row(1 / jnp.maximum(total, 1e-30), rows)
    shape = rows[:2]
    out_block = (head * group + broadcast_along(member, shape, 0)) * blocks + broadcast_along(
        block, shape, 1
    )
    mask = broadcast_along(member < group, shape, 0) & broadcast_along(block < blocks, shape, 1)
    store_layouts(layouts, out_refs, sequence, out_block, mask, y)


def _reduce_splits(
    splits: _Splits, index: tuple[Array, Array], member: Array, block: Array, used: Array
) -> tuple[Array, Array, Array]:
    """Merges the softmax states of all splits of one KV head.

    Args:
      splits: their states.
      index: sequence and KV head.
      member: indices of the query heads of the group, padded, `[members]`.
      block: indices of the blocks of a value, padded, `[blocks]`.
      used: number of splits that have keys.

    Returns:
      largest scores and sums of weights, float32 `[members]`, and weighted sums of values, float32
      `[members, blocks, 2, 4, 4]`.
    """
    sequence, head = index
    most, _, _, group, value_dim = splits.acc.shape
    blocks = value_dim // BLOCK
    step_splits = min(most, max(1, _COMBINED_ELEMENTS // (len(member) * len(block) * BLOCK)))
    rows = (len(member), *block_elements(block).shape)
    shape = (step_splits, *rows)
    element = jnp.broadcast_to(block_elements(block)[None, None], shape)
    exists = broadcast_along(member < group, shape, 1) & broadcast_along(block < blocks, shape, 2)

    def load(ref: jax.Ref, at: tuple, mask: Array, other: float) -> Array:
        # Volatile: other programs wrote this, and the L1 cache is not coherent.
        return plgpu.load(ref.at[at], mask=mask, other=other, volatile=True)

    def step(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        m, total, acc = carry
        split = i * step_splits + jnp.arange(step_splits)
        row_shape = (step_splits, len(member))
        mask = broadcast_along(split < used, row_shape, 0) & broadcast_along(
            member < group, row_shape, 1
        )
        at = (
            broadcast_along(split, row_shape, 0),
            sequence,
            head,
            broadcast_along(member, row_shape, 1),
        )
        split_m = load(splits.m, at, mask, MASK_VALUE)
        new_m = jnp.maximum(m, jnp.max(split_m, axis=0))
        weight, rescale = jnp.exp2(split_m - new_m[None]), jnp.exp2(m - new_m)
        total = total * rescale + jnp.sum(weight * load(splits.total, at, mask, 0.0), axis=0)
        at = (
            broadcast_along(split, shape, 0),
            sequence,
            head,
            broadcast_along(member, shape, 1),
            element,
        )
        split_acc = load(splits.acc, at, exists & broadcast_along(split < used, shape, 0), 0.0)
        weight = jnp.broadcast_to(weight[..., None, None, None, None], shape)
        rescale = _per_row(rescale, rows)
        return new_m, total, acc * rescale + jnp.sum(split_acc * weight, axis=0)

    carry = (
        jnp.full(len(member), MASK_VALUE, jnp.float32),
        jnp.zeros(len(member), jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    return lax.fori_loop(0, pl.cdiv(used, step_splits), step, carry)


def _per_row(x: Array, shape: tuple[int, ...]) -> Array:
    """`[rows]` broadcast to `[rows, blocks, 2, 4, 4]`."""
    return jnp.broadcast_to(x[:, None, None, None, None], shape)
