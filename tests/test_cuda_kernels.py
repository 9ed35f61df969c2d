"""Kernels in CUDA C++: on the CPU against float64, and compiled for GPUs."""

import cuda_host
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import usual_blocks
from helpers import nmse
from tiny import fresh_rng

from jaxsplit.ops.activations import int8
from jaxsplit.ops.activations.layout import RMSStatistics
from jaxsplit.ops.matmul import cuda_gemv_int8
from jaxsplit.ops.matmul.cuda_gemv_int8 import Launch, Tiling
from jaxsplit.quant import TYPES, dequantize, unpack

on_cpu = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")


@pytest.fixture
def rng():
    return fresh_rng()


def matrix(rng, name, rows, columns):
    """A random matrix of a GGML type."""
    raw = usual_blocks(rng, name, rows, columns // TYPES[name].block)
    return unpack(name, jnp.asarray(raw))


def rounded_rows(rng, rows, columns, *, normalized=False):
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    found = int8.quantize_rows(jnp.asarray(x))
    if not normalized:
        return found
    squares = (x.reshape(rows, 4, -1) ** 2).sum(axis=-1)
    return int8.Int8Rows(
        found.codes,
        found.scale,
        found.sums,
        found.half_sums,
        RMSStatistics(jnp.asarray(squares), 1e-5, columns),
    )


TYPES_WITH_KERNELS = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "TQ2_0",
]


@on_cpu
@pytest.mark.parametrize("name", TYPES_WITH_KERNELS)
def test_gemv_int8_equals_float64(rng, name):
    """Rows that fill a step and rows that do not; two rows of activations."""
    w = matrix(rng, name, 7, 2816)
    assert cuda_gemv_int8.supports(w)
    x = rounded_rows(rng, 2, 2816)
    expected = np.float64(x.dequantized()) @ np.float64(dequantize(w)).T
    for tiling in (None, Tiling(32, 2, 3)):
        [y] = cuda_host.run(Launch.of(x, [w], jnp.float32, tiling=tiling))
        assert nmse(y, expected) <= 1e-10
