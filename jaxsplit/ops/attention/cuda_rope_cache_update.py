"""The kernel between projections and attention in CUDA C++: as `triton_rope_cache_update`."""

import importlib.resources

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.attention.kernels import supports_update
from jaxsplit.ops.attention.rope import rope_cos_sin
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams

_WARPS = 4  # of a block
_FOLDER = importlib.resources.files("jaxsplit") / "ops" / "attention"

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
    launch = launch_of(query, key, value, batch, cache, config=config, params=params)
    queries, *leaves = cuda_call(launch, capability=current_context().policy.cuda)
    queries = queries.reshape(*batch.positions.shape, -1, config.head_dim)
    return queries, jax.tree.unflatten(jax.tree.structure(cache), leaves)


def launch_of(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    *,
    config: AttentionConfig,
    params: AttentionParams,
) -> Launch:
    """The launch, arguments as of `rope_cache_update`."""
    tokens, time = batch.positions.size, batch.positions.shape[1]
    rope, norms = config.rope, (config.query_norm, config.key_norm)
    assert rope is not None  # see `supports`
    cos, sin = rope_cos_sin(batch.positions, rope, rope.divisors(batch.freq_factors))
    heads, kv_heads = query.shape[-1] // config.head_dim, key.shape[-1] // config.head_dim
    pages = batch.pages_of(ring=config.window is not None)
    count = 1 if pages is None else pages.shape[1]
    numbers = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": config.head_dim,
        "VALUE_DIM": value.shape[-1] // kv_heads,
        "ROPE_DIM": rope.dim,
        "INTERLEAVED": int(rope.interleaved),
        "NORMS": sum(bit for bit, norm in zip((1, 2), norms, strict=True) if norm is not None),
        "RING": int(config.window is not None),
        "PAGE": cache.length,
        "PAGES": count,
        "LENGTH": cache.length * count,
        "TIME": time,
        "WARPS": _WARPS,
        "QUERY_EPSILON": float(norms[0].epsilon) if norms[0] else 0.0,
        "KEY_EPSILON": float(norms[1].epsilon) if norms[1] else 0.0,
    }
    types = f"typedef {cpp_type(cache.keys.dtype)} Stored;\ntypedef {cpp_type(query.dtype)} X;\n"
    given = Arguments()
    scales = [None if x is None else x.astype(jnp.float32) for x in params.norm_scales]
    body = f"  Projections x = {given.operands(query, key, value, cos, sin, *scales)};\n"
    queries = given.result(jax.ShapeDtypeStruct(query.shape, query.dtype))
    kept = cache.keys, cache.own_values, cache.key_scale, cache.value_scale
    body += f"  Cache cache = {{{', '.join(map(given.overwritten, kept))}}};\n"
    where = f"{given.operand(batch.positions)}, {given.operand(pages)}"
    body += f"  update(x, {where}, cache, {queries});\n"
    return given.launch(
        "rope_cache_update",
        constants(numbers),
        types,
        _FOLDER / "cuda_cache.cuh",
        _FOLDER / "cuda_rope_cache_update.cu",
        body=body,
        grid=(tokens, -(-(heads + 2 * kv_heads) // _WARPS), 1),
        threads=32 * _WARPS,
    )
