"""Rows in the order in which tiles of quantized matrices are multiplied with them.

A tile is made of the codes at one place of each pair of bytes, whose weights lie apart in a row.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.ops.activations.deferred import BLOCK, RootMeanSquare, block_elements, like
from jaxsplit.ops.matmul.triton_gemv_int8 import split
from jaxsplit.pallas import plgpu
from jaxsplit.quant.qtensor import Form, QTensor

SUMMED = (BLOCK // 2, BLOCK)
"""Activations that have a sum in common: as many weights may share a minimum."""


def pieces_of(form: Form) -> tuple[int, int]:
    """Codes in a byte of the narrowest plane, and pairs of bytes of a chunk in it."""
    pieces = 8 // min(form.bits)
    return pieces, form.chunk // pieces // 2


def group_length(w: QTensor, entries: Array | jax.Ref) -> int:
    """Weights that share one of the entries `[..., out, groups]`."""
    return w.shape[-1] // entries.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ordered:
    """Rows by where the weights are that they are multiplied with.

    Attributes:
      pairs: bfloat16 `[places in a pair of bytes, rows, pairs]` for each order. Those of a form
        with one plane are divided by the power of two that a code is worth at its place in a byte.
      sums: of the groups that share a minimum, bfloat16 `[rows, groups]`; None: there are none.
      mean: by the root of which products are to be divided; None: they are not.
      ordering: what they are for.
    """

    pairs: tuple[Array, ...]
    sums: tuple[Array | None, ...]
    mean: RootMeanSquare | None
    ordering: "Ordering" = dataclasses.field(metadata={"static": True})

    def for_matrix(self, w: QTensor) -> tuple[Array, Array | None]:
        """Pairs and sums in the order of a matrix."""
        i = self.ordering.orders.index(_order(w))
        return self.pairs[i], self.sums[i]


def _order(w: QTensor) -> tuple[Form, int | None]:
    """What decides about the order of a matrix: its form, and the weights that share a minimum."""
    return w.form, None if w.minimum is None else group_length(w, w.minimum)


@dataclasses.dataclass(frozen=True)
class Ordering:
    """Reads rows in the orders of some matrices."""

    orders: tuple[tuple[Form, int | None], ...]

    @staticmethod
    def for_matrices(weights: Sequence[QTensor]) -> "Ordering":
        """The orders of these."""
        return Ordering(tuple(dict.fromkeys(map(_order, weights))))

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        """Of pairs and perhaps of sums, order by order."""
        shapes = []
        for form, length in self.orders:
            places = 2 * pieces_of(form)[0]
            shapes.append((places, rows, columns // places))
            if length:
                shapes.append((rows, columns // length))
        return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, inside: Array, x: Array
    ) -> None:
        """Stores blocks in all orders: see `Reader`."""
        element, x = block_elements(block), x.astype(jnp.bfloat16)
        exists, following = like(inside, element.shape), iter(refs)
        for form, length in self.orders:
            pieces, per_chunk = pieces_of(form)
            chunk, at = split(element, form.chunk)
            piece, at = split(at, 2 * per_chunk)
            pair, byte = split(at, 2)
            place = (2 * piece + byte, row, chunk * per_chunk + pair)
            divided = _times_power(x, -form.bits[0] * piece) if len(form.bits) == 1 else x
            plgpu.store(next(following).at[place], divided, mask=exists)
            if length:
                sums = jnp.sum(jnp.sum(x.astype(jnp.float32), axis=-1), axis=-1)
                group = block[..., None] * 2 + jnp.arange(2)
                if length == BLOCK:
                    sums, group = jnp.sum(sums, axis=-1), block
                mask = like(inside, group.shape)
                plgpu.store(next(following).at[row, group], sums.astype(jnp.bfloat16), mask=mask)

    def of(self, stored: Sequence[Array], mean: RootMeanSquare | None) -> Ordered:
        """Of these shapes."""
        following = iter(stored)
        pairs, sums = zip(
            *((next(following), next(following) if length else None) for _, length in self.orders),
            strict=True,
        )
        return Ordered(pairs, sums, mean, self)


def _times_power(x: Array, exponent: Array) -> Array:
    """Values times powers of two, by their exponents, which are at least -126."""
    power = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    return (x.astype(jnp.float32) * power).astype(x.dtype)
