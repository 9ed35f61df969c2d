"""The memory of a decoder: keys and values of the tokens so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, `[slots, kv_heads, context, head_dim]` each."""

    keys: Array
    values: Array

    axes = (None, "kv_heads")

    def update(self, keys: Array, values: Array, slots: Array, positions: Array) -> "LayerCache":
        """The cache with new tokens written.

        Args:
          keys, values: `[batch, time, kv_heads, head_dim]`.
          slots: int32 `[batch]`: the slot of each sequence.
          positions: int32 `[batch, time]`; tokens at negative positions are padding and dropped.
        """
        context = self.keys.shape[2]
        rows = jnp.where(positions < 0, context, positions)

        def write(cache: Array, new: Array) -> Array:
            index = (slots[:, None], slice(None), rows)
            return cache.at[index].set(new.astype(cache.dtype), mode="drop")

        return LayerCache(write(self.keys, keys), write(self.values, values))

    def read(self, slots: Array | None) -> tuple[Array, Array]:
        """Keys and values `[batch, kv_heads, context, head_dim]` of some slots; None: of all."""
        if slots is None:
            return self.keys, self.values
        return self.keys[slots], self.values[slots]


Cache = list[LayerCache]


def init_cache(
    layers: int, slots: int, kv_heads: int, context: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """An empty cache."""
    shape = (slots, kv_heads, context, head_dim)
    return [LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers)]
