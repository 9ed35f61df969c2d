"""What layers keep of earlier tokens: keys, values and recurrent states.

Each layer has its own cache, a dataclass of arrays. Recurrent states and the rings of sliding
windows have a slot for each sequence. The keys and values of other attention layers are in pages: a
sequence lists those that hold its tokens, in order, and sequences may share pages. A cache whose
pages are as long as the context has one for each sequence: the sequence's slot.

`CacheArray` describes an array before allocation: a mixer's config returns a cache of them.
"""

# Dataclasses of arrays hold descriptions of arrays too, such as `CacheArray`.
# pyright: reportArgumentType=false, reportAssignmentType=false

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.sharding.axes import PAGES, SLOTS, Axis


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """Shape, axes and dtype of an array of a cache.

    Attributes:
      shape: of one slot or page, unpadded.
      axes: logical axes of the dimensions of `shape`; None: replicated.
      dtype: of the elements.
      paged: the array is in pages; else each sequence has a slot.
    """

    shape: tuple[int, ...]
    axes: tuple[Axis | None, ...]
    dtype: jnp.dtype
    paged: bool = False

    @property
    def all_axes(self) -> tuple[Axis | None, ...]:
        """The axes, with the one of slots or pages first."""
        return (PAGES if self.paged else SLOTS, *self.axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SideInputs:
    """What accompanies the residual stream from layer to layer; None: no layer reads it.

    Attributes:
      tokens: token ids, int32 `[batch, time]`; only the first stage has them.
      carried: `[batch, time, carried]`: the embedding, or what a layer has put there for all later
        ones.
      per_layer_embeddings: `[batch, time, width]` each, of the layers to come; a layer is given its
        own.
    """

    tokens: Array | None = None
    carried: Array | None = None
    per_layer_embeddings: tuple[Array, ...] = ()

    def of_layer(self, index: int) -> "SideInputs":
        """What a layer is given, the first to come being 0."""
        own = self.per_layer_embeddings[index : index + 1]
        return dataclasses.replace(self, per_layer_embeddings=own)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of a forward pass that all layers share.

    Attributes:
      positions: int32 `[batch, time]`, consecutive in each sequence; negative for padding, which
        comes last.
      slots: int32 `[batch]`: the slot of each sequence; None: all slots in order.
      pages: int32 `[batch, pages]`: the pages of each sequence, in order; None: its slot.
      freq_factors: divisors of rotary frequencies, float32 `[dim / 2]`, by name.
      lent: what layers lend to later ones of their stage, by name: keys and values with the keys'
        positions, or which keys an indexer has selected.
      side_inputs: what accompanies the residual stream.
    """

    positions: Array
    slots: Array | None = None
    pages: Array | None = None
    freq_factors: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    lent: dict[str, Any] = dataclasses.field(default_factory=dict)
    side_inputs: SideInputs = dataclasses.field(default_factory=SideInputs)

    @property
    def rows(self) -> Array:
        """The slot of each sequence: int32 `[batch]`."""
        return jnp.arange(self.positions.shape[0]) if self.slots is None else self.slots

    def pages_of(self, *, ring: bool) -> Array | None:
        """The pages of each sequence, int32 `[batch, pages]`; None: the n-th sequence has page n.

        Args:
          ring: of a sliding window's layer, whose ring is a single page: the slot.
        """
        if self.pages is not None and not ring:
            return self.pages
        return None if self.slots is None else self.slots[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys and values of one layer. Position p of a sequence is at `p % length` of its pages.

    Attributes:
      keys: `[pages, kv_heads, page, head_dim]`.
      values: `[pages, kv_heads, page, value_dim]`; None: the keys' first dimensions.
      key_scale, value_scale: float32 `[pages, kv_heads, page]` that multiply int8 keys and values;
        None for other dtypes.
    """

    keys: Array
    values: Array | None
    key_scale: Array | None = None
    value_scale: Array | None = None

    @staticmethod
    def of(keys: Array, values: Array | None, dtype: jnp.dtype) -> "AttentionCache":
        """Converts keys and values of new tokens, each `[batch, time, kv_heads, width]`, to the
        layout and dtype of a cache, `[batch, kv_heads, time, width]`."""
        arrays = [None if x is None else x.swapaxes(1, 2) for x in (keys, values)]
        if jnp.dtype(dtype) != jnp.int8:
            return AttentionCache(*(None if x is None else x.astype(dtype) for x in arrays))
        (keys, key_scale), (values, value_scale) = (
            (None, None) if x is None else _to_int8(x) for x in arrays
        )
        return AttentionCache(keys, values, key_scale, value_scale)

    def dequantized_keys(self, dtype: jnp.dtype) -> Array:
        """The keys in a floating-point dtype."""
        if self.key_scale is None:
            return self.keys.astype(dtype)
        return (self.keys * self.key_scale[..., None]).astype(dtype)

    @property
    def own_values(self) -> Array:
        """The values, of a cache that has them beside the keys."""
        assert self.values is not None
        return self.values

    @property
    def length(self) -> int:
        """Positions of a page."""
        return self.keys.shape[2]

    def write(self, new: "AttentionCache", batch: Batch, *, ring: bool = False) -> "AttentionCache":
        """Writes new tokens; if there are more than fit, the last of them.

        Args:
          new: `[batch, kv_heads, time, width]`.
          batch: where the tokens belong.
          ring: as in `Batch.pages_of`.
        """
        positions, pages = batch.positions, batch.pages_of(ring=ring)
        pages = batch.rows[:, None] if pages is None else pages
        length = pages.shape[1] * self.length
        last = positions.max(axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > last - length)
        target = positions % length
        page = jnp.take_along_axis(pages, target // self.length, axis=1)
        index = (jnp.where(kept, page, self.keys.shape[0]), slice(None), target % self.length)
        return jax.tree.map(
            lambda old, add: old.at[index].set(add.swapaxes(1, 2), mode="drop"), self, new
        )

    def read(self, pages: Array | None, filled: Array | None = None) -> "AttentionCache":
        """Gathers the pages of each sequence as one long page.

        Args:
          pages: int32 `[batch, pages]`; None: all pages are whole sequences, in order, and are
            returned as they are.
          filled: int32 `[batch]`: how many positions have been written. The others are 0: what is
            there may not be finite, and a weight of 0 times that is NaN.
        """
        if pages is None:
            return self

        def of(x: Array) -> Array:
            x = jnp.moveaxis(x[pages], 1, 2)
            x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
            if filled is None:
                return x
            exists = jnp.arange(x.shape[2]) < filled[:, None]
            exists = exists.reshape(len(x), 1, -1, *[1] * (x.ndim - 3))
            return jnp.where(exists, x, jnp.zeros((), x.dtype))

        return jax.tree.map(of, self)

    def at(self, index: Array, pages: Array | None) -> "AttentionCache":
        """Gathers some positions of each sequence.

        Args:
          index: int32 `[batch, kv_heads or 1, n]`; negative: zeros.
          pages: int32 `[batch, pages]`; None: the n-th sequence has page n.

        Returns:
          a cache `[batch, kv_heads, n, width]`.
        """
        batch, heads, _ = index.shape
        exists, index = index >= 0, jnp.maximum(index, 0)
        if pages is None:
            pages = jnp.arange(batch)[:, None]
        page = jnp.take_along_axis(pages[:, None], index // self.length, axis=2)
        head = jnp.arange(self.keys.shape[1] if heads == 1 else heads)[:, None]

        def of(x: Array) -> Array:
            x = x[page, head, index % self.length]
            return jnp.where(exists.reshape(*exists.shape, *[1] * (x.ndim - 3)), x, 0).astype(
                x.dtype
            )

        return jax.tree.map(of, self)

    def positions(self, last: Array) -> Array:
        """Position at each index once `last`, int32 `[batch]`, is written: int32 `[batch, length]`,
        negative where there is none. Of a sequence in a single page."""
        return last[:, None] - (last[:, None] - jnp.arange(self.length)) % self.length

    def followed_by(self, new: "AttentionCache") -> "AttentionCache":
        """Concatenates two caches along the positions."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), self, new)


def _to_int8(x: Array) -> tuple[Array, Array]:
    """Quantizes `[..., head_dim]` to int8, with a scale `[...]` that maps the largest magnitude to
    127."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None])
    return codes.astype(jnp.int8), scale


def attention_cache(
    kv_heads: Axis,
    length: int,
    head_dim: int,
    value_dim: int | None,
    dtype: jnp.dtype,
    *,
    ring: bool = False,
) -> AttentionCache:
    """`AttentionCache` of `CacheArray`s; int8 has a scale for each head and position.

    Args:
      kv_heads: axis of the heads; without units: a single, replicated head.
      length: positions of a page, or of the ring.
      head_dim, value_dim: widths; `value_dim` None: values are the keys' first dimensions.
      dtype: of keys and values.
      ring: of a sliding window: in slots, not in pages.
    """
    heads = max(kv_heads.units, 1)

    def array(*width: int, dtype: jnp.dtype = dtype) -> CacheArray:
        shape = (heads, length, *width)
        return CacheArray(shape, (kv_heads, *[None] * (len(shape) - 1)), dtype, paged=not ring)

    scaled = jnp.dtype(dtype) == jnp.int8
    scale = array(dtype=jnp.float32) if scaled else None
    values = None if value_dim is None else array(value_dim)
    return AttentionCache(array(head_dim), values, scale, scale if values else None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentCache:
    """State of a recurrent layer, float32.

    Attributes:
      inputs: last inputs of each convolution: `[slots, kernel_size - 1, channels]`.
      state: `[slots, heads, key_dim, value_dim]`; None: only convolutions have state.
    """

    inputs: tuple[Array, ...]
    state: Array | None = None

    def read(self, batch: Batch) -> "RecurrentCache":
        """Gathers the state of the batch's slots, zeros where a sequence starts."""
        begins = batch.positions[:, 0] == 0

        def of(x: Array) -> Array:
            x = x if batch.slots is None else x[batch.slots]
            return jnp.where(begins.reshape(-1, *[1] * (x.ndim - 1)), 0, x)

        return jax.tree.map(of, self)

    def write(self, new: "RecurrentCache", batch: Batch) -> "RecurrentCache":
        """Replaces the state of the batch's slots."""
        if batch.slots is None:
            return new
        return jax.tree.map(lambda old, x: old.at[batch.slots].set(x), self, new)


def recurrent_cache(
    kernel_size: int,
    channels: Sequence[tuple[Axis, int]],
    state: tuple[Axis, int, int] | None = None,
) -> RecurrentCache:
    """`RecurrentCache` of `CacheArray`s.

    Args:
      kernel_size: of the convolutions, in tokens.
      channels: axis and size of each convolution's channels.
      state: axis of the heads, `key_dim` and `value_dim`; None: no state.
    """
    inputs = [
        CacheArray((kernel_size - 1, size), (None, axis), jnp.float32) for axis, size in channels
    ]
    if state is None:
        return RecurrentCache(tuple(inputs))
    heads, *sizes = state
    matrices = CacheArray((heads.units, *sizes), (heads, None, None), jnp.float32)
    return RecurrentCache(tuple(inputs), matrices)


def pool_cache(rows: int, row_width: int, entries: int, width: int) -> RecurrentCache:
    """`RecurrentCache` of `CacheArray`s: the last `rows` tokens of a sequence, and entries for its
    blocks of tokens."""
    shapes = (rows, row_width), (max(1, entries), width)
    return RecurrentCache(tuple(CacheArray(s, (None, None), jnp.float32) for s in shapes))


Cache = list[Any]
"""The cache of each layer; None for a stateless one."""


def init_cache(
    layers: Sequence[Any],
    slots: int,
    padded: Callable[[CacheArray], Sequence[int]] = lambda array: array.shape,
    *,
    pages: int | None = None,
) -> Cache:
    """Allocates a cache, filled with zeros.

    Args:
      layers: caches of `CacheArray`s, as from `ModelConfig.cache`.
      slots: number of sequences.
      padded: global shape of an array, padded for its sharding.
      pages: number of pages; None: one for each slot.
    """
    paged = slots if pages is None else pages

    def empty(a: CacheArray) -> Array:
        return jnp.zeros((paged if a.paged else slots, *padded(a)), a.dtype)

    return jax.tree.map(empty, list(layers))


def in_pages(layers: Sequence[Any], length: int) -> list[Any]:
    """Caches of `CacheArray`s with pages of another length.

    Args:
      layers: as from `ModelConfig.cache`, whose pages are as long as the context.
      length: positions of a page.
    """

    def of(a: CacheArray) -> CacheArray:
        heads, _, *width = a.shape
        return dataclasses.replace(a, shape=(heads, length, *width)) if a.paged else a

    return jax.tree.map(of, list(layers))
