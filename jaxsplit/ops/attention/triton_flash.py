"""FlashAttention for GPUs: scores never reach memory (Dao 2023, arXiv:2307.08691).

For few queries, programs split the keys, and a second kernel combines their results (Dao et al.
2023, "Flash-Decoding").
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.cache.layers import AttentionCache
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.layout import (
    BLOCK,
    ActivationLayout,
    Activations,
    block_elements,
    store_layouts,
    wrap_layouts,
)
from jaxsplit.ops.attention.kernels import supports_attend
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.attention.triton_softmax import (
    LOG2_E,
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
)
from jaxsplit.ops.launch import launch_dependents
from jaxsplit.pallas import pl, plgpu

_SPLIT_KEYS = 256
_MAX_SPLITS = 64
_PROGRAMS = 128  # as a large GPU runs at a time

supports = supports_attend


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut: rows of queries (a row is one head at one time) and keys of a step,
    splits of the keys, warps and pipeline stages of a program."""

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def tiling_of(rows: int, keys: int, width: int, heads: int = _PROGRAMS) -> Tiling:
    """The fastest tiling that was measured.

    Args:
      rows: queries of all heads that share a KV head.
      keys: most keys that there may be.
      width: of a head.
      heads: KV heads of all sequences together. If tiles and heads are few, programs split the
        keys, too.
    """
    if rows <= MIN_MMA_M:
        splits = min(_MAX_SPLITS, pl.next_power_of_2(pl.cdiv(keys, _SPLIT_KEYS)))
        return Tiling(MIN_MMA_M, 64 if width <= 128 else 32, splits, 4, 3)
    if rows <= 64:
        splits = min(_MAX_SPLITS, pl.next_power_of_2(pl.cdiv(keys, 2 * _SPLIT_KEYS)))
        return Tiling(pl.next_power_of_2(rows), 64 if width <= 128 else 32, splits, 4, 2)
    tiling = Tiling(128, 64, 1, 8, 3) if width <= 128 else Tiling(64, 32, 1, 4, 2)
    programs = heads * pl.cdiv(rows, tiling.rows)
    splits = min(pl.cdiv(_PROGRAMS, programs), pl.cdiv(keys, 4 * _SPLIT_KEYS))
    splits = 1 << (splits.bit_length() - 1)  # a power of two
    return dataclasses.replace(tiling, splits=splits)


def flash_attention(
    queries: Array,
    kv: AttentionCache,
    positions: Array,
    *,
    config: AttentionConfig,
    key_positions: Array | None = None,
    sinks: Array | None = None,
    pages: Array | None = None,
    layouts: Sequence[ActivationLayout] = (),
    tiling: Tiling | None = None,
) -> Activations:
    """As `jaxsplit.ops.attention.api.attend`, for what is supported.

    Args:
      layouts: of the result, where a second kernel combines splits of the keys; else, and if there
        are none, the result is an array.
      tiling: of the work; None: a usual one.
    """
    batch, time, kv_heads, group, _ = queries.shape
    value_dim = kv.own_values.shape[-1]
    width = pl.next_power_of_2(max(kv.keys.shape[-1], value_dim))
    length = kv.length if pages is None else kv.length * pages.shape[1]
    tiling = tiling or tiling_of(time * group, length, width, kv_heads * batch)
    scale = queries.shape[-1] ** -0.5 if config.scale is None else config.scale
    of_one = sinks if tiling.splits == 1 else None
    # With more rows, converting int8 is a small part of the work.
    stored = in_pairs(kv) if tiling.rows <= MIN_MMA_M else kv
    inputs = (queries, stored, positions, key_positions, of_one, pages)
    leaves, structure = jax.tree.flatten(inputs)
    shape = (batch, time, kv_heads, group)
    out = jax.ShapeDtypeStruct((*shape, value_dim), queries.dtype)
    of_splits = (tiling.splits, *shape)
    sums = [
        jax.ShapeDtypeStruct((*of_splits, value_dim), jnp.float32),
        *[jax.ShapeDtypeStruct(of_splits, jnp.float32)] * 2,
    ]
    results = pl.pallas_call(
        partial(
            _flash_attention_kernel,
            structure=structure,
            tiling=tiling,
            config=config,
            scale=scale,
        ),
        grid=(pl.cdiv(time * group, tiling.rows) * tiling.splits, kv_heads, batch),
        out_shape=[out] if tiling.splits == 1 else sums,
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpreted(),
        name="flash_attention",
    )(*leaves)
    if tiling.splits == 1:
        return Activations(results[0].reshape(batch, time, -1))
    return _combine(results, sinks, queries.dtype, layouts)


