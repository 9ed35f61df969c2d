"""Which sequences the devices work on next.

A request waits until its prompt fits into the cache. Its prompt is read in chunks, then it is
decoded together with others, in blocks of steps, until it ends. Requests join and leave between
blocks. A sequence that needs a page when there is none preempts the youngest: what that one has
computed is forgotten, and computed again later.

Sequences under a grammar take single steps together, since the host has to know a token before it
can tell which may follow; the others' blocks alternate with these steps.

Some units of work are always in flight: while the devices work on one, the results of the one
before are read. Sequences that have ended stay in blocks that are already in flight, masked.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxsplit.cache.prefixes import Allocation, PrefixCache
from jaxsplit.engine.engine import MAX_STOP_IDS, Engine, Masks, Prompt, Row
from jaxsplit.engine.pace import MAX_BLOCK, Chunk, Pace, Step
from jaxsplit.engine.pending import PendingPrompts, PendingTokens
from jaxsplit.engine.prefix_store import Loading, PrefixStore
from jaxsplit.engine.request import (
    CANCELLED,
    CONTEXT,
    LENGTH,
    STOP,
    Progress,
    Request,
    RequestSpec,
    TokenLogprob,
    token_logprobs,
)
from jaxsplit.engine.sampling import NOT_FINITE, SamplerSpec
from jaxsplit.errors import JaxsplitError
from jaxsplit.text.grammar import Grammars, Matcher

_RESERVE = 128
"""Tokens that must fit into the cache after a prompt, before it is read."""


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request that waits or is being worked on.

    Attributes:
      request: what is wanted.
      tokens: the prompt, and what has been generated.
      spec: of its sampler.
      replica, slot, allocation: where it is; None: it waits.
      prompt: tokens to read before it decodes: of a preempted sequence, also those generated.
      read: how many of these have been enqueued.
      sampled: tokens that have been enqueued since, at most.
      finite: whether the logits after its prompt have arrived, and are finite. Until then, nothing
        that has been computed is known to other sequences: a NaN spreads to all tokens of a chunk.
      matcher: of its grammar; None: it has none.
      loading: what is read of its prompt's prefix from disk; None: nothing.
      looked_up: whether it is known what is on disk.
    """

    request: Request
    tokens: list[int]
    spec: SamplerSpec
    replica: int = 0
    slot: int = -1
    allocation: Allocation | None = None
    prompt: int = 0
    read: int = 0
    sampled: int = 0
    finite: bool = False
    outputs: list[np.ndarray] = dataclasses.field(default_factory=list)
    matcher: Matcher | None = None
    loading: Loading | None = None
    looked_up: bool = False

    @property
    def order(self) -> tuple[int, int]:
        """The first in this order goes first."""
        return -self.request.spec.priority, self.request.id

    @property
    def decodes(self) -> bool:
        """Whether its prompt has been enqueued."""
        return self.read == self.prompt


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Work that has been enqueued.

    Attributes:
      sequences: of each data replica, in the order of the rows.
      pending: its results.
      work: what its time depends on.
      steps: of a block; 1 of prompts.
      enqueued: when.
      parts: what was read of each prompt.
    """

    sequences: Sequence[Sequence[_Sequence]]
    pending: PendingTokens | PendingPrompts
    work: Chunk | Step
    steps: int
    enqueued: float
    parts: Sequence[Sequence[Prompt]] = ()

    def rows(self) -> Iterator[tuple[tuple[int, int], _Sequence]]:
        """The sequences and their places in the results."""
        for replica, own in enumerate(self.sequences):
            for row, sequence in enumerate(own):
                yield (replica, row), sequence


@dataclasses.dataclass
class Counters:
    """What a scheduler has done so far.

    Attributes:
      prompt_tokens, cached_tokens, generated_tokens: in all; cached ones were not read again.
      preemptions, finished: how often; how many requests.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a scheduler has done and is doing.

    Attributes:
      waiting, running: requests.
      pages, free_pages, cached_pages: of the cache: all, those without content, and those that keep
        prefixes which no running sequence uses.
      page: tokens of a page.
      counters: what it has done so far.
      ram_bytes, disk_bytes: of prefixes in the host's memory and on disk.
      restored_tokens, loaded_tokens: of `counters.cached_tokens`, those that came back from there.
    """

    waiting: int
    running: int
    pages: int
    free_pages: int
    cached_pages: int
    page: int
    counters: Counters
    ram_bytes: int = 0
    disk_bytes: int = 0
    restored_tokens: int = 0
    loaded_tokens: int = 0


class Scheduler:
    """Runs requests on an engine, a unit of work at a time. Not thread-safe.

    Args:
      engine: that does the work.
      itl_budget: seconds that reading a prompt may delay the tokens of other requests.
      measures: choose chunk and block lengths by measured times; else they are fixed, so that
        all processes choose alike.
      grammars: of the model's tokenizer; None: no request has a grammar.
      store: prefixes on the host; None: what the devices forget is forgotten.

    Attributes:
      counters: what it has done so far.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        itl_budget: float = 0.1,
        measures: bool = True,
        grammars: Grammars | None = None,
        store: PrefixStore | None = None,
    ):
        self._store = store
        self.engine = engine
        self._pace = Pace(engine, itl_budget, measures)
        self._grammars = grammars
        self.counters = Counters()
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._units: collections.deque[_Unit] = collections.deque()
        self._most_in_flight = engine.most_in_flight
        self._prompts_last = self._masked_last = False
        self._make_caches()

    def _make_caches(self) -> None:
        self.engine.overwritten = False
        engine, size = self.engine, self.engine.size
        self._stateful = engine.stateful
        self._caches = [
            PrefixCache(
                size.pages,
                size.page,
                size.states,
                stateful=self._stateful,
                keeper=self._store and self._store.of(replica),
            )
            for replica in range(engine.partition.data)
        ]
        count = engine.slots_per_replica
        self._free_slots = [list(range(count))[::-1] for _ in self._caches]

    # Requests

    def check(self, spec: RequestSpec) -> None:
        """Refuses what could never run.

        Raises:
          JaxsplitError: the prompt and its tokens do not fit into the cache.
        """
        size = self.engine.size
        generated = 0 if spec.reads_only else max(spec.max_tokens - 1, 0)
        needed = min(len(spec.prompt) + generated, size.context)
        if -(-needed // size.page) > size.pages:
            raise JaxsplitError(
                f"the prompt has {len(spec.prompt)} tokens and may generate "
                f"{int(needed) - len(spec.prompt)}; the cache has room for "
                f"{size.pages * size.page}: ask for less, or set a larger cache_tokens"
            )

    def add(self, request: Request) -> None:
        """Queues a request that `check` has passed."""
        self._pace.arrived()
        spec = SamplerSpec.of(request.spec.sampling, self.engine.context)
        sequence = _Sequence(request, [*request.spec.prompt], spec)
        if request.spec.grammar is not None:
            assert self._grammars is not None
            matcher = self._grammars.matcher(request.spec.grammar, request.spec.stop_ids)
            sequence.matcher, sequence.spec = matcher, dataclasses.replace(spec, mask=True)
        self._waiting.append(sequence)
        self._waiting.sort(key=lambda one: one.order)

    def cancel(self, number: int, reason: str = CANCELLED) -> None:
        """Ends the request of a number, if it has not ended."""
        for sequence in [*self._waiting, *self._running]:
            if sequence.request.id == number:
                self._end(sequence, Progress(finish_reason=reason), exact=False)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running or self._units)

    # A turn

    def step(self) -> None:
        """Enqueues a unit of work, and reads the results of earlier ones."""
        if self.engine.overwritten and not (self._running or self._units):
            self._make_caches()
        unit = None
        if len(self._units) < self._most_in_flight:
            unit = self._guarded(self._next_unit)
        if unit is not None:
            self._units.append(unit)
        if self._units and (unit is None or len(self._units) >= self._most_in_flight):
            self._guarded(self._read_oldest)
        elif not self._units:
            self._wait_for_disk()

    def close(self) -> None:
        """Saves what it knows. No request may follow."""
        if self._store is not None:
            self._store.close(self._caches)

    @property
    def statistics(self) -> Statistics:
        """What it has done and is doing; may be asked for on any thread."""
        cached = sum(cache.cached for cache in self._caches)
        store = self._store
        return Statistics(
            waiting=len(self._waiting),
            running=len(self._running),
            pages=sum(cache.total for cache in self._caches),
            free_pages=sum(cache.available for cache in self._caches) - cached,
            cached_pages=cached,
            page=self.engine.size.page,
            counters=dataclasses.replace(self.counters),
            ram_bytes=store.ram_bytes if store else 0,
            disk_bytes=store.disk_bytes if store else 0,
            restored_tokens=store.restored if store else 0,
            loaded_tokens=store.loaded if store else 0,
        )

    def late(self) -> list[int]:
        """Numbers of requests whose time is over."""
        now, found = time.perf_counter(), []
        for sequence in (*self._waiting, *self._running):
            timeout = sequence.request.spec.timeout
            if timeout is not None and now > sequence.request.timings.submitted + timeout:
                found.append(sequence.request.id)
        return found

    def _guarded(self, function: Any) -> Any:
        """Runs a part of a turn. If it fails, so do the requests that it worked on."""
        working: list[_Sequence] = []
        try:
            return function(working)
        except Exception as error:
            self._recover(working or self._running or self._waiting[:1], error)

    def abandon(self, error: Exception) -> None:
        """Ends all requests, after an error of the scheduler itself."""
        self._recover([*self._running, *self._waiting], error)

    def _recover(self, failed: Sequence[_Sequence], error: Exception) -> None:
        """Ends some requests, after a failure that lost all sequences; the others begin again. If
        the cache cannot be allocated, all end."""
        every = [*self._running, *self._waiting]
        failed = [*failed]
        self._units.clear()
        self._running, self._waiting = [], []
        try:
            self.engine.reset()
        except Exception as another:
            failed, error = every, another
        if self._store is not None:
            self._store.clear()
        self._make_caches()
        for sequence in every:
            sequence.allocation, sequence.slot = None, -1
            if sequence in failed:
                self.counters.finished += 1
                sequence.request.deliver(Progress(error=error))
            else:
                self._waiting.append(sequence)
        self._waiting.sort(key=lambda one: one.order)

    def _next_unit(self, working: list[_Sequence]) -> _Unit | None:
        """Enqueues a unit of work; None: there is none to enqueue now."""
        self._admit(working)
        reading = [s for s in self._running if not s.decodes]
        decoding = self._may_decode()
        tokens = sum(self._until(s) - s.read for s in reading)
        oldest = min((s.request.timings.submitted for s in reading), default=0.0)
        waits = decoding and (self._prompts_last or self._pace.waits_for_more(tokens, oldest))
        if reading and not waits:
            self._prompts_last = True
            return self._read_prompts(reading, bool(decoding), working)
        if not decoding:
            return None
        unit = self._decode(decoding, bool(reading or self._waiting), working)
        if unit is not None:
            self._prompts_last = False  # no prompt is read before there is a block
            self._masked_last = decoding[0].spec.mask
        return unit

    def _may_decode(self) -> list[_Sequence]:
        """The sequences of the next block: all under a grammar, or all others."""
        decoding = [s for s in self._running if s.decodes and self._steps_left(s) > 0]
        masked = [s for s in decoding if s.spec.mask and len(s.tokens) == s.prompt + s.sampled]
        if any(isinstance(unit.work, Step) and unit.work.sampler.mask for unit in self._units):
            masked = []  # they wait for one another, and take the next step together
        others = [s for s in decoding if not s.spec.mask]
        return masked if masked and not (others and self._masked_last) else others

    # Admission

    def _admit(self, working: list[_Sequence]) -> None:
        """Begins waiting requests, in order, as long as they fit. Those whose prefix is read from
        disk let others go first."""
        for sequence in [*self._waiting]:
            if not self._is_loaded(sequence):
                continue
            if not self._begin(sequence, working):
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)

    def _is_loaded(self, sequence: _Sequence) -> bool:
        """Whether what is on disk of a prompt's prefix has been read."""
        if self._store is None:
            return True
        if not sequence.looked_up:
            if self._store.is_busy:
                return False
            spec, sequence.looked_up = sequence.request.spec, True
            if self._shares(spec):
                tokens, scales = sequence.tokens, spec.lora_scales
                sequence.loading = self._store.load(tokens, scales, self._caches)
        return sequence.loading is None or sequence.loading.done

    def _wait_for_disk(self) -> None:
        """Waits a moment for what is read from disk, when there is nothing else to do."""
        loading = [s.loading for s in self._waiting if s.loading and not s.loading.done]
        if loading:
            parts = [part for one in loading for part in one.parts.values()]
            missing = [part for part in parts if not part.done()]
            concurrent.futures.wait(missing, 0.01, concurrent.futures.FIRST_COMPLETED)

    @staticmethod
    def _shares(spec: RequestSpec) -> bool:
        """Whether a request uses what the cache has of its prompt."""
        return spec.share_prefix and spec.wanted == "last"

    def _begin(self, sequence: _Sequence, working: list[_Sequence]) -> bool:
        spec, size = sequence.request.spec, self.engine.size
        # The replica that has the longest prefix; among equals, that with most room.
        replicas = [r for r, free in enumerate(self._free_slots) if free]
        share, store, loading = self._shares(spec), self._store, sequence.loading
        kept = store.lookup(loading) if store is not None and share else None
        replicas.sort(
            key=lambda r: (
                -self._caches[r].match(sequence.tokens, spec.lora_scales) if share else 0,
                -self._caches[r].available,
            )
        )
        for replica in replicas:
            cache, before = self._caches[replica], len(sequence.tokens)
            running = any(s.replica == replica for s in self._running)
            reserve = 0 if spec.reads_only or not running else _RESERVE
            pages = -(-min(before + reserve, size.context) // size.page)
            known = cache.match(sequence.tokens, spec.lora_scales) // size.page
            if running and cache.available < pages - known:
                continue
            begun = cache.begin(sequence.tokens, spec.lora_scales, share=share, kept=kept)
            if begun is None:
                continue
            slot = self._free_slots[replica].pop()
            sequence.allocation, sequence.replica, sequence.slot = begun.allocation, replica, slot
            sequence.prompt, sequence.read = before, begun.allocation.cached
            sequence.sampled, sequence.finite, sequence.outputs = 0, False, []
            working.append(sequence)
            if begun.pages or begun.states:
                self.engine.copy(replica, pages=begun.pages, states=begun.states)
            if store is not None and share:
                store.restore(replica, begun, loading)
                store.use(replica, cache, begun)
                sequence.loading = None
            request = sequence.request
            if not spec.reads_only:
                stops = spec.stop_ids
                self.engine.assign(
                    replica,
                    slot,
                    sequence.tokens,
                    spec.sampling,
                    stop_ids=stops,
                    end=self._end_position(sequence),
                )
            working.remove(sequence)
            if request.cached_tokens < 0:
                request.cached_tokens = begun.allocation.cached
                self.counters.prompt_tokens += before
                self.counters.cached_tokens += begun.allocation.cached
            return True
        return False

    def _end_position(self, sequence: _Sequence) -> int:
        """Position of the last token."""
        spec = sequence.request.spec
        return int(min(self.engine.context, len(spec.prompt) + spec.max_tokens - 1))

    def _steps_left(self, sequence: _Sequence) -> int:
        """Steps that it may still take, were all of those in flight to succeed."""
        if sequence.request.spec.reads_only:
            return 0
        return self._end_position(sequence) - (sequence.prompt + sequence.sampled - 1)

    # Prompts

    def _read_prompts(
        self, reading: list[_Sequence], decoding: bool, working: list[_Sequence]
    ) -> _Unit:
        """Enqueues chunks of some prompts."""
        reading.sort(key=lambda one: one.order)
        first = reading[0]
        wanted = first.request.spec.wanted
        length = self._chunk(first, decoding, len(reading))
        alike = [
            s
            for s in reading
            if s is first
            or (wanted == "last" == s.request.spec.wanted and self._fits(s, length, decoding))
        ]
        count = max(collections.Counter(s.replica for s in alike).values())
        rows = self._pace.rows(count, length, decoding=decoding) if wanted == "last" else 1
        spec = SamplerSpec.join(s.spec for s in alike)
        chunk = Chunk(rows, length, wanted)
        chunk = self._pace.compiled(chunk, spec, self._until(first) - first.read)
        rows, length, _ = chunk
        sequences: list[list[_Sequence]] = [[] for _ in self._caches]
        for sequence in alike:
            if len(sequences[sequence.replica]) < rows:
                sequences[sequence.replica].append(sequence)
        working += itertools.chain(*sequences)
        parts = [[self._part(s, length) for s in own] for own in sequences]
        now = time.perf_counter()
        pending = self.engine.read_prompts(
            parts,
            rows=rows,
            length=length,
            sampler=spec,
            wanted=wanted,
            masks=self._masks(spec, sequences),
        )
        for own, these in zip(sequences, parts, strict=True):
            for sequence, part in zip(own, these, strict=True):
                if not sequence.request.timings.started:
                    timings = dataclasses.replace(sequence.request.timings, started=now)
                    sequence.request.timings = timings
                sequence.read += len(part.tokens)
                sequence.sampled += part.ends
                self._save_state(sequence)
        return _Unit(sequences, pending, chunk, 1, now, parts)

    def _masks(self, spec: SamplerSpec, sequences: list[list[_Sequence]]) -> Masks | None:
        """What computes the masks of rows; None: none has a grammar."""
        if not spec.mask:
            return None
        assert self._grammars is not None
        matchers = [[s.matcher for s in own] for own in sequences]
        return functools.partial(self._grammars.masks, matchers)

    def _part(self, sequence: _Sequence, length: int) -> Prompt:
        """The next tokens of a prompt."""
        assert sequence.allocation is not None
        start, spec = sequence.read, sequence.request.spec
        stop = min(start + length, self._until(sequence))
        targets = None
        if spec.wanted == "logprobs":
            # A preempted sequence also reads what it has generated.
            targets = [*spec.prompt[start + 1 : stop + 1]]
        return Prompt(
            self._row(sequence),
            start,
            sequence.tokens[start:stop],
            ends=stop == sequence.prompt and not spec.reads_only,
            targets=targets,
        )

    def _until(self, sequence: _Sequence) -> int:
        """Where the next chunk of a prompt has to end: where a checkpoint of the state is wanted,
        which is after its last full page."""
        if not self._stateful:
            return sequence.prompt
        last_page = (sequence.prompt - 1) // self.engine.size.page * self.engine.size.page
        return last_page if sequence.read < last_page else sequence.prompt

    def _save_state(self, sequence: _Sequence) -> None:
        """Keeps a checkpoint of the state after a chunk that ends with a page."""
        if not self._stateful or sequence.read % self.engine.size.page:
            return
        assert sequence.allocation is not None
        cache = self._caches[sequence.replica]
        copy = cache.checkpoint(sequence.allocation, sequence.read)
        if copy is not None:
            self.engine.copy(sequence.replica, states=[copy])

    def _row(self, sequence: _Sequence) -> Row:
        assert sequence.allocation is not None
        allocation, scales = sequence.allocation, sequence.request.spec.lora_scales
        return Row(sequence.slot, allocation.pages, allocation.state, scales)

    def _chunk(self, sequence: _Sequence, decoding: bool, queued: int) -> int:
        """Length of the next chunk of a prompt."""
        spec, left = sequence.request.spec, self._until(sequence) - sequence.read
        if spec.one_by_one:
            return 1
        return self._pace.chunk(left, spec.wanted, decoding=decoding, queued=queued)

    def _fits(self, sequence: _Sequence, length: int, decoding: bool) -> bool:
        """Whether the next chunk of a prompt has about this length."""
        left = self._until(sequence) - sequence.read
        return left <= length or self._chunk(sequence, decoding, 1) == length

    # Decoding

    def _decode(
        self, decoding: list[_Sequence], busy: bool, working: list[_Sequence]
    ) -> _Unit | None:
        """Enqueues a block of steps. None: units in flight have to be read first."""
        steps = self._block(decoding, busy)
        for sequence in sorted(decoding, key=lambda one: one.order):
            if sequence not in self._running:
                continue  # preempted
            # One more under a grammar, for the layers of the next step.
            needed = min(
                sequence.prompt + sequence.sampled - 1 + steps + sequence.spec.mask,
                self._end_position(sequence),
            )
            assert sequence.allocation is not None
            cache = self._caches[sequence.replica]
            while not cache.extend(sequence.allocation, needed):
                if self._units:
                    return None  # to know all tokens of those that are preempted
                self._preempt(sequence.replica)
                if sequence not in self._running:
                    break
        decoding = [s for s in decoding if s in self._running]
        if not decoding:
            return None
        sequences: list[list[_Sequence]] = [[] for _ in self._caches]
        for sequence in decoding:
            sequences[sequence.replica].append(sequence)
        working += decoding
        spec = SamplerSpec.join(s.spec for s in decoding)
        rows = [[self._row(s) for s in own] for own in sequences]
        now = time.perf_counter()
        masks = self._masks(spec, sequences)
        pending = self.engine.decode(rows, spec, steps, length=MAX_BLOCK, masks=masks)
        for sequence in decoding:
            sequence.sampled += min(steps, self._steps_left(sequence))
        return _Unit(sequences, pending, Step.of(max(map(len, rows)), spec), steps, now)

    def _block(self, decoding: list[_Sequence], busy: bool) -> int:
        """Steps of the next block."""
        if decoding[0].spec.mask:
            return 1
        left = max(map(self._steps_left, decoding))
        asked = [s.request.spec.block for s in decoding if s.request.spec.block is not None]
        if asked:
            return min(*asked, left, MAX_BLOCK)
        steps = self._pace.block(
            collections.Counter(s.replica for s in decoding).most_common(1)[0][1],
            SamplerSpec.join(s.spec for s in decoding),
            alone=len(self._running) == 1,
            busy=busy,
            beside_grammars=any(s.spec.mask for s in self._running),
        )
        return min(steps, left)

    def _preempt(self, replica: int) -> None:
        """Puts the youngest sequence of a replica back into the queue."""
        youngest = max((s for s in self._running if s.replica == replica), key=lambda s: s.order)
        self._leave(youngest, exact=True)
        self._waiting.append(youngest)
        self._waiting.sort(key=lambda one: one.order)
        self.counters.preemptions += 1

    def _leave(self, sequence: _Sequence, *, exact: bool) -> None:
        """Takes a sequence off its slot; `exact`: its state includes all known tokens but the
        last, and nothing else."""
        self._running.remove(sequence)
        allocation, sequence.allocation = sequence.allocation, None
        assert allocation is not None
        computed = sequence.read
        if sequence.decodes:  # but for the last token, which has not been read
            computed = max(sequence.prompt, len(sequence.tokens) - 1)
        self._caches[sequence.replica].release(
            allocation,
            sequence.tokens[:computed],
            keep=sequence.finite,
            keep_state=exact and sequence.decodes,
        )
        self._free_slots[sequence.replica].append(sequence.slot)
        sequence.slot, sequence.read, sequence.prompt = -1, 0, 0

    def _end(self, sequence: _Sequence, news: Progress, *, exact: bool, **times: float) -> None:
        """Ends a request."""
        if sequence in self._running:
            self._leave(sequence, exact=exact)
        else:
            self._waiting.remove(sequence)
        self.counters.finished += 1
        sequence.request.deliver(news, **times)

    # Results

    def _read_oldest(self, working: list[_Sequence]) -> None:
        """Waits for the oldest unit, and hands its results over."""
        unit = self._units.popleft()
        working += [sequence for _, sequence in unit.rows()]
        outputs, details = unit.pending.read(), None
        values = None
        if isinstance(unit.pending, PendingPrompts):
            details = unit.pending.details()
            values = unit.pending.values()
        now = time.perf_counter()
        self._pace.done(unit.work, unit.steps, unit.enqueued, now)
        for at, sequence in unit.rows():
            if sequence not in self._running:
                continue
            if unit.parts:
                part = unit.parts[at[0]][at[1]]
                self._take_details(sequence, part, at, details, values, now)
                if not part.ends or sequence not in self._running:
                    continue
            if outputs is not None:
                self._take_tokens(sequence, outputs, at, now)

    def _take_details(
        self,
        sequence: _Sequence,
        part: Prompt,
        at: tuple[int, int],
        details: Any,
        values: np.ndarray | None,
        now: float,
    ) -> None:
        """Takes log-probabilities, logits or hidden states of a part of a prompt."""
        request = sequence.request
        if details is not None:
            count = request.spec.sampling.logprobs or 0
            known = len(request.prompt_logprobs)
            for i in range(len(part.targets or ())):
                if part.start + i >= known:
                    request.prompt_logprobs.append(token_logprobs(details, (*at, i), count))
        if values is not None:
            sequence.outputs.append(values[at][: len(part.tokens)])
            if part.start + len(part.tokens) == sequence.prompt:
                request.outputs = np.concatenate(sequence.outputs)
                sequence.finite = bool(np.isfinite(request.outputs).all())
                news = Progress(finish_reason=LENGTH)
                self._end(sequence, news, exact=False, last_token=now)

    def _take_tokens(
        self, sequence: _Sequence, outputs: Any, at: tuple[int, int], now: float
    ) -> None:
        """Takes the tokens of a row."""
        request, spec = sequence.request, sequence.request.spec
        tokens = outputs.tokens[at].tolist()
        if spec.max_tokens == 0 and tokens[0] != NOT_FINITE:
            sequence.finite = True
            self._end(sequence, Progress(finish_reason=LENGTH), exact=False, last_token=now)
            return
        new: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason, end = None, self._end_position(sequence)
        for i, token in enumerate(tokens):
            if token == -1:
                break
            if token == NOT_FINITE:
                self._fail_not_finite(sequence, len(sequence.tokens) + len(new))
                return
            new.append(token)
            if spec.sampling.logprobs is not None:
                logprobs.append(token_logprobs(outputs, (*at, i), spec.sampling.logprobs))
            position = len(sequence.tokens) + len(new) - 1
            if token in spec.stop_ids or (sequence.matcher and sequence.matcher.accept(token)):
                reason = STOP
            elif len(request.tokens) + len(new) >= spec.max_tokens:
                reason = LENGTH
            elif position >= end:
                reason = CONTEXT
            if reason is not None:
                break
        if not new:
            return
        sequence.finite = True
        sequence.tokens += new
        self.counters.generated_tokens += len(new)
        times = {"last_token": now}
        if not request.tokens:
            times["first_token"] = now
        news = Progress(new, logprobs, reason)
        if reason is not None:
            self._end(sequence, news, exact=self._stopped_on_device(sequence, reason), **times)
            return
        assert sequence.allocation is not None
        self._caches[sequence.replica].commit(
            sequence.allocation, sequence.tokens[: len(sequence.tokens) - 1]
        )
        request.deliver(news, **times)

    def _stopped_on_device(self, sequence: _Sequence, reason: str) -> bool:
        """Whether the devices knew why a sequence ended, so that they did not go on."""
        return reason != STOP or len(sequence.request.spec.stop_ids) <= MAX_STOP_IDS

    def _fail_not_finite(self, sequence: _Sequence, tokens: int) -> None:
        error = JaxsplitError(
            f"the model's logits are not finite after {tokens} tokens: try "
            "dtype=float32; if that does not help, the file's weights are damaged"
        )
        if sequence.matcher is not None and self._grammars is not None:
            error = self._grammars.error(sequence.matcher) or error
        sequence.finite = False
        self._end(sequence, Progress(error=error), exact=False)

    # Checks

    def check_pages(self) -> None:
        """Raises AssertionError unless every page is free or has one owner, and so on."""
        for replica, cache in enumerate(self._caches):
            cache.check()
            slots = [s.slot for s in self._running if s.replica == replica]
            slots += self._free_slots[replica]
            assert sorted(slots) == list(range(self.engine.slots_per_replica))
