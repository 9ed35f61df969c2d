"""Rows that are not computed yet, and the kernel that computes them for the kernels that read them.

Between two products the residual stream is added to, normalized, an activation function is applied
or the parts of attention are joined: all of it fits into the kernel that stores rows as the next
product reads them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm import one_shot
from jaxsplit.context import KernelLaunch
from jaxsplit.ops.launch import launch_dependents
from jaxsplit.pallas import pl, plgpu

BLOCK = 32
"""Elements of a row that are stored together."""

_BLOCKS = one_shot.WIDTH // BLOCK  # in each program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RootMeanSquare:
    """By what products with rows that are not normalized yet are to be divided.

    Attributes:
      squares: sums of so many squares, float32 `[rows, parts]`.
      epsilon: added to the mean square.
      size: elements of which that is the mean.
    """

    squares: Array
    epsilon: float = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def inverse(self) -> Array:
        """float32 `[rows]`."""
        return self._inverse(self.squares)

    def inverse_of(self, row: Array) -> Array:
        """Likewise of some rows, inside a kernel: float32 `[...]`, like `row`."""
        parts = self.squares.shape[1]
        part = jnp.arange(pl.next_power_of_2(parts))
        shape = (*row.shape, part.size)
        at = like(row, shape), jnp.broadcast_to(part, shape)
        return self._inverse(plgpu.load(self.squares.at[at], mask=at[1] < parts, other=0.0))

    def _inverse(self, squares: Array) -> Array:
        return lax.rsqrt(jnp.sum(squares, axis=-1) / self.size + self.epsilon)


class Reader(Protocol):
    """How a kernel reads rows."""

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        """Of what is stored of rows `[rows, columns]`."""

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, inside: Array, x: Array
    ) -> None:
        """Stores blocks `[...]` of a row, inside a kernel.

        Args:
          refs: of these shapes.
          row: which.
          block: which.
          inside: which blocks there are.
          x: float32 `[..., 2, 4, 4]`.
        """

    def of(self, stored: Sequence[Array], mean: RootMeanSquare | None) -> Any:
        """What the kernel reads: of these shapes, perhaps of rows that are not normalized yet."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """Rows as an array `[rows, in]`.

    Attributes:
      rows: the array.
      mean: by the root of which products are to be divided; None: they are not.
    """

    rows: Array
    mean: RootMeanSquare | None


@dataclasses.dataclass(frozen=True)
class Plain:
    """Reads rows as an array of a dtype."""

    dtype: jnp.dtype

    def shapes(self, rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
        """Of the array."""
        return [jax.ShapeDtypeStruct((rows, columns), self.dtype)]

    def store(
        self, refs: Sequence[jax.Ref], row: Array, block: Array, inside: Array, x: Array
    ) -> None:
        """Stores blocks: see `Reader`."""
        element = block_elements(block)
        x = x.astype(self.dtype)
        plgpu.store(refs[0].at[row, element], x, mask=like(inside, element.shape))

    def of(self, stored: Sequence[Array], mean: RootMeanSquare | None) -> Stored:
        """Of this shape."""
        return Stored(*stored, mean)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Terms that are not added yet, so that the kernel that reads them can add them too.

    Attributes:
      stream: `[..., n]`, of the dtype of the sum.
      addends: float32 `[terms, ..., n]`.
      peers: devices whose addends are to be added; None: there is no other.
      counts: of the exchange, int32 `[..., n]`: the kernel that computed the addends, of one term,
        has sent them to the devices and left these; None: they are not sent yet.
      interpret: kernels are interpreted, to test them without a GPU.
    """

    stream: Array
    addends: Array
    peers: one_shot.Peers | None = None
    counts: Array | None = None
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., n]`."""
        return self.stream.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the sum."""
        return self.stream.dtype

    @cached_property
    def array(self) -> Array:
        """The sum; a kernel that read the terms has left it here."""
        addend = sum(self.addends[1:], self.addends[0])
        if self.peers is not None:
            addend = one_shot.total(
                addend, self.peers, counts=self.counts, interpret=self.interpret
            )
        return self.stream + addend.astype(self.dtype)


class Late:
    """Rows `[..., in]` that are not computed yet."""

    dtype: jnp.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in]`."""
        raise NotImplementedError

    @property
    def array(self) -> Array:
        """The rows."""
        raise NotImplementedError

    def prepared(self, reader: Reader, launch: KernelLaunch) -> Any:
        """The rows as kernels read them, and nothing else does, computed in one kernel."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Pending(Late):
    """Rows that are a function of others, element by element.

    Attributes:
      function: of the operands' elements, float32.
      operands: `[..., in]`, `[..., 1]` or `[in]` each, the first of them `[..., in]` and perhaps a
        `Sum`.
      dtype: of the rows.
      epsilon: the rows are then divided by the root of the mean square of the first operand, with
        this added to it; None: they are not.
      size: elements of which that is the mean.
    """

    function: Callable[..., Array]
    operands: tuple[Array | Sum, ...]
    dtype: jnp.dtype
    epsilon: float | None = None
    size: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in]`."""
        return self.operands[0].shape

    @cached_property
    def array(self) -> Array:
        """The rows `[..., in]`."""
        y = self.undivided
        if self.epsilon is not None:
            squares = jnp.sum(self._operands[0] ** 2, axis=-1, keepdims=True)
            y = y * lax.rsqrt(squares / self.size + self.epsilon)
        return y.astype(self.dtype)

    @property
    def undivided(self) -> Array:
        """The rows before they are divided, float32 `[..., in]`."""
        return self.function(*self._operands)

    @property
    def _operands(self) -> list[Array]:
        operands = (x.array if isinstance(x, Sum) else x for x in self.operands)
        return [x.astype(jnp.float32) for x in operands]

    def prepared(self, reader: Reader, launch: KernelLaunch) -> Any:
        """In one kernel, once for each reader. What divides all of a row is left for later."""
        made = vars(self).setdefault("_made", {})
        if reader not in made:
            made[reader] = self._prepared(reader, launch)
        return made[reader]

    def _prepared(self, reader: Reader, launch: KernelLaunch) -> Any:
        columns, (total, *others) = self.shape[-1], self.operands
        if isinstance(total, Sum) and "array" in vars(total):
            total = total.array  # devices exchange it once
        rows, parts = math.prod(self.shape[:-1]), pl.cdiv(columns // BLOCK, _BLOCKS)

        def by_rows(x: Array | Sum) -> Array | Sum:
            if not isinstance(x, Sum):
                return x if x.ndim == 1 else x.reshape(rows, -1)
            counts = None if x.counts is None else by_rows(x.counts)
            addends = x.addends.reshape(-1, rows, columns)
            return dataclasses.replace(x, stream=by_rows(x.stream), addends=addends, counts=counts)

        operands = tuple(by_rows(x) for x in (total, *others))
        inputs, structure = jax.tree.flatten(operands)
        shapes = list(reader.shapes(rows, columns))
        if self.epsilon is not None:
            shapes.append(jax.ShapeDtypeStruct((rows, parts), jnp.float32))
        if isinstance(total, Sum):
            shapes.append(jax.ShapeDtypeStruct((rows, columns), total.dtype))
        prepare = pl.pallas_call(
            partial(
                _kernel,
                function=self.function,
                structure=structure,
                reader=reader,
                squares=self.epsilon is not None,
                launch=launch,
            ),
            grid=(rows, parts),
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=one_shot.WARPS, num_stages=1),
            interpret=launch.interpret,
            name="prepare_rows",
        )
        results = list(prepare(*inputs))
        if isinstance(total, Sum):
            vars(total)["array"] = results.pop().reshape(total.shape)
        mean = None
        if self.epsilon is not None:
            mean = RootMeanSquare(results.pop(), self.epsilon, self.size)
        return reader.of(results, mean)


def as_late(x: Array | Sum | Late) -> Late:
    """Rows, computed or not, as ones that are not."""
    return x if isinstance(x, Late) else Pending(_same, (x,), x.dtype)


def _same(x: Array) -> Array:
    return x


def block_elements(block: Array) -> Array:
    """Where in its row the elements of blocks `[...]` are: `[..., 2, 4, 4]`."""
    half = block[..., None] * 2 + jnp.arange(2)
    word = half[..., None] * (BLOCK // 8) + jnp.arange(BLOCK // 8)
    return word[..., None] * 4 + jnp.arange(4)


def like(mask: Array, shape: tuple[int, ...]) -> Array:
    """`[n]` as `[n, ...]`, likewise more dimensions."""
    return jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape)


def _kernel(
    *refs: jax.Ref,
    function: Callable[..., Array],
    structure: Any,
    reader: Reader,
    squares: bool,
    launch: KernelLaunch,
) -> None:
    """Some blocks of a row.

    Args:
      *refs: the operands; what the reader has stored, perhaps sums of squares, and perhaps the rows
        that the first operand adds up to.
      function: of the operands.
      structure: of the operands.
      reader: of the rows.
      squares: whether there are sums of them.
      launch: as in `Pending.prepared`.
    """
    operands = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs = list(refs[structure.num_leaves :])
    total_ref = outs.pop() if isinstance(operands[0], Sum) else None
    squares_ref = outs.pop() if squares else None
    columns = operands[0].shape[-1]
    row = launch_dependents(pl.program_id(0), launch)
    block = pl.program_id(1) * _BLOCKS + jnp.arange(_BLOCKS)
    inside = block < columns // BLOCK
    element = block_elements(block)
    exists = like(inside, element.shape)

    def load(ref: jax.Ref, *before: int, dtype: jnp.dtype = jnp.float32) -> Array:
        place = element if ref.shape[-1] > 1 else jnp.zeros_like(element)
        at = (place,) if ref.ndim == 1 else (*before, row, place)
        zero = jnp.zeros((), ref.dtype)
        return plgpu.load(ref.at[at], mask=exists, other=zero).astype(dtype)

    def value(operand: jax.Ref | Sum) -> Array:
        if not isinstance(operand, Sum):
            return load(operand)
        stream, terms = load(operand.stream), range(operand.addends.shape[0])
        addend = sum(load(operand.addends, term) for term in terms)
        if operand.peers is not None:
            counts = operand.counts
            addend = one_shot.add_up(
                addend,
                operand.peers,
                row * pl.num_programs(1) + pl.program_id(1),
                element - pl.program_id(1) * one_shot.WIDTH,
                None if counts is None else load(counts, dtype=jnp.int32),
                interpret=launch.interpret,
            )
        x = (stream + addend).astype(total_ref.dtype)
        plgpu.store(total_ref.at[row, element], x, mask=exists)
        return x.astype(jnp.float32)

    others = [value(operand) for operand in operands[1:]]  # before an exchange, not after it
    values = [value(operands[0]), *others]
    reader.store(outs, row, block, inside, function(*values))
    if squares_ref is not None:
        of_program = jnp.sum(jnp.where(exists, values[0] * values[0], 0))
        plgpu.store(squares_ref.at[row, pl.program_id(1)], of_program)
