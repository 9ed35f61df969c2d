"""Prefill and decode of sequences through the pipeline stages of a model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsplit.comm.stage_transfer import fetch, transfer
from jaxsplit.config import SamplingConfig
from jaxsplit.context import DEFAULT_POLICY, MatmulPolicy
from jaxsplit.engine import steps
from jaxsplit.engine.chunked_prefill import CHUNKS, chunk_lengths
from jaxsplit.engine.device_loop import DecodeLoops, MicroBatch
from jaxsplit.engine.runner import StageRunner, compile_together
from jaxsplit.engine.sampling import SamplerParams, SamplerSpec
from jaxsplit.errors import JaxsplitError
from jaxsplit.models import Decoder
from jaxsplit.sharding import Partition
from jaxsplit.sharding.axes import Axis


def never_cancelled() -> bool:
    """`Engine.is_cancelled` of a call whose caller waits for it."""
    return False


class Engine:
    """Runs a model on a mesh: slots, each holding one sequence.

    Slots are sharded over the `data` axis and grouped into micro-batches for the stages: while one
    micro-batch is in a stage, another can be in the next. Calls return once the work is enqueued.

    An engine is not thread-safe; `EngineThread` serves callers on any number of threads. Programs
    donate the cache. If a call fails halfway, all sequences are lost; the next `start` or `logits`
    allocates a new cache.

    Args:
      models: the decoder of each stage, its parameters on the stage's mesh.
      partition: the stages.
      context: length of each slot's cache, in tokens.
      cache_dtype: dtype of keys and values.
      slots: sequences that are decoded together.
      vocab: tokens of the vocabulary; larger ids are never sampled; None: all rows of the head.
      stop_ids: tokens that stop a slot.
      chunks: lengths for which prefill is compiled; longer prompts are read in chunks.
      policy: how matrices are multiplied.
      peer_access: use peer-to-peer kernels for all-reduces and stage transfers where the devices
        support them.

    Attributes:
      stop_ids: tokens that stop a slot.
      is_cancelled: whether the caller has stopped waiting. The engine asks before each chunk of a
        prompt and each block of steps, and raises `CancelledError`.
      loops: whether decode loops run on the devices. Not on CPUs, where XLA takes twice as long for
        a step inside a loop, and not across stages without peer access.
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
        stop_ids: Sequence[int] = (),
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
        self.stop_ids = frozenset(stop_ids)
        stop_ids = np.asarray(sorted(stop_ids) or [-1], np.int32)
        self._stop_ids = self.runners[-1].put(stop_ids)
        count = min(slots, len(self.runners))
        self._slots_per_device = -(-slots // (count * partition.data))  # of one micro-batch
        count = -(-slots // (self._slots_per_device * partition.data))
        self._slots_per_micro_batch = self._slots_per_device * partition.data
        self.slots = slots
        self.is_cancelled: Callable[[], bool] = never_cancelled
        self._peer_access = peer_access
        self._micro_batches = [MicroBatch([]) for _ in range(count)]
        self._sampler: SamplerSpec | None = None
        self._sampling: dict[int, SamplingConfig] = {}  # of started slots
        self.reset()
        platform = partition.stages[0].mesh.devices.flat[0].platform
        several = len(self.runners) > 1
        self.loops = self._decode_loops.in_ring if several else platform != "cpu"

    def reset(self) -> None:
        """Drops all sequences and reallocates the cache.

        Attention multiplies masked values of earlier sequences by 0, so no NaN may remain.
        """
        self._sampling = {}
        for one in self._micro_batches:  # frees the old buffers first
            one.caches, one.state, one.step_inputs, one.output_tokens = [], None, None, None
        slots = self._slots_per_micro_batch
        for one in self._micro_batches:
            one.caches = [runner.empty_cache(slots) for runner in self.runners]
        self._decode_loops = DecodeLoops(
            self.runners,
            self._stop_ids,
            self._slots_per_device,
            len(self._micro_batches),
            peer_access=self._peer_access,
        )
        self._lost = False

    @contextlib.contextmanager
    def _consuming(self, *, new: bool = False) -> Iterator[None]:
        """Runs programs that donate caches and states; an exception loses them.

        Args:
          new: the call starts new sequences and may reset the engine.

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

    def _check_cancelled(self) -> None:
        if self.is_cancelled():
            raise CancelledError

    @property
    def communication(self) -> list[str]:
        """How devices of this process that run kernels communicate in decode steps."""
        found = dict.fromkeys(
            f"all-reduce through {runner.collective_backend}"
            for runner in self.runners
            if runner.collective_backend
        )
        if len(self.runners) > 1 and self.runners[0].policy.kernels:
            way = "peer access" if self._decode_loops.in_ring else "the host"
            found[f"stages transfer through {way}"] = None
        return list(found)

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on the fullest device of this process."""
        return _bytes_on_fullest([one.caches for one in self._micro_batches])

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters on the fullest device of this process."""
        return _bytes_on_fullest([r.params for r in self.runners if r.stage.is_local])

    def _transfer(self, tree: Any, like: Any, source: int, target: int) -> Any:
        """Transfers arrays from one stage's devices to another's."""
        stages = self.partition.stages
        return transfer(tree, like, stages[source].mesh, stages[target].mesh)

    # Prefill

    def _prefill(
        self,
        micro_batch: MicroBatch,
        local: int,
        prompts: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        chunks: Sequence[int] | None = None,
        queued: int = 1,
    ) -> Iterator[tuple[jax.Array | None, np.ndarray, np.ndarray, int]]:
        """Reads prompts into empty slots, one for each data replica, chunk by chunk.

        Args:
          micro_batch: the slots' micro-batch.
          local: index of each slot on its device.
          prompts: one for each data replica; empty ones are skipped.
          all_logits: logits of all positions, not of each chunk's last one only.
          chunks: compiled chunk lengths; None: those of the engine.
          queued: as in `chunk_lengths`.

        Yields:
          the logits of a chunk, the start and the count of tokens read of each prompt, int32
          `[data]`, and the chunk's length.
        """
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        done = np.zeros_like(lengths)
        slot = np.full_like(lengths, local)
        stages = len(self.runners)
        for length in chunk_lengths(lengths.max(), chunks or self.chunks, stages, queued):
            self._check_cancelled()
            count = np.minimum(lengths - done, length)
            programs = [runner.prefill(length, all_logits=all_logits) for runner in self.runners]
            if stages > 1:
                compile_together(programs, partial(self._prefill_arguments, length))
            x: Any = np.zeros((len(prompts), length), np.int32)
            for row, (prompt, start, n) in enumerate(zip(prompts, done, count, strict=True)):
                x[row, :n] = prompt[start : start + n]
            for i, (runner, program) in enumerate(zip(self.runners, programs, strict=True)):
                if i:
                    x = self._transfer(x, runner.input_shape(len(prompts), length), i - 1, i)
                chunk = steps.PrefillChunk(done.copy(), count, slot)
                micro_batch.caches[i], x = program(runner.params, micro_batch.caches[i], x, chunk)
            yield x, done.copy(), count, length
            done += count

    def logits(self, tokens: Sequence[int], *, one_by_one: bool = False) -> np.ndarray:
        """Logits after each token: float32 `[time, vocab]`. Overwrites slot 0.

        Args:
          tokens: at most `context`.
          one_by_one: one token at a time through the cache, as in decoding.
        """
        prompts = [tokens, *[()] * (self.partition.data - 1)]
        last = self.runners[-1].stage
        rows = last.layout(Axis("vocab", self.config.vocab)).size
        parts = [np.zeros((0, self.config.vocab), np.float32)]
        chunks = [1] if one_by_one else None
        with self._consuming(new=True):
            for logits, _, count, length in self._prefill(
                self._micro_batches[0], 0, prompts, all_logits=True, chunks=chunks
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
        """Reads a prompt into a slot and samples the token that follows it.

        Args:
          tokens: 1 to `context` ids.
          sampling: config of this slot, or a config for each slot.
          slot: index of the slot; its previous sequence is dropped.

        Raises:
          JaxsplitError: slots that are still decoding need another `SamplerSpec`.
        """
        self.start_all({slot: tokens}, sampling)

    def start_all(
        self,
        prompts: Mapping[int, Sequence[int]],
        sampling: Sequence[SamplingConfig] | SamplingConfig,
    ) -> None:
        """Reads prompts into slots, in parallel over the `data` axis; otherwise as `start`."""
        one = isinstance(sampling, SamplingConfig)
        started = {slot: sampling if one else sampling[slot] for slot in prompts}
        others = {} if self._lost else self._sampling
        kept = {slot: others[slot] for slot in others.keys() - prompts.keys()}
        specs = {SamplerSpec.of(c, self.context) for c in (*started.values(), *kept.values())}
        if len(specs) > 1:
            raise JaxsplitError(
                "slots are decoded together only if their top_k and repeat_last_n agree, and "
                "whether they are greedy and penalized; start all of them anew"
            )
        with self._consuming(new=True):
            (self._sampler,) = specs
            self._sampling = kept | started
            self._start_all(prompts)

    def _start_all(self, prompts: Mapping[int, Sequence[int]]) -> None:
        window, data = self._window(self._sampler), self.partition.data
        per_device, per_batch = self._slots_per_device, self._slots_per_micro_batch
        runner, unused = self.runners[-1], next(iter(self._sampling.values()))
        for i, one in enumerate(self._micro_batches):
            first = i * per_batch
            configs = [self._sampling.get(first + slot, unused) for slot in range(per_batch)]
            one.sampler = runner.put(SamplerParams.of(configs), by_slot=True)
            if one.state is None or one.state.recent.shape[1] != window:
                one.state, one.step_inputs = runner.empty_state(per_batch, window), None
            for local in range(per_device):
                slots = [first + replica * per_device + local for replica in range(data)]
                if any(slot in prompts for slot in slots):
                    rows = [prompts.get(slot, ()) for slot in slots]
                    self._start(one, local, rows, queued=-(-len(prompts) // data))

    @staticmethod
    def _window(sampler: SamplerSpec) -> int:
        # XLA:GPU fails on empty arrays when it compiles for several devices.
        return max(1, sampler.window)

    def _start(
        self,
        micro_batch: MicroBatch,
        local: int,
        prompts: Sequence[Sequence[int]],
        *,
        queued: int,
    ) -> None:
        window = self._window(self._sampler)
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        recent = np.full((len(prompts), window), -1, np.int32)
        for row, prompt in zip(recent, prompts, strict=True):
            last = prompt[-window:]
            row[window - len(last) :] = last
        inputs = steps.SamplerInputs(self._stop_ids, micro_batch.sampler)
        for logits, done, count, _ in self._prefill(micro_batch, local, prompts, queued=queued):
            ended = (count > 0) & (done + count == lengths)
            if not ended.any():
                continue
            slot = np.where(ended, local, -1).astype(np.int32)
            prompt = steps.PromptEnd(recent, lengths, slot)
            program = self.runners[-1].sample_first(self._sampler)
            micro_batch.state, micro_batch.step_inputs = program(
                logits, micro_batch.state, prompt, inputs
            )

    # Decode

    def step(self) -> None:
        """Enqueues a decode step: one token in each active slot."""
        with self._consuming():
            self._step()

    def _step(self) -> None:
        inputs_like = jax.ShapeDtypeStruct((self._slots_per_micro_batch, 2), np.int32)
        for one in self._micro_batches:
            x, inputs = None, self._transfer(self._step_inputs(one), inputs_like, -1, 0)
            for i, runner in enumerate(self.runners[:-1]):
                program = runner.decode_layers()
                one.caches[i], x = program(runner.params, one.caches[i], x, inputs)
                x_like = self.runners[i + 1].input_shape(self._slots_per_micro_batch, 1)
                x, inputs = self._transfer((x, inputs), (x_like, inputs_like), i, i + 1)
            runner = self.runners[-1]
            sampler = steps.SamplerInputs(self._stop_ids, one.sampler)
            program = runner.decode_and_sample(self._sampler)
            one.caches[-1], one.state, one.step_inputs = program(
                runner.params, one.caches[-1], x, one.state, sampler
            )

    def tokens(self) -> list[jax.Array]:
        """The slots' last tokens, still being computed; `read` waits for them."""
        like = jax.ShapeDtypeStruct((self._slots_per_micro_batch, 2), np.int32)
        return [self._fetchable(self._step_inputs(one), like) for one in self._micro_batches]

    def _step_inputs(self, micro_batch: MicroBatch) -> jax.Array | None:
        if micro_batch.step_inputs is None:
            micro_batch.step_inputs = self.runners[-1].step_inputs()(micro_batch.state)
        return micro_batch.step_inputs

    def read(self, tokens: Sequence[jax.Array]) -> tuple[np.ndarray, np.ndarray]:
        """Waits for the result of `tokens`: int32 `[slots]`, and which slots are active, bool.

        A token is `NOT_FINITE` where the model's logits were not finite.
        """
        with self._consuming():  # errors of the device surface here
            inputs = np.concatenate([np.asarray(x) for x in tokens])[: self.slots]
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
        self._check_cancelled()
        limit = min(limit, length)
        if not self.loops:
            return self._step_loop(limit)
        with self._consuming():
            return self._device_loop(limit, length)

    def _device_loop(self, limit: int, length: int) -> np.ndarray:
        self._decode_loops.run(self._micro_batches, self._sampler, limit, length)
        like = jax.ShapeDtypeStruct((self._slots_per_micro_batch, length), np.int32)
        tokens = [self._fetchable(one.output_tokens, like) for one in self._micro_batches]
        # NumPy views of an array on several CPUs may keep its buffer alive (jax 0.11).
        tokens = [x.addressable_data(0) if x.is_fully_replicated else x for x in tokens]
        return np.concatenate([np.array(x) for x in tokens])[: self.slots, :limit]

    def _step_loop(self, limit: int) -> np.ndarray:
        """Decodes step by step from the host.

        Several stages: all steps are enqueued before the first is read. One stage: each step is
        read, which lets the loop end with the last active slot; CPUs have no queue to fill anyway.
        """
        pending = [self.tokens()]
        for _ in range(limit):
            self._check_cancelled()
            self.step()
            pending.append(self.tokens())
            if len(self.runners) == 1 and not self.read(pending[-1])[1].any():
                break
        read = [self.read(tokens) for tokens in pending]
        columns = [
            np.where(active, token, -1)
            for (_, active), (token, _) in zip(read[:-1], read[1:], strict=True)
        ]
        output = np.full((self.slots, limit), -1, np.int32)
        for i, column in enumerate(columns):
            output[:, i] = column
        return output

    def _fetchable(self, x: jax.Array | None, like: jax.ShapeDtypeStruct) -> jax.Array:
        """An array of the last stage as one that this process can read."""
        return fetch(x, like, self.partition.stages[-1].mesh, self.partition.global_mesh)

    # Inspection

    def _prefill_arguments(self, length: int, stage: int) -> tuple:
        cache = self._micro_batches[0].caches[stage]
        return self.runners[stage].prefill_arguments(length, cache)

    def trace_prefill(self, length: int) -> list[jax.stages.Traced]:
        """Traces each stage's prefill of a chunk, without compiling it."""
        return [
            runner.prefill(length, all_logits=False).trace(*self._prefill_arguments(length, i))
            for i, runner in enumerate(self.runners)
        ]

    def trace_step(self, sampling: SamplingConfig) -> list[jax.stages.Traced]:
        """Traces each stage's decode step, without compiling it."""
        traced, sampler = [], SamplerSpec.of(sampling, self.context)
        slots = self._slots_per_micro_batch
        for i, runner in enumerate(self.runners):
            x = runner.input_shape(slots, 1) if i else None
            cache = self._micro_batches[0].caches[i]
            if runner.last:
                state = runner.empty_state(slots, self._window(sampler))
                params = SamplerParams.of([sampling] * slots)
                inputs = steps.SamplerInputs(self._stop_ids, params)
                arguments = (runner.params, cache, x, state, inputs)
                traced.append(runner.decode_and_sample(sampler).trace(*arguments))
            else:
                inputs = jax.ShapeDtypeStruct((slots, 2), np.int32)
                traced.append(runner.decode_layers().trace(runner.params, cache, x, inputs))
        return traced


def _bytes_on_fullest(tree: Any) -> int:
    """Bytes of arrays on the device of this process that holds most."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
