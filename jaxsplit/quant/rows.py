"""Dequantizes rows as files store them, to the last bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import STORED_TYPES
from jaxsplit.quant.qtensor import QTensor, Weight, inner_groups, shifts, unscaled
from jaxsplit.quant.types import quant_type, unpack


def dequantize_rows(type_name: str, raw: np.ndarray) -> np.ndarray:
    """Dequantizes rows as files store them, to the last bit as ggml and ik_llama.cpp define them.

    IQ2_KT and IQ3_KT include the factors 1.05 and 1.01 that ik_llama.cpp's products apply, and
    IQ6_K is the table of its products: its `to_float` differs from what it runs.

    Args:
      type_name: the GGML type, such as `Q4_K` or `IQ4_KS_R4`.
      raw: uint8 `[rows, row_bytes]`. Of interleaved types, the rows of a unit follow one another;
        of I2_S, each row is a whole tensor.

    Returns:
      float32 `[rows, columns]`.

    Raises:
      JaxsplitError: the type is unsupported, or the bytes are not rows of it.
    """
    entry, stored = quant_type(type_name), STORED_TYPES[type_name]
    raw = np.ascontiguousarray(raw)
    if raw.dtype != np.uint8 or raw.ndim != 2:
        raise JaxsplitError(
            f"raw={raw.dtype}{list(raw.shape)} is not uint8 [rows, row_bytes], as {type_name} needs"
        )
    rows, extra = len(raw), stored.trailer or stored.header
    blocks, rest = divmod(raw.shape[1] - extra, stored.size)
    if rest or blocks <= 0 or rows % stored.rows:
        units = f", and rows in units of {stored.rows}" if stored.rows > 1 else ""
        raise JaxsplitError(
            f"raw has {rows} rows of {raw.shape[1]} bytes; {type_name} needs {extra} + a multiple "
            f"of {stored.size}{units}"
        )
    shape = rows, blocks * stored.block
    if stored.trailer:
        tensors = [stored.parts(row, (1, shape[1])) for row in raw]
    else:
        tensors = [stored.parts(raw.reshape(-1), shape)]
    joined = [
        np.concatenate([part.reshape(-1, blocks, part[0, 0, 0].size) for part in parts], axis=-1)
        for parts in tensors
    ]
    raw = np.concatenate(joined).reshape(rows, -1, entry.block_bytes)
    if entry.layout is None:
        return np.asarray(_plain(type_name, raw))
    # Products and sums in NumPy: on CPUs, XLA flushes subnormal numbers to zero.
    values, *groups = _integers(type_name, raw)
    scale, super_scale, minimum, super_minimum = (
        None if group is None else np.asarray(group, np.float32) for group in groups
    )
    assert scale is not None
    with np.errstate(all="ignore"):
        scale = _times(scale, super_scale)[..., None]
        weights = np.asarray(values).reshape(*scale.shape[:-1], -1) * scale
        if minimum is not None:
            weights += _times(minimum, super_minimum)[..., None]
        return (
            weights.reshape(shape) + np.float32(0) if entry.adds_offset else weights.reshape(shape)
        )


def _times(inner: np.ndarray, outer: np.ndarray | None) -> np.ndarray:
    """Scales of groups, times those of super-groups."""
    if outer is None:
        return inner
    return inner * np.repeat(outer, inner.shape[-1] // outer.shape[-1], axis=-1)


@partial(jax.jit, static_argnums=0)
def _plain(name: str, raw: Array) -> Weight:
    return unpack(name, raw, dtype=jnp.float32)


@partial(jax.jit, static_argnums=0)
def _integers(name: str, raw: Array) -> tuple[Array | None, ...]:
    """What makes up the weights, before anything is rounded: values with their shifts, float32
    `[rows, columns]`, then scales, super-scales, minima and super-minima."""
    w = unpack(name, raw)
    assert isinstance(w, QTensor)
    values, shift = unscaled(w), shifts(w)
    if shift is not None:
        values += jnp.repeat(shift, values.shape[-1] // shift.shape[-1], axis=-1)
    scale = inner_groups(w.scale, w.layout, w.layout.decode_scale)
    minimum = None if w.minimum is None else inner_groups(w.minimum, w.layout)
    return values, scale, w.super_scale, minimum, w.super_minimum
