"""Softmax attention: from the projections of new tokens to what they have read.

Each table lists implementations, best first: whether one supports the arguments, and the function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import current_context
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.attention import (
    cuda_decode,
    cuda_flash,
    cuda_rope_cache_update,
    triton_decode,
    triton_flash,
    triton_rope_cache_update,
    xla,
)
from jaxsplit.ops.attention.kernels import supports_update
from jaxsplit.ops.attention.kv import KV, over_filled
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.attention.xla import (
    MAX_SCORES,
    apply_temperature,
    gathers,
    update_cache,
    window_of,
)

__all__ = [
    "KV",
    "MAX_SCORES",
    "apply_temperature",
    "attend",
    "gathers",
    "over_filled",
    "self_attention",
    "update_cache",
    "window_of",
]


def self_attention(
    query: Unreduced,
    key: Unreduced | None,
    value: Unreduced | None,
    batch: Batch,
    cache: AttentionCache | None,
    *,
    config: AttentionConfig,
    params: AttentionParams,
    dtype: jnp.dtype,
    readers: Readers = XLA_ONLY,
    selected: Array | None = None,
) -> tuple[Activations, AttentionCache | None]:
    """Causal attention of new tokens to earlier ones and themselves.

    Adds the keys and values to `batch.lent` if the config is a `kv_donor`.

    Args:
      query, key, value: projections, `[batch, time, heads * width]`; key and value are None where
        the config has a `kv_source`.
      batch: where the tokens belong.
      cache: keys and values of earlier tokens; None: there are none.
      config: heads, rotation, window and so on.
      params: parameters of norms, and sinks.
      dtype: of the result.
      readers: of the result.
      selected: as in `KV`, of a config without window and ALiBi.

    Returns:
      `[batch, time, heads * value_dim]`, and the cache with the new tokens.
    """
    if selected is not None:
        options = {"config": config, "params": params, "dtype": dtype, "readers": readers}
        return _in_steps(query, key, value, batch, cache, **options, selected=selected)
    like = jax.ShapeDtypeStruct(query.parts.shape[1:], dtype)
    for supports, run in _SELF_ATTENTION:
        if supports(config, batch, cache, like, readers):
            options = {"config": config, "params": params, "dtype": dtype, "readers": readers}
            return run(query, key, value, batch, cache, **options)
    raise AssertionError("the last implementation supports everything")


def attend(
    queries: Array,
    kv: KV,
    batch: Batch,
    *,
    config: AttentionConfig,
    sinks: Array | None = None,
    readers: Readers = XLA_ONLY,
) -> Activations:
    """Softmax attention to the keys at and before each query's position.

    Args:
      queries: `[batch, time, kv_heads, group, head_dim]`.
      kv: keys and values.
      batch: where the queries belong.
      config: scale, window, soft-cap and biases of the scores.
      sinks: float32 `[kv_heads * group]`, or None.
      readers: of the result.

    Returns:
      `[batch, time, kv_heads * group * value_dim]` in the dtype of `queries`; scores and softmax
      are float32.
    """
    for supports, run in _ATTEND:
        if supports(queries, kv, config):
            return run(queries, kv, batch, config=config, sinks=sinks, readers=readers)
    raise AssertionError("the last implementation supports everything")


def _kernels_support_decode(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: jax.ShapeDtypeStruct,
    readers: Readers,
) -> bool:
    kernels = current_context().policy.kernels
    return kernels and triton_decode.supports(config, batch, cache, query)


def _decode(
    query: Unreduced,
    key: Unreduced,
    value: Unreduced,
    batch: Batch,
    cache: AttentionCache,
    *,
    readers: Readers,
    **options: Any,
) -> tuple[Activations, AttentionCache]:
    """All in one kernel, which also sums split-K parts and biases of the projections."""
    layouts = () if readers.xla else readers.layouts
    return triton_decode.decode_attention(
        query.parts,
        key.parts,
        value.parts,
        batch,
        cache,
        biases=(query.bias, key.bias, value.bias),
        layouts=layouts,
        **options,
    )


def _cuda_supports_decode(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: jax.ShapeDtypeStruct,
    readers: Readers,
) -> bool:
    runs = current_context().policy.only_cuda
    return runs and cuda_decode.supports(config, batch, cache, query, readers)


def _decode_by_cuda(
    query: Unreduced, key: Unreduced, value: Unreduced, *args: Any, **options: Any
) -> tuple[Activations, AttentionCache]:
    parts, biases = zip(*((x.parts, x.bias) for x in (query, key, value)), strict=True)
    return cuda_decode.decode_attention(*parts, *args, biases=biases, **options)


def _in_steps(
    query: Unreduced,
    key: Unreduced | None,
    value: Unreduced | None,
    batch: Batch,
    cache: AttentionCache | None,
    *,
    config: AttentionConfig,
    params: AttentionParams,
    dtype: jnp.dtype,
    readers: Readers,
    selected: Array | None = None,
) -> tuple[Activations, AttentionCache | None]:
    """Rotation and cache update, then attention."""
    q = query.local_output.astype(dtype)
    k, v = (None if x is None else x.local_output.astype(dtype) for x in (key, value))
    options = {"config": config, "params": params}
    if config.kv_source is not None:
        queries, kv = xla.rotate_queries(q, batch, **options), batch.lent[config.kv_source]
    else:
        update = next(run for supports, run in _UPDATE if supports(config, batch, cache, dtype))
        queries, kv, cache = update(q, k, v, batch, cache, **options)
    if config.kv_donor is not None:
        batch.lent[config.kv_donor] = kv
    queries = queries.reshape(*batch.positions.shape, kv.memory.keys.shape[1], -1, config.head_dim)
    if selected is not None:
        few = gathers(kv.length, selected.shape[-1], queries.shape[1], queries.shape[3])
        kv = dataclasses.replace(kv, selected=selected, gathers=few)
    sinks = params.sinks
    return attend(queries, kv, batch, config=config, sinks=sinks, readers=readers), cache


def _kernel_supports_update(
    config: AttentionConfig, batch: Batch, cache: AttentionCache | None, dtype: jnp.dtype
) -> bool:
    policy = current_context().policy
    runs = policy.kernels or policy.only_cuda
    return runs and supports_update(config, batch, cache, dtype)


def _update_by_kernel(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    *,
    config: AttentionConfig,
    params: AttentionParams,
) -> tuple[Array, KV, AttentionCache]:
    only_cuda = current_context().policy.only_cuda
    backend = cuda_rope_cache_update if only_cuda else triton_rope_cache_update
    queries, cache = backend.rope_cache_update(
        query,
        key,
        value,
        batch,
        cache,
        config=config,
        params=params,
    )
    ring = config.window is not None
    positions = cache.positions(batch.positions[:, 0]) if ring else None
    return queries, KV(cache, positions, batch.pages_of(ring=ring)), cache


def _kernel_supports_attend(queries: Array, kv: KV, config: AttentionConfig) -> bool:
    kernels = current_context().policy.kernels and kv.selected is None
    return kernels and triton_flash.supports(queries, kv.memory, config)


def _flash(
    queries: Array,
    kv: KV,
    batch: Batch,
    *,
    config: AttentionConfig,
    sinks: Array | None,
    readers: Readers,
) -> Activations:
    return triton_flash.flash_attention(
        queries,
        kv.memory,
        batch.positions,
        config=config,
        key_positions=kv.positions,
        sinks=sinks,
        pages=kv.pages,
        layouts=() if readers.xla else readers.layouts,
    )


def _cuda_supports_attend(queries: Array, kv: KV, config: AttentionConfig) -> bool:
    policy = current_context().policy
    runs = policy.only_cuda or (policy.kernels and policy.cuda in cuda_flash.FASTER)
    return runs and kv.selected is None and cuda_flash.supports(queries, kv.memory, config)


def _flash_by_cuda(
    queries: Array,
    kv: KV,
    batch: Batch,
    *,
    config: AttentionConfig,
    sinks: Array | None,
    readers: Readers,
) -> Activations:
    options = {"config": config, "key_positions": kv.positions, "sinks": sinks, "pages": kv.pages}
    return cuda_flash.flash_attention(
        queries, kv.memory, batch.positions, **options, readers=readers
    )


def _attend_by_xla(
    queries: Array,
    kv: KV,
    batch: Batch,
    *,
    config: AttentionConfig,
    sinks: Array | None,
    readers: Readers,
) -> Activations:
    run = xla.attend
    if kv.selected is not None:
        run = xla.attend_gathered if kv.gathers else xla.attend_masked
    return Activations(run(queries, kv, batch.positions, config=config, sinks=sinks))


_Table = tuple[tuple[Callable[..., bool], Callable[..., Any]], ...]

_SELF_ATTENTION: _Table = (
    (_kernels_support_decode, _decode),
    (_cuda_supports_decode, _decode_by_cuda),
    (lambda *_: True, _in_steps),
)
_UPDATE: _Table = (
    (_kernel_supports_update, _update_by_kernel),
    (lambda *_: True, xla.rope_cache_update),
)
_ATTEND: _Table = (
    (_cuda_supports_attend, _flash_by_cuda),
    (_kernel_supports_attend, _flash),
    (lambda *_: True, _attend_by_xla),
)
