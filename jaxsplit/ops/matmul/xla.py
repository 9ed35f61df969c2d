"""Products that XLA computes: of one row in a fused loop, of more on the matrix unit."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.quant.qtensor import QTensor, Weight, as_bytes, combine, minima, scales, value_of

_HIGHEST = lax.Precision.HIGHEST


def one_row(x: Array, w: Weight, dtype: jnp.dtype) -> Array:
    """`x @ w.T` for one row, without rounding: `[..., out]`."""
    row = x.reshape(-1).astype(jnp.float32)
    if isinstance(w, QTensor):
        y = lax.platform_dependent(
            row,
            w,
            cpu=partial(_row_product, sum_groups_first=True),
            default=partial(_row_product, sum_groups_first=False),
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
    form = w.form
    count = 8 // min(form.bits)
    width = form.chunk // count
    slices = []
    for i in range(count):
        pieces = []
        for plane, bits in zip(w.codes, form.bits, strict=True):
            size = plane.dtype.itemsize
            shift, byte = divmod(i * width, form.chunk * bits // 8)
            packed = plane.reshape(plane.shape[0], -1, form.chunk * bits // 8 // size)
            piece = packed[..., byte // size : (byte + width) // size]
            mask = int.from_bytes([2**bits - 1] * size)
            pieces.append(
                piece if bits == 8 else (piece >> (shift * bits)) & np.asarray(mask, plane.dtype)
            )
        codes = as_bytes(combine(pieces, form), form)
        slices.append(value_of(codes, form))
    return slices


def _row_product(x: Array, w: QTensor, *, sum_groups_first: bool) -> Array:
    """`w @ x` for float32 `x` `[in]`, as one loop over the stored bytes: float32 `[out]`.

    Summing each group before it is scaled is fastest on a CPU; a GPU needs a single sum, since
    two would be two kernels.
    """
    slices = _slices(w)
    chunk, width = w.form.chunk, slices[0].shape[-1]
    x = x.reshape(-1, len(slices), width)

    def per_chunk(groups: Array) -> Array:
        """`[out, groups]` to `[out, chunks, groups in a chunk]`."""
        chunks = w.shape[-1] // chunk
        if groups.shape[-1] < chunks:
            groups = jnp.repeat(groups, chunks // groups.shape[-1], axis=-1)
        return groups.reshape(groups.shape[0], chunks, -1, 1)

    scale, minimum = per_chunk(scales(w)), minima(w)
    if minimum is not None:
        minimum = per_chunk(minimum)
    groups = scale.shape[2]
    if groups > len(slices):
        raise ValueError(f"groups of {chunk // groups} weights do not fit slices of {width}")
    per_group = len(slices) // groups
    total = 0.0
    for g in range(groups):
        members = range(g * per_group, (g + 1) * per_group)
        products = sum(slices[i] * x[:, i] for i in members)
        inputs = sum(x[:, i] for i in members)
        if sum_groups_first:
            products = jnp.sum(products, axis=-1, keepdims=True)
            inputs = jnp.sum(inputs, axis=-1, keepdims=True)
        total = total + products * scale[:, :, g]
        if minimum is not None:
            total = total + inputs * minimum[:, :, g]
    return jnp.sum(total, axis=(1, 2))
