"""What is done to the residual stream after a layer.

Modules take the stream `[batch, time, embed]` and the batch, and return the stream.
"""

import jax
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch
from jaxsplit.models.layers import Linear, Norm, param
from jaxsplit.models.residual_config import (
    CarriedConfig,
    EndNormConfig,
    OutputScaleConfig,
    PerLayerEmbeddingConfig,
)
from jaxsplit.sharding.axes import EMBED, PER_LAYER, Axis


class PerLayerEmbedding(nnx.Module):
    """Adds the layer's own embedding of the token, gated by the stream (Gemma 3n).

    Its matrices are small: every device has them whole, so that none has to wait.
    """

    def __init__(self, config: PerLayerEmbeddingConfig, embed: int, *, rngs: nnx.Rngs):
        self.gate = Linear(EMBED, embed, PER_LAYER, config.width, rngs=rngs)
        self.out = Linear(PER_LAYER, config.width, EMBED, embed, rngs=rngs)
        self.norm = Norm(config.norm, embed)

    def gated(self, x: Array, batch: Batch) -> Array:
        """What is added, for a stream `[batch, time, embed]`: the same shape."""
        [embedding] = batch.side_inputs.per_layer_embeddings
        return self.norm(self.out(jax.nn.gelu(self.gate(x)) * embedding))

    def __call__(self, residual: Array, batch: Batch) -> Array:
        return residual + self.gated(residual, batch)


class OutputScale(nnx.Module):
    """Multiplies the stream by a constant or a parameter."""

    def __init__(self, config: OutputScaleConfig, embed: int, *, rngs: nnx.Rngs):
        self.constant = config.constant or 1.0
        self.scale = param(None, (Axis("scalar"),), (1,)) if config.constant is None else None

    def __call__(self, residual: Array, batch: Batch) -> Array:
        scale = self.constant if self.scale is None else self.scale.get_value()
        return (residual * scale).astype(residual.dtype)


class Carried(nnx.Module):
    """Adds what is carried."""

    def __init__(self, config: CarriedConfig, embed: int, *, rngs: nnx.Rngs):
        self.scale = param(None, (Axis("scalar"),), (1,)) if config.scaled else None
        self.swap = config.swap

    def __call__(self, residual: Array, batch: Batch) -> Array:
        carried = batch.side_inputs.carried
        assert carried is not None
        if self.swap:
            batch.side_inputs.carried = residual
        if self.scale is not None:
            carried = carried * self.scale.get_value()
        return (residual + carried).astype(residual.dtype)


class EndNorm(nnx.Module):
    """Normalizes the stream."""

    def __init__(self, config: EndNormConfig, embed: int, *, rngs: nnx.Rngs):
        self.norm = Norm(config.norm, embed)

    def __call__(self, residual: Array, batch: Batch) -> Array:
        return self.norm(residual)
