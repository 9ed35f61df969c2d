"""What queries attend to."""

import dataclasses

import jax
from jax import Array

from jaxsplit.cache.layers import AttentionCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys and values that queries attend to.

    Attributes:
      memory: `[pages, kv_heads, page, width]` each. Scales of 8-bit ones multiply the scores and
        the weights, so that keys and values are used as they are stored.
      positions: of the keys, int32 `[batch or 1, keys]`, negative where there is no key; None: a
        key's position is its index.
      pages: int32 `[batch, pages]`: the pages of each sequence, in order; None: the n-th sequence
        has page n.
      selected: int32 `[batch, kv_heads or 1, time, n]`: the keys that a query sees, by their index,
        negative for none, whatever its position; None: all at and before its position, within the
        window.
      gathers: the selected keys are gathered for each query; else the others are masked.
    """

    memory: AttentionCache
    positions: Array | None = None
    pages: Array | None = None
    selected: Array | None = None
    gathers: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def length(self) -> int:
        """How many keys there are."""
        return self.memory.length * (1 if self.pages is None else self.pages.shape[1])

    def read(self, positions: Array) -> AttentionCache:
        """The keys and values up to the queries' positions, int32 `[batch, time]`, as one long page
        of each sequence; later ones are 0."""
        return self.memory.read(self.pages, positions.max(axis=1) + 1)
