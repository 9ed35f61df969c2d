"""Activations rounded to 8 bits: as in ggml, 32 neighbours share a scale."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plgpu

from jaxsplit.quant.late import BLOCK, RootMeanSquare, like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations in 8 bits.

    Attributes:
      words: four neighbouring codes each, uint32 `[rows, in / 4]`.
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
        codes = lax.bitcast_convert_type(self.words, jnp.int8)
        blocks = codes.reshape(*self.scale.shape, BLOCK).astype(jnp.float32)
        x = (blocks * self.scale[..., None]).reshape(len(self.scale), -1)
        return x if self.mean is None else x * self.mean.inverse[:, None]


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Reads rows in 8 bits."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        """Of words, scales, sums and those of halves."""
        blocks = columns // BLOCK
        words = jax.ShapeDtypeStruct((rows, columns // 4), jnp.uint32)
        return [
            words,
            *(jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (blocks, blocks, 2 * blocks)),
        ]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, inside: Array, x: Array
    ) -> None:
        """Rounds blocks: see `Reader`. What divides all of a row does not change the codes."""
        half = block[..., None] * 2 + jnp.arange(2)
        word = half[..., None] * (BLOCK // 8) + jnp.arange(BLOCK // 8)
        words, *results = _round_block(x)
        results = [lax.bitcast_convert_type(words, jnp.uint32), *results]
        for ref, at, y in zip(refs, (word, block, block, half), results, strict=True):
            plgpu.store(ref.at[row, at], y, mask=like(inside, at.shape))

    def of(self, stored: Sequence[Array], mean: RootMeanSquare | None) -> Rounded:
        """Of these shapes."""
        return Rounded(*stored, mean)


def _round_block(x: Array) -> tuple[Array, Array, Array, Array]:
    """`[..., 2, 4, 4]` to words `[..., 2, 4]`, scales and sums `[...]`, and sums of halves `[...,
    2]`: the largest magnitude becomes 127."""
    scale = jnp.max(jnp.max(jnp.max(jnp.abs(x), axis=-1), axis=-1), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None, None, None]
    codes = jnp.floor(x * inverse + 0.5).astype(jnp.int32)
    bytes_ = (codes & 255) << jnp.broadcast_to(8 * jnp.arange(4, dtype=jnp.int32), codes.shape)
    counts = jnp.sum(jnp.sum(codes, axis=-1), axis=-1)
    half_sums = counts.astype(jnp.float32) * scale[..., None]
    return jnp.sum(bytes_, axis=-1), scale, jnp.sum(half_sums, axis=-1), half_sums


def round_rows(x: Array) -> Rounded:
    """Rounds `[rows, in]`."""
    rows = len(x)
    blocks = x.astype(jnp.float32).reshape(rows, -1, 2, BLOCK // 8, 4)
    words, scale, sums, half_sums = _round_block(blocks)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(rows, -1)
    return Rounded(words, scale, sums, half_sums.reshape(rows, -1))
