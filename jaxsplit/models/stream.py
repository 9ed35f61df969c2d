"""The residual stream between stages, and what accompanies it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.cache.layers import Beside


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """What one stage hands to the next, side by side in one array `[batch, time, width]`.

    Attributes:
      residual: width of the residual streams.
      per_layer: width of an embedding for one layer.
      layers: how many layers to come have one.
      carried: width of what is carried.
    """

    residual: int
    per_layer: int
    layers: int
    carried: int

    @property
    def width(self) -> int:
        """Elements of each token."""
        return self.residual + self.per_layer * self.layers + self.carried

    def pack(self, residual: Array, beside: Beside) -> Array:
        """The array; embeddings for earlier layers are left out."""
        embeddings = beside.per_layer_embeddings
        parts = [residual, *embeddings[len(embeddings) - self.layers :]]
        parts += [] if beside.carried is None else [beside.carried]
        return residual if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def unpack(self, x: Array) -> tuple[Array, Beside]:
        """The residual streams of such an array, and what accompanies them."""
        if self.width == self.residual:
            return x, Beside()
        widths = [self.residual, *[self.per_layer] * self.layers, self.carried]
        residual, *embeddings, carried = jnp.split(x, np.cumsum(widths)[:-1], axis=-1)
        return residual, Beside(
            carried=carried if self.carried else None, per_layer_embeddings=tuple(embeddings)
        )
