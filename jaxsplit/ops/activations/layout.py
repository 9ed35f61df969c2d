"""Activations, and the layouts in which kernels read them."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm.peers import PeerGroup
from jaxsplit.pallas import pl, plgpu

BLOCK = 32
"""Elements of a row that a kernel stores together."""

Addend = tuple[Array, Array | None, PeerGroup | None]
"""Parts of a matmul output, float32 `[parts, ..., in]`; the epochs under which the matmul has sent
them to the peers, int32 `[..., in]`, or None; and the peers over which they are summed, or None."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RMSStatistics:
    """RMS statistics of rows whose normalization is deferred: a matmul that reads them divides its
    result by `sqrt(mean_square + epsilon)`.

    Attributes:
      squares: partial sums of squares, float32 `[rows, parts]`.
      epsilon: added to the mean square.
      size: elements of a row.
    """

    squares: Array
    epsilon: float = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def inverse(self) -> Array:
        """The factor of each row, float32 `[rows]`."""
        return self._inverse(self.squares)

    def inverse_of(self, row: Array) -> Array:
        """The factors of some rows, inside a kernel: float32, shaped as `row`."""
        parts = self.squares.shape[1]
        part = jnp.arange(pl.next_power_of_2(parts))
        shape = (*row.shape, part.size)
        at = broadcast_leading(row, shape), jnp.broadcast_to(part, shape)
        return self._inverse(plgpu.load(self.squares.at[at], mask=at[1] < parts, other=0.0))

    def _inverse(self, squares: Array) -> Array:
        return lax.rsqrt(jnp.sum(squares, axis=-1) / self.size + self.epsilon)


class ActivationLayout(Protocol):
    """How a kernel reads rows of activations."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        """The arrays that hold `[rows, columns]`."""
        ...

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        """Stores blocks of a row, inside a kernel.

        Args:
          refs: of arrays of these shapes.
          row: index of the row.
          block: indices of the blocks, `[...]`.
          mask: which blocks exist, `[...]`.
          x: float32 `[..., 2, 4, 4]`.
        """

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> Any:
        """What the kernel takes: arrays of these shapes, perhaps not normalized yet."""

    def serves(self, other: "ActivationLayout") -> bool:
        """Whether rows in this layout are in the other one, too."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainRows:
    """Rows as an array.

    Attributes:
      array: `[rows, in]`.
      rms: see `RMSStatistics`; None: nothing is left to divide.
    """

    array: Array
    rms: RMSStatistics | None


@dataclasses.dataclass(frozen=True)
class PlainLayout:
    """An array of a dtype."""

    dtype: jnp.dtype

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((rows, columns), self.dtype)]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, mask: Array, x: Array
    ) -> None:
        element = block_elements(block)
        mask = broadcast_leading(mask, element.shape)
        plgpu.store(refs[0].at[row, element], x.astype(self.dtype), mask=mask)

    def wrap(self, arrays: Sequence[Array], rms: RMSStatistics | None) -> PlainRows:
        [array] = arrays
        return PlainRows(array, rms)

    def serves(self, other: ActivationLayout) -> bool:
        return self == other


@dataclasses.dataclass(frozen=True)
class Readers:
    """Who reads activations.

    Attributes:
      layouts: one for each kind of kernel; none: kernels do not read them.
      xla: XLA's programs read them as an array.
    """

    layouts: tuple[ActivationLayout, ...] = ()
    xla: bool = True

    def __or__(self, other: "Readers") -> "Readers":
        """The readers of both."""
        layouts = dict.fromkeys((*self.layouts, *other.layouts))
        return Readers(tuple(layouts), self.xla or other.xla)


XLA_ONLY = Readers()


@dataclasses.dataclass(frozen=True)
class Activations:
    """Activations `[..., in]`: as an array, and in the layouts that kernels read.

    Attributes:
      rows: `[..., in]`. They cost nothing where nothing reads them: XLA drops the operations. Only
        their shape and dtype, if the rows exist in their layouts only.
      layouts: in which the rows are stored.
      stored: the rows in each layout.
      unnormalized: float32 `[..., in]`, of which `rows` are the product with `rms.inverse`; None
        where `rms` is None.
      rms: statistics of `unnormalized` and of `stored`; None: both are final.
    """

    rows: Array | jax.ShapeDtypeStruct
    layouts: tuple[ActivationLayout, ...] = ()
    stored: tuple[Any, ...] = ()
    unnormalized: Array | None = None
    rms: RMSStatistics | None = None

    @property
    def array(self) -> Array:
        """The rows, unless they exist in their layouts only."""
        assert not isinstance(self.rows, jax.ShapeDtypeStruct), "stored in layouts only"
        return self.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in]`."""
        return self.rows.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the rows."""
        return self.rows.dtype


def rows_of(x: Array | Activations | jax.ShapeDtypeStruct) -> int:
    """The number of rows of `[..., in]`."""
    return math.prod(x.shape[:-1])


def block_elements(block: Array) -> Array:
    """Positions in the row of the elements of blocks `[...]`: `[..., 2, 4, 4]`."""
    half = block[..., None] * 2 + jnp.arange(2)
    quad = half[..., None] * (BLOCK // 8) + jnp.arange(BLOCK // 8)
    return quad[..., None] * 4 + jnp.arange(4)


def broadcast_leading(x: Array, shape: tuple[int, ...]) -> Array:
    """Broadcasts along trailing dimensions: `[n]` to `[n, ...]`, `[m, n]` to `[m, n, ...]`."""
    return jnp.broadcast_to(x.reshape(*x.shape, *[1] * (len(shape) - x.ndim)), shape)


def store_layouts(
    layouts: Sequence[ActivationLayout],
    refs: Sequence[jax.Ref],
    row: Array,
    block: Array,
    mask: Array,
    x: Array,
) -> None:
    """`ActivationLayout.store` in several layouts, given the arrays of all."""
    following = iter(refs)
    for layout in layouts:
        own = [next(following) for _ in layout.shapes(1, BLOCK)]
        layout.store(own, row, block, mask, x)


def wrap_layouts(
    layouts: Sequence[ActivationLayout],
    arrays: Sequence[Array],
    rows: int,
    columns: int,
    rms: RMSStatistics | None = None,
) -> tuple[Any, ...]:
    """`ActivationLayout.wrap` of several layouts, given the arrays of all."""
    following, wrapped = iter(arrays), []
    for layout in layouts:
        own = [next(following) for _ in layout.shapes(rows, columns)]
        wrapped.append(layout.wrap(own, rms))
    return tuple(wrapped)
