"""Activation functions of MLPs."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jnp.where(x < 0, 0, x)),
}
"""None of them, and no bound below, is a maximum or minimum: Triton's hide a NaN."""


def activate(name: str, up: Array, gate: Array | None = None) -> Array:
    """Hidden units of a plain or a gated MLP (Shazeer 2020, arXiv:2002.05202).

    Args:
      name: in `ACTIVATIONS`, or `clamped_swiglu` (gpt-oss; OpenAI 2025, arXiv:2508.10925).
      up: `[..., hidden]`.
      gate: `[..., hidden]`; None: plain.
    """
    if name == "clamped_swiglu":
        assert gate is not None
        gate = jnp.where(gate > 7, 7, gate)
        up = jnp.where(up > 7, 7, jnp.where(up < -7, -7, up))
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return ACTIVATIONS[name](up) if gate is None else ACTIVATIONS[name](gate) * up
