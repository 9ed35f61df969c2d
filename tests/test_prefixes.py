"""Pages and states of sequences against a simulated device that knows which tokens each has."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tiny import fresh_rng

from jaxsplit.cache.host import HostCache, HostCopy, Kept, page_key
from jaxsplit.cache.prefixes import PrefixCache

GARBAGE = -1


class Sequence:
    """What a sequence has of the cache, and the tokens that it knows to be there."""

    def __init__(self, allocation, tokens):
        self.allocation, self.tokens = allocation, tokens


class Device:
    """Drives a `PrefixCache` as a scheduler does, and simulates the device.

    Attributes:
      pages: the tokens in each page, by position.
      states: the tokens that each state includes.
      host: what it has forgotten; None: nothing is kept.
    """

    def __init__(self, *, pages, page, states, slots, stateful, host=None):
        keeper = None if host is None else self
        self.cache = PrefixCache(pages, page, states, stateful=stateful, keeper=keeper)
        self.host, self.restored = host, 0
        self.page, self.stateful, self.slots = page, stateful, slots
        self.pages = [[GARBAGE] * page for _ in range(pages)]
        self.states = [(GARBAGE,)] * states
        self.running: list[Sequence] = []
        self.computed: set[tuple[int, ...]] = set()

    def root(self, model):
        return repr(model).encode()

    def keep(self, key, page, state):
        """As of a `Keeper`."""
        page, state = (
            None if index is None else HostCopy([[[np.asarray(held[index])]]])
            for index, held in ((page, self.pages), (state, self.states))
        )
        self.host.put(key, Kept(page, state))

    def key_of(self, tokens):
        """The key of the last of some full pages."""
        key = self.root(None)
        for start in range(0, len(tokens), self.page):
            key = page_key(key, tokens[start : start + self.page])
        return key

    @property
    def used(self):
        return len({page for s in self.running for page in s.allocation.pages})

    def contents(self, sequence):
        return [token for page in sequence.allocation.pages for token in self.pages[page]]

    def begin(self, prompt, *, share=True):
        """False: there is no room."""
        before = self.cache.available, self.cache.cached
        needed, matched = -(-len(prompt) // self.page), self.cache.match(prompt)
        kept = None if self.host is None else self.host.get
        begun = self.cache.begin(prompt, share=share, kept=kept)
        if begun is None:
            assert self.cache.available == before[0]
            assert needed > before[0] - before[1] or len(self.running) == len(self.states)
            assert needed > self.cache.total - self.used or len(self.running) == len(self.states)
            return False
        for source, target in begun.pages:
            self.pages[target] = [*self.pages[source]]
        for source, target in begun.states:
            self.states[target] = self.states[source]
        allocation = begun.allocation
        for copy, target in begun.restored:
            self.pages[target] = copy.vectors[0][0][0].tolist()
        if begun.state is not None:
            self.states[allocation.state] = tuple(begun.state.vectors[0][0][0].tolist())
        if begun.restored or begun.state:
            assert allocation.cached % self.page == 0
            assert matched < allocation.cached < len(prompt)
            self.restored += 1
        else:
            assert allocation.cached == (matched if share else 0) < len(prompt)
        assert len(allocation.pages) == needed
        known = tuple(prompt[: allocation.cached])
        sequence = Sequence(allocation, [*known])
        assert self.contents(sequence)[: len(known)] == [*known]
        assert not known or any(one[: len(known)] == known for one in self.computed)
        if not known:
            self.states[allocation.state] = ()
        elif self.stateful:
            assert self.states[allocation.state] == known
        self.running.append(sequence)
        self.compute(sequence, prompt[len(known) :])
        return True

    def write(self, sequence, position, token):
        index = position // self.page
        assert index >= len(sequence.allocation.nodes), "a shared page is overwritten"
        self.pages[sequence.allocation.pages[index]][position % self.page] = token

    def compute(self, sequence, tokens):
        """Reads tokens."""
        for token in tokens:
            self.write(sequence, len(sequence.tokens), token)
            sequence.tokens.append(token)
            self.states[sequence.allocation.state] = tuple(sequence.tokens)
        self.computed.add(tuple(sequence.tokens))

    def extend(self, sequence, tokens):
        before = self.cache.available
        needed = -(-(len(sequence.tokens) + len(tokens)) // self.page)
        missing = needed - len(sequence.allocation.pages)
        if not self.cache.extend(sequence.allocation, len(sequence.tokens) + len(tokens)):
            assert missing > before == self.cache.available
            return False
        assert len(sequence.allocation.pages) == max(needed, needed - missing)
        self.compute(sequence, tokens)
        return True

    def commit(self, sequence):
        self.cache.commit(sequence.allocation, sequence.tokens)

    def checkpoint(self, sequence):
        copy = self.cache.checkpoint(sequence.allocation, len(sequence.tokens))
        if copy is not None:
            assert copy[0] == sequence.allocation.state
            self.states[copy[1]] = self.states[copy[0]]

    def release(self, sequence, *, keep=True, exact=True, unknown=0):
        """Not `exact`: units in flight go on computing a few tokens that the host never sees."""
        capacity = len(sequence.allocation.pages) * self.page
        if not exact:
            for position in range(len(sequence.tokens), len(sequence.tokens) + unknown):
                if position < capacity:
                    self.write(sequence, position, GARBAGE)
            self.states[sequence.allocation.state] = (GARBAGE,)
        if not keep:  # whatever is there is not to be trusted
            for page in sequence.allocation.own:
                self.pages[page] = [GARBAGE] * self.page
        self.running.remove(sequence)
        self.cache.release(sequence.allocation, sequence.tokens, keep=keep, keep_state=exact)

    def check(self):
        cache = self.cache
        cache.check()
        assert cache.available == cache.total - self.used
        for sequence in self.running:
            count = len(sequence.tokens)
            assert self.contents(sequence)[:count] == sequence.tokens
            if self.stateful:
                assert self.states[sequence.allocation.state] == tuple(sequence.tokens)
        nodes = [*cache._nodes()]
        assert len(nodes) <= cache.total
        for (allocation, count), state in cache._pending.items():
            (tokens,) = (s.tokens for s in self.running if s.allocation is allocation)
            assert self.states[state] == tuple(tokens[:count])
        assert len(cache._checkpoints) <= len(self.states)
        if self.host is not None:
            assert self.host.nbytes == sum(kept.nbytes for _, kept in self.host.items())
            assert self.host.nbytes <= self.host.capacity
        for node in nodes:  # what any later sequence may find
            path, above = [], node
            while above.parent is not None:
                path = [*above.tokens, *path]
                above = above.parent
            if self.host is not None and len(node.tokens) == self.page:
                assert cache.key(node) == self.key_of(path)
            assert self.pages[node.page][: len(node.tokens)] == [*node.tokens]
            for offset, state in node.states.items():
                end = len(path) - len(node.tokens) + offset
                assert self.states[state] == tuple(path[:end])


# Few different tokens, so that prefixes are often shared.
texts = st.lists(st.integers(0, 1), min_size=1, max_size=14)
few = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    """A scheduler that does anything in any order."""

    @initialize(
        pages=st.integers(3, 12),
        page=st.integers(1, 4),
        slots=st.integers(1, 4),
        checkpoints=st.integers(0, 3),
        stateful=st.booleans(),
        host=st.none() | st.integers(0, 20_000).map(HostCache),
    )
    def start(self, pages, page, slots, checkpoints, stateful, host):
        self.device = Device(
            pages=pages,
            page=page,
            states=slots + checkpoints,
            slots=slots,
            stateful=stateful,
            host=host,
        )

    def chosen(self, index):
        running = self.device.running
        return running[index % len(running)]

    def some_run(self):
        return bool(self.device.running)

    @precondition(lambda self: len(self.device.running) < self.device.slots)
    @rule(prompt=texts, share=st.sampled_from([True, True, True, False]))
    def begin(self, prompt, share):
        self.device.begin(prompt, share=share)

    @precondition(some_run)
    @rule(index=few, tokens=texts)
    def extend(self, index, tokens):
        self.device.extend(self.chosen(index), tokens)

    @precondition(some_run)
    @rule(index=few)
    def commit(self, index):
        self.device.commit(self.chosen(index))

    @precondition(some_run)
    @rule(index=few)
    def checkpoint(self, index):
        self.device.checkpoint(self.chosen(index))

    @precondition(some_run)
    @rule(index=few, keep=st.sampled_from([True, True, False]), exact=st.booleans(), unknown=few)
    def release(self, index, keep, exact, unknown):
        self.device.release(self.chosen(index), keep=keep, exact=exact, unknown=unknown)

    @invariant()
    def holds(self):
        if hasattr(self, "device"):
            self.device.check()


def test_a_prefix_that_is_found_is_in_the_pages_and_states():
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=checks
        ),
    )


@pytest.mark.parametrize("kept", [0, 300_000])
@pytest.mark.parametrize("stateful", [False, True])
def test_after_ten_thousand_operations_every_page_is_free_or_owned(stateful, kept):
    rng = fresh_rng()
    host = HostCache(kept) if kept else None
    device = Device(pages=40, page=4, states=9, slots=6, stateful=stateful, host=host)
    done = dict.fromkeys(("begin", "refused", "extend", "full", "checkpoint", "release"), 0)
    base = rng.integers(0, 3, 60).tolist()
    for operation in range(100_000):
        if operation >= 10_000 and bool(device.restored) == bool(kept):
            break
        what = rng.choice([*done])
        one = rng.choice(device.running) if device.running else None
        if what in ("begin", "refused") and len(device.running) < device.slots:
            start = base[: rng.integers(0, 60)] + rng.integers(0, 3, rng.integers(1, 20)).tolist()
            done["begin" if device.begin(start, share=rng.random() < 0.9) else "refused"] += 1
        elif what in ("extend", "full") and one:
            more = rng.integers(0, 3, rng.integers(1, 12)).tolist()
            done["extend" if device.extend(one, more) else "full"] += 1
        elif what == "checkpoint" and one:
            device.commit(one) if rng.random() < 0.5 else device.checkpoint(one)
            done["checkpoint"] += 1
        elif what == "release" and one:
            device.release(one, keep=rng.random() < 0.8, exact=rng.random() < 0.6, unknown=5)
            done["release"] += 1
        device.check()
    assert all(done.values())
    assert bool(device.restored) == bool(kept)
    for one in [*device.running]:
        device.release(one)
    device.check()
    assert device.cache.available == device.cache.total


@pytest.mark.parametrize("stateful", [False, True])
def test_a_finished_sequence_is_found_again(stateful):
    """All of it but the last token, which has to be read."""
    device = Device(pages=8, page=4, states=4, slots=2, stateful=stateful)
    text = np.arange(11).tolist()
    device.begin(text)
    device.release(device.running[0])
    assert device.cache.match([*text, 50]) == len(text)
    assert device.cache.match(text) == (0 if stateful else len(text) - 1)
    assert device.cache.match([*text[:6], 50, 51]) == (0 if stateful else 6)
    assert device.begin([*text, 50])
    device.check()


def test_a_running_sequence_shares_its_full_pages():
    device = Device(pages=8, page=4, states=4, slots=2, stateful=False)
    text = np.arange(11).tolist()
    device.begin(text)
    assert device.cache.match([*text, 50]) == 0
    device.commit(device.running[0])
    assert device.cache.match([*text, 50]) == 8
    device.begin([*text, 50])
    first, second = (one.allocation.pages for one in device.running)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    assert device.used == 4


def test_a_state_within_a_page_that_has_been_filled_since_is_found():
    device = Device(pages=8, page=4, states=4, slots=2, stateful=True)
    text = np.arange(10).tolist()
    device.begin(text)
    device.commit(device.running[0])
    device.begin(text[:6])
    device.release(device.running[1])
    assert device.cache.match([*text, 50]) == 6
    assert device.begin([*text, 50])
    device.check()


@pytest.mark.parametrize("stateful", [False, True])
def test_the_same_text_again_takes_no_more_pages(stateful):
    device = Device(pages=8, page=4, states=4, slots=2, stateful=stateful)
    for share in (True, True, False):
        device.begin([1, 2, 3, 4, 5, 6], share=share)
        device.release(device.running[0])
        assert device.cache.cached == 2


def test_what_was_used_last_is_kept_longest():
    """Also where it was a part of a page, which was copied."""
    device = Device(pages=3, page=4, states=2, slots=2, stateful=False)
    for text in ([1, 2, 3], [4, 5, 6]):
        device.begin(text)
        device.release(device.running[0])
    device.begin([1, 2, 9])
    device.release(device.running[0], keep=False)
    device.begin([7] * 8)
    assert device.cache.match([1, 2, 3]) == 2
    assert device.cache.match([4, 5, 6]) == 0
