"""What queries attend to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

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


def over_filled(run: Callable[[KV], Any], kv: KV, positions: Array, *, at_least: int = 1) -> Any:
    """`run(kv)`, whose result does not depend on keys after the last position. On CPUs it gets only
    the first pages of each sequence: the filled ones, rounded up to one of `_page_counts`.

    Args:
      run: its result has the same shape for any number of pages.
      kv: keys and values.
      positions: of queries, int32 `[batch, time]`.
      at_least: how many keys `run` needs, whatever they are.
    """
    if kv.pages is None:
        return run(kv)
    most = kv.pages.shape[1]
    counts = [n for n in _page_counts(most) if n == most or n * kv.memory.length >= at_least]
    if len(counts) == 1:
        return run(kv)

    def first_pages(count: int, kv: KV) -> Any:
        assert kv.pages is not None
        return run(dataclasses.replace(kv, pages=kv.pages[:, :count]))

    def on_cpu(kv: KV) -> Any:
        needed = positions.max() // kv.memory.length + 1
        branches = [lambda kv, count=count: first_pages(count, kv) for count in counts]
        return lax.switch((needed > jnp.asarray(counts[:-1])).sum(), branches, kv)

    # A GPU would have to tell the host which branch it takes.
    return lax.platform_dependent(kv, cpu=on_cpu, default=run)


def _page_counts(most: int) -> list[int]:
    """The page counts that are compiled, ascending; the last is `most`."""
    counts = [most]
    while counts[0] > 1:
        counts.insert(0, -(-counts[0] // 4))
    return counts
