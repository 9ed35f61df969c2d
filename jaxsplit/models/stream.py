"""The residual stream between stages, and what accompanies it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.cache.layers import SideInputs


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

    def pack(self, residual: Array, side_inputs: SideInputs) -> Array:
        """The array; embeddings for earlier layers are left out."""
        embeddings = side_inputs.per_layer_embeddings
        parts = [residual, *embeddings[len(embeddings) - self.layers :]]
        parts += [] if side_inputs.carried is None else [side_inputs.carried]
        return residual if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def unpack(self, x: Array) -> tuple[Array, SideInputs]:
        """The residual streams of such an array, and what accompanies them."""
        if self.width == self.residual:
            return x, SideInputs()
        widths = [self.residual, *[self.per_layer] * self.layers, self.carried]
        residual, *embeddings, carried = jnp.split(x, np.cumsum(widths)[:-1], axis=-1)
        return residual, SideInputs(
            carried=carried if self.carried else None, per_layer_embeddings=tuple(embeddings)
        )
