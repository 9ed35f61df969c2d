"""The perceptron that follows the mixer in each layer."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.models.config import MLPConfig
from jaxsplit.models.layers import Linear, Partials, project
from jaxsplit.ops.activations.deferred import Pending
from jaxsplit.ops.matmul.api import Rows, pends
from jaxsplit.sharding.axes import EMBED, Axis

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jnp.where(x < 0, 0, x)),
}
"""None of them, and no bound below, is a maximum or minimum: those of Triton hide a NaN."""


def activate(name: str, up: Array, gate: Array | None = None) -> Array:
    """Hidden units of a plain or a gated MLP.

    Args:
      name: in `ACTIVATIONS`, or `clamped_swiglu` (gpt-oss; OpenAI 2025, arXiv:2508.10925).
      up: `[..., hidden]`.
      gate: likewise; None: plain.
    """
    if name == "clamped_swiglu":
        gate = jnp.where(gate > 7, 7, gate)
        up = jnp.where(up > 7, 7, jnp.where(up < -7, -7, up))
        return gate * jax.nn.sigmoid(1.702 * gate) * (up + 1)
    return ACTIVATIONS[name](up) if gate is None else ACTIVATIONS[name](gate) * up


class MLP(nnx.Module):
    """A hidden layer, gated or plain, split by its units."""

    def __init__(self, config: MLPConfig, embed: int, *, rngs: nnx.Rngs):
        axis, c = Axis("mlp", config.hidden), config

        def projection() -> Linear:
            return Linear(EMBED, embed, axis, c.hidden, bias=c.bias, rngs=rngs)

        self.gate = projection() if c.gated else None
        self.up = projection()
        self.down = Linear(axis, c.hidden, EMBED, embed, bias=c.bias, rngs=rngs)
        self.activation = c.activation

    def __call__(self, x: Rows) -> Partials:
        """`[..., embed]` to parts of the same."""
        up, gate = project(x, self.up, self.gate)
        function = partial(activate, self.activation)
        operands = (up,) if gate is None else (up, gate)
        hidden = Pending(function, operands, x.dtype) if pends(up) else function(*operands)
        return (self.down.partial(hidden),)
