"""What kernels of attention share, whatever they are written in: the layers that they support, and
the inputs of decode attention."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.ops.attention.rope import RopeConfig, rope_cos_sin
from jaxsplit.ops.attention.spec import (
    HEAD_FIELDS,
    SCORE_FIELDS,
    SHAPE_FIELDS,
    AttentionConfig,
    AttentionParams,
)
from jaxsplit.ops.norm.spec import NormConfig

_HEADS = ("rope", "query_norm", "key_norm", "norm_over", "norm_first")
_MAX_HEAD_DIM = 256


def supports_update(
    config: AttentionConfig, batch: Batch, cache: AttentionCache | None, dtype: jnp.dtype
) -> bool:
    """Whether kernels rotate the heads of a layer, and write its cache."""
    c = config

    def is_rms(norm: NormConfig | None) -> bool:
        return norm is None or (norm.kind == "rms" and not norm.bias)

    normed = c.query_norm is not None or c.key_norm is not None
    return (
        cache is not None
        and cache.values is not None
        and max(cache.keys.size, cache.values.size) < 2**31  # indices are 32-bit
        # A chunk may wrap around a ring buffer: two of its tokens would store to one index.
        and (batch.positions.shape[1] == 1 or c.window is None)
        and jnp.dtype(dtype).itemsize == 2
        and c.uses_only(*SHAPE_FIELDS, *SCORE_FIELDS, *_HEADS)
        and c.rope is not None
        and is_rms(c.query_norm)
        and is_rms(c.key_norm)
        and (not normed or (c.norm_over == "head" and c.norm_first))
    )


def supports_attend(
    queries: Array | jax.ShapeDtypeStruct, memory: AttentionCache, config: AttentionConfig
) -> bool:
    """Whether kernels attend with queries `[batch, time, …]` to a memory."""
    return (
        queries.dtype.itemsize == 2
        and memory.values is not None
        and memory.keys.dtype.itemsize <= 2
        and max(memory.keys.size, memory.values.size) < 2**31  # elements are counted in 32 bits
        and max(memory.keys.shape[-1], memory.values.shape[-1]) <= _MAX_HEAD_DIM
        and config.uses_only(*SHAPE_FIELDS, *HEAD_FIELDS, "scale", "window", "softcap", "sinks")
    )


def supports_decode(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: Array | jax.ShapeDtypeStruct,
) -> bool:
    """Whether kernels do all of it for one new token of each sequence, for queries `[batch, time,
    heads * width]`."""
    return (
        batch.positions.shape[1] == 1
        and cache is not None
        and supports_update(config, batch, cache, query.dtype)
        and supports_attend(query, cache, config)
        and config.kv_donor is None
        and cache.own_values.shape[-1] % BLOCK == 0
    )


def decode_inputs(
    projections: Sequence[Array],
    batch: Batch,
    pages: Array | None,
    config: AttentionConfig,
    params: AttentionParams,
    kv_heads: int,
    biases: Sequence[Array | None],
) -> tuple:
    """The inputs of a kernel of decode attention, except for the cache.

    Args:
      projections: query, key and value, `[parts, sequences, 1, heads * width]`.
      batch, config, params: as in `self_attention`.
      pages: as of `Batch.pages_of`.
      kv_heads: number of KV heads.
      biases: of the projections, float32 `[heads * width]` or None each.
    """
    query, key, value = projections
    rope = config.rope
    assert rope is not None  # see `supports_update`
    group = query.shape[-1] // (kv_heads * config.head_dim)
    query = query.reshape(-1, query.shape[1], kv_heads, group, config.head_dim)
    divisors = rope.divisors(batch.freq_factors)
    cos, sin = _rope_factors(batch.positions, rope, config.head_dim, divisors)
    heads = (query.shape[2:], (kv_heads, -1), (kv_heads, -1))
    return (
        query,
        *(x.reshape(*x.shape[:2], kv_heads, -1) for x in (key, value)),
        [None if x is None else x.reshape(shape) for x, shape in zip(biases, heads, strict=True)],
        batch.positions.reshape(-1),
        pages,
        cos,
        sin,
        list(params.norm_scales),
        params.sinks,
        # Finished splits of each sequence and head. The last program resets its counter to zero.
        jnp.zeros(query.shape[1:3], jnp.int32),
    )


def _rope_factors(
    positions: Array, rope: RopeConfig, head_dim: int, divisors: Array | None
) -> list[Array]:
    """The factors of each dimension of a head, and of the dimension it is rotated with: float32
    `[sequences, head_dim]` each."""
    cos, sin = (x[:, 0] for x in rope_cos_sin(positions, rope, divisors))
    axis = -1 if rope.interleaved else -2
    rest = head_dim - rope.dim
    pairs = (jnp.stack(x, axis).reshape(len(cos), -1) for x in ((cos, cos), (-sin, sin)))
    return [
        jnp.pad(x, ((0, 0), (0, rest)), constant_values=identity)
        for x, identity in zip(pairs, (1.0, 0.0), strict=True)
    ]
