"""Tests of the kernel that makes matrices plain, interpreted, against XLA's arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import usual_blocks
from tiny import fresh_rng

from jaxsplit.quant import TYPES, QTensor, dense, dequantize, unpack, with_words

QUANTIZED = [name for name, kind in TYPES.items() if kind.block > 1]


@pytest.mark.parametrize("words", [False, True])
@pytest.mark.parametrize("name", QUANTIZED)
def test_every_type_is_dequantized(name, words):
    kind = TYPES[name]
    w = unpack(name, usual_blocks(fresh_rng(), name, 7, 768 // kind.block))
    assert isinstance(w, QTensor)
    assert dense.supports(w)
    w = with_words(w) if words else w
    found = dense.dequantize([w], jnp.float32, interpret=True)
    expected = jax.jit(dequantize)(w)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_what_comes_first_changes_nothing():
    w = unpack("Q6_K", usual_blocks(fresh_rng(), "Q6_K", 40, 3))
    after = jnp.full((3, 5), jnp.nan)
    found = dense.dequantize([w], jnp.bfloat16, after=after, interpret=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jax.jit(dequantize, static_argnums=1)(w, jnp.bfloat16))


def test_rows_of_several_matrices_follow_one_another():
    rng = fresh_rng()
    weights = [
        unpack(name, usual_blocks(rng, name, rows, 768 // TYPES[name].block))
        for name, rows in (("Q4_K", 5), ("Q6_K", 9), ("Q8_0", 3))
    ]
    found = dense.dequantize(weights, jnp.float32, interpret=True)
    expected = jnp.concatenate([jax.jit(dequantize)(w) for w in weights])
    np.testing.assert_array_equal(found, expected)
