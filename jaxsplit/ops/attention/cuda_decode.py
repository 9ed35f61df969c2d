"""Decode attention in a single kernel in CUDA C++: as `triton_decode`."""

import importlib.resources
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.layout import Activations, Readers, wrap_layouts
from jaxsplit.ops.attention.kernels import decode_inputs, supports_decode
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams

_THREADS = 128
_MAX_GROUP = 8
"""Query heads of a key head: a thread has sums for all of them in registers."""

_MAX_SPLITS = 16
_MAX_BLOCKS = 1024
_FOLDER = importlib.resources.files("jaxsplit") / "ops" / "attention"


def supports(
    config: AttentionConfig,
    batch: Batch,
    cache: AttentionCache | None,
    query: Array | jax.ShapeDtypeStruct,
    readers: Readers,
) -> bool:
    """Whether `decode_attention` supports a layer, for queries `[batch, time, heads * width]`."""
    return (
        cuda_rows.supports(readers)
        and not readers.xla
        and supports_decode(config, batch, cache, query)
        and cache is not None
        and cache.keys.shape[-1] % 8 == 0
        and 8 * _THREADS % cache.own_values.shape[-1] == 0
        and query.shape[-1] <= _MAX_GROUP * config.head_dim * cache.keys.shape[1]
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
    readers: Readers,
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
      readers: of the result.

    Returns:
      `[batch, 1, heads * value_dim]`, and the cache.
    """
    options = {"config": config, "params": params, "biases": biases, "readers": readers}
    launch = launch_of(query, key, value, batch, cache, **options)
    results = cuda_call(launch, capability=current_context().policy.cuda)
    leaves, structure = jax.tree.flatten(cache)
    arrays, leaves = results[3 : -len(leaves)], results[-len(leaves) :]
    sequences = query.shape[1]
    columns = query.shape[-1] // config.head_dim * cache.own_values.shape[-1]
    stored = wrap_layouts(readers.layouts, arrays, sequences, columns)
    like = jax.ShapeDtypeStruct((sequences, 1, columns), dtype)
    return Activations(like, readers.layouts, stored), jax.tree.unflatten(structure, leaves)


def launch_of(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache,
    *,
    config: AttentionConfig,
    params: AttentionParams,
    biases: Sequence[Array | None] = (None, None, None),
    readers: Readers,
) -> Launch:
    """The launch, arguments as of `decode_attention`."""
    sequences, kv_heads = query.shape[1], cache.keys.shape[1]
    pages = batch.pages_of(ring=config.window is not None)
    if pages is None:
        pages = jnp.arange(sequences, dtype=jnp.int32)[:, None]
    query, key, value, biases, positions, pages, cos, sin, scales, sinks, finished = decode_inputs(
        (query, key, value), batch, pages, config, params, kv_heads, biases
    )
    group, head_dim, value_dim = query.shape[3], query.shape[-1], value.shape[-1]
    page, count = cache.keys.shape[2], pages.shape[1]
    tile = 64 if group <= 4 else 32
    tiles, most = -(-page * count // tile), _MAX_BLOCKS // (sequences * kv_heads)
    splits = max(1, min(tiles, most, _MAX_SPLITS))
    rope, norms = config.rope, (config.query_norm, config.key_norm)
    assert rope is not None  # see `supports`
    scale = head_dim**-0.5 if config.scale is None else config.scale
    numbers = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "GROUP": group,
        "SPLITS": splits,
        "PARTS": query.shape[0],
        "PAGE": page,
        "PAGES": count,
        "TILE": tile,
        "WINDOW": config.window or 0,
        "ROPE_DIM": rope.dim,
        "INTERLEAVED": int(rope.interleaved),
        "NORMS": sum(bit for bit, norm in zip((1, 2), norms, strict=True) if norm is not None),
        "SINKS": int(sinks is not None),
        "SCALE": float(scale),
        "SOFTCAP": float(config.softcap or 0),
        "QUERY_EPSILON": float(norms[0].epsilon) if norms[0] else 0.0,
        "KEY_EPSILON": float(norms[1].epsilon) if norms[1] else 0.0,
    }
    types = f"typedef {cpp_type(cache.keys.dtype)} Stored;\n"
    types += f"typedef {cpp_type(query.dtype)} Projected;\n"
    columns, state = kv_heads * group * value_dim, (splits, sequences, kv_heads, group)
    given = Arguments()
    vectors = [None if x is None else x.astype(jnp.float32) for x in (*scales, sinks, *biases)]
    body = f"  Token token = {given.operands(query, key, value, cos, sin, *vectors)};\n"
    sums = given.results(
        jax.ShapeDtypeStruct((*state, value_dim), jnp.float32),
        *[jax.ShapeDtypeStruct(state, jnp.float32)] * 2,
    )
    counter = f"(int*){given.operand(finished)}"  # left as it was found
    body += f"  Splits splits = {{{sums.strip('{}')}, {counter}}};\n"
    body += cuda_rows.declare_out(readers, given, sequences, columns)
    kept = cache.keys, cache.own_values, cache.key_scale, cache.value_scale
    body += f"  Cache cache = {{{', '.join(map(given.overwritten, kept))}}};\n"
    where = f"{given.operand(positions)}, {given.operand(pages)}"
    body += f"  attend(token, {where}, cache, splits, out);\n"
    return given.launch(
        "decode_attention",
        *cuda_rows.FILES,
        constants(numbers),
        types,
        _FOLDER / "cuda_cache.cuh",
        _FOLDER / "cuda_softmax.cuh",
        _FOLDER / "cuda_decode.cu",
        body=body,
        grid=(kv_heads, sequences, splits),
        threads=_THREADS,
    )
