"""The perceptron that follows the mixer in each layer."""

from flax import nnx
from jax import Array

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

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`."""
        return readers_of(x, self.up, self.gate)

    def __call__(self, x: Activations) -> Unreduced:
        """`[..., embed]` to `[..., embed]`."""
        up, gate = project(x, self.up, self.gate)
        gate = None if gate is None else gate.local_sum
        readers = XLA_ONLY if self.norm else self.down.readers(x)
        h = act_and_mul(up.local_sum, gate, self.activation, readers)
        if self.norm is not None:
            h = Activations(self.norm(h.array))
        return self.down.unreduced(h)
