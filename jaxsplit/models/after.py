"""What is done to the residual stream after a layer.

Modules are called with the stream `[batch, time, embed]` and the batch, and return the stream.
"""

import jax
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch
from jaxsplit.models.layers import Linear, Norm, param
from jaxsplit.models.residual_config import (
    CarriedScaleConfig,
    EndNormConfig,
    ExchangeConfig,
    OutputScaleConfig,
    PerLayerEmbeddingConfig,
    StreamScaleConfig,
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

    def added(self, x: Array, batch: Batch) -> Array:
        """What is added for a stream `[batch, time, embed]`: the same shape."""
        [embedding] = batch.beside.per_layer_embeddings
        return self.norm(self.out(jax.nn.gelu(self.gate(x)) * embedding))

    def __call__(self, residual: Array, batch: Batch) -> Array:
        """The stream with the embedding."""
        return residual + self.added(residual, batch)


class OutputScale(nnx.Module):
    """Multiplies the stream by a parameter."""

    def __init__(self, config: OutputScaleConfig, embed: int, *, rngs: nnx.Rngs):
        self.scale = param(None, (Axis("scalar"),), (1,))

    def __call__(self, residual: Array, batch: Batch) -> Array:
        """The scaled stream."""
        return (residual * self.scale.get_value()).astype(residual.dtype)


class CarriedScale(nnx.Module):
    """Adds what is carried, times a parameter."""

    def __init__(self, config: CarriedScaleConfig, embed: int, *, rngs: nnx.Rngs):
        self.scale = param(None, (Axis("scalar"),), (1,))

    def __call__(self, residual: Array, batch: Batch) -> Array:
        """The sum."""
        return (residual + batch.beside.carried * self.scale.get_value()).astype(residual.dtype)


class StreamScale(nnx.Module):
    """Multiplies the stream by a constant."""

    def __init__(self, config: StreamScaleConfig, embed: int, *, rngs: nnx.Rngs):
        self.factor = config.factor

    def __call__(self, residual: Array, batch: Batch) -> Array:
        """The scaled stream."""
        return residual * self.factor


class EndNorm(nnx.Module):
    """Normalizes the stream."""

    def __init__(self, config: EndNormConfig, embed: int, *, rngs: nnx.Rngs):
        self.norm = Norm(config.norm, embed)

    def __call__(self, residual: Array, batch: Batch) -> Array:
        """The normalized stream."""
        return self.norm(residual)


class Exchange(nnx.Module):
    """Adds what is carried, and may have the stream before that carried on."""

    def __init__(self, config: ExchangeConfig, embed: int, *, rngs: nnx.Rngs):
        self.swap = config.swap

    def __call__(self, residual: Array, batch: Batch) -> Array:
        """The sum."""
        carried = batch.beside.carried
        assert carried is not None
        if self.swap:
            batch.beside.carried = residual
        return residual + carried
