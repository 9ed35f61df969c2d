"""The perceptron that follows the mixer in each layer."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.models.axes import EMBED, Axis
from jaxsplit.models.config import MLPConfig
from jaxsplit.models.layers import Linear, Partials

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class MLP(nnx.Module):
    """A hidden layer, gated or plain, split by its units."""

    def __init__(self, config: MLPConfig, embed: int, *, rngs: nnx.Rngs):
        axis, c = Axis("mlp", config.hidden), config

        def projection() -> Linear:
            return Linear(EMBED, embed, axis, c.hidden, bias=c.bias, rngs=rngs)

        self.gate = projection() if c.gated else None
        self.up = projection()
        self.down = Linear(axis, c.hidden, EMBED, embed, bias=c.bias, rngs=rngs)
        self.activation = ACTIVATIONS[c.activation]

    def __call__(self, x: Array) -> Partials:
        """`[..., embed]` to parts of the same."""
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)
        return (self.down.partial(hidden),)
