"""Activation functions of MLPs."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": lambda x: jnp.where(x < 0, 0, x),
    "relu2": lambda x: jnp.square(jnp.where(x < 0, 0, x)),
}
"""None of them, and no bound below, is a maximum or minimum: Triton's hide a NaN."""


@dataclasses.dataclass(frozen=True)
class BoundedSwiGLU:
    """SwiGLU whose two factors are bounded.

    Attributes:
      limit: gates are at most this, the others between it and its negative.
      after: gates are bounded after the SiLU; else before.
    """

    limit: float
    after: bool = False

    def __call__(self, up: Array, gate: Array | None) -> Array:
        """As `activate`."""
        assert gate is not None
        limit = self.limit
        gate = jax.nn.silu(gate) if self.after else gate
        gate = jnp.where(gate > limit, limit, gate)
        gate = gate if self.after else jax.nn.silu(gate)
        return gate * jnp.where(up > limit, limit, jnp.where(up < -limit, -limit, up))


@dataclasses.dataclass(frozen=True)
class SiTUGLU:
    """SwiGLU with a tanh that bounds both factors (Kimi K3).

    Attributes:
      beta: bound of the gate before its sigmoid.
      linear_beta: bound of the other factor; None: it is not bounded.
    """

    beta: float
    linear_beta: float | None = None

    def __call__(self, up: Array, gate: Array | None) -> Array:
        """As `activate`."""
        assert gate is not None
        if self.linear_beta is not None:
            up = self.linear_beta * jnp.tanh(up / self.linear_beta)
        return self.beta * jnp.tanh(gate / self.beta) * jax.nn.sigmoid(gate) * up


@dataclasses.dataclass(frozen=True)
class XIELU:
    """xIELU (Huang and Schlag 2024, arXiv:2411.13010): quadratic above 0, exponential below.

    Attributes:
      alpha_p, alpha_n: of the parts above and below 0.
      beta: slope of the linear part.
      epsilon: upper bound of what is exponentiated.
    """

    alpha_p: float
    alpha_n: float
    beta: float
    epsilon: float

    def __call__(self, up: Array, gate: Array | None) -> Array:
        """As `activate`."""
        assert gate is None
        below = jnp.expm1(jnp.where(up > self.epsilon, self.epsilon, up)) - up
        return jnp.where(up > 0, self.alpha_p * up * up, self.alpha_n * below) + self.beta * up


Activation = str | BoundedSwiGLU | SiTUGLU | XIELU
"""A name in `ACTIVATIONS`, or a function with parameters."""


def activate(activation: Activation, up: Array, gate: Array | None = None) -> Array:
    """Hidden units of a plain or a gated MLP (Shazeer 2020, arXiv:2002.05202).

    Args:
      activation: in `ACTIVATIONS`, `clamped_swiglu` (gpt-oss; OpenAI 2025, arXiv:2508.10925), or
        one with parameters.
      up: `[..., hidden]`.
      gate: `[..., hidden]`; None: plain.
    """
    if not isinstance(activation, str):
        return activation(up, gate)
    if activation == "clamped_swiglu":
        assert gate is not None
        gate = jnp.where(gate > 7, 7, gate)
        up = jnp.where(up > 7, 7, jnp.where(up < -7, -7, up))
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    function = ACTIVATIONS[activation]
    return function(up) if gate is None else function(gate) * up