def _combine(
    splits: Sequence[Array],
    sinks: Array | None,
    dtype: jnp.dtype,
    layouts: Sequence[ActivationLayout],
) -> Activations:
    """Combines splits of the keys, in a kernel that stores the rows in layouts if a head consists
    of whole blocks.

    Args:
      splits: weighted values, float32 `[splits, batch, time, kv_heads, group, value_dim]`; the
        largest scores and the sums of weights, `[splits, batch, time, kv_heads, group]` each.
      sinks: float32 `[kv_heads * group]`, or None.
      dtype: of the rows.
      layouts: of the rows; none: an array.
    """
    count, batch, time, kv_heads, group, value_dim = splits[0].shape
    rows, heads = batch * time, kv_heads * group
    shape = (batch, time, heads * value_dim)
    if value_dim % BLOCK:
        layouts = ()
    outs = [jax.ShapeDtypeStruct((rows, shape[-1]), dtype)]
    if layouts:
        outs = [out for layout in layouts for out in layout.shapes(rows, shape[-1])]
    arrays = pl.pallas_call(
        partial(_combine_kernel, results=len(outs), layouts=layouts),
        grid=(rows, heads),
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpreted(),
        name="combine_splits",
    )(
        *(x.reshape(count, rows, heads, *x.shape[5:]) for x in splits),
        *(() if sinks is None else (sinks,)),
    )
    if not layouts:
        return Activations(arrays[0].reshape(shape))
    stored = wrap_layouts(layouts, arrays, rows, shape[-1])
    return Activations(jax.ShapeDtypeStruct(shape, dtype), tuple(layouts), stored)


