"""The kernel between projections and attention.

It normalizes and rotates heads, and writes the new keys and values to the cache.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.int8 import largest_magnitude
from jaxsplit.ops.attention.kernels import supports_update
from jaxsplit.ops.attention.rope import RopeConfig, rope_cos_sin
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.attention.triton_softmax import locate
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.pallas import pl, plgpu

_MAX_ELEMENTS = 2048  # of a program
_WARPS = 4  # of a program
_FEW_TOKENS = 32  # up to which a program has a single head and a single warp

supports = supports_update


def rope_cache_update(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    *,
    config: AttentionConfig,
    params: AttentionParams,
) -> tuple[Array, AttentionCache]:
    """Normalizes and rotates queries and keys, and adds the new tokens to the cache.

    Args:
      query, key, value: projections, `[batch, time, heads * width]`.
      batch: positions and pages of the tokens; nothing is written for padding.
      cache: keys and values of earlier tokens.
      config: a supported layer.
      params: parameters of the norms.

    Returns:
      queries `[batch, time, heads, head_dim]` in the dtype of `query`, and the cache.
    """
    c, tokens, rope = config, batch.positions.size, config.rope
    assert rope is not None  # see `supports`
    cos, sin = rope_cos_sin(batch.positions, rope, rope.divisors(batch.freq_factors))
    heads, kv_heads = query.shape[-1] // c.head_dim, key.shape[-1] // c.head_dim
    inputs = (
        query.reshape(tokens, heads, -1),
        key.reshape(tokens, kv_heads, -1),
        value.reshape(tokens, kv_heads, -1),
        batch.positions,
        batch.pages_of(ring=c.window is not None),
        cos.reshape(tokens, -1),
        sin.reshape(tokens, -1),
        params.norm_scales,
    )
    leaves, structure = jax.tree.flatten(inputs)
    width = pl.next_power_of_2(max(c.head_dim, value.shape[-1] // kv_heads))
    most = 1 if tokens <= _FEW_TOKENS else max(1, _MAX_ELEMENTS // width)
    heads_per_program = tuple(min(most, pl.next_power_of_2(n)) for n in (heads, kv_heads))
    programs = sum(map(pl.cdiv, (heads, kv_heads), heads_per_program))
    cache_leaves, cache_structure = jax.tree.flatten(cache)
    queries = jax.ShapeDtypeStruct((tokens, heads, c.head_dim), query.dtype)
    queries, *cache_leaves = pl.pallas_call(
        partial(
            _rope_cache_update_kernel,
            structures=(structure, cache_structure),
            heads_per_program=heads_per_program,
            rope=rope,
            norms=(c.query_norm, c.key_norm),
            ring=c.window is not None,
        ),
        grid=(tokens, programs),
        out_shape=[queries, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cache_leaves]],
        input_output_aliases={len(leaves) + i: 1 + i for i in range(len(cache_leaves))},
        compiler_params=plgpu.CompilerParams(
            num_warps=1 if tokens <= _FEW_TOKENS else _WARPS, num_stages=1
        ),
        interpret=interpreted(),
        name="rope_cache_update",
    )(*leaves, *cache_leaves)
    cache = jax.tree.unflatten(cache_structure, cache_leaves)
    return queries.reshape(*batch.positions.shape, heads, -1), cache


def _rope_cache_update_kernel(
    *refs: jax.Ref,
    structures: tuple[Any, Any],
    heads_per_program: Sequence[int],
    rope: RopeConfig,
    norms: tuple[NormConfig | None, NormConfig | None],
    ring: bool,
) -> None:
    """Processes some query heads, or some key and value heads, of one token.

    Args:
      *refs: inputs and the cache; then the queries and, aliased, the cache.
      structures: of the inputs and of the cache.
      heads_per_program: query heads, and KV heads.
      rope: of queries and keys.
      norms: of queries and of keys.
      ring: the cache is a ring buffer: positions wrap around.
    """
    structure, cache_structure = structures
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    query, key, value, positions, pages, cos, sin, scales = inputs
    queries_ref, *cache_refs = refs[structure.num_leaves + cache_structure.num_leaves :]
    cache = jax.tree.unflatten(cache_structure, cache_refs)
    token, program = pl.program_id(0), pl.program_id(1)
    (heads, head_dim), value_dim = query.shape[1:], value.shape[-1]
    rotation = _Rotation(rope, head_dim, (cos, sin), token)
    query_programs = pl.cdiv(heads, heads_per_program[0])

    @pl.when(program < query_programs)
    def _() -> None:
        head = program * heads_per_program[0] + jnp.arange(heads_per_program[0])
        rotated = rotation.load_heads(query, head, norms[0], scales[0])
        for columns, y in zip(rotation.ranges, rotated, strict=True):
            index, mask = columns.tile(head, heads)
            plgpu.store(queries_ref.at[token, *index], y.astype(queries_ref.dtype), mask=mask)

    @pl.when(program >= query_programs)
    def _() -> None:
        first = (program - query_programs) * heads_per_program[1]
        head = first + jnp.arange(heads_per_program[1])
        page_length, (_, time) = cache.keys.shape[2], positions.shape
        length = page_length if pages is None else page_length * pages.shape[1]
        sequence = token // time
        position = positions[sequence, token % time]
        exists = (position >= 0) & (ring | (position < length))
        page, index = locate(pages, sequence, jnp.maximum(position, 0) % length, page_length)
        target = _CacheRows(page, head, index, exists)
        value_columns = _ColumnRange(0, value_dim)
        values = _load_tile(value, token, head, value_columns)
        keys = rotation.load_heads(key, head, norms[1], scales[1])
        _store(cache.keys, cache.key_scale, target, keys, rotation.ranges)
        _store(cache.values, cache.value_scale, target, [values], [value_columns])


class _ColumnRange:
    """Columns `first` to `stop` of a head, padded to a power of two.

    Attributes:
      size: padded number of columns.
      index: of each column, int32 `[size]`.
      mask: the columns that exist, bool `[size]`.
    """

    def __init__(self, first: int, stop: int, size: int | None = None) -> None:
        self.size = size or pl.next_power_of_2(stop - first)
        self.index = first + jnp.arange(self.size)
        self.mask = self.index < stop

    def tile(self, head: Array, heads: int) -> tuple[tuple[Array, Array], Array]:
        """The indices of heads and columns, and their mask, `[len(head), size]` each."""
        shape = (len(head), self.size)
        row, column = jnp.broadcast_to(head[:, None], shape), jnp.broadcast_to(self.index, shape)
        return (row, column), (row < heads) & self.mask[None]


def _load_tile(ref: jax.Ref, token: Array, head: Array, columns: _ColumnRange) -> Array:
    """Loads columns of heads of a token, float32 `[heads, columns]`."""
    index, mask = columns.tile(head, ref.shape[1])
    x = plgpu.load(ref.at[token, *index], mask=mask, other=jnp.zeros((), ref.dtype))
    return x.astype(jnp.float32)


def _load_row(ref: jax.Ref, leading: tuple, columns: _ColumnRange, padding: float = 0.0) -> Array:
    """Loads columns of a vector, float32 `[1, columns]`."""
    return plgpu.load(ref.at[*leading, columns.index], mask=columns.mask, other=padding)[None]


class _Rotation:
    """Loads heads of a token, normalized and rotated.

    A head is loaded in ranges of columns, so that the rotation is element-wise: the two halves of
    the rotated dimensions, then the rest. Interleaved dimensions are one range.

    Args:
      rope: the rotation.
      head_dim: columns of a head.
      factors: references to cosines and sines, float32 `[tokens, rope.dim / 2]`.
      token: index of the token.

    Attributes:
      ranges: the ranges of columns.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, factors: tuple[jax.Ref, jax.Ref], token: Array
    ) -> None:
        half = rope.dim // 2
        bounds = [0, head_dim] if rope.interleaved else [0, half, rope.dim, head_dim]
        pairs = zip(bounds, bounds[1:], strict=False)
        self.ranges = [_ColumnRange(*ends) for ends in pairs if len({*ends}) > 1]
        first_size = self.ranges[0].size
        self._half = _ColumnRange(0, half, first_size // 2 if rope.interleaved else None)
        self._interleaved, self._head_dim = rope.interleaved, head_dim
        self._factors, self._token = factors, token

    def load_heads(
        self, ref: jax.Ref, head: Array, norm: NormConfig | None, scale: jax.Ref | None
    ) -> list[Array]:
        """Loads heads: for each range of columns, float32 `[heads, columns]`.

        Args:
          ref: projections, `[tokens, heads, head_dim]`.
          head: indices of the heads.
          norm: of heads, or None.
          scale: of the norm, `[head_dim]`, or None.
        """
        xs = [_load_tile(ref, self._token, head, columns) for columns in self.ranges]
        (cos, sin), leading = self._factors, (self._token,)
        c, s = _load_row(cos, leading, self._half, 1.0), _load_row(sin, leading, self._half)
        if norm is not None:
            mean = sum(jnp.sum(x * x, axis=1) for x in xs) / self._head_dim
            factor = jax.lax.rsqrt(mean + norm.epsilon)[:, None]
            xs = [x * factor for x in xs]
            if scale is not None:
                ranges = zip(xs, self.ranges, strict=True)
                xs = [x * _load_row(scale, (), columns) for x, columns in ranges]
        if self._interleaved:
            x, y = jnp.unstack(xs[0].reshape(len(head), -1, 2), axis=2)
            return [jnp.stack([x * c - y * s, y * c + x * s], axis=2).reshape(len(head), -1)]
        x, y, *rest = xs
        return [x * c - y * s, y * c + x * s, *rest]


@dataclasses.dataclass(frozen=True)
class _CacheRows:
    """Where a token's keys and values go: page, heads `[heads]`, index in the page; and whether the
    token exists."""

    page: Array
    head: Array
    index: Array
    exists: Array


def _store(
    ref: jax.Ref,
    scale_ref: jax.Ref | None,
    target: _CacheRows,
    xs: list[Array],
    ranges: Sequence[_ColumnRange],
) -> None:
    """Stores a token's keys or values in the cache, quantized to int8 if it has scales.

    Args:
      ref: `[pages, heads, length, width]`.
      scale_ref: `[pages, heads, length]`, or None.
      target: where to store them.
      xs: for each range of columns, float32 `[heads, columns]`.
      ranges: the ranges of columns.
    """
    page, head, index, exists = target.page, target.head, target.index, target.exists
    heads = ref.shape[1]
    if scale_ref is not None:
        largest = [largest_magnitude(x, 1) for x in xs]
        # A maximum that propagates NaN, unlike Triton's.
        scale = reduce(lambda a, b: jnp.where((a > b) | (a != a), a, b), largest) / 127
        divisor = jnp.where(scale > 0, scale, 1)[:, None]
        xs = [jnp.floor(x / divisor + 0.5) for x in xs]
        mask = exists & (head < heads)
        plgpu.store(scale_ref.at[page, head, index], scale, mask=mask)
    for columns, x in zip(ranges, xs, strict=True):
        (row, column), mask = columns.tile(head, heads)
        plgpu.store(ref.at[page, row, index, column], x.astype(ref.dtype), mask=mask & exists)
