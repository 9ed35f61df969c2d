"""Activations permuted to the order of packed weights.

The small-M GEMM loads codes as uint16, pairs of bytes. It unpacks one code of each pair at a time
into a tensor core operand. Neighbors in this operand are not neighbors in the matrix row, so the
activations are permuted to match.
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
from jaxsplit.pallas import ArrayRef, plgpu
from jaxsplit.quant.qtensor import PlaneLayout, QTensor

SUM_SIZES = (BLOCK // 2, BLOCK)
"""Supported numbers of weights that share a minimum; it multiplies the sum of their activations."""


def packing_of(layout: PlaneLayout) -> tuple[int, int]:
    """The codes per byte of the narrowest plane, and the byte pairs per chunk in it. Of a trellis,
    whose pairs of bytes are states: as if these held codes."""
    codes_per_byte = 8 // (layout.bits[0] if layout.trellis else min(layout.bits))
    return codes_per_byte, layout.chunk // codes_per_byte // 2


def keeps_places(layout: PlaneLayout) -> bool:
    """Whether the GEMM leaves codes at their place in a byte: see `PackedRows.values`."""
    return len(layout.bits) == 1 and layout.table is None and not layout.trellis


def group_size(w: QTensor, plane: ArrayRef) -> int:
    """The weights per group of a plane of scales or minima, `[..., out, groups]`."""
    return w.shape[-1] // plane.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of activations, permuted like the codes of the matrices that they multiply.

    Attributes:
      values: for each order, bfloat16 `[codes per byte pair, rows, byte pairs]`. The GEMM does not
        shift the codes of a single plane without a table down to bit 0: the activations are divided
        by that power of two instead.
      sums: for each order, sums over the groups that share a minimum, bfloat16 `[rows, groups]`;
        None: no minima.
      rms: statistics of a deferred normalization; None: the rows are final.
      layout: the orders.
    """

    values: tuple[Array, ...]
    sums: tuple[Array | None, ...]
    rms: RMSStatistics | None
    layout: "PackedLayout" = dataclasses.field(metadata={"static": True})

    def for_matrix(self, w: QTensor) -> tuple[Array, Array | None]:
        """Values and sums in the order of a matrix."""
        i = self.layout.orders.index(_order_of(w))
        return self.values[i], self.sums[i]


def _order_of(w: QTensor) -> tuple[PlaneLayout, int | None]:
    """The order of a matrix, as in `PackedLayout`."""
    return w.layout, None if w.minimum is None else group_size(w, w.minimum)


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """The layout of `PackedRows`, for some matrices.

    Attributes:
      orders: the distinct orders: the layout of the planes, and the number of weights that share a
        minimum or None.
    """

    orders: tuple[tuple[PlaneLayout, int | None], ...]

    @staticmethod
    def of(weights: Sequence[QTensor]) -> "PackedLayout":
        """The orders of some matrices."""
        return PackedLayout(tuple(dict.fromkeys(map(_order_of, weights))))

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        shapes = []
        for layout, sum_size in self.orders:
            codes_per_pair = 2 * packing_of(layout)[0]
            shapes.append((codes_per_pair, rows, columns // codes_per_pair))
            if sum_size:
                shapes.append((rows, columns // sum_size))
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        element, x = block_elements(block), x.astype(jnp.bfloat16)
        element_mask, following = broadcast_leading(mask, element.shape), iter(refs)
        for layout, sum_size in self.orders:
            _, pairs_per_chunk = packing_of(layout)
            chunk, offset = divmod_pow2(element, layout.chunk)
            code, offset = divmod_pow2(offset, 2 * pairs_per_chunk)  # index of the code in its byte
            pair, byte = divmod_pow2(offset, 2)
            index = (2 * code + byte, row, chunk * pairs_per_chunk + pair)
            divided = _times_pow2(x, -layout.bits[0] * code) if keeps_places(layout) else x
            plgpu.store(next(following).at[index], divided, mask=element_mask)
            if sum_size:
                sums = jnp.sum(jnp.sum(x.astype(jnp.float32), axis=-1), axis=-1)
                group = block[..., None] * 2 + jnp.arange(2)
                if sum_size == BLOCK:
                    sums, group = jnp.sum(sums, axis=-1), block
                group_mask = broadcast_leading(mask, group.shape)
                sums = sums.astype(jnp.bfloat16)
                plgpu.store(next(following).at[row, group], sums, mask=group_mask)

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> PackedRows:
        following = iter(arrays)
        values, sums = zip(
            *(
                (next(following), next(following) if sum_size else None)
                for _, sum_size in self.orders
            ),
            strict=True,
        )
        return PackedRows(values, sums, rms, self)

    def serves(self, other: ActivationLayout) -> bool:
        return isinstance(other, PackedLayout) and set(other.orders) <= set(self.orders)


def _times_pow2(x: Array, exponent: Array) -> Array:
    """`x * 2**exponent`, exactly, for exponents of normal float32 powers."""
    power = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    return (x.astype(jnp.float32) * power).astype(x.dtype)
