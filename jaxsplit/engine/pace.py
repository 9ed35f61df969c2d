"""How much work the devices get at a time, by measured times."""

import math
import time
from typing import NamedTuple

from jaxsplit.engine.chunked_prefill import CHUNK_OVERHEAD, MAX_LOGITS, chunk_lengths
from jaxsplit.engine.engine import Engine, power_of_2
from jaxsplit.engine.sampling import SamplerSpec

MAX_BLOCK = 32
"""Steps of a decode block at most."""

_BLOCK_SECONDS = 0.04
"""Of a block of several sequences."""

_BLOCK_SECONDS_BESIDE_GRAMMARS = 0.01
"""Of a block beside sequences under a grammar, which then take one step."""

_STREAM_SECONDS = 0.1
"""Of a block of a single sequence."""

_FIRST_BLOCK = 4
"""Steps of a block whose speed is not known yet."""

_PACKED_ROWS = (1, 4, 16, 64)
"""Prompts that are read at a time, for which prefill is compiled."""


class Chunk(NamedTuple):
    """What the time of a chunk of prompts depends on: rows of each data replica, tokens of a row,
    and what is wanted of them."""

    rows: int
    length: int
    wanted: str


class Step(NamedTuple):
    """What the time of a decode step depends on: rows of each data replica, and their sampler."""

    rows: int
    sampler: SamplerSpec

    @classmethod
    def of(cls, rows: int, sampler: SamplerSpec) -> "Step":
        """A step of some rows: programs are compiled for powers of two."""
        return cls(power_of_2(rows), sampler)


class Pace:
    """Chooses lengths of chunks of prompts and of blocks of steps.

    Args:
      engine: that does the work.
      itl_budget: seconds that reading a prompt may delay the tokens of other requests.
      measures: choose by measured times; else lengths are fixed, so that all processes choose
        alike.
    """

    def __init__(self, engine: Engine, itl_budget: float, measures: bool):
        self._engine, self._itl_budget, self._measures = engine, itl_budget, measures
        self._seconds: dict[Chunk | Step, float] = {}
        self._last_arrival = self._last_done = 0.0
        self._interval = 1.0  # seconds between requests, a moving average

    def arrived(self) -> None:
        """Notes that a request has come."""
        now = time.perf_counter()
        since, self._last_arrival = min(now - self._last_arrival, 1.0), now
        self._interval = 0.8 * self._interval + 0.2 * since

    def done(self, work: Chunk | Step, steps: int, enqueued: float, now: float) -> None:
        """Notes how long work took: since it was enqueued, or the work before it was done.

        Whatever else happens on the host makes it longer: the least counts, and is forgotten
        slowly.

        Args:
          work: a chunk, or a step of a block.
          steps: of the block.
          enqueued, now: by `time.perf_counter`.
        """
        since = max(enqueued, self._last_done)
        self._last_done = now
        if self._engine.compiled_at < enqueued:
            before = self._seconds.get(work, math.inf)
            self._seconds[work] = min((now - since) / steps, 1.05 * before)

    # Prompts

    def waits_for_more(self, tokens: int, oldest: float) -> bool:
        """Whether prompts should wait for others to be read with: a chunk has a fixed cost, and
        meanwhile the devices decode.

        Args:
          tokens: that are to be read.
          oldest: when the first of the prompts came.
        """
        if not self._measures or self._interval > self._itl_budget / 2:
            return False
        return tokens < CHUNK_OVERHEAD and time.perf_counter() - oldest < self._itl_budget

    def chunk(self, left: int, wanted: str, *, decoding: bool, queued: int = 1) -> int:
        """Length of the next chunk of a prompt.

        Args:
          left: tokens of the prompt that have not been read.
          wanted: as in `Engine.read_prompts`.
          decoding: whether other sequences decode, which must not wait for long.
          queued: prompts like this one.
        """
        chunks = [c for c in self._engine.chunks if not decoding or self._in_budget(1, c)]
        if wanted != "last":
            chunks = [c for c in chunks if c <= MAX_LOGITS]
        chunks = chunks or [min(self._engine.chunks)]
        return chunk_lengths(left, chunks, len(self._engine.runners), queued)[0]

    def rows(self, count: int, length: int, *, decoding: bool) -> int:
        """How many of `count` prompts to read at a time, on each data replica, in chunks of a
        length."""
        most = max(self._engine.chunks)

        def cost(rows: int) -> float:
            return (rows * length + CHUNK_OVERHEAD) / min(rows, count)

        options = [
            rows
            for rows in _PACKED_ROWS
            if rows == 1
            or (
                rows <= self._engine.slots_per_replica
                and rows * length <= most
                and (not decoding or self._in_budget(rows, length))
            )
        ]
        return min(options, key=cost)

    def compiled(self, chunk: Chunk, sampler: SamplerSpec, left: int) -> Chunk:
        """A chunk whose program is there: this one, or, while it is being compiled, one of a single
        prompt with `left` tokens to read."""
        if not self._measures or self._engine.is_ready(*chunk, sampler):
            return chunk
        ready = sorted(self._engine.ready_chunks(chunk.wanted))
        if not ready:
            return chunk
        return Chunk(1, next((c for c in ready if c >= left), ready[-1]), chunk.wanted)

    def _in_budget(self, rows: int, length: int) -> bool:
        """Whether a chunk delays the tokens of others no longer than they may be."""
        known = {work: s for work, s in self._seconds.items() if isinstance(work, Chunk)}
        size = rows * length
        if not known or not self._measures:
            return size <= MAX_LOGITS
        # By all chunks that were measured: one that took long once must not be shunned for ever.
        seconds = min(
            s * max(1, (size + CHUNK_OVERHEAD) / (work.rows * work.length + CHUNK_OVERHEAD))
            for work, s in known.items()
        )
        return seconds <= self._itl_budget

    # Decoding

    def block(
        self, rows: int, sampler: SamplerSpec, *, alone: bool, busy: bool, beside_grammars: bool
    ) -> int:
        """Steps of the next block.

        Args:
          rows: of each data replica.
          sampler: of the rows.
          alone: whether there is a single sequence.
          busy: whether prompts wait or are being read.
          beside_grammars: whether other sequences take single steps.
        """
        if not self._measures:
            return MAX_BLOCK // 4
        seconds = self._seconds.get(Step.of(rows, sampler))
        if seconds is None:
            return _FIRST_BLOCK
        target = _STREAM_SECONDS if alone and not busy else _BLOCK_SECONDS
        if busy:
            target /= 2
        if beside_grammars:
            target = min(target, _BLOCK_SECONDS_BESIDE_GRAMMARS)
        return max(1, min(MAX_BLOCK, int(target / max(seconds, 1e-6))))
