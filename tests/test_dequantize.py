"""The dequantize kernel, interpreted, against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import usual_blocks
from helpers import quick_jit
from tiny import fresh_rng

from jaxsplit.formats import IK_TYPES
from jaxsplit.ops.matmul import float8, triton_dequantize
from jaxsplit.quant import TYPES, QTensor, dequantize, qtensor, to_u32, unpack

pytestmark = pytest.mark.usefixtures("interpreter")

QUANTIZED = [
    name for name, kind in TYPES.items() if kind.layout is not None and name not in IK_TYPES
]


_unpacked = quick_jit(unpack, static_argnums=0)
_in_words = quick_jit(lambda name, raw: to_u32(unpack(name, raw)), static_argnums=0)
_kernel = quick_jit(lambda w: triton_dequantize.dequantize([w], jnp.float32))
_dequantized = quick_jit(dequantize)
_weights_and_bounds = quick_jit(lambda w: (dequantize(w), qtensor.row_bounds(w)))


# Of ik_llama.cpp's types, those with planes that no other type has.
IK = ("IQ2_K", "IQ6_K", "IQ5_KS", "IQ1_M_R4", "IQ2_KT", "IQ3_KT", "IQ4_KT")


@pytest.mark.parametrize("u32", [False, True])
@pytest.mark.parametrize("name", [*QUANTIZED, *IK])
def test_every_type_is_dequantized(name, u32):
    kind = TYPES[name]
    raw = usual_blocks(fresh_rng(), name, 7, 768 // kind.block)
    w = (_in_words if u32 else _unpacked)(name, raw)
    assert isinstance(w, QTensor)
    assert triton_dequantize.supports(w)
    found, expected = _kernel(w), _dequantized(w)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_after_does_not_change_the_result():
    w = _unpacked("Q6_K", usual_blocks(fresh_rng(), "Q6_K", 40, 3))
    after = jnp.full((3, 5), jnp.nan)
    found = triton_dequantize.dequantize([w], jnp.bfloat16, after=after)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jax.jit(dequantize, static_argnums=1)(w, jnp.bfloat16))


def test_bounds_scale_rows_to_the_largest_number():
    rng = fresh_rng()
    weights = [
        _unpacked(name, usual_blocks(rng, name, rows, 768 // TYPES[name].block))
        for name, rows in (("Q4_K", 5), ("Q8_0", 3))
    ]
    bounds = [qtensor.row_bounds(w) for w in weights]
    bounds[0] = bounds[0].at[2].set(0).at[4].set(1e-38)  # of rows of zeros, which stay zeros
    found = triton_dequantize.dequantize(weights, float8.DTYPE, bounds=bounds)
    expected = [jax.jit(float8.round_matrix)(w, b) for w, b in zip(weights, bounds, strict=True)]
    expected = np.float32(jnp.concatenate(expected))
    np.testing.assert_allclose(np.float32(found), expected, rtol=1 / 8)  # one step of 3 bits
    assert np.mean(np.float32(found) == expected) > 0.999
    assert not np.float32(found)[[2, 4]].any()


@pytest.mark.parametrize("name", [*QUANTIZED, *IK])
def test_no_weight_exceeds_the_bound_of_its_row(name):
    w = _unpacked(name, usual_blocks(fresh_rng(), name, 9, 768 // TYPES[name].block))
    weights, bounds = map(np.float32, _weights_and_bounds(w))
    largest = np.abs(weights).max(axis=-1)
    assert (largest <= bounds * (1 + 1e-6)).all()
    assert (bounds <= 100 * largest).all()  # of 2^15, above which all bits of a weight are kept


def test_rows_of_several_matrices_are_concatenated():
    rng = fresh_rng()
    weights = [
        _unpacked(name, usual_blocks(rng, name, rows, 768 // TYPES[name].block))
        for name, rows in (("Q4_K", 5), ("Q6_K", 9), ("Q8_0", 3))
    ]
    found = triton_dequantize.dequantize(weights, jnp.float32)
    expected = jnp.concatenate([_dequantized(w) for w in weights])
    np.testing.assert_array_equal(found, expected)
