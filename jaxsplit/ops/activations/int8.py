"""Activations quantized to 8 bits: as in ggml's Q8_1, 32 neighbours share a scale."""

import dataclasses
from collections.abc import Sequence

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
"""Values whose codes a thread loads at once."""

_GROUP = 8  # slices that fill all banks of a GPU's L1 cache


def bank_swizzle(slice_: Array) -> Array:
    """Where a slice of a row is stored; the function is its own inverse.

    Neighbouring threads load slices that are 1, 2, 4 or 8 apart. Unswizzled, eight of these would
    share one or a few banks, and their loads would be serialized.
    """
    return slice_ ^ ((slice_ >> 3) & (_GROUP - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Rows:
    """Rows of activations in 8 bits.

    Attributes:
      words: four neighbouring codes each, uint32 `[rows, in / 4]`, in the order of `bank_swizzle`;
        rows are padded to whole groups of it.
      scale: float32 `[rows, in / 32]`.
      sums: of 32 values each, float32 `[rows, in / 32]`.
      half_sums: of 16 values each, float32 `[rows, in / 16]`.
      rms: see `RMSStatistics`; None: nothing is left to divide.
    """

    words: Array
    scale: Array
    sums: Array
    half_sums: Array
    rms: RMSStatistics | None = None

    def dequantized(self) -> Array:
        """float32 `[rows, in]`."""
        rows, blocks = self.scale.shape
        slices = self.words.reshape(rows, -1, SLICE // 4)[:, bank_swizzle(np.arange(2 * blocks))]
        codes = lax.bitcast_convert_type(slices, jnp.int8).reshape(rows, blocks, BLOCK)
        x = (codes.astype(jnp.float32) * self.scale[..., None]).reshape(rows, -1)
        return x if self.rms is None else x * self.rms.inverse[:, None]


@dataclasses.dataclass(frozen=True)
class Int8Layout:
    """Codes of 8 bits with scales and sums: `Int8Rows`."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        blocks = columns // BLOCK
        words = jax.ShapeDtypeStruct((rows, _padded(columns) // 4), jnp.uint32)
        return [
            words,
            *(jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (blocks, blocks, 2 * blocks)),
        ]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        # The deferred division scales a whole row, which does not change its codes.
        words, *of_blocks = _quantize_block(x)
        words = lax.bitcast_convert_type(words, jnp.uint32)
        half = block[..., None] * 2 + jnp.arange(2)
        word = bank_swizzle(half)[..., None] * (SLICE // 4) + jnp.arange(SLICE // 4)
        mask = broadcast_leading(mask, word.shape)
        # Every thread stores the scale and sums of its words, the same as its neighbours. If the
        # compiler saw that they are the same, it would move them between threads, with barriers.
        places = word, half >> 1, half >> 1, half
        for ref, at, y in zip(refs, places, (words, *of_blocks), strict=True):
            at, y = broadcast_leading(at, word.shape), broadcast_leading(y, word.shape)
            plgpu.store(ref.at[row, at], y, mask=mask)

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> Int8Rows:
        return Int8Rows(*arrays, rms)

    def serves(self, other: ActivationLayout) -> bool:
        return self == other


def _quantize_block(x: Array) -> tuple[Array, Array, Array, Array]:
    """`[..., 2, 4, 4]` to words `[..., 2, 4]`, scales and sums `[...]`, and sums of halves `[...,
    2]`: the largest magnitude becomes 127."""
    scale = largest_magnitude(x, -1, -1, -1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None, None, None]
    # The bound changes nothing. It keeps compilers from fusing this product with the sum in
    # `_to_nearest` into one FMA, which rounds once and here and there to another code.
    codes = _to_nearest(jnp.minimum(x * inverse, 127))
    bytes_ = (codes & 255) << jnp.broadcast_to(8 * jnp.arange(4, dtype=jnp.int32), codes.shape)
    counts = jnp.sum(jnp.sum(codes, axis=-1), axis=-1)
    half_sums = counts.astype(jnp.float32) * scale[..., None]
    return jnp.sum(bytes_, axis=-1), scale, jnp.sum(half_sums, axis=-1), half_sums


def largest_magnitude(x: Array, *axes: int, keepdims: bool = False) -> Array:
    """The largest magnitude of float32 along axes, one after the other; NaN if one of them is NaN.

    In Triton, the maximum of a number and a NaN is the number, so that a NaN would become the code
    of some number. Bits of magnitudes are in the order of the magnitudes, those of NaN the largest.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    for axis in axes:
        bits = jnp.max(bits, axis=axis, keepdims=keepdims)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _to_nearest(x: Array) -> Array:
    """The nearest int32 of float32 below 2^22, of two the even one: what a sum adds to the bits of
    a number whose last bit is 1."""
    number = np.float32(1.5 * 2**23)
    return lax.bitcast_convert_type(x + number, jnp.int32) - number.view(np.int32)


def quantize_rows(x: Array) -> Int8Rows:
    """Quantizes `[rows, in]`."""
    rows, columns = x.shape
    blocks = x.astype(jnp.float32).reshape(rows, -1, 2, SLICE // 4, 4)
    words, scale, sums, half_sums = _quantize_block(blocks)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(rows, -1, SLICE // 4)
    words = jnp.pad(words, ((0, 0), (0, (_padded(columns) - columns) // SLICE), (0, 0)))
    words = words[:, bank_swizzle(np.arange(words.shape[1]))].reshape(rows, -1)
    return Int8Rows(words, scale, sums, half_sums.reshape(rows, -1))


def _padded(columns: int) -> int:
    """Values of a row, padded to whole groups of `bank_swizzle`."""
    return -(-columns // (_GROUP * SLICE)) * _GROUP * SLICE
