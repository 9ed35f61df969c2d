"""What the attention kernels share: softmax over keys that come some at a time.

Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.cache.contiguous import AttentionCache
from jaxsplit.context import interpreted
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.pallas import pl, plgpu

LOG2_E = math.log2(math.e)
NONE = -1e30  # the score of a key that is not looked at
FEW = 16  # rows of queries: the least that a matrix unit takes


def padded(width: int, parts: int = 1) -> int:
    """Columns as the matrix unit takes them: a power of two, of which each part has 16 or more."""
    return max(16 * parts, pl.next_power_of_2(width))


def in_pairs(memory: AttentionCache) -> AttentionCache:
    """int8 keys and values `[..., width]` as int16 `[..., width / 2]`, others as they are.

    The matrix unit's loads move 16 bits at a time: values of 8 bits would be turned byte by byte.
    """
    arrays = memory.keys, memory.values
    if memory.keys.dtype != jnp.int8 or any(x.shape[-1] % 2 for x in arrays):
        return memory
    pairs = [x.reshape(*x.shape[:-1], -1, 2) for x in arrays]
    keys, values = (lax.bitcast_convert_type(x, jnp.int16) for x in pairs)
    return dataclasses.replace(memory, keys=keys, values=values)


def without_pairs(memory: AttentionCache) -> AttentionCache:
    """The inverse of `in_pairs`."""
    if parts_of(memory) == 1:
        return memory
    arrays = memory.keys, memory.values
    bytes_ = [lax.bitcast_convert_type(x, jnp.int8) for x in arrays]
    keys, values = (x.reshape(*x.shape[:-2], -1) for x in bytes_)
    return dataclasses.replace(memory, keys=keys, values=values)


def parts_of(memory: AttentionCache) -> int:
    """Into how many parts columns are divided where a memory is read, even and odd ones."""
    return 2 if memory.keys.dtype == jnp.int16 else 1


def in_parts(x: Array, parts: int) -> list[Array]:
    """Columns `i, i + parts, ...` of `[..., columns]` for each part `i`."""
    if parts == 1:
        return [x]
    return list(jnp.unstack(x.reshape(*x.shape[:-1], -1, parts), axis=-1))


def joined(parts: list[Array]) -> Array:
    """The inverse of `in_parts`, of two dimensions: `[rows, columns]`."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=2).reshape(parts[0].shape[0], -1)


def unpaired(pairs: Array, dtype: jnp.dtype) -> list[Array]:
    """The first and the second int8 of each int16, in a floating-point dtype of 16 bits."""
    if interpreted():
        return [x.astype(dtype) for x in ((pairs & 0x7F) - (pairs & 0x80), pairs >> 8)]

    def twice(x: float) -> int:
        """The bits of two numbers."""
        return int(np.asarray(x, dtype).view(np.uint16)) * 0x10001

    # In the mantissa of `one`, whose last bit counts 1: `one + low - (one + 128 * negative)`.
    one = twice(2.0 ** jnp.finfo(dtype).nmant)
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    results = []
    for shift in (0, 8):
        [x] = plgpu.elementwise_inline_asm(
            f"""{{
            .reg .b32 codes, low, negative, minus;
            shr.u32 codes, $1, {shift};
            lop3.b32 low, codes, {0x7F007F}, {one}, 0xea;
            lop3.b32 negative, codes, {0x800080}, {one}, 0xea;
            mov.b32 minus, {twice(-1.0)};
            fma.rn.{kind} $0, negative, minus, low;
            }}""",
            args=[pairs],
            constraints="=r,r",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(pairs.shape, dtype)],
        )
        results.append(x)
    return results


def wide(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """`[n]` as an array in which it runs along an axis."""
    return jnp.broadcast_to(x.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


Sums = tuple[Array, Array, list[Array]]
"""What some queries have of the keys so far: the largest score and the sum of weights, float32
`[rows]` each, and weighted values, float32 `[rows, columns]` for each part of the columns."""


def scores_of(products: Array, config: AttentionConfig, scale: float) -> Array:
    """Scores to the base 2."""
    if config.softcap is None:
        return products * (scale * LOG2_E)
    return config.softcap * LOG2_E * jnp.tanh(products * (scale / config.softcap))


def read(
    memory: AttentionCache, at: tuple[Array, Array, Array], exists: Array | None
) -> AttentionCache:
    """Keys, values and their scales in some places, as they are kept, in a kernel.

    Args:
      memory: of references, perhaps `in_pairs`.
      at: slot, head and places `[keys]`.
      exists: bool `[keys]`: the places that are read; None: all.

    Returns:
      keys and values `[keys, columns]`, scales `[keys]`.
    """
    slot, head, place = at
    parts = parts_of(memory)

    def load(ref: jax.Ref, index: tuple, mask: Array | None) -> Array:
        if mask is None:
            return plgpu.load(ref.at[index])
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    def tile_of(ref: jax.Ref) -> Array:
        width = ref.shape[-1]
        shape = (len(place), padded(width * parts, parts) // parts)
        column, mask = wide(jnp.arange(shape[1]), shape, 1), None
        if exists is not None or shape[1] != width:
            mask = column < width
            if exists is not None:
                mask &= wide(exists, shape, 0)
        return load(ref, (slot, head, wide(place, shape, 0), column), mask)

    def scale_of(ref: jax.Ref | None) -> Array | None:
        return None if ref is None else load(ref, (slot, head, place), exists)

    return AttentionCache(
        tile_of(memory.keys),
        tile_of(memory.values),
        scale_of(memory.key_scale),
        scale_of(memory.value_scale),
    )


def more_keys(
    sums: Sums,
    queries: list[Array],
    some: AttentionCache,
    seen: Array | None,
    score: Callable[[Array], Array],
) -> Sums:
    """Some more keys, in a kernel.

    Args:
      sums: of the keys before.
      queries: `[rows, columns]` for each part.
      some: keys and values, as they were read.
      seen: bool `[rows, keys]` or `[1, keys]`; None: all.
      score: of products.
    """
    largest, total, values = sums
    dtype = queries[0].dtype

    def in_dtype(x: Array) -> list[Array]:
        return [x.astype(dtype)] if len(queries) == 1 else unpaired(x, dtype)

    contract_columns = (((1,), (1,)), ((), ()))
    products = sum(
        lax.dot_general(x, keys, contract_columns, preferred_element_type=jnp.float32)
        for x, keys in zip(queries, in_dtype(some.keys), strict=True)
    )
    if some.key_scale is not None:
        products *= some.key_scale[None]
    scores = score(products)
    if seen is not None:
        scores = jnp.where(seen, scores, NONE)
    now_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - now_largest[:, None])
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    fade = jnp.exp2(largest - now_largest)
    total = total * fade + jnp.sum(weights, axis=1)
    if some.value_scale is not None:
        weights *= some.value_scale[None]
    weights = weights.astype(dtype)
    values = [
        x * fade[:, None] + jnp.dot(weights, tile, preferred_element_type=jnp.float32)
        for x, tile in zip(values, in_dtype(some.values), strict=True)
    ]
    return now_largest, total, values
