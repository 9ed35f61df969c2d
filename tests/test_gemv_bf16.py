"""The bfloat16 GEMV kernel, interpreted, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import nmse, quick_jit
from tiny import fresh_rng

from jaxsplit.ops.activations.layout import PlainLayout, Readers
from jaxsplit.ops.activations.triton_rows import store_rows
from jaxsplit.ops.matmul import triton_gemv_bf16

pytestmark = pytest.mark.usefixtures("quick_compilation", "interpreter")


@pytest.fixture
def rng():
    return fresh_rng()


def matrix(rng, rows, columns):
    return jnp.asarray(rng.normal(size=(rows, columns)), jnp.bfloat16)


# Columns of one step, of two unrolled steps, of many; some do not fill the last step.
@pytest.mark.parametrize("columns", [256, 320, 1024, 3 * 512, 3 * 512 + 64])
@pytest.mark.parametrize("scaled", [False, True])
def test_matmuls_equal_float64(rng, columns, scaled):
    matrices = [matrix(rng, rows, columns) for rows in (9, 33)]
    assert all(triton_gemv_bf16.supports(w, jnp.bfloat16) for w in matrices)
    x = jnp.asarray(rng.normal(size=(1, 1, columns)), jnp.bfloat16)
    norm, divisor = None, 0.5
    if scaled:
        norm, divisor = (0.5, columns), 0.5 * np.sqrt((np.float64(x) ** 2).mean() + 0.5)
    layouts = (PlainLayout(jnp.bfloat16),)

    @quick_jit
    def products(x, matrices):
        [row], *_ = store_rows(lambda x: 2 * x, (x,), Readers(layouts, xla=False), norm=norm)
        tiling = triton_gemv_bf16.Tiling(columns=512)
        return triton_gemv_bf16.gemv_bf16(row, matrices, tiling=tiling)

    results = products(x, matrices)
    for y, w in zip(results, matrices, strict=True):
        assert nmse(y, np.float64(x)[0] @ np.float64(w).T / divisor) <= 1e-11


def test_unsupported_dtypes_and_shapes(rng):
    w = matrix(rng, 8, 64)
    assert not triton_gemv_bf16.supports(w.astype(jnp.float16), jnp.float16)
    assert not triton_gemv_bf16.supports(w, jnp.float32)
    assert not triton_gemv_bf16.supports(w[:, :36], jnp.bfloat16)
