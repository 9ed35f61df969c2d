"""Products of activations with plain and quantized matrices."""

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.comm import one_shot
from jaxsplit.comm.one_shot import Peers
from jaxsplit.context import current_context
from jaxsplit.ops.activations.deferred import Late, Plain, Reader, RootMeanSquare, Sum, as_late
from jaxsplit.ops.activations.int8 import Rounding, round_rows
from jaxsplit.ops.activations.packed import Ordering
from jaxsplit.ops.matmul import (
    float8,
    triton_dequantize,
    triton_gemv_bf16,
    triton_gemv_int8,
    triton_small_m_gemm,
    xla,
)
from jaxsplit.quant.qtensor import QTensor, Weight, dequantize, row_bounds

TOGETHER = 2**28
"""Bytes of matrices up to which those of the same activations are dequantized into one."""


Rows = Array | Late | Sum
"""Activations `[..., in]`, perhaps not computed yet."""


def rounds(rows: int) -> bool:
    """Whether kernels round so many rows."""
    active = current_context().policy
    return active.int8_activations and active.kernels and rows <= triton_gemv_int8.MAX_ROWS


def _tiled(rows: int) -> bool:
    """Whether kernels multiply so many rows with tiles of the matrices."""
    return (
        current_context().policy.kernels
        and not rounds(rows)
        and 1 < rows <= triton_small_m_gemm.MAX_ROWS
    )


def pends(x: Rows) -> bool:
    """Whether rows are best left to be computed by the kernel that prepares them for others."""
    rows = _count(x)
    few = _tiled(rows) or (rows == 1 and current_context().policy.fuse_all_reduce)
    return rounds(rows) or (few and x.dtype == jnp.bfloat16)


