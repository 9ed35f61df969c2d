"""What the attention kernels share: online softmax over blocks of keys.

Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.cache.layers import AttentionCache
from jaxsplit.context import interpreted
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.pallas import ArrayRef, pl, plgpu

LOG2_E = math.log2(math.e)
MASK_VALUE = -1e30  # score of a masked key
MIN_MMA_M = 16  # fewest rows of a tensor core operation


def padded(width: int, parts: int = 1) -> int:
    """Columns as tensor cores take them: a power of two, at least 16 for each part."""
    return max(16 * parts, pl.next_power_of_2(width))


def in_pairs(memory: AttentionCache) -> AttentionCache:
    """int8 keys and values `[..., width]` as int16 `[..., width / 2]`, others as they are.

    Tensor core operands are loaded 16 bits at a time: bytes would be shuffled one by one.
    """
    arrays = memory.keys, memory.own_values
    if memory.keys.dtype != jnp.int8 or any(x.shape[-1] % 2 for x in arrays):
        return memory
    pairs = [x.reshape(*x.shape[:-1], -1, 2) for x in arrays]
    keys, values = (lax.bitcast_convert_type(x, jnp.int16) for x in pairs)
    return dataclasses.replace(memory, keys=keys, values=values)


def without_pairs(memory: AttentionCache) -> AttentionCache:
    """The inverse of `in_pairs`."""
    if parts_of(memory) == 1:
        return memory
    arrays = memory.keys, memory.own_values
    bytes_ = [lax.bitcast_convert_type(x, jnp.int8) for x in arrays]
    keys, values = (x.reshape(*x.shape[:-2], -1) for x in bytes_)
    return dataclasses.replace(memory, keys=keys, values=values)


def parts_of(memory: AttentionCache) -> int:
    """The number of parts of the columns where keys and values are loaded: even and odd ones."""
    return 2 if memory.keys.dtype == jnp.int16 else 1


def in_parts(x: Array, parts: int) -> list[Array]:
    """Columns `i, i + parts, ...` of `[..., columns]` for each part `i`."""
    if parts == 1:
        return [x]
    return list(jnp.unstack(x.reshape(*x.shape[:-1], -1, parts), axis=-1))


def concatenated(parts: list[Array]) -> Array:
    """The inverse of `in_parts`, in two dimensions: `[rows, columns]`."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, axis=2).reshape(parts[0].shape[0], -1)


def unpack_int8(pairs: Array, dtype: jnp.dtype) -> list[Array]:
    """The first and the second int8 of each int16, in a floating-point dtype of 16 bits."""
    if interpreted():
        return [x.astype(dtype) for x in ((pairs & 0x7F) - (pairs & 0x80), pairs >> 8)]

    def twice(x: float) -> int:
        """The bits of a number in both halves of a register."""
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


