"""One kernel between projections and attention.

Heads are normalized and turned, and the new keys and values are put into the cache.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.models.cache import AttentionCache, Batch
from jaxsplit.models.layers import Norm, rope_factors
from jaxsplit.models.mixer_config import AttentionConfig, NormConfig, RopeConfig


def supports(
    config: AttentionConfig, batch: Batch, cache: AttentionCache | None, dtype: jnp.dtype
) -> bool:
    """Whether `place` can do what a layer needs."""
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
        and c.borrows is None
        and c.rope is not None
        and c.clamp is None
        and c.temperature is None
        and c.value_norm is None
        and simple(c.query_norm)
        and simple(c.key_norm)
        and (not normed or (c.norm_over == "head" and c.norm_first))
    )


def place(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    config: AttentionConfig,
    norms: tuple[Norm | None, Norm | None],
    *,
    interpret: bool = False,
) -> tuple[Array, AttentionCache]:
    """Queries as attention reads them, and the cache with the new tokens.

    Args:
      query, key, value: projections, `[batch, time, heads * width]`.
      batch: where the tokens belong; nothing is written for padding.
      cache: of earlier tokens.
      config: one that is supported.
      norms: of queries and of keys.
      interpret: run it without a GPU, to test it.

    Returns:
      `[batch, time, heads, head_dim]` in the dtype of `query`, and the cache.
    """
    c, tokens = config, batch.positions.size
    cos, sin = rope_factors(batch.positions, c.rope, batch.rope_factors.get(c.rope.factors))
    heads, kv_heads = query.shape[-1] // c.head_dim, key.shape[-1] // c.head_dim
    scales = [None if n is None or n.scale is None else n.scale.get_value() for n in norms]
    inputs = (
        query.reshape(tokens, heads, -1),
        key.reshape(tokens, kv_heads, -1),
        value.reshape(tokens, kv_heads, -1),
        batch.positions,
        batch.slots,
        cos.reshape(tokens, -1),
        sin.reshape(tokens, -1),
        scales,
    )
    leaves, structure = jax.tree.flatten(inputs)
    kept, cache_structure = jax.tree.flatten(cache)
    queries = jax.ShapeDtypeStruct((tokens, heads, c.head_dim), query.dtype)
    queries, *kept = pl.pallas_call(
        partial(
            _kernel,
            structures=(structure, cache_structure),
            rope=c.rope,
            norms=(c.query_norm, c.key_norm),
            ring=c.window is not None,
        ),
        grid=(tokens, heads + kv_heads),
        out_shape=[queries, *[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in kept]],
        input_output_aliases={len(leaves) + i: 1 + i for i in range(len(kept))},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="place_heads",
    )(*leaves, *kept)
    return queries.reshape(*batch.positions.shape, heads, -1), jax.tree.unflatten(
        cache_structure, kept
    )


def _kernel(
    *refs: jax.Ref,
    structures: tuple[Any, Any],
    rope: RopeConfig,
    norms: tuple[NormConfig | None, NormConfig | None],
    ring: bool,
) -> None:
    """One head of one token: of queries, or of keys and values."""
    structure, cache_structure = structures
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    query, key, value, positions, slots, cos, sin, scales = inputs
    queries_ref, *kept = refs[structure.num_leaves + cache_structure.num_leaves :]
    cache = jax.tree.unflatten(cache_structure, kept)
    token, head = pl.program_id(0), pl.program_id(1)
    heads, head_dim = query.shape[1:]
    column = jnp.arange(pl.next_power_of_2(head_dim))
    inside = column < head_dim
    if rope.interleaved:
        other, pair, sign = column ^ 1, column >> 1, jnp.where(column % 2 == 0, -1.0, 1.0)
    else:
        half = rope.dim // 2
        first = column < half
        other = jnp.where(first, column + half, column - half)
        pair, sign = jnp.where(first, column, column - half), jnp.where(first, -1.0, 1.0)
    turns = column < rope.dim

    def load(ref: jax.Ref, at: tuple, mask: Array, other: float = 0.0) -> Array:
        x = plgpu.load(ref.at[at], mask=mask, other=jnp.asarray(other, ref.dtype))
        return x.astype(jnp.float32)

    def turned(ref: jax.Ref, head: Array, norm: NormConfig | None, scale: jax.Ref | None) -> Array:
        """float32 `[head_dim]`."""
        x, y = (
            load(ref, (token, head, column), inside),
            load(ref, (token, head, other), turns),
        )
        if norm is not None:
            factor = jax.lax.rsqrt(jnp.sum(x * x) / head_dim + norm.epsilon)
            x, y = x * factor, y * factor
            if scale is not None:
                x, y = x * load(scale, (column,), inside), y * load(scale, (other,), turns)
        c, s = load(cos, (token, pair), turns, 1), load(sin, (token, pair), turns)
        return x * c + y * (sign * s)

    @pl.when(head < heads)
    def _() -> None:
        y = turned(query, head, norms[0], scales[0])
        at = (token, head, column)
        plgpu.store(queries_ref.at[at], y.astype(queries_ref.dtype), mask=inside)

    @pl.when(head >= heads)
    def _() -> None:
        kv_head = head - heads
        length, (_, time) = cache.keys.shape[2], positions.shape
        sequence = token // time
        position = positions[sequence, token % time]
        slot = sequence if slots is None else slots[sequence]
        exists = (position >= 0) & (ring | (position < length))
        spot = jnp.maximum(position, 0) % length

        def keep(ref: jax.Ref, scale_ref: jax.Ref | None, x: Array, mask: Array) -> None:
            mask &= exists
            if scale_ref is not None:
                scale = jnp.max(jnp.abs(x)) / 127
                x = jnp.floor(x / jnp.where(scale > 0, scale, 1) + 0.5)
                plgpu.store(
                    scale_ref.at[slot, kv_head, spot + jnp.arange(1)],
                    jnp.full(1, scale),
                    mask=jnp.full(1, exists),
                )
            at = (slot, kv_head, spot, jnp.arange(len(mask)))
            plgpu.store(ref.at[at], x.astype(ref.dtype), mask=mask)

        keep(cache.keys, cache.key_scale, turned(key, kv_head, norms[1], scales[1]), inside)
        width = value.shape[-1]
        of_value = jnp.arange(pl.next_power_of_2(width))
        x = load(value, (token, kv_head, of_value), of_value < width)
        keep(cache.values, cache.value_scale, x, of_value < width)
