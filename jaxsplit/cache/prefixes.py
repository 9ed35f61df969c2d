"""Which sequence has which pages. Prefixes are shared, and kept until their pages are needed.

A tree has a node for each page that earlier tokens fill: its path from the root is the text before.
A sequence refers to the nodes of its prefix and has pages of its own for what follows. A page that
fills up becomes a node. A page that a finished sequence has filled in part becomes a leaf, which
later sequences copy.

The rings of sliding windows and recurrent states cannot be cut back to an earlier token. For models
with such layers, a prefix is known only up to a checkpoint, a copy of their state.

A `Keeper` is told of pages and checkpoints before they are forgotten. What it has copied to the
host can come back: a prompt that begins with such pages gets new ones, to copy them to.
"""

import collections
import dataclasses
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Protocol

from jaxsplit.cache.host import HostCopy, Kept, Lookup, page_key

Copy = tuple[int, int]
"""From and to."""


class _Node:
    """A page and its tokens; fewer than fit only in a leaf.

    Attributes:
      tokens: ids.
      page: index in the cache.
      parent: the page before; None: this is the root, which has no page.
      children: by their tokens.
      users: running sequences that refer to it.
      states: checkpoints, by the number of this page's tokens that they include.
      key: as of `page_key`, of a full page; None: nobody has asked for it.
    """

    __slots__ = ("__weakref__", "children", "key", "page", "parent", "states", "tokens", "users")

    def __init__(self, tokens: tuple[int, ...], page: int, parent: "_Node | None"):
        self.tokens, self.page, self.parent = tokens, page, parent
        self.children: dict[tuple[int, ...], _Node] = {}
        self.users = 0
        self.states: dict[int, int] = {}
        self.key: bytes | None = None


class Keeper(Protocol):
    """Copies what is about to be forgotten."""

    def root(self, model: Hashable) -> bytes:
        """A hash of what keys and values depend on besides tokens."""
        ...

    def keep(self, key: bytes, page: int | None, state: int | None) -> None:
        """Copies a page, a checkpoint after it, or both, before anything overwrites them."""
        ...


@dataclasses.dataclass(eq=False)
class Allocation:
    """What a sequence has of the cache.

    Attributes:
      nodes: shared pages of its prefix.
      own: pages after these.
      state: where its rings and recurrent states are.
      cached: tokens of its prompt that were there already.
      root: of its prefixes.
    """

    nodes: list[_Node]
    own: list[int]
    state: int
    cached: int
    root: _Node

    @property
    def last(self) -> _Node:
        """The node of its last shared page."""
        return self.nodes[-1] if self.nodes else self.root

    @property
    def pages(self) -> list[int]:
        """All pages, in order."""
        return [*(node.page for node in self.nodes), *self.own]


@dataclasses.dataclass(frozen=True)
class Begun:
    """A new sequence: what it has, and what has to be copied before it begins.

    Attributes:
      allocation: what it has.
      pages, states: copies to make.
      restored: copies on the host, and the pages to write them to.
      state: the copy of its state on the host; None: there is none to write.
    """

    allocation: Allocation
    pages: Sequence[Copy]
    states: Sequence[Copy]
    restored: Sequence[tuple[HostCopy, int]] = ()
    state: HostCopy | None = None


