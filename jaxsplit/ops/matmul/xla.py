"""Matmuls that XLA computes.

One row is multiplied and summed in one fused loop, so that weights are read as they are stored and
their dequantized form never reaches memory; on CPUs, so are a few. For more rows, matrices are
dequantized to the dtype of the activations, by a kernel where there is one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.context import current_context
from jaxsplit.ops.matmul import cuda_dequantize, float8, triton_dequantize
from jaxsplit.quant.qtensor import (
    PlaneLayout,
    QTensor,
    Weight,
    as_bytes,
    combine_planes,
    decode_codes,
    dequantize,
    minima,
    row_bounds,
    scales,
    shifts,
    unscaled,
)

MAX_CONCAT_BYTES = 2**28
"""Bytes up to which the matrices of the same activations are dequantized into one."""

_FEW_ROWS = 16
"""Rows that a CPU multiplies one by one: dequantizing a matrix takes as long as 15 to 30."""

_HIGHEST = lax.Precision.HIGHEST

_Matrix = TypeVar("_Matrix", bound=Weight)


def matmuls(x: Array, weights: Sequence[Weight], dtype: jnp.dtype) -> list[Array]:
    """`x @ w.T` for `[..., in]` and each matrix `[out, in]`: `[..., out]` of a dtype."""
    rows = math.prod(x.shape[:-1])
    if rows <= _FEW_ROWS and any(isinstance(w, QTensor) for w in weights):
        x = _computed_once(x)
    if rows == 1:
        return [one_row(x, w, dtype) for w in weights]
    results = []
    for group in _together(weights, x.dtype):
        if (kernel := _dequantize_kernel(group)) is None:
            results += [_matmul(x, w, dtype) for w in group]
        else:
            w = kernel(group, x.dtype, after=x)
            results += _split_rows(dot(x, w, dtype), group)
    return results


def _matmul(x: Array, w: Weight, dtype: jnp.dtype) -> Array:
    """One of `matmuls`, without kernels."""

    def dequantized(x: Array, w: Weight) -> Array:
        return dot(x, dequantize(_after(x, w), x.dtype), dtype)

    def one_by_one(x: Array, w: QTensor) -> Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        y = jax.vmap(lambda row: _row_product(row, w, for_cpu=True))(rows)
        return y.reshape(*x.shape[:-1], -1).astype(dtype)

    few = math.prod(x.shape[:-1]) <= _FEW_ROWS
    if few and isinstance(w, QTensor) and not w.layout.trellis:
        return lax.platform_dependent(x, w, cpu=one_by_one, default=dequantized)
    return dequantized(x, w)


def float8_matmuls(x: Array, weights: Sequence[QTensor], dtype: jnp.dtype) -> list[Array]:
    """`matmuls` in 8-bit floating point."""
    (x, largest), results = float8.round_rows(x), []
    for group in _together(weights, x.dtype):
        bounds = [row_bounds(w) for w in group]
        if (kernel := _dequantize_kernel(group)) is not None:
            w = kernel(group, x.dtype, bounds=bounds, after=x)
        else:
            w = float8.round_matrix(_after(x, group[0]), bounds[0])
        # Sums of such numbers are too large for float16.
        y = dot(x, w, jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)
        y = float8.scaled(y, largest, jnp.concatenate(bounds)).astype(dtype)
        results += _split_rows(y, group)
    return results


def _dequantize_kernel(weights: Sequence[Weight]) -> Callable[..., Array] | None:
    """The kernel that dequantizes matrices into one; None: there is none for all of them."""
    policy = current_context().policy
    for backend, runs in ((triton_dequantize, policy.kernels), (cuda_dequantize, policy.only_cuda)):
        if runs and all(isinstance(w, QTensor) and backend.supports(w) for w in weights):
            return backend.dequantize
    return None


def _together(weights: Sequence[_Matrix], dtype: jnp.dtype) -> list[Sequence[_Matrix]]:
    """Groups of matrices to dequantize into one: all if they are small, else each by itself."""
    whole, size = [weights], sum(math.prod(w.shape) for w in weights) * dtype.itemsize
    small = weights and size <= MAX_CONCAT_BYTES
    return whole if small and _dequantize_kernel(weights) else [[w] for w in weights]


def _split_rows(y: Array, weights: Sequence[Weight]) -> list[Array]:
    """The results `[..., out]` of matrices that were multiplied as one."""
    return jnp.split(y, np.cumsum([w.shape[0] for w in weights[:-1]]), axis=-1)


def _after(x: Array, w: _Matrix) -> _Matrix:
    """Makes a matrix depend on `x`: else XLA may dequantize many ahead of time and keep them.

    Some backends drop an optimization barrier too early to serve.
    """
    if not isinstance(w, QTensor):
        return w
    poisoned = jnp.isnan(x[(0,) * x.ndim])
    return dataclasses.replace(w, scale=jnp.where(poisoned, jnp.zeros((), w.scale.dtype), w.scale))


def _computed_once(x: Array) -> Array:
    """On CPUs, `x` as XLA computes it before the loops over quantized matrices that read it.

    It would fuse what is cheap, such as norms, into each of them and compute it again for each row
    of a matrix. Divisions it does not; that the divisor is 1, it does not know in time.
    """

    def divided(x: Array) -> Array:
        return x / lax.optimization_barrier(jnp.ones(x.shape[-1], x.dtype))

    return lax.platform_dependent(x, cpu=divided, default=lambda x: x)


def one_row(x: Array, w: Weight, dtype: jnp.dtype) -> Array:
    """`x @ w.T` for one row, without rounding: `[..., out]`."""
    row = x.reshape(-1).astype(jnp.float32)
    if isinstance(w, QTensor):
        y = lax.platform_dependent(
            row,
            w,
            cpu=partial(_row_product, for_cpu=True),
            default=partial(_row_product, for_cpu=False),
        )
        return y.reshape(*x.shape[:-1], -1).astype(dtype)
    if x.dtype == jnp.float32:
        return dot(x, w, dtype)
    return lax.platform_dependent(x, w, cuda=_sum_of_products, default=dot).astype(dtype)


def dot(x: Array, w: Array, dtype: jnp.dtype = jnp.float32) -> Array:
    """`x @ w.T` for rows `[..., in]` and a plain matrix `[out, in]`: `[..., out]` of a dtype."""
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        (((x.ndim - 1,), (1,)), ((), ())),
        precision=_HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )


def _sum_of_products(x: Array, w: Array) -> Array:
    """One row, faster than the matrix unit."""
    row = x.reshape(-1).astype(jnp.float32)
    return jnp.sum(w.astype(jnp.float32) * row, axis=-1).reshape(*x.shape[:-1], -1)


def _slices(w: QTensor) -> list[Array]:
    """Values before scaling, as slices that need no shuffling of the stored bytes.

    Returns:
      float32 `[out, chunks, width]` each; slice `i` holds the weights `[i * width, (i + 1) *
      width)` of each chunk.
    """
    layout = w.layout
    count = 8 // min(layout.bits)
    width = layout.chunk // count
    slices = []
    for i in range(count):
        pieces = []
        for plane, bits in zip(w.codes, layout.bits, strict=True):
            size = plane.dtype.itemsize
            shift, byte = divmod(i * width, layout.chunk * bits // 8)
            packed = plane.reshape(plane.shape[0], -1, layout.chunk * bits // 8 // size)
            piece = packed[..., byte // size : (byte + width) // size]
            mask = int.from_bytes([2**bits - 1] * size)
            pieces.append(
                piece if bits == 8 else (piece >> (shift * bits)) & np.asarray(mask, plane.dtype)
            )
        codes = as_bytes(combine_planes(pieces, layout), layout)
        slices.append(decode_codes(codes, layout))
    return slices


def _trellis_row_product(x: Array, w: QTensor, *, for_cpu: bool) -> Array:
    """`_row_product` of a trellis layout."""
    scale = scales(w)[..., None]
    values = unscaled(w).reshape(*scale.shape[:-1], -1)
    products = values * x.reshape(*values.shape[1:])
    if for_cpu:
        products = jnp.sum(products, axis=-1, keepdims=True)
    return jnp.sum(products * scale, axis=(1, 2))


def _row_product(x: Array, w: QTensor, *, for_cpu: bool) -> Array:
    """`w @ x` for float32 `x` `[in]`, as one loop over the stored bytes: float32 `[out]`."""
    if w.layout.trellis:
        return _trellis_row_product(x, w, for_cpu=for_cpu)
    slices = _slices(w)
    chunk, width = w.layout.chunk, slices[0].shape[-1]
    chunks = w.shape[-1] // chunk
    x = x.reshape(-1, len(slices), width)

    def per_chunk(groups: Array) -> Array:
        """`[out, groups]` to `[out, chunks, groups in a chunk]`."""
        if groups.shape[-1] < chunks:
            groups = jnp.repeat(groups, chunks // groups.shape[-1], axis=-1)
        return groups.reshape(groups.shape[0], chunks, -1, 1)

    scale, shift, minimum = per_chunk(scales(w)), shifts(w), minima(w)
    if shift is not None:
        shift = per_chunk(shift)
    if minimum is not None:
        minimum = per_chunk(minimum)
    groups = scale.shape[2]
    if groups > len(slices):
        raise ValueError(f"groups of {chunk // groups} weights do not fit slices of {width}")
    per_group = len(slices) // groups
    total = below = jnp.zeros(())
    for g in range(groups):
        members = range(g * per_group, (g + 1) * per_group)
        products = sum(slices[i] * x[:, i] for i in members)
        inputs = sum(x[:, i] for i in members)
        if shift is not None:
            products = products + inputs * shift[:, :, g]
        total = total + products * scale[:, :, g]
        if minimum is not None:
            inputs = jnp.sum(inputs, axis=-1, keepdims=True) if for_cpu else inputs
            below = below + inputs * minimum[:, :, g]
    if not for_cpu:
        return jnp.sum(total + below, axis=(1, 2))
    # LLVM vectorizes these sums over the bytes of a slice; a sum over chunks, it would over chunks.
    added = _chunks_added(w.layout, chunks, len(slices), groups)
    parts = total.reshape(total.shape[0], -1, added, width)
    y = jnp.sum(functools.reduce(jnp.add, (parts[:, :, i] for i in range(added))), axis=(1, 2))
    return y if minimum is None else y + jnp.sum(below, axis=(1, 2))


def _chunks_added(layout: PlaneLayout, chunks: int, slices: int, groups: int) -> int:
    """How many chunks of a row a CPU adds one by one, given the slices and groups of a chunk: 128
    weights, fewer if these have tables or small groups. With more, XLA breaks the loop apart
    (docs/log.md)."""
    most = 128 // layout.chunk
    if layout.table is not None:
        most = min(most, 8 // slices) if len(layout.table) <= 16 else 1
    if layout.chunk // groups < 16:
        most = 1
    return max((n for n in range(1, most + 1) if chunks % n == 0), default=1)
