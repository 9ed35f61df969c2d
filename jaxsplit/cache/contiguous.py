"""The memory of a decoder: what its layers keep of the tokens so far.

Each layer has one cache: a dataclass of arrays that begin with the dimension `slots`. `CacheArray`
says what such an array looks like before it is made: a mixer's config gives a cache of them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.sharding.axes import SLOTS, Axis


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """An array of a cache.

    Attributes:
      shape: of one slot, unpadded.
      axes: logical axes of the dimensions of `shape`; None: not split.
      dtype: of the elements.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    dtype: jnp.dtype

    @property
    def all_axes(self) -> tuple[Axis | None, ...]:
        """The axes with that of the slots."""
        return (SLOTS, *self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What all layers need to know of the tokens that they are given.

    Attributes:
      positions: int32 `[batch, time]`, consecutive in each sequence; tokens at negative positions
        are padding, which comes last.
      slots: int32 `[batch]`: the slot of each sequence; None: all slots in order.
      rope_factors: what divides rotary frequencies, float32 `[dim / 2]`, by name.
      lent: keys and values that layers leave for later ones, by name, with the keys' positions.
    """

    positions: Array
    slots: Array | None = None
    rope_factors: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    lent: dict[str, tuple["AttentionCache", Array | None]] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> Array:
        """The slot of each sequence: int32 `[batch]`."""
        return jnp.arange(self.positions.shape[0]) if self.slots is None else self.slots


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys and values of one layer: position p at place `p % length`.

    Attributes:
      keys: `[slots, kv_heads, length, head_dim]`.
      values: `[slots, kv_heads, length, value_dim]`; None: they are the first dimensions of the
        keys.
      key_scale, value_scale: float32 `[slots, kv_heads, length]` that multiply int8 keys and
        values; None for other dtypes.
    """

    keys: Array
    values: Array | None
    key_scale: Array | None = None
    value_scale: Array | None = None

    @staticmethod
    def of(keys: Array, values: Array | None, dtype: jnp.dtype) -> "AttentionCache":
        """Keys and values of new tokens, each `[batch, time, kv_heads, width]`, as they are kept:
        `[batch, kv_heads, time, width]`."""
        parts = [None if x is None else x.swapaxes(1, 2) for x in (keys, values)]
        if jnp.dtype(dtype) != jnp.int8:
            return AttentionCache(*(None if x is None else x.astype(dtype) for x in parts))
        (keys, key_scale), (values, value_scale) = (
            (None, None) if x is None else _to_int8(x) for x in parts
        )
        return AttentionCache(keys, values, key_scale, value_scale)

    def dequantized(self, dtype: jnp.dtype) -> Array:
        """The keys in a floating-point dtype."""
        if self.key_scale is None:
            return self.keys.astype(dtype)
        return (self.keys * self.key_scale[..., None]).astype(dtype)

    @property
    def length(self) -> int:
        """Positions that are kept."""
        return self.keys.shape[2]

    def write(self, new: "AttentionCache", batch: Batch) -> "AttentionCache":
        """The cache with new tokens written, the last of them if there are too many."""
        positions = batch.positions
        last = positions.max(axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > last - self.length)
        places = jnp.where(kept, positions % self.length, self.length)
        index = (batch.rows[:, None], slice(None), places)
        return jax.tree.map(
            lambda old, add: old.at[index].set(add.swapaxes(1, 2), mode="drop"), self, new
        )

    def read(self, batch: Batch) -> "AttentionCache":
        """The keys and values of the sequences."""
        return self if batch.slots is None else jax.tree.map(lambda x: x[batch.slots], self)

    def positions(self, last: Array) -> Array:
        """The position in each place after `last` was written, int32 `[batch]`: int32
        `[batch, length]`, negative where there is none."""
        return last[:, None] - (last[:, None] - jnp.arange(self.length)) % self.length

    def followed_by(self, new: "AttentionCache") -> "AttentionCache":
        """Both, one after the other."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), self, new)


def _to_int8(x: Array) -> tuple[Array, Array]:
    """`[..., head_dim]` to int8 and a scale `[...]`: the largest magnitude becomes 127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return codes.astype(jnp.int8), scale


def attention_cache(
    kv_heads: Axis, length: int, head_dim: int, value_dim: int | None, dtype: jnp.dtype
) -> AttentionCache:
    """`AttentionCache` of `CacheArray`s; int8 keeps a scale for each head and position.

    Args:
      kv_heads: the heads' axis; one without units is a single head that every device has.
      length: positions that are kept.
      head_dim, value_dim: widths; no `value_dim`: values are parts of the keys.
      dtype: of keys and values.
    """
    heads = max(kv_heads.units, 1)

    def array(*width: int, dtype: jnp.dtype = dtype) -> CacheArray:
        shape = (heads, length, *width)
        return CacheArray(shape, (kv_heads, *[None] * (len(shape) - 1)), dtype)

    scaled = jnp.dtype(dtype) == jnp.int8
    scale = array(dtype=jnp.float32) if scaled else None
    values = None if value_dim is None else array(value_dim)
    return AttentionCache(array(head_dim), values, scale, scale if values else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """What a recurrent layer keeps of a sequence, float32.

    Attributes:
      inputs: of each convolution, its last inputs: `[slots, width - 1, channels]`.
      state: `[slots, heads, key_dim, value_dim]`; None: only convolutions remember.
    """

    inputs: tuple[Array, ...]
    state: Array | None = None

    def read(self, batch: Batch) -> "RecurrentCache":
        """Those of the sequences, zeros where one begins."""
        begins = batch.positions[:, 0] == 0

        def of(x: Array) -> Array:
            x = x if batch.slots is None else x[batch.slots]
            return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), 0, x)

        return jax.tree.map(of, self)

    def write(self, new: "RecurrentCache", batch: Batch) -> "RecurrentCache":
        """The cache with those of the sequences replaced."""
        if batch.slots is None:
            return new
        return jax.tree.map(lambda old, x: old.at[batch.slots].set(x), self, new)


def recurrent_cache(
    width: int, channels: Sequence[tuple[Axis, int]], state: tuple[Axis, int, int] | None = None
) -> RecurrentCache:
    """`RecurrentCache` of `CacheArray`s.

    Args:
      width: of the convolutions, in tokens.
      channels: the axis and the size of each convolution's.
      state: the axis of the heads, `key_dim` and `value_dim`; None: there is no state.
    """
    inputs = [CacheArray((width - 1, size), (None, axis), jnp.float32) for axis, size in channels]
    if state is None:
        return RecurrentCache(tuple(inputs))
    heads, *sizes = state
    matrices = CacheArray((heads.units, *sizes), (heads, None, None), jnp.float32)
    return RecurrentCache(tuple(inputs), matrices)


Cache = list[Any]
"""The layers' caches; None for a layer that keeps nothing."""


def init_cache(
    layers: Sequence[Any],
    slots: int,
    padded: Callable[[CacheArray], Sequence[int]] = lambda array: array.shape,
) -> Cache:
    """An empty cache.

    Args:
      layers: the caches of `CacheArray`s, as `ModelConfig.cache` gives them.
      slots: sequences.
      padded: the shape of an array where devices share it.
    """
    return jax.tree.map(lambda a: jnp.zeros((slots, *padded(a)), a.dtype), list(layers))


def cache_bytes(layers: Sequence[Any]) -> int:
    """Bytes of one slot's caches, unpadded."""
    return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in jax.tree.leaves(layers))
