"""Activations in the order of packed weights.

The small-M GEMM unpacks one code of each pair of bytes at a time. Neighbouring codes of such a tile
belong to weights that are apart in the matrix row, so activations are permuted to match.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.ops.activations.layout import (
    BLOCK,
    ActivationLayout,
    RMSStatistics,
    block_elements,
    broadcast_leading,
)
from jaxsplit.ops.launch import divmod_pow2
from jaxsplit.pallas import plgpu
from jaxsplit.quant.qtensor import PlaneLayout, QTensor

SUMMED = (BLOCK // 2, BLOCK)
"""Activations that have a sum in common: as many weights may share a minimum."""


def pieces_of(layout: PlaneLayout) -> tuple[int, int]:
    """Codes in a byte of the narrowest plane, and pairs of bytes of a chunk in it."""
    pieces = 8 // min(layout.bits)
    return pieces, layout.chunk // pieces // 2


def group_length(w: QTensor, entries: Array | jax.Ref) -> int:
    """Weights that share one of the entries `[..., out, groups]`."""
    return w.shape[-1] // entries.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of activations, permuted as the codes of matrices are packed.

    Attributes:
      pairs: bfloat16 `[codes in a pair of bytes, rows, pairs]` for each order. Matrices with a
        single plane of codes are multiplied without shifting these down: the activations are
        divided by the power of two instead.
      sums: of the groups that share a minimum, bfloat16 `[rows, groups]`; None: no minima.
      rms: see `RMSStatistics`; None: nothing is left to divide.
      layout: the orders.
    """

    pairs: tuple[Array, ...]
    sums: tuple[Array | None, ...]
    rms: RMSStatistics | None
    layout: "PackedLayout" = dataclasses.field(metadata={"static": True})

    def for_matrix(self, w: QTensor) -> tuple[Array, Array | None]:
        """Pairs and sums in the order of a matrix."""
        i = self.layout.orders.index(_order(w))
        return self.pairs[i], self.sums[i]


def _order(w: QTensor) -> tuple[PlaneLayout, int | None]:
    """Identifies the order of a matrix: its layout, and how many weights share a minimum."""
    return w.layout, None if w.minimum is None else group_length(w, w.minimum)


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Rows in the orders of some matrices: `PackedRows`.

    Attributes:
      orders: of each matrix its layout, and the number of weights that share a minimum or None.
    """

    orders: tuple[tuple[PlaneLayout, int | None], ...]

    @staticmethod
    def of(weights: Sequence[QTensor]) -> "PackedLayout":
        """The orders of some matrices."""
        return PackedLayout(tuple(dict.fromkeys(map(_order, weights))))

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        shapes = []
        for layout, length in self.orders:
            places = 2 * pieces_of(layout)[0]
            shapes.append((places, rows, columns // places))
            if length:
                shapes.append((rows, columns // length))
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        element, x = block_elements(block), x.astype(jnp.bfloat16)
        exists, following = broadcast_leading(mask, element.shape), iter(refs)
        for layout, length in self.orders:
            pieces, per_chunk = pieces_of(layout)
            chunk, at = divmod_pow2(element, layout.chunk)
            piece, at = divmod_pow2(at, 2 * per_chunk)
            pair, byte = divmod_pow2(at, 2)
            place = (2 * piece + byte, row, chunk * per_chunk + pair)
            divided = _times_power(x, -layout.bits[0] * piece) if len(layout.bits) == 1 else x
            plgpu.store(next(following).at[place], divided, mask=exists)
            if length:
                sums = jnp.sum(jnp.sum(x.astype(jnp.float32), axis=-1), axis=-1)
                group = block[..., None] * 2 + jnp.arange(2)
                if length == BLOCK:
                    sums, group = jnp.sum(sums, axis=-1), block
                of_groups = broadcast_leading(mask, group.shape)
                sums = sums.astype(jnp.bfloat16)
                plgpu.store(next(following).at[row, group], sums, mask=of_groups)

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> PackedRows:
        following = iter(arrays)
        pairs, sums = zip(
            *((next(following), next(following) if length else None) for _, length in self.orders),
            strict=True,
        )
        return PackedRows(pairs, sums, rms, self)

    def serves(self, other: ActivationLayout) -> bool:
        return isinstance(other, PackedLayout) and set(other.orders) <= set(self.orders)


def _times_power(x: Array, exponent: Array) -> Array:
    """Values times powers of two, by their exponents, which are at least -126."""
    power = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    return (x.astype(jnp.float32) * power).astype(x.dtype)
