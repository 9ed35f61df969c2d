"""Decode attention in a single kernel in CUDA C++: as `triton_decode`."""

import importlib.resources

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.context import current_context
from jaxsplit.cuda.call import Kernel, Launch, cuda_call, source_of
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import Activations, Readers, wrap_layouts
from jaxsplit.ops.attention import triton_decode
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams

_THREADS = 128
_MAX_GROUP = 8
"""Query heads of a key head: a thread has sums for all of them in registers."""

_MAX_SPLITS = 32
_MAX_BLOCKS = 1024
_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat16", "int8": "Int8"}
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
        readers == Readers((Int8Layout(),), xla=False)
        and triton_decode.supports(config, batch, cache, query)
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
      readers: of the result.

    Returns:
      `[batch, 1, heads * value_dim]`, and the cache.
    """
    launch = launch_of(query, key, value, batch, cache, config=config, params=params)
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
) -> Launch:
    """The launch, arguments as of `decode_attention`."""
    sequences, kv_heads = query.shape[1], cache.keys.shape[1]
    pages = batch.pages_of(ring=config.window is not None)
    if pages is None:
        pages = jnp.arange(sequences, dtype=jnp.int32)[:, None]
    query, key, value, positions, pages, cos, sin, scales, sinks, finished = (
        triton_decode.kernel_inputs((query, key, value), batch, pages, config, params, kv_heads)
    )
    group, head_dim, value_dim = query.shape[3], query.shape[-1], value.shape[-1]
    page, count = cache.keys.shape[2], pages.shape[1]
    tile = 64 if group <= 4 else 32
    tiles, most = -(-page * count // tile), _MAX_BLOCKS // (sequences * kv_heads)
    splits = max(1, min(tiles, most, _MAX_SPLITS))
    rope, norms = config.rope, (config.query_norm, config.key_norm)
    assert rope is not None  # see `supports`
    scale = head_dim**-0.5 if config.scale is None else config.scale
    integers = {
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
    }
    floats = {
        "SCALE": scale,
        "SOFTCAP": config.softcap or 0.0,
        "QUERY_EPSILON": norms[0].epsilon if norms[0] else 0.0,
        "KEY_EPSILON": norms[1].epsilon if norms[1] else 0.0,
    }
    declared = "".join(f"constexpr int {key} = {number};\n" for key, number in integers.items())
    declared += "".join(
        f"constexpr float {key} = {float(number)!r}f;\n" for key, number in floats.items()
    )
    declared += f"typedef {_TYPES[cache.keys.dtype.name]} Stored;\n"
    declared += f"typedef {_TYPES[query.dtype.name]} Projected;\n"
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "cos": cos,
        "sin": sin,
        "query_scale": scales[0],
        "key_scale": scales[1],
        "sinks": sinks,
        "positions": positions,
        "pages": pages,
        "finished": finished,
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}
    projected = "query", "key", "value"
    operands = [
        x if x.dtype == jnp.int32 or name in projected else x.astype(jnp.float32)
        for name, x in arrays.items()
    ]
    kinds = [
        "Projected" if name in projected else "int" if x.dtype == jnp.int32 else "float"
        for name, x in arrays.items()
    ]
    parameters = [f"{kind}* {name}" for kind, name in zip(kinds, arrays, strict=True)]
    leaves = jax.tree.leaves(cache)
    names = ["keys", "values", "key_scales", "value_scales"][: len(leaves)]
    types = ["Stored", "Stored", "float", "float"]
    parameters += [f"{kind}* old_{name}" for kind, name in zip(types, names, strict=False)]
    columns = kv_heads * group * value_dim
    state = (splits, sequences, kv_heads, group)
    results = [
        jax.ShapeDtypeStruct((*state, value_dim), jnp.float32),
        *[jax.ShapeDtypeStruct(state, jnp.float32)] * 2,
        *Int8Layout().shapes(sequences, columns),
        *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves),
    ]
    parameters += ["float* split_sums", "float* split_most", "float* split_total"]
    parameters += ["u32* codes", "float* scales", "float* sums", "float* half_sums"]
    parameters += [f"{kind}* {name}" for kind, name in zip(types, names, strict=False)]

    def given(*wanted: str) -> str:
        return ", ".join(name if name in (*arrays, *names) else "0" for name in wanted)

    main = (
        f'extern "C" __global__ void __launch_bounds__({_THREADS}) decode_attention(\n    '
        + ", ".join(parameters)
        + ") {\n"
        + "  Token token = {"
        + given("query", "key", "value", "cos", "sin", "query_scale", "key_scale", "sinks")
        + "};\n"
        + f"  Cache cache = {{{given('keys', 'values', 'key_scales', 'value_scales')}}};\n"
        + "  Splits splits = {split_sums, split_most, split_total, finished};\n"
        + "  Int8Rows out = {codes, scales, sums, half_sums};\n"
        + "  attend(token, positions, pages, cache, splits, out);\n}\n"
    )
    source = source_of(
        cuda_rows.FOLDER / "cuda_int8.cuh", declared, _FOLDER / "cuda_decode.cu", main
    )
    first, after = len(arrays), len(results) - len(leaves)
    return Launch(
        Kernel("decode_attention", source, (kv_heads, sequences, splits), _THREADS),
        [*operands, *leaves],
        results,
        aliases={first + i: after + i for i in range(len(leaves))},
    )
