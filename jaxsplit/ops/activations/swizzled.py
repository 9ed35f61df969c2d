"""Activations in 16 bits, as a kernel in CUDA C++ copies them to shared memory for tensor cores."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.ops.activations.layout import (
    ActivationLayout,
    RMSStatistics,
    block_elements,
    broadcast_leading,
)
from jaxsplit.pallas import plgpu

COLUMNS = 64
"""Columns of a block: 128 bytes of a row, which cover all banks of shared memory once."""


def _column_order() -> np.ndarray:
    """Of each of the 16 places of an operand, the column: a thread of four has places 2 i, 2 i + 1,
    2 i + 8 and 2 i + 9, and weights of four neighbors."""
    return np.arange(16).reshape(4, 2, 2).swapaxes(0, 1).reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SwizzledRows:
    """Rows of activations, block by block.

    Attributes:
      values: bfloat16 or float16 `[in / 64, rows, 64]`. Within 16 neighbors, values are in the
        order in which threads have operands; pieces of 16 bytes are swizzled, so that those of
        eight rows are in all banks: piece `i` of row `r` is at place `i ^ (r % 8)`.
      rms: statistics of a deferred normalization; None: the rows are final.
    """

    values: Array
    rms: RMSStatistics | None = None

    def array(self) -> Array:
        """The rows as float32 `[rows, in]`, normalized."""
        blocks, rows, _ = self.values.shape
        place = np.arange(8) ^ (np.arange(rows) % 8)[:, None]
        pieces = self.values.reshape(blocks, rows, 8, 8)[:, np.arange(rows)[:, None], place]
        x = pieces.reshape(blocks, rows, 4, 16)[..., np.argsort(_column_order())]
        x = jnp.moveaxis(x, 1, 0).reshape(rows, -1).astype(jnp.float32)
        return x if self.rms is None else x * self.rms.inverse[:, None]


@dataclasses.dataclass(frozen=True)
class SwizzledLayout:
    """The layout of `SwizzledRows`.

    Attributes:
      dtype: bfloat16 or float16.
    """

    dtype: jnp.dtype

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((columns // COLUMNS, rows, COLUMNS), self.dtype)]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        column = block_elements(block)
        piece = column // 16 % 4 * 2 + column // 2 % 2
        place = (piece ^ row % 8) * 8 + column // 4 % 4 * 2 + column % 2
        mask = broadcast_leading(mask, column.shape)
        plgpu.store(refs[0].at[column // COLUMNS, row, place], x.astype(self.dtype), mask=mask)

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> SwizzledRows:
        [values] = arrays
        return SwizzledRows(values, rms)

    def serves(self, other: ActivationLayout) -> bool:
        return self == other