def _flash_attention_kernel(
    *refs: jax.Ref,
    structure: jax.tree_util.PyTreeDef,
    tiling: Tiling,
    config: AttentionConfig,
    scale: float,
) -> None:
    """Some rows of the queries that share a key head, with all keys that they see or a split of
    them."""
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    queries, kv, positions, key_positions, sinks, pages = inputs
    out_refs = refs[structure.num_leaves :]
    parts = parts_of(kv)
    time, group = queries.shape[1], queries.shape[3]
    value_dim, page_length = kv.values.shape[-1] * parts, kv.keys.shape[2]
    length = page_length if pages is None else page_length * pages.shape[1]
    tiles = pl.cdiv(time * group, tiling.rows)
    # The last queries see the most keys: they start first.
    tile, split = tiles - 1 - pl.program_id(0) // tiling.splits, pl.program_id(0) % tiling.splits
    head, sequence = pl.program_id(1), pl.program_id(2)

    if tiling.splits > 1:
        tile = launch_dependents(tile)
    row = tile * tiling.rows + jnp.arange(tiling.rows)
    row_mask = row < time * group
    position = plgpu.load(positions.at[sequence, jnp.minimum(row // group, time - 1)])
    qs = in_parts(_load_queries(queries, sequence, head, row, parts), parts)
    in_order = key_positions is None
    filled = jnp.minimum(jnp.max(position) + 1, length) if in_order else length
    share = pl.cdiv(pl.cdiv(filled, tiling.splits), tiling.keys) * tiling.keys
    start = split * share
    stop = jnp.minimum(start + share, filled)
    key_row = 0 if in_order or key_positions.shape[0] == 1 else sequence

    score = partial(scores_of, config=config, scale=scale)

    def step(i: Array, state: SoftmaxState, *, all_seen: bool) -> SoftmaxState:
        """Attends to some more keys; `all_seen`: without a mask."""
        first, offset = start + i * tiling.keys, jnp.arange(tiling.keys)
        index = first + offset
        if page_length % tiling.keys:
            page, place = locate(pages, sequence, index, page_length)
        else:  # `first` is a multiple of the tile: one page has all of it
            page, place = locate(pages, sequence, first, page_length)
            place = place + offset
        at = page, head, place
        if all_seen:
            return softmax_update(state, qs, load_kv(kv, at, None), None, score)
        mask = index < stop
        key_position = index
        if not in_order:
            key_position = plgpu.load(key_positions.at[key_row, index], mask=mask, other=-1)
            mask &= key_position >= 0
        distance = position[:, None] - key_position[None]
        seen = (distance >= 0) & mask[None]
        if config.window is not None:
            seen &= distance < config.window
        return softmax_update(state, qs, load_kv(kv, at, mask), seen, score)

    steps = jnp.maximum(pl.cdiv(stop - start, tiling.keys), 0)
    state, unmasked = SoftmaxState.empty(tiling.rows, padded(value_dim, parts), parts), 0
    if in_order and config.window is None and tiling.rows > MIN_MMA_M:
        seen_by_all = jnp.minimum(jnp.min(position) + 1, stop) - start
        unmasked = jnp.clip(seen_by_all // tiling.keys, 0, steps)
        state = lax.fori_loop(0, unmasked, partial(step, all_seen=True), state)
    state = lax.fori_loop(unmasked, steps, partial(step, all_seen=False), state)
    m, total, acc = state.m, state.total, concatenated(state.acc)

    def store(ref: jax.Ref, x: Array, *before: Array) -> None:
        t, g, mask, column = row // group, row % group, row_mask, ()
        if x.ndim == 2:
            t, g, mask = (broadcast_along(a, x.shape, 0) for a in (t, g, mask))
            column = broadcast_along(jnp.arange(x.shape[1]), x.shape, 1)
            mask, column = mask & (column < value_dim), (column,)
        plgpu.store(
            ref.at[(*before, sequence, t, head, g, *column)], x.astype(ref.dtype), mask=mask
        )

    if tiling.splits > 1:
        for ref, x in zip(out_refs, (acc, m, total), strict=True):
            store(ref, x, split)
        return
    if sinks is not None:
        sink = plgpu.load(sinks.at[head * group + row % group]) * LOG2_E
        final = jnp.maximum(m, sink)
        rescale = jnp.exp2(m - final)
        acc, total = acc * rescale[:, None], total * rescale + jnp.exp2(sink - final)
    store(out_refs[0], acc / jnp.maximum(total, 1e-30)[:, None])


def _load_queries(queries: jax.Ref, sequence: Array, head: Array, row: Array, parts: int) -> Array:
    """The queries of some rows, a row being a head of the group at a time: `[rows, columns]`."""
    time, group, head_dim = queries.shape[1], *queries.shape[3:]
    shape = (len(row), padded(head_dim, parts))
    column = broadcast_along(jnp.arange(shape[1]), shape, 1)
    at = (broadcast_along(row // group, shape, 0), head, broadcast_along(row % group, shape, 0))
    mask = broadcast_along(row < time * group, shape, 0) & (column < head_dim)
    other = jnp.zeros((), queries.dtype)
    return plgpu.load(queries.at[(sequence, *at, column)], mask=mask, other=other)


def _combine_kernel(*refs: jax.Ref, results: int, layouts: Sequence[ActivationLayout]) -> None:
    """One head of one query."""
    acc_ref, m_ref, total_ref, *rest = refs
    sinks, outs = rest[:-results], rest[-results:]
    splits, _, _, value_dim = acc_ref.shape
    row, head, split = pl.program_id(0), pl.program_id(1), jnp.arange(splits)
    if layouts:
        row = launch_dependents(row)
    m = plgpu.load(m_ref.at[split, row, head])
    total = plgpu.load(total_ref.at[split, row, head])
    final = jnp.max(m)
    if sinks:
        sink = sinks[0][head] * LOG2_E
        final = jnp.maximum(final, sink)
    rescale = jnp.exp2(m - final)
    total = jnp.sum(total * rescale)
    if sinks:
        total += jnp.exp2(sink - final)
    if layouts:
        block = jnp.arange(pl.next_power_of_2(value_dim // BLOCK))
        column = block_elements(block)
    else:
        column = jnp.arange(pl.next_power_of_2(value_dim))
    shape = (splits, *column.shape)
    at = jnp.broadcast_to(column[None], shape)
    acc = plgpu.load(
        acc_ref.at[broadcast_along(split, shape, 0), row, head, at],
        mask=at < value_dim,
        other=0.0,
    )
    y = jnp.sum(acc * broadcast_along(rescale, shape, 0), axis=0) / jnp.maximum(total, 1e-30)
    if layouts:
        first = head * (value_dim // BLOCK)
        store_layouts(layouts, outs, row, first + block, block < value_dim // BLOCK, y)
    else:
        at = (row, head * value_dim + column)
        plgpu.store(outs[0].at[at], y.astype(outs[0].dtype), mask=column < value_dim)
