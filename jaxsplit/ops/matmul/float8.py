"""Products of many rows in 8-bit floating point: less exact than in 16 bits, and up to twice as
fast on GPUs from compute capability 8.9 on.

Numbers are E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), with a scale for each row of
activations and for each row of a matrix.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import compute_capability
from jaxsplit.quant.qtensor import QTensor, dequantize

DTYPE = jnp.dtype(jnp.float8_e4m3fn)
LARGEST = float(jnp.finfo(DTYPE).max)

LEAST_BOUND = 1e-30
"""Rows whose bound is less become zeros: its inverse might overflow."""


def supported_by(device: jax.Device) -> bool:
    """Whether a device multiplies such numbers itself, or is a CPU, which does so slowly."""
    return device.platform == "cpu" or compute_capability(device) >= 8.9


def round_rows(x: Array) -> tuple[Array, Array]:
    """Activations `[..., in]` in 8 bits, and what became `LARGEST` in rows, float32 `[..., 1]`."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return (x * _inverse(largest)).astype(DTYPE), largest


def round_matrix(w: QTensor, bounds: Array) -> Array:
    """A matrix `[out, in]` in 8 bits, where the `row_bounds` `[out]` become `LARGEST`."""
    return (dequantize(w, jnp.float32) * _inverse(bounds)[:, None]).astype(DTYPE)


def scaled(y: Array, largest: Array, bounds: Array) -> Array:
    """Products `[..., out]` of rounded rows and matrices, in float32, as they are without scales.

    Args:
      y: the products.
      largest: of the rows.
      bounds: of the matrix.
    """
    return y.astype(jnp.float32) * (largest / LARGEST) * (bounds / LARGEST)


def _inverse(largest: Array) -> Array:
    return jnp.where(largest > LEAST_BOUND, LARGEST / largest, 0)
