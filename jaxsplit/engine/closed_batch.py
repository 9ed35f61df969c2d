"""Sequences that begin together, without a scheduler: for benchmarks and tests."""

from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from jaxsplit.config import SamplingConfig
from jaxsplit.engine.chunked_prefill import chunk_lengths
from jaxsplit.engine.engine import Engine, Prompt, Row
from jaxsplit.engine.pending import PendingPrompts
from jaxsplit.engine.sampling import SamplerSpec
from jaxsplit.errors import JaxsplitError


class ClosedBatch:
    """The slots of an engine, each with pages for a whole context.

    What else uses the engine overwrites the sequences.

    Args:
      engine: that does the work.
      slots: how many, from the first on; None: as many as fit.
    """

    def __init__(self, engine: Engine, slots: int | None = None):
        self.engine = engine
        fitting = engine.size.pages // engine.size.pages_per_sequence
        most = engine.slots if fitting >= engine.slots_per_replica else fitting
        self.slots = most if slots is None else slots
        self._sampling: dict[int, SamplingConfig] = {}

    def reset(self) -> None:
        """As `Engine.reset`."""
        self._sampling = {}
        self.engine.reset()

    def _recover(self) -> None:
        """Before new sequences."""
        self.engine.overwritten = True
        if self.engine.lost:
            self.reset()

    def _row_of(self, slot: int) -> tuple[int, Row]:
        """The data replica of a slot, and its row: pages and state are its own."""
        size, per_replica = self.engine.size, self.engine.slots_per_replica
        replica, local = divmod(slot, per_replica)
        count = size.pages_per_sequence
        if (local + 1) * count > size.pages:
            raise JaxsplitError(
                f"the cache has {size.pages} pages of {size.page} tokens, too few for {local + 1} "
                "whole contexts"
            )
        return replica, Row(local, range(local * count, (local + 1) * count), local)

    def _rows(self) -> list[list[Row]]:
        """All slots, for each data replica."""
        rows: list[list[Row]] = [[] for _ in range(self.engine.partition.data)]
        for slot in range(self.slots):
            replica, row = self._row_of(slot)
            rows[replica].append(row)
        return rows

    def _spec(self) -> SamplerSpec:
        context = self.engine.context
        return SamplerSpec.join(SamplerSpec.of(c, context) for c in self._sampling.values())

    def _read_prompts(
        self,
        prompts: Mapping[int, Sequence[int]],
        *,
        wanted: str,
        chunks: Sequence[int] | None = None,
    ) -> Iterator[tuple[PendingPrompts, list[list[Prompt]]]]:
        """Reads prompts into slots, chunk by chunk, one at a time on each data replica."""
        engine, spec = self.engine, self._spec()
        waiting: list[list[tuple[Row, Sequence[int]]]] = [[] for _ in range(engine.partition.data)]
        for slot, tokens in sorted(prompts.items()):
            replica, row = self._row_of(slot)
            waiting[replica].append((row, tokens))
        queued = max(map(len, waiting))
        for turn in range(queued):
            group = [own[turn : turn + 1] for own in waiting]
            longest, done = max(len(tokens) for own in group for _, tokens in own), 0
            stages = len(engine.runners)
            for length in chunk_lengths(longest, chunks or engine.chunks, stages, queued):
                stop = done + length
                parts = [
                    [
                        Prompt(row, done, tokens[done:stop], ends=len(tokens) <= stop)
                        for row, tokens in own
                        if len(tokens) > done
                    ]
                    for own in group
                ]
                yield (
                    engine.read_prompts(parts, rows=1, length=length, sampler=spec, wanted=wanted),
                    parts,
                )
                done = stop

    def logits(self, tokens: Sequence[int], *, one_by_one: bool = False) -> np.ndarray:
        """Logits after each token: float32 `[time, vocab]`. Overwrites slot 0.

        Args:
          tokens: at most `context`.
          one_by_one: one token at a time through the cache, as in decoding.
        """
        self._recover()
        found = [np.zeros((0, self.engine.config.vocab), np.float32)]
        chunks = [1] if one_by_one else None
        prompts = self._read_prompts({0: tokens}, wanted="logits", chunks=chunks)
        for pending, own in prompts:
            logits = pending.values()
            assert logits is not None
            found.append(logits[0, 0, : len(own[0][0].tokens)])
        if not np.isfinite(found[-1]).all():
            self.reset()
        return np.concatenate(found)

    def start(
        self, tokens: Sequence[int], sampling: Sequence[SamplingConfig] | SamplingConfig, slot=0
    ) -> None:
        """Reads a prompt into a slot and samples the token that follows it.

        Args:
          tokens: 1 to `context` ids.
          sampling: config of this slot, or a config for each slot.
          slot: index of the slot; its previous sequence is dropped.
        """
        self.start_all({slot: tokens}, sampling)

    def start_all(
        self,
        prompts: Mapping[int, Sequence[int]],
        sampling: Sequence[SamplingConfig] | SamplingConfig,
    ) -> None:
        """Reads prompts into slots, in parallel over the `data` axis; otherwise as `start`."""
        self._recover()
        one = isinstance(sampling, SamplingConfig)
        for slot, tokens in prompts.items():
            config = sampling if one else sampling[slot]
            self._sampling[slot] = config
            replica, row = self._row_of(slot)
            stops = self.engine.stop_ids
            self.engine.assign(replica, row.slot, tokens, config, stop_ids=stops)
        for _ in self._read_prompts(prompts, wanted="last"):
            pass

    def step(self) -> None:
        """Enqueues a decode step: one token in each active slot."""
        self.engine.decode(self._rows(), self._spec(), 1, on_host=True)

    def tokens(self) -> jax.Array | None:
        """The slots' last tokens, still being computed; `read` waits for them."""
        return self.engine.step_inputs(self._rows())

    def read(self, tokens: jax.Array | None) -> tuple[np.ndarray, np.ndarray]:
        """Waits for the result of `tokens`: int32 `[slots]`, and which slots are active, bool.

        A token is `NOT_FINITE` where the model's logits were not finite.
        """
        count = self.engine.slots_per_replica * self.engine.partition.data
        inputs = self.engine.fetch(tokens, jax.ShapeDtypeStruct((count, 2), np.int32))
        inputs = inputs[: self.slots]
        return inputs[:, 0], inputs[:, 1] >= 0

    def loop(self, limit: int, length: int = 32) -> np.ndarray:
        """Decodes up to `limit` tokens in each active slot, on the devices if the engine `loops`.

        Args:
          limit: steps to run.
          length: size of the output buffer, for which the loop is compiled; caps `limit`.

        Returns:
          int32 `[slots, limit]`: -1 where a slot had stopped, `NOT_FINITE` where the model's logits
          were not finite, which stops the slot.
        """
        pending = self.engine.decode(self._rows(), self._spec(), limit, length=length)
        tokens = pending.read().tokens[:, : self.engine.slots_per_replica]
        return np.concatenate(list(tokens))[: self.slots]
