"""One kernel between projections and attention.

Heads are normalized and turned, and the new keys and values are put into the cache.
"""

from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.contiguous import AttentionCache, Batch
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.int8 import largest_magnitude
from jaxsplit.ops.attention.rope import RopeConfig, rope_cos_sin
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.pallas import pl, plgpu

_ELEMENTS = 2048  # of a program at most, and its warps; a head and a warp where tokens are few
_WARPS = 4
_FEW = 32


def supports(
    config: AttentionConfig, batch: Batch, cache: AttentionCache | None, dtype: jnp.dtype
) -> bool:
    """Whether `rope_cache_update` can do what a layer needs."""
    c = config

    def simple(norm: NormConfig | None) -> bool:
        return norm is None or (norm.kind == "rms" and not norm.bias)

    normed = c.query_norm is not None or c.key_norm is not None
    return (
        cache is not None
        and cache.values is not None
        and max(cache.keys.size, cache.values.size) < 2**31  # elements are counted in 32 bits
        and (batch.positions.shape[1] == 1 or c.window is None)  # no new key is in another's place
        and jnp.dtype(dtype).itemsize == 2
        and c.kv_source is None
        and c.rope is not None
        and c.clip_qkv is None
        and c.attn_temperature is None
        and c.value_norm is None
        and simple(c.query_norm)
        and simple(c.key_norm)
        and (not normed or (c.norm_over == "head" and c.norm_first))
    )


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
    """Queries as attention reads them, and the cache with the new tokens.

    Args:
      query, key, value: projections, `[batch, time, heads * width]`.
      batch: where the tokens belong; nothing is written for padding.
      cache: of earlier tokens.
      config: one that is supported.
      params: parameters of norms.

    Returns:
      `[batch, time, heads, head_dim]` in the dtype of `query`, and the cache.
    """
    c, tokens = config, batch.positions.size
    cos, sin = rope_cos_sin(batch.positions, c.rope, batch.freq_factors.get(c.rope.freq_factors))
    heads, kv_heads = query.shape[-1] // c.head_dim, key.shape[-1] // c.head_dim
    inputs = (
        query.reshape(tokens, heads, -1),
        key.reshape(tokens, kv_heads, -1),
        value.reshape(tokens, kv_heads, -1),
        batch.positions,
        batch.slots,
        cos.reshape(tokens, -1),
        sin.reshape(tokens, -1),
        params.norm_scales,
    )
    leaves, structure = jax.tree.flatten(inputs)
    width = pl.next_power_of_2(max(c.head_dim, value.shape[-1] // kv_heads))
    most = 1 if tokens <= _FEW else max(1, _ELEMENTS // width)
    together, kv_together = (min(most, pl.next_power_of_2(n)) for n in (heads, kv_heads))
    kept, cache_structure = jax.tree.flatten(cache)
    queries = jax.ShapeDtypeStruct((tokens, heads, c.head_dim), query.dtype)
    queries, *kept = pl.pallas_call(
        partial(
            _rope_cache_update_kernel,
            structures=(structure, cache_structure),
            together=(together, kv_together),
            rope=c.rope,
            norms=(c.query_norm, c.key_norm),
            ring=c.window is not None,
        ),
        grid=(tokens, pl.cdiv(heads, together) + pl.cdiv(kv_heads, kv_together)),
        out_shape=[queries, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept]],
        input_output_aliases={len(leaves) + i: 1 + i for i in range(len(kept))},
        compiler_params=plgpu.CompilerParams(
            num_warps=1 if tokens <= _FEW else _WARPS, num_stages=1
        ),
        interpret=interpreted(),
        name="rope_cache_update",
    )(*leaves, *kept)
    return queries.reshape(*batch.positions.shape, heads, -1), jax.tree.unflatten(
        cache_structure, kept
    )


def _rope_cache_update_kernel(
    *refs: jax.Ref,
    structures: tuple[Any, Any],
    together: tuple[int, int],
    rope: RopeConfig,
    norms: tuple[NormConfig | None, NormConfig | None],
    ring: bool,
) -> None:
    """Some heads of one token: of queries, or of keys and values.

    A head is in parts: where it turns by halves, each half is one and what does not turn another.
    """
    structure, cache_structure = structures
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    query, key, value, positions, slots, cos, sin, scales = inputs
    queries_ref, *kept = refs[structure.num_leaves + cache_structure.num_leaves :]
    cache = jax.tree.unflatten(cache_structure, kept)
    token, program = pl.program_id(0), pl.program_id(1)
    (heads, head_dim), (kv_heads, value_dim) = query.shape[1:], value.shape[1:]
    half = rope.dim // 2
    bounds = [0, head_dim] if rope.interleaved else [0, half, rope.dim, head_dim]
    parts = [_Columns(*ends) for ends in zip(bounds, bounds[1:], strict=False) if len({*ends}) > 1]
    pairs = _Columns(0, half, parts[0].size // 2 if rope.interleaved else None)

    def load(ref: jax.Ref, head: Array, columns: _Columns) -> Array:
        """float32 `[heads, columns]`."""
        at, mask = columns.of(head, ref.shape[1])
        x = plgpu.load(ref.at[token, *at], mask=mask, other=jnp.zeros((), ref.dtype))
        return x.astype(jnp.float32)

    def load_row(ref: jax.Ref, before: tuple, columns: _Columns, other: float = 0.0) -> Array:
        """float32 `[1, columns]`."""
        return plgpu.load(ref.at[*before, columns.index], mask=columns.inside, other=other)[None]

    def turned(
        ref: jax.Ref, head: Array, norm: NormConfig | None, scale: jax.Ref | None
    ) -> list[Array]:
        """The parts of heads, float32 `[heads, columns]`."""
        xs = [load(ref, head, part) for part in parts]
        c, s = load_row(cos, (token,), pairs, 1.0), load_row(sin, (token,), pairs)
        if norm is not None:
            mean = sum(jnp.sum(x * x, axis=1) for x in xs) / head_dim
            factor = jax.lax.rsqrt(mean + norm.epsilon)[:, None]
            xs = [x * factor for x in xs]
            if scale is not None:
                xs = [x * load_row(scale, (), p) for x, p in zip(xs, parts, strict=True)]
        if rope.interleaved:
            x, y = jnp.unstack(xs[0].reshape(len(head), -1, 2), axis=2)
            return [jnp.stack([x * c - y * s, y * c + x * s], axis=2).reshape(len(head), -1)]
        x, y, *rest = xs
        return [x * c - y * s, y * c + x * s, *rest]

    @pl.when(program < pl.cdiv(heads, together[0]))
    def _() -> None:
        head = program * together[0] + jnp.arange(together[0])
        for part, y in zip(parts, turned(query, head, norms[0], scales[0]), strict=True):
            at, mask = part.of(head, heads)
            plgpu.store(queries_ref.at[token, *at], y.astype(queries_ref.dtype), mask=mask)

    @pl.when(program >= pl.cdiv(heads, together[0]))
    def _() -> None:
        first = (program - pl.cdiv(heads, together[0])) * together[1]
        head = first + jnp.arange(together[1])
        length, (_, time) = cache.keys.shape[2], positions.shape
        sequence = token // time
        position = positions[sequence, token % time]
        slot = sequence if slots is None else slots[sequence]
        exists = (position >= 0) & (ring | (position < length))
        spot = jnp.maximum(position, 0) % length
        whole = _Columns(0, value_dim)
        values = load(value, head, whole)

        def keep(
            ref: jax.Ref, scale_ref: jax.Ref | None, xs: list[Array], parts: list[_Columns]
        ) -> None:
            if scale_ref is not None:
                largest = [largest_magnitude(x, 1) for x in xs]
                scale = reduce(lambda a, b: jnp.where((a > b) | (a != a), a, b), largest) / 127
                divisor = jnp.where(scale > 0, scale, 1)[:, None]
                xs = [jnp.floor(x / divisor + 0.5) for x in xs]
                mask = exists & (head < kv_heads)
                plgpu.store(scale_ref.at[slot, head, spot], scale, mask=mask)
            for part, x in zip(parts, xs, strict=True):
                (row, column), mask = part.of(head, kv_heads)
                at = (slot, row, spot, column)
                plgpu.store(ref.at[at], x.astype(ref.dtype), mask=mask & exists)

        keep(cache.keys, cache.key_scale, turned(key, head, norms[1], scales[1]), parts)
        keep(cache.values, cache.value_scale, [values], [whole])


class _Columns:
    """Columns of a head from `first` to `stop`, as many as a power of two."""

    def __init__(self, first: int, stop: int, size: int | None = None) -> None:
        self.size = size or pl.next_power_of_2(stop - first)
        self.index = first + jnp.arange(self.size)
        self.inside = self.index < stop

    def of(self, head: Array, heads: int) -> tuple[tuple[Array, Array], Array]:
        """Indices `[heads, columns]` of both and what exists."""
        shape = (len(head), self.size)
        row, column = jnp.broadcast_to(head[:, None], shape), jnp.broadcast_to(self.index, shape)
        return (row, column), (row < heads) & self.inside[None]