class PrefixCache:
    """The pages and states of one data replica.

    Args:
      pages: how many there are.
      page: tokens of a page.
      states: places for rings and recurrent states: of running sequences, and checkpoints.
      stateful: whether the model has such layers; else prefixes need no checkpoints.
      keeper: is told what is forgotten; None: nobody is.
    """

    def __init__(
        self, pages: int, page: int, states: int, *, stateful: bool, keeper: Keeper | None = None
    ):
        self.page, self.stateful, self._keeper = page, stateful, keeper
        self._free = list(range(pages))[::-1]
        self._free_states = list(range(states))[::-1]
        # A tree of prefixes for each model, which lives as long as one of its nodes.
        self._roots: weakref.WeakValueDictionary[Hashable, _Node] = weakref.WeakValueDictionary()
        self._idle: collections.OrderedDict[_Node, None] = collections.OrderedDict()
        self._unused = 0  # nodes without users
        self._checkpoints: collections.OrderedDict[tuple[_Node, int], None] = (
            collections.OrderedDict()
        )
        self._pending: collections.OrderedDict[tuple[Allocation, int], int] = (
            collections.OrderedDict()
        )  # checkpoints of running sequences, by token count, until their pages are known
        self._running: set[Allocation] = set()
        self.total = pages

    @property
    def available(self) -> int:
        """Pages that are free, or would be if unused prefixes were forgotten."""
        return len(self._free) + self._unused

    @property
    def cached(self) -> int:
        """Pages that keep prefixes which no running sequence uses."""
        return self._unused

    # A sequence's life

    def match(self, tokens: Sequence[int], model: Hashable = None) -> int:
        """How many of a prompt's first tokens are in the cache; arguments as of `begin`."""
        return self._match(tokens, self._root(model))[2]

    def full_pages(self, tokens: Sequence[int], model: Hashable = None) -> int:
        """How many full pages of a prompt are in the cache, with or without a checkpoint."""
        return len(self._full_pages(tokens, self._root(model)))

    def begin(
        self,
        tokens: Sequence[int],
        model: Hashable = None,
        *,
        share: bool = True,
        kept: Lookup | None = None,
    ) -> Begun | None:
        """Pages for a prompt: those of the longest prefix that is known, and new ones.

        Args:
          tokens: the prompt. At least its last token has to be read.
          model: what else keys and values depend on, such as the scales of adapters.
          share: use known prefixes.
          kept: what the host has; None: nothing.

        Returns:
          None: there are too few pages.
        """
        root = self._root(model)
        nodes, tail, cached, checkpoint = [], None, 0, None
        restored: list[HostCopy] = []
        kept_state = None
        if share:
            nodes, tail, cached, checkpoint = self._match(tokens, root)
        if share and kept is not None:
            found = self._match_kept(tokens, root, kept)
            if (count := (len(found[0]) + len(found[1])) * self.page) > cached:
                nodes, restored, kept_state = found
                tail, cached, checkpoint = None, count, None
        for node in nodes:
            self._use(node)
        source = None if checkpoint is None else checkpoint[0].states[checkpoint[1]]
        if checkpoint is not None:
            self._checkpoints.move_to_end(checkpoint)
        own = self._allocate(-(-len(tokens) // self.page) - len(nodes))
        state = None if own is None else self._allocate_state()
        if own is None or state is None:
            for node in nodes:
                self._leave(node)
            self._free += own or []
            return None
        # Copies come before whatever overwrites their sources, which may have been given away.
        pages = [] if tail is None else [(tail.page, own[0])]
        if tail is not None and tail in self._idle:
            self._idle.move_to_end(tail)
        allocation = Allocation(nodes, own, state, cached, root)
        self._running.add(allocation)
        to = [*zip(restored, own, strict=False)]
        if restored:
            self.commit(allocation, tokens[:cached])
        states = [] if source is None else [(source, state)]
        return Begun(allocation, pages, states, to, kept_state)

    def extend(self, allocation: Allocation, tokens: int) -> bool:
        """Adds pages for as many tokens in all; False: there are too few."""
        missing = -(-tokens // self.page) - len(allocation.nodes) - len(allocation.own)
        pages = self._allocate(missing)
        if pages is None:
            return False
        allocation.own += pages
        return True

    def commit(self, allocation: Allocation, tokens: Sequence[int]) -> None:
        """Makes full pages known to other sequences, and the checkpoints among them.

        Args:
          allocation: of the sequence.
          tokens: those whose keys and values have been computed and are right.
        """
        nodes = allocation.nodes
        while allocation.own and (len(nodes) + 1) * self.page <= len(tokens):
            start = len(nodes) * self.page
            full = tuple(tokens[start : start + self.page])
            nodes.append(self._insert(allocation.last, full, allocation))
            self._use(nodes[-1])
        for key in [k for k in self._pending if k[0] is allocation]:
            if key[1] <= len(nodes) * self.page:
                state = self._pending.pop(key)
                self._keep_state(nodes[key[1] // self.page - 1], self.page, state)

    def _insert(self, parent: _Node, tokens: tuple[int, ...], allocation: Allocation) -> _Node:
        """The child with these tokens: a new one of the first own page, or one that is there."""
        page, known = allocation.own.pop(0), parent.children.get(tokens)
        if known is not None:
            self._free.append(page)
            return known
        for shorter in [n for t, n in parent.children.items() if t == tokens[: len(t)]]:
            if not shorter.users and not shorter.states:
                self._forget(shorter)
        self._idle.pop(parent, None)
        node = parent.children[tokens] = _Node(tokens, page, parent)
        self._unused += 1
        self._idle[node] = None
        return node

    def checkpoint(self, allocation: Allocation, tokens: int) -> Copy | None:
        """Room for a copy of a sequence's state, which becomes known with the pages before it.

        Args:
          allocation: of the sequence.
          tokens: how many the state includes.

        Returns:
          the copy to make; None: there is no room, or the tokens do not fill their pages.
        """
        if not self.stateful or not tokens or tokens % self.page:
            return None
        state = self._pending.pop((allocation, tokens), None)
        state = self._allocate_state() if state is None else state
        if state is None:
            return None
        self._pending[allocation, tokens] = state
        return allocation.state, state

    def release(
        self,
        allocation: Allocation,
        tokens: Sequence[int],
        *,
        keep: bool = True,
        keep_state: bool = True,
    ) -> None:
        """Ends a sequence.

        Args:
          allocation: what it had.
          tokens: those whose keys and values have been computed and, if kept, are right.
          keep: keep its tokens for later sequences; else only the pages that are known already.
          keep_state: its state includes exactly these tokens: keep it, too.
        """
        self._running.remove(allocation)
        if keep:
            self.commit(allocation, tokens)
        parent = allocation.last
        rest = tuple(tokens[len(allocation.nodes) * self.page :])
        holder, offset = parent, len(parent.tokens)
        if keep and rest and allocation.own:
            holder, offset = self._keep_rest(parent, rest, allocation), len(rest)
        self._free += allocation.own
        for key in [k for k in self._pending if k[0] is allocation]:
            self._free_states.append(self._pending.pop(key))
        if keep_state and keep and self.stateful and holder is not allocation.root:
            self._keep_state(holder, offset, allocation.state)
        else:
            self._free_states.append(allocation.state)
        for node in allocation.nodes:
            self._leave(node)

    def _keep_rest(self, parent: _Node, rest: tuple[int, ...], allocation: Allocation) -> _Node:
        """The leaf that begins with the tokens of a page filled in part."""
        for tokens, node in parent.children.items():
            if tokens[: len(rest)] == rest:
                return node
        return self._insert(parent, rest, allocation)

    # Nodes

    def _root(self, model: Hashable) -> _Node:
        """The root of a model's prefixes."""
        root = self._roots.get(model)
        if root is None:
            root = self._roots[model] = _Node((), -1, None)
            if self._keeper is not None:
                root.key = self._keeper.root(model)
        return root

    def key(self, node: _Node) -> bytes:
        """The key of a full page."""
        if node.key is None:
            assert node.parent is not None
            node.key = page_key(self.key(node.parent), node.tokens)
        return node.key

    def chains(self) -> Iterator[list[_Node]]:
        """The full pages from the root to each page that none follows, most recently used
        first."""
        ends = [*reversed(self._idle)]
        ends += [a.nodes[-1] for a in self._running if a.nodes and not a.nodes[-1].children]
        for end in ends:
            chain, node = [], end
            while node.parent is not None:
                chain.append(node)
                node = node.parent
            yield [node for node in reversed(chain) if len(node.tokens) == self.page]

    def _full_pages(self, tokens: Sequence[int], root: _Node) -> list[_Node]:
        """The full pages that a prompt begins with."""
        node, nodes = root, []
        while (len(nodes) + 1) * self.page <= len(tokens) - 1:
            start = len(nodes) * self.page
            following = node.children.get(tuple(tokens[start : start + self.page]))
            if following is None:
                break
            node = following
            nodes.append(node)
        return nodes

    def _match_kept(
        self, tokens: Sequence[int], root: _Node, kept: Lookup
    ) -> tuple[list[_Node], list[HostCopy], HostCopy | None]:
        """The prefix of a prompt that is known together with the host: nodes of full pages, copies
        of those that follow, and of the state after them."""
        nodes = self._full_pages(tokens, root)
        found: list[Kept] = []
        key = self.key(nodes[-1] if nodes else root)
        while (start := (len(nodes) + len(found)) * self.page) + self.page <= len(tokens) - 1:
            key = page_key(key, tokens[start : start + self.page])
            one = kept(key)
            if one is None or one.page is None:
                break
            found.append(one)
        state = None
        while self.stateful and (nodes or found):
            last = found[-1] if found else kept(self.key(nodes[-1]))
            state = None if last is None else last.state
            if state is not None:
                break
            (found or nodes).pop()
        return nodes, [one.page for one in found if one.page is not None], state

    def _match(
        self, tokens: Sequence[int], root: _Node
    ) -> tuple[list[_Node], _Node | None, int, tuple[_Node, int] | None]:
        """The known prefix of a prompt: nodes of full pages, a page to copy the next tokens from,
        how many tokens that is, and the checkpoint."""
        limit, nodes = len(tokens) - 1, self._full_pages(tokens, root)
        node = nodes[-1] if nodes else root
        rest = tuple(tokens[len(nodes) * self.page : limit][: self.page])
        tail, count = None, 0
        for known, child in node.children.items():
            common = _common(known, rest)
            if self.stateful:
                common = max((n for n in child.states if n <= common), default=0)
            if common > count:
                tail, count = child, common
        if not self.stateful:
            return nodes, tail, len(nodes) * self.page + count, None
        if tail is not None:
            return nodes, tail, len(nodes) * self.page + count, (tail, count)
        while nodes:
            best = max(nodes[-1].states, default=0)
            if best == self.page:
                return nodes, None, len(nodes) * self.page, (nodes[-1], best)
            last = nodes.pop()
            if best:  # a checkpoint within a page that has been filled since
                return nodes, last, len(nodes) * self.page + best, (last, best)
        return [], None, 0, None

    def _use(self, node: _Node) -> None:
        if not node.users:
            self._unused -= 1
            self._idle.pop(node, None)
        node.users += 1

    def _leave(self, node: _Node) -> None:
        node.users -= 1
        if not node.users:
            self._unused += 1
            if not node.children:
                self._idle[node] = None

    def _allocate(self, count: int) -> list[int] | None:
        """Free pages, some of unused prefixes if need be."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._forget(next(iter(self._idle)))
        return [self._free.pop() for _ in range(count)]

    def _forget(self, node: _Node) -> None:
        """Frees the page and the checkpoints of an unused leaf."""
        parent = node.parent
        assert parent is not None
        assert not node.users
        assert not node.children
        if self._keeper is not None and len(node.tokens) == self.page:
            self._keeper.keep(self.key(node), node.page, node.states.get(self.page))
        del parent.children[node.tokens]
        self._idle.pop(node, None)
        self._unused -= 1
        self._free.append(node.page)
        for offset, state in node.states.items():
            del self._checkpoints[node, offset]
            self._free_states.append(state)
        if parent.parent is not None and not parent.users and not parent.children:
            self._idle[parent] = None
            self._idle.move_to_end(parent, last=False)

    # States

    def _keep_state(self, node: _Node, offset: int, state: int) -> None:
        """Makes a checkpoint known, unless there is one already."""
        if offset in node.states:
            self._free_states.append(state)
        else:
            node.states[offset] = state
            self._checkpoints[node, offset] = None
        self._checkpoints.move_to_end((node, offset))

    def _allocate_state(self) -> int | None:
        """A free state, that of the oldest checkpoint if need be."""
        if not self._free_states and self._checkpoints:
            (node, offset), _ = self._checkpoints.popitem(last=False)
            if self._keeper is not None and offset == self.page:
                self._keeper.keep(self.key(node), None, node.states[offset])
            self._free_states.append(node.states.pop(offset))
        if not self._free_states and self._pending:
            self._free_states.append(self._pending.popitem(last=False)[1])
        return self._free_states.pop() if self._free_states else None

    # Checks

    def check(self) -> None:
        """Raises AssertionError unless every page is free or has one owner, and so on."""
        nodes = list(self._nodes())
        owned = [n.page for n in nodes] + [p for a in self._running for p in a.own]
        assert sorted(owned + self._free) == list(range(self.total))
        users: collections.Counter = collections.Counter()
        for allocation in self._running:
            users.update(allocation.nodes)
        assert all(n.users == users[n] for n in nodes)
        assert set(users) <= set(nodes)
        assert self._unused == sum(not n.users for n in nodes)
        assert set(self._idle) == {n for n in nodes if not n.users and not n.children}
        states = [s for n in nodes for s in n.states.values()]
        states += [a.state for a in self._running] + self._free_states
        states += self._pending.values()
        assert all(allocation in self._running for allocation, _ in self._pending)
        assert len(set(states)) == len(states)
        assert {(n, o) for n in nodes for o in n.states} == set(self._checkpoints)
        for node in nodes:
            assert len(node.tokens) == self.page or not node.children
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
            assert not node.users or node.parent.parent is None or node.parent.users

    def _nodes(self) -> Iterator[_Node]:
        waiting = [node for root in self._roots.values() for node in root.children.values()]
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
