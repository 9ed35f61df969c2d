"""A NaN must reach the logits, where it is noticed.

In Triton, unlike in the interpreter, the maximum and the minimum of a number and a NaN are the
number. Kernels must therefore not apply either to values that may be NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fresh_rng

from jaxsplit.ops.activations.functions import (
    ACTIVATIONS,
    XIELU,
    BoundedSwiGLU,
    SiTUGLU,
    activate,
)
from jaxsplit.ops.activations.int8 import largest_magnitude, quantize_rows

HIDING = {"max", "min", "clamp", "reduce_max", "reduce_min"}


def primitives(jaxpr):
    """Names of the operations with floating-point results, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        inner = [v for v in equation.params.values() if hasattr(v, "jaxpr")]
        for closed in inner:
            yield from primitives(closed.jaxpr)
        if not inner and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
            yield equation.primitive.name


GATED = ["clamped_swiglu", BoundedSwiGLU(2.0), BoundedSwiGLU(2.0, after=True), SiTUGLU(1.5, 2.0)]
PLAIN = [XIELU(0.7, 1.1, 0.5, -1e-6)]


@pytest.mark.parametrize("name", [*ACTIVATIONS, *GATED, *PLAIN])
def test_activations_keep_nan(name):
    x = fresh_rng().normal(scale=8, size=64).astype(np.float32)
    gates = [x[::-1]] if name in GATED else [None] if name in PLAIN else [None, x[::-1]]
    for gate in gates:
        jaxpr = jax.make_jaxpr(lambda *operands: activate(name, *operands))(x, gate)
        assert not HIDING & set(primitives(jaxpr.jaxpr))
        for broken in range(1 if gate is None else 2):
            operands = [x.copy(), gate if gate is None else gate.copy()]
            operands[broken][5] = np.nan
            assert np.isnan(activate(name, *operands)).tolist() == [i == 5 for i in range(64)]


@pytest.mark.parametrize("activation", [*GATED[1:], *PLAIN])
def test_activations_with_parameters(activation):
    """Against their formulas in float64."""
    up, gate = fresh_rng().normal(scale=3, size=(2, 500))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    if isinstance(activation, XIELU):
        a, gate = activation, None
        below = a.alpha_n * (np.expm1(np.minimum(up, a.epsilon)) - up)
        expected = np.where(up > 0, a.alpha_p * up**2, below) + a.beta * up
    elif isinstance(activation, SiTUGLU):
        first = activation.beta * np.tanh(gate / activation.beta) * sigmoid(gate)
        expected = first * activation.linear_beta * np.tanh(up / activation.linear_beta)
    else:
        bounded = gate if activation.after else np.minimum(gate, activation.limit)
        first = np.minimum(bounded * sigmoid(bounded), activation.limit)
        expected = first * np.clip(up, -activation.limit, activation.limit)
    found = activate(activation, np.float32(up), gate if gate is None else np.float32(gate))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_quantization_to_int8_keeps_nan():
    x = fresh_rng().normal(size=(2, 256)).astype(np.float32)
    whole = np.asarray(quantize_rows(x).dequantized())
    assert "reduce_max" not in set(primitives(jax.make_jaxpr(quantize_rows)(x).jaxpr))
    for value in (np.nan, np.copysign(np.float32(np.nan), np.float32(-1)), np.inf):
        broken = x.copy()
        broken[1, 77] = value
        found = np.array(quantize_rows(broken).dequantized())
        assert not np.isfinite(found[1, 64:96]).any()
        whole = np.asarray(quantize_rows(x).dequantized())
        assert np.array_equal(
            np.delete(found[1], range(64, 96)), np.delete(whole[1], range(64, 96))
        )
        assert np.array_equal(found[0], whole[0])


def test_largest_magnitude():
    x = fresh_rng().normal(size=(3, 5, 7)).astype(np.float32)
    assert np.array_equal(largest_magnitude(x, -1), np.abs(x).max(-1))
    assert np.array_equal(largest_magnitude(x, 0, keepdims=True), np.abs(x).max(0, keepdims=True))
    assert np.array_equal(largest_magnitude(x, -1, -1), np.abs(x).max((1, 2)))
    x[1, 2, 3] = np.nan
    assert np.isnan(largest_magnitude(x, -1, -1)).tolist() == [False, True, False]
