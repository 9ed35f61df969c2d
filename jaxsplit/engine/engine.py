"""Prefill and decode of sequences through the stages of a model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsplit.comm.stage_transfer import fetch, hand_over
from jaxsplit.config import SamplingConfig
from jaxsplit.context import DEFAULT_POLICY, MatmulPolicy
from jaxsplit.engine.chunked_prefill import CHUNKS, chunk_lengths
from jaxsplit.engine.device_loop import Group, Loops
from jaxsplit.engine.runner import StageRunner, compile_together
from jaxsplit.engine.sampling import SamplingPlan, SamplingValues
from jaxsplit.errors import JaxsplitError
from jaxsplit.models import Decoder
from jaxsplit.sharding import Partition
from jaxsplit.sharding.axes import Axis


def never() -> bool:
    """The `Engine.dropped` of a call that somebody waits for."""
    return False


class Engine:
    """Runs a model on a mesh: slots, each holding one sequence.

    Slots are shared out over the `data` axis, and in groups over the stages: while one group is in
    one stage, another can be in the next. Calls return as soon as the work is on its way.

    One thread at a time may call an engine; `EngineThread` serves any number of them. Programs
    consume the cache that they update. If a call fails in between, all sequences are lost; the next
    `start` or `logits` allocates a new cache.

    Args:
      models: the decoder of each stage, its parameters on the stage's mesh.
      partition: the stages.
      context: tokens that a slot can hold.
      cache_dtype: of keys and values.
      slots: sequences that are decoded together.
      vocab: only token ids below this may be chosen; None: all of the model's.
      ends: tokens that end a text.
      chunks: lengths for which prefill is compiled; longer prompts are read piece by piece.
      policy: of products with quantized matrices.
      peer_access: where devices run kernels, these exchange numbers, if the devices can.

    Attributes:
      end_ids: tokens that end a text.
      dropped: returns whether the caller has stopped waiting. The engine asks before each chunk of
        a prompt and each block of steps, and raises `CancelledError`.
      loops: whether devices run several steps by themselves. Not CPUs: XLA takes twice as long for
        a step in a loop there. Nor several stages that cannot write to one another's memory.
    """

    def __init__(
        self,
        models: Sequence[Decoder],
        partition: Partition,
        *,
        context: int,
        cache_dtype: jnp.dtype,
        slots: int = 1,
        vocab: int | None = None,
        ends: Sequence[int] = (),
        chunks: Sequence[int] = CHUNKS,
        policy: MatmulPolicy = DEFAULT_POLICY,
        peer_access: bool = True,
    ):
        self.partition = partition
        self.config = models[0].config
        self.context = context
        self.chunks = chunks
        self.runners = [
            StageRunner(
                model, stage, context, cache_dtype, policy, vocab=vocab, peer_access=peer_access
            )
            for model, stage in zip(models, partition.stages, strict=True)
        ]
        self.end_ids = frozenset(ends)
        self._ends = self.runners[-1].place(np.asarray(sorted(ends) or [-1], np.int32))
        count = min(slots, len(self.runners))
        self._local = -(-slots // (count * partition.data))  # of a group, on one device
        count = -(-slots // (self._local * partition.data))
        self._group_slots = self._local * partition.data
        self.slots = slots
        self.dropped: Callable[[], bool] = never
        self._peer_access = peer_access
        self._groups = [Group([]) for _ in range(count)]
        self._plan: SamplingPlan | None = None
        self._sampling: dict[int, SamplingConfig] = {}  # of slots that have been started
        self.reset()
        platform = partition.stages[0].mesh.devices.flat[0].platform
        several = len(self.runners) > 1
        self.loops = self._device_loops.in_ring if several else platform != "cpu"

    def reset(self) -> None:
        """Forgets all sequences: allocates the memory of the slots anew.

        Masked values of earlier sequences are multiplied by 0, so a NaN among them must not stay.
        """
        self._sampling = {}
        for group in self._groups:  # of what a failed call left, first
            group.caches, group.state, group.fed, group.texts = [], None, None, None
        for group in self._groups:
            group.caches = [runner.empty_cache(self._group_slots) for runner in self.runners]
        self._device_loops = Loops(
            self.runners, self._ends, self._local, len(self._groups), peer_access=self._peer_access
        )
        self._lost = False

    @contextlib.contextmanager
    def _consuming(self, *, new: bool = False) -> Iterator[None]:
        """Runs programs that consume caches and states: an exception loses them.

        Args:
          new: the call starts sequences, so that lost ones do not matter.

        Raises:
          JaxsplitError: an earlier call lost the sequences that this one would continue.
        """
        if self._lost and not new:
            raise JaxsplitError("an earlier call failed and its sequences are lost; start new ones")
        if self._lost:
            self.reset()
        self._lost = True
        yield
        self._lost = False

    def _check_dropped(self) -> None:
        if self.dropped():
            raise CancelledError

    @property
    def meetings(self) -> list[str]:
        """Through what devices of this process that run kernels meet in decode steps."""
        found = dict.fromkeys(
            f"GPUs meet through {runner.meets_through}"
            for runner in self.runners
            if runner.meets_through
        )
        if len(self.runners) > 1 and self.runners[0].policy.kernels:
            way = "peer access" if self._device_loops.in_ring else "the host"
            found[f"stages hand over through {way}"] = None
        return list(found)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on the fullest device of this process."""
        return _bytes_on_fullest([group.caches for group in self._groups])

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters on the fullest device of this process."""
        return _bytes_on_fullest([r.params for r in self.runners if r.stage.is_local])

    def _between(self, tree: Any, like: Any, source: int, target: int) -> Any:
        """Arrays of one stage on another's devices."""
        stages = self.partition.stages
        return hand_over(tree, like, stages[source].mesh, stages[target].mesh)

    # Reading prompts

    def _read(
        self,
        group: Group,
        local: int,
        prompts: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        chunks: Sequence[int] | None = None,
        in_turn: int = 1,
    ) -> Iterator[tuple[jax.Array | None, np.ndarray, np.ndarray, int]]:
        """Reads prompts into empty slots, one for each place of the `data` axis, chunk by chunk.

        Args:
          group, local: where the slots are.
          prompts: of each place; empty ones are not read.
          all_logits: of all tokens, not of each chunk's last.
          chunks: lengths that there are; None: those of the engine.
          in_turn: as in `chunk_lengths`.

        Yields:
          the logits of a chunk, the position of its first tokens and how many of each prompt it
          has read, int32 `[data]`, and the chunk's length.
        """
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        done = np.zeros_like(lengths)
        slot = np.full_like(lengths, local)
        stages = len(self.runners)
        for length in chunk_lengths(lengths.max(), chunks or self.chunks, stages, in_turn):
            self._check_dropped()
            count = np.minimum(lengths - done, length)
            programs = [runner.prefill(length, all_logits=all_logits) for runner in self.runners]
            if stages > 1:
                compile_together(programs, partial(self._prefill_arguments, length))
            x: Any = np.zeros((len(prompts), length), np.int32)
            for row, (prompt, start, n) in enumerate(zip(prompts, done, count, strict=True)):
                x[row, :n] = prompt[start : start + n]
            for i, (runner, program) in enumerate(zip(self.runners, programs, strict=True)):
                if i:
                    like = runner.input(len(prompts), length)
                    x = self._between(x, like, i - 1, i)
                group.caches[i], x = program(
                    runner.params, group.caches[i], x, done.copy(), count, slot
                )
            yield x, done.copy(), count, length
            done += count

    def logits(self, tokens: Sequence[int], *, one_by_one: bool = False) -> np.ndarray:
        """Logits after each token: float32 `[time, vocab]`. Overwrites slot 0.

        Args:
          tokens: at most `context`.
          one_by_one: a token at a time, through the cache, as in decoding.
        """
        prompts = [tokens, *[()] * (self.partition.data - 1)]
        last = self.runners[-1].stage
        rows = last.layout(Axis("vocab", self.config.vocab)).size
        parts = [np.zeros((0, self.config.vocab), np.float32)]
        chunks = [1] if one_by_one else None
        with self._consuming(new=True):
            for logits, _, count, length in self._read(
                self._groups[0], 0, prompts, all_logits=True, chunks=chunks
            ):
                like = jax.ShapeDtypeStruct((len(prompts), length, rows), np.float32)
                whole = np.asarray(self._fetchable(logits, like))
                parts.append(whole[0, : count[0], : self.config.vocab])
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            self.reset()
        return found

    def start(
        self, tokens: Sequence[int], sampling: Sequence[SamplingConfig] | SamplingConfig, slot=0
    ) -> None:
        """Reads a prompt into a slot and chooses the token that follows it.

        Args:
          tokens: 1 to `context` of them.
          sampling: how tokens are chosen, in this slot, or a config for each slot.
          slot: which one; what it held is forgotten.

        Raises:
          JaxsplitError: slots that go on decoding need another program (`SamplingPlan`).
        """
        self.start_all({slot: tokens}, sampling)

    def start_all(
        self,
        prompts: Mapping[int, Sequence[int]],
        sampling: Sequence[SamplingConfig] | SamplingConfig,
    ) -> None:
        """Reads prompts into slots, on all places of the `data` axis at once; as `start`."""
        one = isinstance(sampling, SamplingConfig)
        chosen = {slot: sampling if one else sampling[slot] for slot in prompts}
        others = {} if self._lost else self._sampling
        kept = {slot: others[slot] for slot in others.keys() - prompts.keys()}
        plans = {SamplingPlan.of(c, self.context) for c in (*chosen.values(), *kept.values())}
        if len(plans) > 1:
            raise JaxsplitError(
                "slots are decoded together only if their top_k and repeat_last_n agree, and "
                "whether they are greedy and penalized; start all of them anew"
            )
        with self._consuming(new=True):
            (self._plan,) = plans
            self._sampling = kept | chosen
            self._start_all(prompts)

    def _start_all(self, prompts: Mapping[int, Sequence[int]]) -> None:
        # XLA:GPU fails on empty arrays when it compiles for several devices.
        window = max(1, self._plan.window)
        runner, data = self.runners[-1], self.partition.data
        unused = next(iter(self._sampling.values()))
        configs = [
            self._sampling.get(slot, unused)
            for slot in range(len(self._groups) * self._group_slots)
        ]
        in_turn = -(-len(prompts) // data)
        for g, group in enumerate(self._groups):
            first = g * self._group_slots
            values = SamplingValues.of(configs[first : first + self._group_slots])
            group.values = runner.place(values, by_slot=True)
            if group.state is None or group.state.recent.shape[1] != window:
                group.state, group.fed = runner.empty_state(self._group_slots, window), None
            for local in range(self._local):
                slots = [first + place * self._local + local for place in range(data)]
                if any(slot in prompts for slot in slots):
                    rows = [prompts.get(slot, ()) for slot in slots]
                    self._start(group, local, rows, window, in_turn)

    def _start(
        self,
        group: Group,
        local: int,
        prompts: Sequence[Sequence[int]],
        window: int,
        in_turn: int,
    ) -> None:
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        recent = np.full((len(prompts), window), -1, np.int32)
        for row, prompt in zip(recent, prompts, strict=True):
            last = prompt[-window:]
            row[window - len(last) :] = last
        for logits, done, count, _ in self._read(group, local, prompts, in_turn=in_turn):
            ended = (count > 0) & (done + count == lengths)
            if not ended.any():
                continue
            slot = np.where(ended, local, -1).astype(np.int32)
            group.state, group.fed = self.runners[-1].begin(self._plan)(
                logits, group.state, recent, lengths, slot, self._ends, group.values
            )

    # Decoding

    def step(self) -> None:
        """Decodes one token in each active slot; does not wait for it."""
        with self._consuming():
            self._step()

    def _step(self) -> None:
        fed_like = jax.ShapeDtypeStruct((self._group_slots, 2), np.int32)
        for group in self._groups:
            x, fed = None, self._between(self._fed(group), fed_like, -1, 0)
            for i, runner in enumerate(self.runners[:-1]):
                group.caches[i], x = runner.relay()(runner.params, group.caches[i], x, fed)
                like = (self.runners[i + 1].input(self._group_slots, 1), fed_like)
                x, fed = self._between((x, fed), like, i, i + 1)
            runner = self.runners[-1]
            group.caches[-1], group.state, group.fed = runner.finish(self._plan)(
                runner.params, group.caches[-1], x, group.state, self._ends, group.values
            )

    def tokens(self) -> list[jax.Array]:
        """The slots' last tokens, on their way; `read` waits for them."""
        like = jax.ShapeDtypeStruct((self._group_slots, 2), np.int32)
        return [self._fetchable(self._fed(group), like) for group in self._groups]

    def _fed(self, group: Group) -> jax.Array | None:
        if group.fed is None:
            group.fed = self.runners[-1].feed()(group.state)
        return group.fed

    def read(self, tokens: Sequence[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Waits for what `tokens` has returned: int32 `[slots]`, and which slots go on, bool.

        A token is `NOT_FINITE` where the model's logits were not finite.
        """
        with self._consuming():  # a program that failed on a device is noticed here
            fed = np.concatenate([np.asarray(part) for part in tokens])[: self.slots]
        return fed[:, 0], fed[:, 1] >= 0

    def loop(self, limit: int, length: int = 32) -> np.ndarray:
        """Decodes up to `limit` tokens in each active slot, without returning to the host if the
        engine `loops`.

        Returns:
          int32 `[slots, limit]`, -1 where a slot had stopped, `NOT_FINITE` where the model's logits
          were not finite, which stops the slot.
        """
        self._check_dropped()
        limit = min(limit, length)
        if not self.loops:
            return self._step_loop(limit)
        with self._consuming():
            return self._loop(limit, length)

    def _loop(self, limit: int, length: int) -> np.ndarray:
        self._device_loops.run(self._groups, self._plan, limit, length)
        like = jax.ShapeDtypeStruct((self._group_slots, length), np.int32)
        texts = [self._fetchable(group.texts, like) for group in self._groups]
        # An array on several CPUs may keep what NumPy has seen of it (jax 0.11), and so its memory.
        texts = [x.addressable_data(0) if x.is_fully_replicated else x for x in texts]
        return np.concatenate([np.array(x) for x in texts])[: self.slots, :limit]

    def _step_loop(self, limit: int) -> np.ndarray:
        """The loop as steps. Those of several stages are all on their way before the first is read;
        CPUs have no queue to hold them, so that the loop can end with the last active slot."""
        coming = [self.tokens()]
        for _ in range(limit):
            self._check_dropped()
            self.step()
            coming.append(self.tokens())
            if len(self.runners) == 1 and not self.read(coming[-1])[1].any():
                break
        read = [self.read(tokens) for tokens in coming]
        columns = [
            np.where(active, token, -1)
            for (_, active), (token, _) in zip(read[:-1], read[1:], strict=True)
        ]
        texts = np.full((self.slots, limit), -1, np.int32)
        for i, column in enumerate(columns):
            texts[:, i] = column
        return texts

    def _fetchable(self, x: jax.Array | None, like: jax.ShapeDtypeStruct) -> jax.Array:
        """An array of the last stage as one that this process can read."""
        return fetch(x, like, self.partition.stages[-1].mesh, self.partition.everyone)

    def _prefill_arguments(self, length: int, stage: int) -> tuple:
        return self.runners[stage].prefill_arguments(length, self._groups[0].caches[stage])

    def trace_prefill(self, length: int) -> list[jax.stages.Traced]:
        """The program of each stage that reads a chunk of a prompt, as `trace_step`."""
        return [
            runner.prefill(length, all_logits=False).trace(*self._prefill_arguments(length, i))
            for i, runner in enumerate(self.runners)
        ]

    def trace_step(self, sampling: SamplingConfig) -> list[jax.stages.Traced]:
        """The program of each stage in a decode step, before it is compiled, to look into."""
        traced, plan = [], SamplingPlan.of(sampling, self.context)
        slots, window = self._group_slots, max(1, plan.window)
        values = SamplingValues.of([sampling] * slots)
        for i, runner in enumerate(self.runners):
            x = runner.input(slots, 1) if i else None
            cache = self._groups[0].caches[i]
            if runner.last:
                state = runner.empty_state(slots, window)
                arguments = (runner.params, cache, x, state, self._ends, values)
                traced.append(runner.finish(plan).trace(*arguments))
            else:
                fed = jax.ShapeDtypeStruct((slots, 2), np.int32)
                traced.append(runner.relay().trace(runner.params, cache, x, fed))
        return traced


def _bytes_on_fullest(tree: Any) -> int:
    """Bytes of arrays on the device of this process that holds the most of them."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