def _count(x: Rows) -> int:
    """How many rows."""
    return math.prod(x.shape[:-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A product that is not computed yet, so that the kernel can send it to other devices too.

    Attributes:
      x: `[..., in]`.
      w: `[out, in]`.
    """

    x: Rows
    w: Weight

    @cached_property
    def array(self) -> Array:
        """float32 `[..., out]`."""
        return matmul(self.x, self.w)

    @property
    def terms(self) -> Array:
        """What it is the sum of: float32 `[terms, ..., out]`."""
        return terms(self.x, [self.w], jnp.float32)[0]

    @property
    def sends(self) -> bool:
        """Whether there is a kernel that sends it."""
        kernel = _rounds(self.x, self.w) or _is_plain_row(self.x, self.w)
        return kernel and self.w.shape[0] % one_shot.WIDTH == 0

    def sent_to(self, peers: Peers) -> tuple[Array, Array]:
        """`array`, sent to devices that exchange it next, in a `Sum`, and counts of that exchange
        likewise."""
        way = _few_rows if _rounds(self.x, self.w) else _plain_row
        return tuple(way(self.x, [self.w], jnp.float32, peers))


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """What the kernel that reads it can add up.

    Attributes:
      terms: float32 `[terms, ..., out]`.
    """

    terms: Array

    @cached_property
    def array(self) -> Array:
        """The sum, float32 `[..., out]`."""
        return self.terms.sum(0)


def computed(x: Rows | Product | Terms) -> Array:
    """Activations, computed."""
    return x.array if isinstance(x, Late | Sum | Product | Terms) else x


def prepare(x: Late) -> RootMeanSquare | None:
    """Has the kernel that rounds a few rows, where `rounds` is true, run now, so that what it adds
    up is there for XLA's kernels too.

    Returns:
      by the root of which rows are still to be divided; None: they are not.
    """
    launch = dataclasses.replace(current_context().launch, pdl=False)  # see `launch_dependents`
    return x.prepared(Rounding(), launch).mean


def matmul(x: Rows, w: Weight, dtype: jnp.dtype = jnp.float32) -> Array:
    """The product with one matrix, as `matmuls`."""
    return matmuls(x, [w], dtype)[0]


def matmuls(x: Rows, weights: Sequence[Weight], dtype: jnp.dtype = jnp.float32) -> list[Array]:
    """The products `x @ w.T` with plain or quantized matrices.

    One row is multiplied and summed in one fused loop, so that the weights are read as they are
    stored and their dequantized form never reaches memory. More rows dequantize the matrix to the
    dtype of `x` and use the matrix unit. The context's policy may have one or two rows rounded,
    up to some tens multiplied by a kernel that serves all matrices, and more multiplied in 8-bit
    floating point.

    Args:
      x: `[..., in]`.
      weights: `[out, in]` each.
      dtype: of the results.

    Returns:
      `[..., out]` each, accumulated in float32.
    """
    left, results = dict(enumerate(weights)), {}
    for suits, way in _WAYS:
        chosen = [i for i, w in left.items() if suits(x, w)]
        if chosen:
            ys = way(x, [left.pop(i) for i in chosen], dtype)
            results |= dict(zip(chosen, ys, strict=True))
    return [results[i] for i in range(len(weights))]


def terms(x: Rows, weights: Sequence[Weight], dtype: jnp.dtype) -> list[Array]:
    """`matmuls`, left to be added up by what reads them: `[terms, ..., out]` each, float32 where a
    kernel has made parts of the sums, else of the dtype."""
    if not all(_has_tiles(x, w) for w in weights):
        return [y[None] for y in matmuls(x, weights, dtype)]
    launch = current_context().launch
    ys = triton_small_m_gemm.products(as_late(x), weights, joined=False, launch=launch)
    return [y.reshape(len(y), *x.shape[:-1], -1) for y in ys]


def _few_rows(
    x: Rows, weights: Sequence[QTensor], dtype: jnp.dtype, peers: Peers | None = None
) -> list[Array]:
    """`matmuls` of rows that kernels round; `peers`: as in `kernels.products`."""
    launch = current_context().launch
    rounded = as_late(x).prepared(Rounding(), launch)
    ys = triton_gemv_int8.products(rounded, weights, dtype, peers=peers, interpret=launch.interpret)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def _few_rows_without_kernels(x: Rows, weights: Sequence[QTensor], dtype: jnp.dtype) -> list[Array]:
    """`matmuls` of the same rounded rows."""
    rounded = round_rows(computed(x).reshape(-1, x.shape[-1])).dequantized()
    return [y.reshape(*x.shape[:-1], -1) for y in _many_rows(rounded, weights, dtype)]


def _plain_row(
    x: Rows, weights: Sequence[Array], dtype: jnp.dtype, peers: Peers | None = None
) -> list[Array]:
    """`matmuls` of one row with plain matrices; `peers`: as in `plain.products`."""
    launch = current_context().launch
    row = as_late(x).prepared(Plain(x.dtype), launch)
    ys = triton_gemv_bf16.products(row, weights, dtype, peers=peers, interpret=launch.interpret)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def _tens_of_rows(x: Rows, weights: Sequence[QTensor], dtype: jnp.dtype) -> list[Array]:
    """`matmuls` with tiles of the matrices."""
    ys = triton_small_m_gemm.products(as_late(x), weights, dtype, launch=current_context().launch)
    return [y.reshape(*x.shape[:-1], -1) for y in ys]


def _float8_rows(x: Rows, weights: Sequence[QTensor], dtype: jnp.dtype) -> list[Array]:
    """`matmuls` in 8-bit floating point."""
    interpret, results = current_context().launch.interpret, []
    x, largest = float8.round_rows(computed(x))
    for group in _together(weights, x.dtype):
        bounds = [row_bounds(w) for w in group]
        if _has_dense(group[0]):
            w = triton_dequantize.dequantize(
                group, x.dtype, bounds=bounds, after=x, interpret=interpret
            )
        else:
            w = float8.round_matrix(_after(x, group[0]), bounds[0])
        # Sums of such numbers are too large for float16.
        y = xla.dot(x, w, jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)
        y = float8.scaled(y, largest, jnp.concatenate(bounds)).astype(dtype)
        results += _split_rows(y, group)
    return results


def _many_rows(x: Rows, weights: Sequence[Weight], dtype: jnp.dtype) -> list[Array]:
    """`matmuls` without a kernel for the products."""
    if math.prod(x.shape[:-1]) == 1:
        return [xla.one_row(computed(x), w, dtype) for w in weights]
    results = []
    for group in _together(weights, x.dtype):
        x = computed(x)
        if _has_dense(group[0]):
            interpret = current_context().launch.interpret
            w = triton_dequantize.dequantize(group, x.dtype, after=x, interpret=interpret)
        else:
            w = dequantize(_after(x, group[0]), x.dtype)
        results += _split_rows(xla.dot(x, w, dtype), group)
    return results


def _together(weights: Sequence[Weight], dtype: jnp.dtype) -> list[Sequence[Weight]]:
    """Matrices that are dequantized into one: all if they are small, else each by itself."""
    size = sum(math.prod(w.shape) for w in weights) * dtype.itemsize
    if weights and size <= TOGETHER and all(map(_has_dense, weights)):
        return [weights]
    return [[w] for w in weights]


def _split_rows(y: Array, weights: Sequence[Weight]) -> list[Array]:
    """The results `[..., out]` of matrices that were multiplied as one."""
    return jnp.split(y, np.cumsum([w.shape[0] for w in weights[:-1]]), axis=-1)


def _after(x: Array, w: Weight) -> Weight:
    """A matrix that depends on `x`: else the compiler may dequantize many ahead and keep them.

    Some backends drop an optimization barrier too early to serve.
    """
    if not isinstance(w, QTensor):
        return w
    poisoned = jnp.isnan(x[(0,) * x.ndim])
    return dataclasses.replace(w, scale=jnp.where(poisoned, jnp.zeros((), w.scale.dtype), w.scale))


def expert_products(
    x: Rows, stacks: Sequence[QTensor], experts: Array, dtype: jnp.dtype = jnp.float32
) -> list[Array]:
    """The products of rows, where `rounds` is true, with matrices of the experts chosen for each.

    Args:
      x: `[rows, in]`.
      stacks: `[experts, out, in]` each, ones for which `has_kernel` is true.
      experts: int32 `[pairs]`: those of the first row come first; all rows have as many.
      dtype: of the results.

    Returns:
      `[pairs, out]` each.
    """
    launch = current_context().launch
    rounded = as_late(x).prepared(Rounding(), launch)
    return triton_gemv_int8.products(
        rounded, stacks, dtype, experts=experts, interpret=launch.interpret
    )


def grouped_products(
    x: Array,
    stacks: Sequence[QTensor],
    groups: triton_small_m_gemm.Groups,
    results: int,
    dtype: jnp.dtype = jnp.float32,
) -> list[Array]:
    """The products of groups of rows with one matrix of a stack each: see `tiles.products`.

    Args:
      x: `[rows, in]`.
      stacks: `[experts, out, in]` each, ones for which `has_tiles` is true.
      groups: of rows.
      results: rows of the results.
      dtype: of the results.

    Returns:
      `[results, out]` each.
    """
    launch = current_context().launch
    return triton_small_m_gemm.products(
        x, stacks, dtype, groups=groups, results=results, launch=launch
    )


def reader_for(x: Rows, w: Weight) -> Reader | None:
    """How the kernel that multiplies rows with a matrix reads them; None: there is none."""
    if _rounds(x, w):
        return Rounding()
    if _has_tiles(x, w):
        return Ordering.for_matrices([w])
    return Plain(x.dtype) if _is_plain_row(x, w) else None


def has_kernel(w: Weight) -> bool:
    """Whether kernels can multiply a few rounded rows with a matrix."""
    return isinstance(w, QTensor) and triton_gemv_int8.supports(w)


def has_tiles(w: Weight, dtype: jnp.dtype) -> bool:
    """Whether a kernel can multiply tens of rows of a dtype with a matrix, or a stack of them."""
    active = current_context().policy
    return active.kernels and isinstance(w, QTensor) and triton_small_m_gemm.supports(w, dtype)


def _rounds(x: Rows, w: Weight) -> bool:
    """Whether kernels round rows and multiply them with a matrix."""
    return rounds(_count(x)) and has_kernel(w)


def _has_tiles(x: Rows, w: Weight) -> bool:
    """Whether a kernel multiplies rows with tiles of a matrix."""
    return _tiled(_count(x)) and has_tiles(w, x.dtype)


def _is_plain_row(x: Rows, w: Weight) -> bool:
    """Whether a kernel multiplies a single row with a plain matrix."""
    suits = not isinstance(w, QTensor) and triton_gemv_bf16.supports(w, x.dtype)
    return current_context().policy.fuse_all_reduce and _count(x) == 1 and suits


def _is_rounded(x: Rows, w: Weight) -> bool:
    """Whether rows are rounded without kernels."""
    active = current_context().policy
    few = active.int8_activations and not active.kernels and _count(x) <= triton_gemv_int8.MAX_ROWS
    return few and has_kernel(w)


def _in_float8(x: Rows, w: Weight) -> bool:
    """Whether rows are multiplied with a matrix in 8-bit floating point."""
    many = current_context().policy.float8 and _count(x) > triton_small_m_gemm.MAX_ROWS
    return many and isinstance(w, QTensor)


def _has_dense(w: Weight) -> bool:
    """Whether a kernel can dequantize a matrix."""
    return (
        current_context().policy.kernels
        and isinstance(w, QTensor)
        and triton_dequantize.supports(w)
    )


_WAYS = (
    (_rounds, _few_rows),
    (_is_rounded, _few_rows_without_kernels),
    (_has_tiles, _tens_of_rows),
    (_is_plain_row, _plain_row),
    (_in_float8, _float8_rows),
    (lambda x, w: True, _many_rows),
)
"""Ways to multiply, best first: whether one suits rows and a matrix, and the function."""
