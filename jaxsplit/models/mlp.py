"""The perceptron that follows the mixer in each layer."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.comm.api import all_reduce_unique_units
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.config import MLPConfig
from jaxsplit.models.layers import Linear, Norm, project, readers_of
from jaxsplit.ops.activations.api import act_and_mul
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.sharding.axes import EMBED, Axis


class MLP(nnx.Module):
    """A hidden layer, gated or plain, split by its units."""

    def __init__(self, config: MLPConfig, embed: int, *, rngs: nnx.Rngs):
        axis, c = Axis("mlp", config.intermediate_size), config

        def projection() -> Linear:
            return Linear(EMBED, embed, axis, c.intermediate_size, bias=c.bias, rngs=rngs)

        self.gate = projection() if c.gated else None
        self.up = projection()
        self.norm = Norm(c.norm, c.intermediate_size, axis) if c.norm else None
        self.down = Linear(axis, c.intermediate_size, EMBED, embed, bias=c.bias, rngs=rngs)
        self.activation = c.activation
        self.config, self.axis = config, axis

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`."""
        return readers_of(x, self.up, self.gate)

    def __call__(self, x: Activations, tokens: Array | None = None) -> Unreduced:
        """`[..., embed]` to `[..., embed]`."""
        up, gate = project(x, self.up, self.gate)
        gate = None if gate is None else gate.local_sum
        if gate is not None and self.config.sparsity is not None:
            gate = self._sparse(gate, self.config.sparsity)
        readers = XLA_ONLY if self.norm else self.down.readers(x)
        h = act_and_mul(up.local_sum, gate, self.activation, readers)
        if self.norm is not None:
            h = Activations(self.norm(h.array))
        return self.down.unreduced(h)

    def _sparse(self, gate: Array, sparsity: float) -> Array:
        """Gates above a threshold, their mean plus some standard deviations (Gemma 3n): what is
        above it, else 0."""
        units, x = self.config.intermediate_size, gate.astype(jnp.float32)
        sums = jnp.stack([x.sum(axis=-1), (x * x).sum(axis=-1)])
        mean, square = all_reduce_unique_units(sums, self.axis)[..., None] / units
        deviation = jnp.sqrt(jnp.maximum(square - mean * mean, 0) * (units / (units - 1)))
        return jax.nn.relu(x - mean - sparsity * deviation).astype(gate.dtype)
