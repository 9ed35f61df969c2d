"""Activations rounded to 8 bits: as in ggml, 32 neighbours share a scale."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.ops.activations.deferred import BLOCK, RootMeanSquare, like
from jaxsplit.pallas import plgpu

SLICE = 16
"""Values whose codes a thread reads at once."""

_GROUP = 8  # slices, as many as the banks of a GPU's cache hold side by side


def place_of(slice_: Array) -> Array:
    """Where a slice of a row lies; the place of that place is the slice.

    Neighbouring threads read slices that are 1, 2, 4 or 8 apart. Eight of these would lie in one
    or a few of the banks and be read one after another; as they lie, they are in all of them.
    """
    return slice_ ^ ((slice_ >> 3) & (_GROUP - 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations in 8 bits.

    Attributes:
      words: four neighbouring codes each, uint32 `[rows, in / 4]`, in the order of `place_of`; rows
        are filled up to whole groups of it.
      scale: float32 `[rows, in / 32]`.
      sums: of 32 values each, likewise.
      half_sums: of 16 values each, `[rows, in / 16]`.
      mean: by the root of which products are to be divided; None: they are not.
    """

    words: Array
    scale: Array
    sums: Array
    half_sums: Array
    mean: RootMeanSquare | None = None

    def dequantized(self) -> Array:
        """float32 `[rows, in]`."""
        rows, blocks = self.scale.shape
        slices = self.words.reshape(rows, -1, SLICE // 4)[:, place_of(np.arange(2 * blocks))]
        codes = lax.bitcast_convert_type(slices, jnp.int8).reshape(rows, blocks, BLOCK)
        x = (codes.astype(jnp.float32) * self.scale[..., None]).reshape(rows, -1)
        return x if self.mean is None else x * self.mean.inverse[:, None]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Reads rows in 8 bits."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        """Of words, scales, sums and those of halves."""
        blocks = columns // BLOCK
        words = jax.ShapeDtypeStruct((rows, _filled(columns) // 4), jnp.uint32)
        return [
            words,
            *(jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (blocks, blocks, 2 * blocks)),
        ]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, inside: Array, x: Array
    ) -> None:
        """Rounds blocks: see `Reader`. What divides all of a row does not change the codes."""
        words, *of_blocks = _round_block(x)
        words = lax.bitcast_convert_type(words, jnp.uint32)
        half = block[..., None] * 2 + jnp.arange(2)
        word = place_of(half)[..., None] * (SLICE // 4) + jnp.arange(SLICE // 4)
        inside = like(inside, word.shape)
        # Threads store what their words share, all of them, where they have it. Where the compiler
        # sees that blocks are neighbours, it hands them to other threads first, with barriers.
        places = word, half >> 1, half >> 1, half
        for ref, at, y in zip(refs, places, (words, *of_blocks), strict=True):
            at, y = like(at, word.shape), like(y, word.shape)
            plgpu.store(ref.at[row, at], y, mask=inside)

    def of(self, stored: Sequence[Array], mean: RootMeanSquare | None) -> Rounded:
        """Of these shapes."""
        return Rounded(*stored, mean)


def _round_block(x: Array) -> tuple[Array, Array, Array, Array]:
    """`[..., 2, 4, 4]` to words `[..., 2, 4]`, scales and sums `[...]`, and sums of halves `[...,
    2]`: the largest magnitude becomes 127."""
    scale = largest_magnitude(x, -1, -1, -1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None, None, None]
    # The bound, which changes nothing, keeps compilers from making this product and the sum in
    # `_to_nearest` one instruction, which rounds once: here and there to another code.
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


def round_rows(x: Array) -> Rounded:
    """Rounds `[rows, in]`."""
    rows, columns = x.shape
    blocks = x.astype(jnp.float32).reshape(rows, -1, 2, SLICE // 4, 4)
    words, scale, sums, half_sums = _round_block(blocks)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(rows, -1, SLICE // 4)
    words = jnp.pad(words, ((0, 0), (0, (_filled(columns) - columns) // SLICE), (0, 0)))
    words = words[:, place_of(np.arange(words.shape[1]))].reshape(rows, -1)
    return Rounded(words, scale, sums, half_sums.reshape(rows, -1))


def _filled(columns: int) -> int:
    """Values of a row with those that fill the last group of `place_of`."""
    return -(-columns // (_GROUP * SLICE)) * _GROUP * SLICE
