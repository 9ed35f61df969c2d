"""Prefixes in the host's memory: what a page held, and a checkpoint of the state after it.

A page's key is a hash of all tokens up to its end, and of what else its keys and values depend on:
prefixes that begin alike share their first pages.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_ENTRY_BYTES = 1024
"""Of an entry besides its copies."""


@dataclasses.dataclass(frozen=True)
class HostCopy:
    """What a page or a state holds.

    Attributes:
      vectors: for each stage and each of its groups of arrays, those that differ between devices:
        of JAX in pinned memory, or of NumPy.
    """

    vectors: Sequence[Sequence[Sequence[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes on the host."""
        return sum(v.nbytes for stage in self.vectors for group in stage for v in group)


@dataclasses.dataclass(frozen=True)
class Kept:
    """What the host has of a page.

    Attributes:
      page: keys and values of its tokens; None: only the state.
      state: rings and recurrent states after its last token; None: only the page.
    """

    page: HostCopy | None = None
    state: HostCopy | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both, and of their place."""
        return sum(one.nbytes for one in (self.page, self.state) if one is not None) + _ENTRY_BYTES

    def joined(self, other: "Kept | None") -> "Kept":
        """With what another has and this one has not."""
        if other is None:
            return self
        page = other.page if self.page is None else self.page
        return Kept(page, other.state if self.state is None else self.state)


Lookup = Callable[[bytes], Kept | None]
"""From a page's key to what the host has of it."""


def page_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a page.

    Args:
      before: key of the page before; of the first page, a hash of the model.
      tokens: of this page.
    """
    content = np.asarray(tokens, "<i4").tobytes()
    return hashlib.blake2b(before + content, digest_size=32).digest()


class HostCache:
    """Pages by their keys; the least recently used are forgotten. Not thread-safe.

    Args:
      capacity: bytes to keep at most.

    Attributes:
      nbytes: bytes that are kept.
    """

    def __init__(self, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self._kept: collections.OrderedDict[bytes, Kept] = collections.OrderedDict()

    def get(self, key: bytes) -> Kept | None:
        """What is kept of a page; it counts as no use."""
        return self._kept.get(key)

    def put(self, key: bytes, kept: Kept) -> None:
        """Keeps a page, or more of it, unless it is larger than all there is room for."""
        before = self._kept.get(key)
        kept = kept.joined(before)
        if kept.nbytes > self.capacity:
            return
        self._kept.pop(key, None)
        self.nbytes += kept.nbytes - (0 if before is None else before.nbytes)
        self._kept[key] = kept
        while self.nbytes > self.capacity:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def use(self, keys: Sequence[bytes]) -> None:
        """Notes that a prefix is used. Its first pages are forgotten last: without them, the others
        are of no use."""
        for key in reversed(keys):
            if key in self._kept:
                self._kept.move_to_end(key)

    def items(self) -> list[tuple[bytes, Kept]]:
        """All keys and pages, most recently used first."""
        return [*reversed(self._kept.items())]

    def clear(self) -> None:
        """Forgets all."""
        self._kept.clear()
        self.nbytes = 0