def broadcast_along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
    """`[n]`, broadcast to a shape in which it runs along an axis."""
    return jnp.broadcast_to(x.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def locate(
    pages: jax.Ref | None, sequence: Array, index: Array, length: int
) -> tuple[Array, Array]:
    """Page and place in the page of positions of a sequence, in a kernel.

    Args:
      pages: int32 `[sequences, pages]`, or None, as in `Batch.pages_of`.
      sequence: index of the sequence.
      index: positions, any shape; those outside of the pages are masked by the caller.
      length: of a page.
    """
    if pages is None:
        return sequence, index
    count = pages.shape[1]
    if count == 1:
        return pages[sequence, 0], index
    nth = jnp.clip(index // length, 0, count - 1)
    page = plgpu.load(pages.at[sequence, nth]) if nth.ndim else pages[sequence, nth]
    return page, index - nth * length


class SoftmaxState(NamedTuple):
    """The online softmax of some queries over the keys so far.

    Attributes:
      m: the largest score, float32 `[rows]`.
      total: the sum of weights relative to it, float32 `[rows]`.
      acc: the weighted sum of values, float32 `[rows, columns]` for each part of the columns.
    """

    m: Array
    total: Array
    acc: list[Array]

    @staticmethod
    def empty(rows: int, columns: int, parts: int) -> "SoftmaxState":
        """The state before the first key."""
        return SoftmaxState(
            jnp.full(rows, MASK_VALUE, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            in_parts(jnp.zeros((rows, columns), jnp.float32), parts),
        )


def scores_of(products: Array, config: AttentionConfig, scale: float) -> Array:
    """Scores to the base 2."""
    if config.softcap is None:
        return products * (scale * LOG2_E)
    return config.softcap * LOG2_E * jnp.tanh(products * (scale / config.softcap))


def load_kv(
    kv: AttentionCache, at: tuple[Array, Array, Array], mask: Array | None
) -> AttentionCache:
    """Loads keys, values and their scales as they are stored, in a kernel.

    Args:
      kv: of references, perhaps `in_pairs`.
      at: page or pages `[keys]`, head, and places in the page `[keys]`.
      mask: bool `[keys]`: the keys to load; None: all.

    Returns:
      keys and values `[keys, columns]`, scales `[keys]`.
    """
    page, head, position = at
    parts = parts_of(kv)

    def load(ref: ArrayRef, index: tuple, mask: Array | None) -> Array:
        if mask is None:
            return plgpu.load(ref.at[index])
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    def tile_of(ref: ArrayRef) -> Array:
        width = ref.shape[-1]
        shape = (len(position), padded(width * parts, parts) // parts)
        column, tile_mask = broadcast_along(jnp.arange(shape[1]), shape, 1), None
        if mask is not None or shape[1] != width:
            tile_mask = column < width
            if mask is not None:
                tile_mask &= broadcast_along(mask, shape, 0)
        of_row = broadcast_along(page, shape, 0) if page.ndim else page
        return load(ref, (of_row, head, broadcast_along(position, shape, 0), column), tile_mask)

    def scale_of(ref: ArrayRef | None) -> Array | None:
        return None if ref is None else load(ref, (page, head, position), mask)

    return AttentionCache(
        tile_of(kv.keys),
        tile_of(kv.own_values),
        scale_of(kv.key_scale),
        scale_of(kv.value_scale),
    )


def softmax_update(
    state: SoftmaxState,
    queries: list[Array],
    kv: AttentionCache,
    seen: Array | None,
    score: Callable[[Array], Array],
) -> SoftmaxState:
    """Attends to some more keys, in a kernel.

    Args:
      state: of the keys before.
      queries: `[rows, columns]` for each part of the columns.
      kv: keys and values, from `load_kv`.
      seen: mask, bool `[rows, keys]` or `[1, keys]`; None: all keys are seen.
      score: of products of queries and keys.
    """
    dtype = queries[0].dtype

    def in_dtype(x: Array) -> list[Array]:
        return [x.astype(dtype)] if len(queries) == 1 else unpack_int8(x, dtype)

    contract_columns = (((1,), (1,)), ((), ()))
    products = reduce(
        add,
        (
            lax.dot_general(x, keys, contract_columns, preferred_element_type=jnp.float32)
            for x, keys in zip(queries, in_dtype(kv.keys), strict=True)
        ),
    )
    if kv.key_scale is not None:
        products *= kv.key_scale[None]
    scores = score(products)
    if seen is not None:
        scores = jnp.where(seen, scores, MASK_VALUE)
    m = jnp.maximum(state.m, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - m[:, None])
    if seen is not None:
        weights = jnp.where(seen, weights, 0)
    rescale = jnp.exp2(state.m - m)
    total = state.total * rescale + jnp.sum(weights, axis=1)
    if kv.value_scale is not None:
        weights *= kv.value_scale[None]
    weights = weights.astype(dtype)
    acc = [
        x * rescale[:, None] + jnp.dot(weights, tile, preferred_element_type=jnp.float32)
        for x, tile in zip(state.acc, in_dtype(kv.own_values), strict=True)
    ]
    return SoftmaxState(m, total, acc)
