"""Activations rounded to 8 bits, and kernels that compute what they round.

As in ggml, 32 neighbours share a scale. Rounding happens between all products with quantized
matrices, so that its kernel can do what else happens there: add to the residual stream, normalize,
apply an activation function, join the parts of attention.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.quant import exchange
from jaxsplit.quant.launch import Launch

BLOCK = 32
"""Activations that share a scale."""

_BLOCKS = exchange.WIDTH // BLOCK  # in each program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Two terms that are not added yet, so that the kernel that reads them can add them too.

    Attributes:
      stream: `[..., n]`, of the dtype of the sum.
      addend: likewise, float32.
      peers: devices whose addends are to be added; None: there is no other.
      sent: the kernel that computed the addend has sent it to them.
      interpret: kernels are interpreted, to test them without a GPU.
    """

    stream: Array
    addend: Array
    peers: exchange.Peers | None = None
    sent: bool = dataclasses.field(default=False, metadata={"static": True})
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
        addend = self.addend
        if self.peers is not None:
            addend = exchange.total(addend, self.peers, sent=self.sent, interpret=self.interpret)
        return self.stream + addend.astype(self.dtype)


class Late:
    """Rows `[..., in]` that are not computed yet, so that a kernel can compute them as it rounds
    them."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in]`."""
        raise NotImplementedError

    @property
    def array(self) -> Array:
        """The rows."""
        raise NotImplementedError

    def rounded(self, launch: Launch) -> "Rounded":
        """The rows in 8 bits, which kernels read and nothing else does."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Pending(Late):
    """Rows that are a function of others, element by element.

    Attributes:
      function: of the operands' elements, float32.
      operands: `[..., in]` or `[in]` each, the first of them perhaps a `Sum`.
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
        operands = [x.array if isinstance(x, Sum) else x for x in self.operands]
        operands = [x.astype(jnp.float32) for x in operands]
        y = self.function(*operands)
        if self.epsilon is not None:
            squares = jnp.sum(operands[0] ** 2, axis=-1, keepdims=True)
            y = y * lax.rsqrt(squares / self.size + self.epsilon)
        return y.astype(self.dtype)

    def rounded(self, launch: Launch) -> "Rounded":
        """In one kernel. What divides all of a row is left for later: it does not change the
        codes."""
        columns, (total, *others) = self.shape[-1], self.operands
        if isinstance(total, Sum) and "array" in vars(total):
            total = total.array  # devices exchange it once
        operands = jax.tree.map(
            lambda y: y if y.ndim == 1 else y.reshape(-1, columns), (total, *others)
        )
        inputs, structure = jax.tree.flatten(operands)
        rows, parts = len(inputs[0]), pl.cdiv(columns // BLOCK, _BLOCKS)
        shapes = rounded_shapes(rows, columns)
        if self.epsilon is not None:
            shapes.append(jax.ShapeDtypeStruct((rows, parts), jnp.float32))
        if isinstance(total, Sum):
            shapes.append(jax.ShapeDtypeStruct((rows, columns), total.dtype))
        *results, last = pl.pallas_call(
            partial(_kernel, function=self.function, structure=structure, launch=launch),
            grid=(rows, parts),
            out_shape=shapes,
            compiler_params=plgpu.CompilerParams(num_warps=exchange.WARPS, num_stages=1),
            interpret=launch.interpret,
            name="round_rows",
        )(*inputs)
        if isinstance(total, Sum):
            vars(total)["array"] = last.reshape(total.shape)
        else:
            results.append(last)
        return Rounded(*results, epsilon=self.epsilon or 0.0, size=self.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations in 8 bits.

    Attributes:
      words: four neighbouring codes each, uint32 `[rows, in / 4]`.
      scale: float32 `[rows, in / 32]`.
      sums: of 32 values each, likewise.
      half_sums: of 16 values each, `[rows, in / 16]`.
      squares: sums of so many squares, float32 `[rows, parts]`: products are to be divided by the
        root of their mean; None: they are not.
      epsilon, size: of that mean, as in `Pending`.
    """

    words: Array
    scale: Array
    sums: Array
    half_sums: Array
    squares: Array | None = None
    epsilon: float = dataclasses.field(default=0.0, metadata={"static": True})
    size: int = dataclasses.field(default=0, metadata={"static": True})

    def dequantized(self) -> Array:
        """float32 `[rows, in]`."""
        rows = len(self.scale)
        codes = lax.bitcast_convert_type(self.words, jnp.int8)
        blocks = codes.reshape(*self.scale.shape, BLOCK).astype(jnp.float32)
        x = (blocks * self.scale[..., None]).reshape(rows, -1)
        if self.squares is None:
            return x
        squares = jnp.sum(self.squares, axis=-1, keepdims=True)
        return x * lax.rsqrt(squares / self.size + self.epsilon)


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


def rounded_shapes(rows: int, columns: int) -> list[jax.ShapeDtypeStruct]:
    """Of words, scales, sums and those of halves."""
    blocks = columns // BLOCK
    words = jax.ShapeDtypeStruct((rows, columns // 4), jnp.uint32)
    return [
        words,
        *(jax.ShapeDtypeStruct((rows, n), jnp.float32) for n in (blocks, blocks, 2 * blocks)),
    ]


def block_elements(block: Array) -> Array:
    """Where in its row the elements of blocks `[...]` are: `[..., 2, 4, 4]`."""
    half = block[..., None] * 2 + jnp.arange(2)
    word = half[..., None] * (BLOCK // 8) + jnp.arange(BLOCK // 8)
    return word[..., None] * 4 + jnp.arange(4)


def store_rounded(
    refs: Sequence[jax.Ref], row: Array, block: Array, inside: Array, x: Array
) -> None:
    """Rounds blocks `[...]` of a row in a kernel.

    Args:
      refs: words, scales, sums and those of halves.
      row: which.
      block: which.
      inside: which blocks there are.
      x: float32 `[..., 2, 4, 4]`.
    """
    half = block[..., None] * 2 + jnp.arange(2)
    word = half[..., None] * (BLOCK // 8) + jnp.arange(BLOCK // 8)
    words, *results = _round_block(x)
    results = [lax.bitcast_convert_type(words, jnp.uint32), *results]
    for ref, at, y in zip(refs, (word, block, block, half), results, strict=True):
        plgpu.store(ref.at[row, at], y, mask=like(inside, at.shape))


def like(mask: Array, shape: tuple[int, ...]) -> Array:
    """`[n]` as `[n, ...]`, likewise more dimensions."""
    return jnp.broadcast_to(mask.reshape(*mask.shape, *[1] * (len(shape) - mask.ndim)), shape)


def _kernel(*refs: jax.Ref, function: Callable[..., Array], structure: Any, launch: Launch) -> None:
    """Some blocks of a row.

    Args:
      *refs: the operands; words, scales, sums and those of halves, perhaps sums of squares, and
        perhaps the rows that the first operand adds up to.
      function: of the operands.
      structure: of the operands.
      launch: as in `Pending.rounded`.
    """
    operands = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    *outs, last = refs[structure.num_leaves :]
    if not isinstance(operands[0], Sum):
        outs.append(last)
    row = launch.next_from(pl.program_id(0))
    block = pl.program_id(1) * _BLOCKS + jnp.arange(_BLOCKS)
    inside = block < outs[1].shape[1]
    element = block_elements(block)
    exists = like(inside, element.shape)

    def load(operand: jax.Ref | Sum) -> Array:
        if isinstance(operand, Sum):
            stream, addend = load(operand.stream), load(operand.addend)
            if operand.peers is not None:
                addend = exchange.add_up(
                    addend,
                    operand.peers,
                    row * pl.num_programs(1) + pl.program_id(1),
                    element - pl.program_id(1) * exchange.WIDTH,
                    sent=operand.sent,
                    interpret=launch.interpret,
                )
            x = (stream + addend).astype(last.dtype)
            plgpu.store(last.at[row, element], x, mask=exists)
            return x.astype(jnp.float32)
        at = (element,) if operand.ndim == 1 else (row, element)
        zero = jnp.zeros((), operand.dtype)
        return plgpu.load(operand.at[at], mask=exists, other=zero).astype(jnp.float32)

    others = [load(operand) for operand in operands[1:]]  # before an exchange, not after it
    values = [load(operands[0]), *others]
    store_rounded(outs[:4], row, block, inside, function(*values))
    for squares_ref in outs[4:]:
        squares = jnp.where(exists, values[0] * values[0], 0)
        plgpu.store(squares_ref.at[row, pl.program_id(1)], jnp.sum(squares))
