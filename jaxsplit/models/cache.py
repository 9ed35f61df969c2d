"""The memory of a decoder: keys and values of the tokens so far."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer.

    Attributes:
      keys, values: `[slots, kv_heads, context, head_dim]`.
      key_scale, value_scale: float32 `[slots, kv_heads, context]` that multiply int8 keys and
        values; None for other dtypes.
    """

    keys: Array
    values: Array
    key_scale: Array | None = None
    value_scale: Array | None = None

    axes = ("slots", "kv_heads")

    def update(self, keys: Array, values: Array, slots: Array, positions: Array) -> "LayerCache":
        """The cache with new tokens written.

        Args:
          keys, values: `[batch, time, kv_heads, head_dim]`.
          slots: int32 `[batch]`: the slot of each sequence.
          positions: int32 `[batch, time]`; tokens at negative positions are padding and dropped.
        """
        context = self.keys.shape[2]
        rows = jnp.where(positions < 0, context, positions)
        index = (slots[:, None], slice(None), rows)

        def write(cache: Array, scale: Array | None, new: Array) -> tuple[Array, Array | None]:
            if scale is not None:
                new, new_scale = _to_int8(new)
                scale = scale.at[index].set(new_scale, mode="drop")
            return cache.at[index].set(new.astype(cache.dtype), mode="drop"), scale

        new_keys, key_scale = write(self.keys, self.key_scale, keys)
        new_values, value_scale = write(self.values, self.value_scale, values)
        return LayerCache(new_keys, new_values, key_scale, value_scale)

    def read(self, slots: Array | None) -> "LayerCache":
        """The keys and values of some slots; None: of all."""
        return self if slots is None else jax.tree.map(lambda leaf: leaf[slots], self)


def _to_int8(x: Array) -> tuple[Array, Array]:
    """`[..., head_dim]` to int8 and a scale `[...]`: the largest magnitude becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return codes.astype(jnp.int8), scale


Cache = list[LayerCache]


def init_cache(
    layers: int, slots: int, kv_heads: int, context: int, head_dim: int, dtype: jnp.dtype
) -> Cache:
    """An empty cache; int8 keeps a scale for each head and position."""
    shape = (slots, kv_heads, context, head_dim)

    def empty() -> Array:
        return jnp.zeros(shape, dtype)

    def scale() -> Array | None:
        return jnp.zeros(shape[:-1], jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None

    return [LayerCache(empty(), empty(), scale(), scale()) for _ in range(layers)]
