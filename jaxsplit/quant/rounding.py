"""Activations rounded to 8 bits, and the kernel that computes what it rounds.

As in ggml, 32 neighbours share a scale. Rounding happens between all products with quantized
matrices, so that its kernel can do what else happens there: add to the residual stream, normalize,
apply an activation function.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 32
"""Activations that share a scale."""

_BLOCKS = 16  # in each program


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Two terms that are not added yet, so that the kernel that reads them can add them too.

    Attributes:
      stream: `[..., n]`, of the dtype of the sum.
      addend: likewise, float32.
    """

    stream: Array
    addend: Array

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
        return self.stream + self.addend.astype(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """Rows that are not computed yet, so that a kernel can compute them as it rounds them.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations in 8 bits.

    Attributes:
      words: four neighbouring codes each, uint32 `[rows, in / 4]`.
      scale: float32 `[rows, in / 32]`.
      sums: of 32 values each, likewise.
      half_sums: of 16 values each, `[rows, in / 16]`.
      squares: sums of so many squares, float32 like `scale`: products are to be divided by the root
        of their mean; None: they are not.
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


def round_pending(x: Pending, *, interpret: bool = False) -> Rounded:
    """Computes and rounds rows in one kernel. What divides all of a row is left for later: it does
    not change the codes.

    Args:
      x: of `[..., in]`.
      interpret: run it without a GPU, to test it.
    """
    columns, total = x.shape[-1], x.operands[0]
    operands = jax.tree.map(lambda y: y if y.ndim == 1 else y.reshape(-1, columns), x.operands)
    inputs, structure = jax.tree.flatten(operands)
    rows, blocks = len(inputs[0]), columns // BLOCK
    of_blocks = jax.ShapeDtypeStruct((rows, blocks), jnp.float32)
    of_halves = jax.ShapeDtypeStruct((rows, 2 * blocks), jnp.float32)
    words = jax.ShapeDtypeStruct((rows, columns // 4), jnp.int32)
    shapes = [words, of_blocks, of_blocks, of_halves]
    if x.epsilon is not None:
        shapes.append(of_blocks)
    if isinstance(total, Sum):
        shapes.append(jax.ShapeDtypeStruct((rows, columns), total.dtype))
    words, scale, sums, half_sums, *more = pl.pallas_call(
        partial(_round_kernel, function=x.function, structure=structure),
        grid=(rows, pl.cdiv(blocks, _BLOCKS)),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="round_rows",
    )(*inputs)
    if isinstance(total, Sum):
        vars(total)["array"] = more.pop().reshape(total.shape)
    words = lax.bitcast_convert_type(words, jnp.uint32)
    rounded = Rounded(words, scale, sums, half_sums, *more)
    return dataclasses.replace(rounded, epsilon=x.epsilon or 0.0, size=x.size)


def _round_kernel(*refs: jax.Ref, function: Callable[..., Array], structure: Any) -> None:
    """Some blocks of a row.

    Args:
      *refs: the operands; words, scales, sums and those of halves, perhaps sums of squares, and
        perhaps the rows that the first operand adds up to.
      function: of the operands.
      structure: of the operands.
    """
    operands = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    words_ref, scale_ref, sums_ref, half_sums_ref, *more = refs[structure.num_leaves :]
    added_ref = more.pop() if isinstance(operands[0], Sum) else None
    row = pl.program_id(0)
    block = pl.program_id(1) * _BLOCKS + jnp.arange(_BLOCKS)
    inside = block < scale_ref.shape[1]
    half = block[:, None] * 2 + jnp.arange(2)
    word = half[..., None] * (BLOCK // 8) + jnp.arange(BLOCK // 8)
    element = word[..., None] * 4 + jnp.arange(4)

    def exists(index: Array) -> Array:
        """Which places of an index that begins with the blocks' dimension there are."""
        return jnp.broadcast_to(inside.reshape(-1, *[1] * (index.ndim - 1)), index.shape)

    def load(operand: jax.Ref | Sum) -> Array:
        if isinstance(operand, Sum):
            x = load(operand.stream) + load(operand.addend)
            x = x.astype(added_ref.dtype)
            plgpu.store(added_ref.at[row, element], x, mask=exists(element))
            return x.astype(jnp.float32)
        at = (element,) if operand.ndim == 1 else (row, element)
        zero = jnp.zeros((), operand.dtype)
        return plgpu.load(operand.at[at], mask=exists(element), other=zero).astype(jnp.float32)

    values = [load(operand) for operand in operands]
    words, scale, sums, half_sums = _round_block(function(*values))
    plgpu.store(words_ref.at[row, word], words, mask=exists(word))
    plgpu.store(scale_ref.at[row, block], scale, mask=inside)
    plgpu.store(sums_ref.at[row, block], sums, mask=inside)
    plgpu.store(half_sums_ref.at[row, half], half_sums, mask=exists(half))
    for squares_ref in more:
        squares = jnp.sum(values[0] * values[0], axis=-1)
        squares = jnp.sum(jnp.sum(squares, axis=-1), axis=-1)
        plgpu.store(squares_ref.at[row, block], squares, mask=inside)
