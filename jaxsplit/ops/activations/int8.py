"""Activations quantized to 8 bits: as in ggml's Q8_1, 32 neighbors share a scale."""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.ops.activations.layout import (
    BLOCK,
    ActivationLayout,
    RMSStatistics,
    broadcast_leading,
)
from jaxsplit.pallas import plgpu

SLICE = 16
"""Codes of a slice, the 16 bytes that a thread loads with one instruction."""

_Index = TypeVar("_Index", Array, np.ndarray)

_BANK_SLICES = 8  # slices that cover all 32 banks of 4 bytes


def bank_swizzle(slice_: _Index) -> _Index:
    """The position at which a slice of a row is stored; the function is its own inverse.

    Neighboring threads load slices that are 1, 2, 4 or 8 apart. Without the swizzle, eight such
    loads would hit one or a few banks of the L1 cache, and bank conflicts would serialize them.
    """
    return slice_ ^ ((slice_ >> 3) & (_BANK_SLICES - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Rows of activations quantized to int8: `x = scale * code`.

    Attributes:
      codes: int8 codes, four neighbors per uint32: `[rows, in / 4]`, padded to a multiple of 32.
        `bank_swizzle` permutes the slices of a row.
      scale: float32 `[rows, in / 32]`.
      sums: sum of each block of 32 values, float32 `[rows, in / 32]`.
      half_sums: sum of each half block, float32 `[rows, in / 16]`.
      rms: statistics of a deferred normalization; None: the rows are final.
    """

    codes: Array
    scale: Array
    sums: Array
    half_sums: Array
    rms: RMSStatistics | None = None

    def dequantized(self) -> Array:
        """The rows as float32 `[rows, in]`, normalized."""
        rows, blocks = self.scale.shape
        slices = self.codes.reshape(rows, -1, SLICE // 4)[:, bank_swizzle(np.arange(2 * blocks))]
        codes = lax.bitcast_convert_type(slices, jnp.int8).reshape(rows, blocks, BLOCK)
        x = (codes.astype(jnp.float32) * self.scale[..., None]).reshape(rows, -1)
        return x if self.rms is None else x * self.rms.inverse[:, None]


@dataclasses.dataclass(frozen=True)
class Int8Layout:
    """The layout of `Int8Rows`."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        blocks = columns // BLOCK
        codes = jax.ShapeDtypeStruct((rows, _padded_columns(columns) // 4), jnp.uint32)
        return [
            codes,
            *(jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (blocks, blocks, 2 * blocks)),
        ]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        # A deferred normalization scales a whole row, which leaves its codes unchanged.
        codes, *block_values = _quantize_block(x)
        codes = lax.bitcast_convert_type(codes, jnp.uint32)
        half = block[..., None] * 2 + jnp.arange(2)  # half a block is a slice
        column = bank_swizzle(half)[..., None] * (SLICE // 4) + jnp.arange(SLICE // 4)
        shape, mask = column.shape, broadcast_leading(mask, column.shape)
        # Every thread stores the scale and sums of its codes, although its neighbors store the same
        # values. Stored once per block, they would have to change threads, through shared memory
        # and with barriers.
        columns = column, half >> 1, half >> 1, half
        for ref, index, y in zip(refs, columns, (codes, *block_values), strict=True):
            index, y = broadcast_leading(index, shape), broadcast_leading(y, shape)
            plgpu.store(ref.at[row, index], y, mask=mask)

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> Int8Rows:
        codes, scale, sums, half_sums = arrays
        return Int8Rows(codes, scale, sums, half_sums, rms)

    def serves(self, other: ActivationLayout) -> bool:
        return self == other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Blocks:
    """`Int8Rows`, block by block: as operands of tensor cores, whose rows are neighbors.

    Attributes:
      codes: four neighbors per uint32, a word of the first half of a block beside one of the second
        half: `[in / 32, rows, 4, 2]`.
      scale: float32 `[in / 32, rows]`.
      sums: sum of each block of 32 values, float32 `[in / 32, rows]`.
      half_sums: sum of each half block, float32 `[in / 16, rows]`.
      rms: statistics of a deferred normalization; None: the rows are final.
    """

    codes: Array
    scale: Array
    sums: Array
    half_sums: Array
    rms: RMSStatistics | None = None

    def dequantized(self) -> Array:
        """The rows as float32 `[rows, in]`, normalized."""
        words = jnp.moveaxis(self.codes, (1, 3), (0, 2))
        codes = lax.bitcast_convert_type(words, jnp.int8).reshape(*words.shape[:2], BLOCK)
        x = (codes.astype(jnp.float32) * self.scale.T[..., None]).reshape(len(words), -1)
        return x if self.rms is None else x * self.rms.inverse[:, None]


@dataclasses.dataclass(frozen=True)
class Int8BlockLayout:
    """The layout of `Int8Blocks`, which kernels in CUDA C++ store."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        blocks = columns // BLOCK
        codes = jax.ShapeDtypeStruct((blocks, rows, SLICE // 4, 2), jnp.uint32)
        return [
            codes,
            *(jax.ShapeDtypeStruct((n, rows), jnp.float32) for n in (blocks, blocks, 2 * blocks)),
        ]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        raise NotImplementedError("Triton kernels store rows one by one")

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> Int8Blocks:
        codes, scale, sums, half_sums = arrays
        return Int8Blocks(codes, scale, sums, half_sums, rms)

    def serves(self, other: ActivationLayout) -> bool:
        return self == other


def _quantize_block(x: Array) -> tuple[Array, Array, Array, Array]:
    """Quantizes blocks of 32 so that the largest magnitude of each becomes 127.

    Args:
      x: float32 `[..., 2, 4, 4]`.

    Returns:
      codes, four per int32 `[..., 2, 4]`; float32 scales `[...]`, sums `[...]` and sums of half
      blocks `[..., 2]`.
    """
    scale = largest_magnitude(x, -1, -1, -1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None, None, None]
    # The minimum changes no value. It keeps compilers from contracting this product and the sum in
    # `_round_to_int32` into one FMA, which rounds only once and sometimes to another code.
    codes = _round_to_int32(jnp.minimum(x * inverse, 127))
    bytes_ = (codes & 255) << jnp.broadcast_to(8 * jnp.arange(4, dtype=jnp.int32), codes.shape)
    code_sums = jnp.sum(jnp.sum(codes, axis=-1), axis=-1)
    half_sums = code_sums.astype(jnp.float32) * scale[..., None]
    return jnp.sum(bytes_, axis=-1), scale, jnp.sum(half_sums, axis=-1), half_sums


def largest_magnitude(x: Array, *axes: int, keepdims: bool = False) -> Array:
    """The largest magnitude of float32 along axes, reduced one after the other; NaN propagates.

    Triton's maximum of a number and a NaN is the number, so a NaN would be lost. The bit patterns
    of magnitudes, compared as integers, have the order of the magnitudes, with NaN above infinity.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    for axis in axes:
        bits = jnp.max(bits, axis=axis, keepdims=keepdims)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _round_to_int32(x: Array) -> Array:
    """Rounds float32 of magnitudes below 2^22 to int32, half to even.

    The last mantissa bit of 1.5 * 2^23 counts 1. Adding it rounds `x` to an integer, which the
    difference of the bit patterns recovers.
    """
    magic = np.float32(1.5 * 2**23)
    return lax.bitcast_convert_type(x + magic, jnp.int32) - magic.view(np.int32)


def quantize_rows(x: Array) -> Int8Rows:
    """Quantizes `[rows, in]`, `in` a multiple of 32, with XLA."""
    rows, columns = x.shape
    blocks = x.astype(jnp.float32).reshape(rows, -1, 2, SLICE // 4, 4)
    codes, scale, sums, half_sums = _quantize_block(blocks)
    codes = lax.bitcast_convert_type(codes, jnp.uint32).reshape(rows, -1, SLICE // 4)
    codes = jnp.pad(codes, ((0, 0), (0, (_padded_columns(columns) - columns) // SLICE), (0, 0)))
    codes = codes[:, bank_swizzle(np.arange(codes.shape[1]))].reshape(rows, -1)
    return Int8Rows(codes, scale, sums, half_sums.reshape(rows, -1))


def _padded_columns(columns: int) -> int:
    """Columns, padded so that `bank_swizzle` maps the slices of a row onto themselves."""
    return -(-columns // (_BANK_SLICES * SLICE)) * _BANK_SLICES * SLICE
