"""Prefill and decode of sequences through the pipeline stages of a model."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsplit.cache.host import HostCopy
from jaxsplit.comm.stage_transfer import fetch, transfer
from jaxsplit.config import SamplingConfig
from jaxsplit.context import DEFAULT_POLICY, MatmulPolicy
from jaxsplit.engine import steps
from jaxsplit.engine.chunked_prefill import CHUNKS
from jaxsplit.engine.device_loop import DecodeLoops
from jaxsplit.engine.host_pages import HostPages
from jaxsplit.engine.pending import PendingPrompts, PendingTokens
from jaxsplit.engine.runner import PAGE, CacheSize, StageRunner, compile_together
from jaxsplit.engine.sampling import SamplerParams, SamplerSpec
from jaxsplit.engine.workers import Background
from jaxsplit.errors import JaxsplitError
from jaxsplit.models import Decoder
from jaxsplit.sharding import Partition

Masks = Callable[[], np.ndarray]
"""Computes which tokens may follow in the rows of each data replica: uint32 `[data, rows, words]`,
a bit for each token. It is called while the devices run the layers."""

MAX_STOP_IDS = 16
"""Tokens that stop a slot on the devices; the host looks for all."""


class Row(NamedTuple):
    """A sequence of a program.

    Attributes:
      slot: of its decode state, on its data replica.
      pages: of the cache, in order.
      state: where its rings and recurrent states are.
      lora_scales: of each adapter; None: as the engine's.
    """

    slot: int
    pages: Sequence[int]
    state: int
    lora_scales: Sequence[float] | None = None


class Prompt(NamedTuple):
    """A part of a prompt.

    Attributes:
      row: the sequence.
      start: position of the first token.
      tokens: the tokens to read.
      ends: whether these are the last ones: the next token is sampled.
      targets: for log-probabilities, the token after each of these; None: none are wanted.
    """

    row: Row
    start: int
    tokens: Sequence[int]
    ends: bool
    targets: Sequence[int] | None = None


class Engine:
    """Runs a model on a mesh: compiled programs over a sharded cache.

    Sequences are on the replicas of the `data` axis. The stages work on micro-batches of rows:
    while one is in a stage, another can be in the next. Calls return once the work is enqueued.

    An engine is not thread-safe; the scheduler runs it on a thread of its own. Programs donate the
    cache: if a call fails halfway, all sequences are lost.

    Args:
      models: the decoder of each stage, its parameters on the stage's mesh.
      partition: the stages.
      context: most tokens of a sequence.
      cache_dtype: dtype of keys and values.
      slots: sequences that can be decoded together.
      cache_tokens: tokens whose keys and values are kept, on each data replica; None: a context of
        each slot.
      checkpoints: copies of rings and recurrent states that are kept besides, on each replica.
      page: tokens of a page.
      vocab: tokens of the vocabulary; larger ids are never sampled; None: all rows of the head.
      stop_ids: tokens that stop a slot.
      chunks: lengths for which prefill is compiled; longer prompts are read in chunks.
      policy: how matrices are multiplied.
      peer_access: use peer-to-peer kernels for all-reduces and stage transfers where the devices
        support them.
      lora_scales: of each adapter that the decoders have, for sequences without scales of their
        own.

    Attributes:
      stop_ids: tokens that stop a slot.
      size: of the cache of a data replica.
      slots_per_replica: slots of a data replica.
      overwritten: whether the cache may hold other than the scheduler believes.
      lost: whether a call failed halfway; `reset` makes the engine work again.
      most_in_flight: units of work that may be enqueued before the first is read.
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
        cache_tokens: int | None = None,
        checkpoints: int = 0,
        page: int = PAGE,
        vocab: int | None = None,
        stop_ids: Sequence[int] = (),
        chunks: Sequence[int] = CHUNKS,
        policy: MatmulPolicy = DEFAULT_POLICY,
        peer_access: bool = True,
        lora_scales: Sequence[float] = (),
    ):
        self.partition = partition
        self.lora_scales = tuple(lora_scales)
        self.config = models[0].config
        self.context = context
        self.chunks = chunks
        self.slots = slots
        self.slots_per_replica = -(-slots // partition.data)
        size = CacheSize.of_slots(context, self.slots_per_replica, page)
        if cache_tokens is not None:
            size = dataclasses.replace(size, pages=-(-cache_tokens // size.page))
        self.size = dataclasses.replace(size, states=size.states + checkpoints)
        self.runners = [
            StageRunner(
                model,
                stage,
                self.size,
                cache_dtype,
                policy,
                vocab=vocab,
                peer_access=peer_access,
                adapters=len(self.lora_scales),
            )
            for model, stage in zip(models, partition.stages, strict=True)
        ]
        self.stop_ids = frozenset(stop_ids)
        self._peer_access = peer_access
        self._caches: list[Any] = []  # in the form of `Cache`, where the stage has local devices
        self._background = Background()
        self.reset()
        platform = partition.stages[0].device_mesh.devices.flat[0].platform
        several = len(self.runners) > 1
        self.loops = self._decode_loops.in_ring if several else platform != "cpu"
        # Programs that do not depend on one another run on a CPU in any order, so that processes
        # or stages might wait for one another for ever.
        alone = platform == "cpu" and (jax.process_count() > 1 or (several and self.loops))
        self.most_in_flight = 1 if alone else 1 + len(self.runners)

    def reset(self) -> None:
        """Drops all sequences and reallocates the cache."""
        self.lost = self.overwritten = True
        self._rows: dict[tuple, tuple[steps.Rows, list[steps.Rows]]] = {}
        self._logits: dict[tuple[int, int], jax.Array] = {}
        self._ahead: list[steps.Rows] = []
        self._assigned: list[tuple] = []  # arguments, see `assign`
        self._state: Any = None
        self._params: Any = None
        self._caches = []  # frees the old buffers first
        self._caches = [runner.empty_cache() for runner in self.runners]
        self._cache_bytes = _bytes_on_fullest(self._caches)
        last, count = self.runners[-1], self.slots_per_replica * self.partition.data
        self._state = last.empty_state(count)
        unused = self._slot_params([(SamplingConfig(temperature=0.0), (), 0)] * count)
        self._params = last.put(unused, by_slot=True)
        self._decode_loops = DecodeLoops(
            self.runners,
            self.slots_per_replica,
            len(self.runners),
            peer_access=self._peer_access,
        )
        self.lost = False

    @contextlib.contextmanager
    def _consuming(self) -> Iterator[None]:
        """Runs programs that donate caches and states; an exception loses them.

        Raises:
          JaxsplitError: an earlier call has lost the sequences.
        """
        if self.lost:
            raise JaxsplitError("an earlier call failed and its sequences are lost; start new ones")
        self.lost = True
        yield
        self.lost = False

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
        return self._cache_bytes  # of any thread: programs that run have taken the arrays

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters on the fullest device of this process."""
        return _bytes_on_fullest([r.params for r in self.runners if r.stage.is_local])

    @property
    def stateful(self) -> bool:
        """Whether layers have rings or recurrent states, which cannot be cut back."""
        return any(runner.stateful for runner in self.runners)

    @property
    def compiled_at(self) -> float:
        """When a call last waited for a compiler, by `time.perf_counter`."""
        return max(runner.compiled_at for runner in self.runners)

    @property
    def vocab(self) -> int:
        """Tokens that may be sampled."""
        return self.runners[-1].vocab

    def _transfer(self, tree: Any, like: Any, source: int, target: int) -> Any:
        """Transfers arrays from one stage's devices to another's."""
        stages = self.partition.stages
        return transfer(tree, like, stages[source].device_mesh, stages[target].device_mesh)

    # What a scheduler runs

    def host_rows(self, rows: Sequence[Sequence[Row | None]], count: int) -> steps.Rows:
        """Rows of a program, for each data replica, filled up to `count`, in NumPy."""
        slots: Any = np.full((len(rows), count), self.slots_per_replica, np.int32)
        states: Any = np.full((len(rows), count), self.size.states, np.int32)
        pages: Any = np.zeros((len(rows), count, self.size.pages_per_sequence), np.int32)
        scales: Any = np.zeros((len(rows), count, len(self.lora_scales)), np.float32)
        for replica, own in enumerate(rows):
            for i, row in enumerate(own):
                if row is not None:
                    slots[replica, i], states[replica, i] = row.slot, row.state
                    pages[replica, i, : len(row.pages)] = row.pages
                    given = self.lora_scales if row.lora_scales is None else row.lora_scales
                    scales[replica, i] = given
        found = steps.Rows(slots, states, pages, scales if self.lora_scales else None)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    def _slot_params(
        self, slots: Sequence[tuple[SamplingConfig, Collection[int], int]]
    ) -> steps.SlotParams:
        """Parameters of slots: sampling, tokens that stop it, position of its last token."""
        stop_ids: Any = np.full((len(slots), MAX_STOP_IDS), -1, np.int32)
        for row, (_, ids, _) in zip(stop_ids, slots, strict=True):
            few = sorted(ids)[:MAX_STOP_IDS]
            row[: len(few)] = few
        sampler = SamplerParams.of([config for config, _, _ in slots], self.context)
        ends: Any = np.asarray([min(end, self.context) for _, _, end in slots], np.int32)
        return steps.SlotParams(sampler, stop_ids, ends)

    def assign(
        self,
        replica: int,
        slot: int,
        tokens: Sequence[int],
        sampling: SamplingConfig,
        *,
        stop_ids: Collection[int] = (),
        end: int | None = None,
    ) -> None:
        """Begins a sequence in a slot: the tokens so far, which penalties count, and how to go on.

        The slot is set when the next token is sampled, so that a GPU reads the prompt meanwhile.

        Args:
          replica, slot: the slot.
          tokens: the prompt.
          sampling: how tokens are chosen.
          stop_ids: tokens that stop the slot; of more than `MAX_STOP_IDS`, the others do not.
          end: position of the last token; None: the context's.
        """
        data, end = self.partition.data, self.context if end is None else end
        slots = np.full(data, self.slots_per_replica, np.int32)
        slots[replica] = slot
        history = np.full((data, self.context + 1), -1, np.int32)
        history[replica, : len(tokens)] = tokens
        new = self._slot_params([(sampling, stop_ids, end)] * data)
        self._ahead = []
        self._assigned.append((slots, history, new))

    def _set_slots(self) -> None:
        """Enqueues what `assign` has been called for."""
        for arguments in self._assigned:
            self._state, self._params = self.runners[-1].assign()(
                self._state, self._params, *arguments
            )
        self._assigned = []

    def copy(self, replica: int, *, pages: Sequence = (), states: Sequence = ()) -> None:
        """Copies pages and states of a data replica: pairs of indices, from and to."""
        size = max(1, power_of_2(max(len(pages), len(states))))

        def pairs(given: Sequence, none: int) -> np.ndarray:
            found = np.full((self.partition.data, size, 2), none, np.int32)
            for i, pair in enumerate(given):
                found[replica, i] = pair
            return found.reshape(-1, 2)

        both = pairs(pages, self.size.pages), pairs(states, self.size.states)
        with self._consuming():
            for i, runner in enumerate(self.runners):
                self._caches[i] = runner.copy()(self._caches[i], *both)

    @functools.cached_property
    def host_pages(self) -> HostPages:
        """Pages of the cache on the host."""
        return HostPages(self.runners, paged=True)

    @functools.cached_property
    def host_states(self) -> HostPages:
        """Rings and recurrent states on the host."""
        return HostPages(self.runners, paged=False)

    def save(self, replica: int, *, page: int | None = None, state: int | None = None) -> HostCopy:
        """Begins to copy a page or a state of a data replica to the host, in a single process. What
        overwrites it later on does not change the copy."""
        if page is not None:
            return self.host_pages.save(self._caches, replica, page)
        assert state is not None
        return self.host_states.save(self._caches, replica, state)

    def restore(
        self,
        replica: int,
        copy: HostCopy,
        *,
        page: int | None = None,
        state: int | None = None,
    ) -> None:
        """Writes a copy to a page or a state of a data replica."""
        on_host = self.host_states if page is None else self.host_pages
        index = state if page is None else page
        assert index is not None
        held = on_host.on_devices(copy)
        with self._consuming():
            self._caches = on_host.restore(self._caches, held, replica, index)

    def read_prompts(
        self,
        prompts: Sequence[Sequence[Prompt]],
        *,
        rows: int,
        length: int,
        sampler: SamplerSpec,
        wanted: str = "last",
        masks: Masks | None = None,
    ) -> PendingPrompts:
        """Reads a part of each of some prompts, and samples the next token of those that end.

        Args:
          prompts: for each data replica.
          rows: of the program, on each replica, for which it is compiled.
          length: tokens of each row, for which it is compiled.
          sampler: the spec of the prompts that end.
          wanted: as in `StageRunner.prefill`.
          masks: of the prompts, if the sampler has them.
        """
        with self._consuming():
            return self._read_prompts(prompts, rows, length, sampler, wanted, masks)

    def _read_prompts(
        self,
        prompts: Sequence[Sequence[Prompt]],
        rows: int,
        length: int,
        sampler: SamplerSpec,
        wanted: str,
        masks: Masks | None,
    ) -> PendingPrompts:
        data, stages = self.partition.data, len(self.runners)
        host = self.host_rows([[one.row for one in own] for own in prompts], rows)
        start: Any = np.zeros((data, rows), np.int32)
        count: Any = np.zeros((data, rows), np.int32)
        x: Any = np.zeros((data, rows, length), np.int32)
        targets = np.full((data, rows, length), -1, np.int32)
        slots = host.slots.reshape(data, rows).copy()
        for replica, own in enumerate(prompts):
            for i, one in enumerate(own):
                start[replica, i], count[replica, i] = one.start, len(one.tokens)
                x[replica, i, : len(one.tokens)] = one.tokens
                if one.targets is not None:
                    targets[replica, i, : len(one.targets)] = one.targets
                if not one.ends:
                    slots[replica, i] = self.slots_per_replica
        ends = wanted in ("last", "logprobs") and any(one.ends for own in prompts for one in own)
        x, targets = x.reshape(-1, length), targets.reshape(-1, length)
        chunk = steps.PrefillChunk(start.reshape(-1), count.reshape(-1), host)
        programs = [runner.prefill(rows, length, wanted) for runner in self.runners]
        if stages > 1:
            arguments = functools.partial(self._prefill_arguments, rows, length, wanted=wanted)
            compile_together(programs, arguments)
        given = targets if wanted == "logprobs" else None
        for i, (runner, program) in enumerate(zip(self.runners, programs, strict=True)):
            if i:
                x = self._transfer(x, runner.input_shape(data * rows, length), i - 1, i)
            self._caches[i], x = program(runner.params, self._caches[i], x, chunk, given)
        details = None
        if wanted == "logprobs":
            x, details = x if x is not None else (None, None)
        outputs = None
        if ends:
            self._set_slots()
            last = dataclasses.replace(
                chunk, rows=dataclasses.replace(host, slots=slots.reshape(-1))
            )
            mask = None if masks is None else self.runners[-1].split_masks(masks(), 0, rows)
            self._state, outputs = self.runners[-1].sample_first(sampler, rows)(
                x, self._state, last, self._params, mask
            )
        values = x if wanted in ("logits", "hidden") else None
        return PendingPrompts(
            self,
            (data, rows, length),
            sampler,
            outputs,
            details,
            values,
            ends=ends,
            wanted=wanted,
        )

    def decode(
        self,
        rows: Sequence[Sequence[Row]],
        sampler: SamplerSpec,
        limit: int,
        *,
        length: int = 32,
        on_host: bool = False,
        masks: Masks | None = None,
    ) -> PendingTokens:
        """Decodes up to `limit` tokens of each row, on the devices if the engine `loops`.

        Args:
          rows: for each data replica.
          sampler: the spec of these rows.
          limit: steps.
          length: steps that the outputs have room for; caps `limit`.
          on_host: step by step from the host.
          masks: of the rows, if the sampler has them: then it decodes a single token of each.
        """
        most, looping = max(map(len, rows)), self.loops and not on_host and masks is None
        count = min(len(self.runners), most)  # micro-batches
        size = min(power_of_2(-(-most // count)), self.slots_per_replica)
        if self.loops and not on_host and len(self.runners) == 1:
            size = self._ready_size(sampler, size, length)
        batches = [[own[i : i + size] for own in rows] for i in range(0, most, size)]
        # A single stage has nothing to overlap: its micro-batches are loops one after the other.
        count = 1 if len(self.runners) == 1 else len(batches)
        limit = min(limit, length)
        with self._consuming():
            self._set_slots()
            masked = masks is not None
            held = [
                self._device_rows((i, size, count, masked), batch)
                for i, batch in enumerate(batches)
            ]
            if not looping:
                by_stage = [list(one) for one in zip(*held, strict=True)]
                if masked:
                    return self._masked_step(by_stage, sampler, masks)
                return self._step_loop(by_stage, sampler, limit)
            found = []
            for i in range(0, len(held), count):
                by_stage = [list(one) for one in zip(*held[i : i + count], strict=True)]
                found += self._device_loop(by_stage, sampler, limit, length)
        size *= self.partition.data
        return PendingTokens(self, size, sampler, [[one] for one in found], length, limit)

    def _ready_size(self, sampler: SamplerSpec, wanted: int, length: int) -> int:
        """Rows of a decode loop or a masked step: as many as wanted, or, while its programs are
        compiled in the background, as many as programs that are ready have."""
        runner, most = self.runners[0], self.slots_per_replica

        def programs(size: int) -> list[Any]:
            if sampler.mask:
                return [runner.decode_logits(size), runner.sample_next(sampler, size)]
            return [runner.decode_loop(sampler, length, size, 1, in_ring=False)]

        ready = [
            size
            for size in (*(1 << i for i in range((most - 1).bit_length())), most)
            if all(program.ready for program in programs(size))
        ]
        if wanted in ready or not ready:
            return wanted
        if (key := ("loop", sampler, wanted, length)) not in self._background:
            rows = self.host_rows([[]] * self.partition.data, wanted)
            held = self._caches, self._state, self._params
            if sampler.mask:
                prepared = zip(programs(wanted), self._masked_arguments(rows), strict=True)
            else:
                prepared = [self._decode_loops.prepared(sampler, wanted, length, rows, held)]

            def task() -> None:
                for program, arguments in prepared:
                    program.compile(*arguments)

            self._background.add(key, task)
        larger = [size for size in ready if wanted < size <= 4 * wanted]
        return min(larger) if larger else max((s for s in ready if s < wanted), default=min(ready))

    def is_ready(self, rows: int, length: int, wanted: str, sampler: SamplerSpec) -> bool:
        """Whether prompts of these shapes can be read without compiling. If not, their programs
        are compiled in the background from now on: where devices decode in loops, so that the
        host is free, and for a single stage."""
        runner, data = self.runners[0], self.partition.data
        program, first = runner.prefill(rows, length, wanted), runner.sample_first(sampler, rows)
        if not self.loops or len(self.runners) > 1 or (program.ready and first.ready):
            return True
        if (key := ("prompts", rows, length, wanted, sampler)) in self._background:
            return False
        cache, state, params = map(runner.shapes_of, (self._caches[0], self._state, self._params))
        arguments = runner.prefill_arguments(rows, length, cache, wanted)
        chunk = arguments[3]

        def task() -> None:
            if not program.ready:
                program.compile(runner.shapes_of(arguments[0]), *arguments[1:])
            if not first.ready and wanted in ("last", "logprobs"):
                logits = runner.logits_shape(data * rows)
                mask = self._no_masks(rows) if sampler.mask else None
                first.compile(logits, state, chunk, params, mask)

        self._background.add(key, task)
        return False

    def wait_for_programs(self) -> None:
        """Waits until the programs that are compiled in the background are ready."""
        self._background.wait()

    def ready_chunks(self, wanted: str) -> list[int]:
        """Lengths of which a single prompt's chunk can be read without compiling."""
        runner = self.runners[0]
        return [c for c in self.chunks if runner.prefill(1, c, wanted).ready]

    def _device_rows(
        self, key: tuple[int, int, int, bool], rows: Sequence[Sequence[Row | None]]
    ) -> list[steps.Rows]:
        """A micro-batch's rows on each stage, in the same buffers as those before: the very same
        arrays if the rows are the same.

        Args:
          key: the micro-batch's index, its rows on each device, how many micro-batches there are,
            and whether it is masked.
          rows: the sequences.
        """
        host = self.host_rows(rows, key[1])
        before, held = self._rows.get(key, (None, []))
        if before is None:
            held = [runner.put(host, by_slot=True) for runner in self.runners]
        elif not all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(host))):
            del self._rows[key]
            held = [
                runner.overwrite()(old, runner.put(host, by_slot=True))
                if runner.stage.is_local
                else host
                for runner, old in zip(self.runners, held, strict=True)
            ]
        self._rows[key] = host, held
        return held

    def _device_loop(
        self, rows: list[list[steps.Rows]], sampler: SamplerSpec, limit: int, length: int
    ) -> list[steps.Outputs | None]:
        """The outputs of each micro-batch."""
        self._caches, self._state, outputs = self._decode_loops.run(
            self._caches, self._state, rows, self._params, sampler, limit=limit, length=length
        )
        return [self.runners[-1].copied()(one) for one in outputs]  # the next loop overwrites them

    def _step_loop(
        self, rows: list[list[steps.Rows]], sampler: SamplerSpec, limit: int
    ) -> PendingTokens:
        """Decodes step by step from the host.

        Several stages: all steps are enqueued before the first is read. One stage: each step is
        read, which lets the loop end with the last active row; CPUs have no queue to fill anyway.
        """
        columns, last = [], self.runners[-1]
        inputs = [last.step_inputs()(self._state, one) for one in rows[-1]]
        like = jax.ShapeDtypeStruct((self._size_of(rows, 0), 2), np.int32)
        for _ in range(limit):
            if len(self.runners) == 1 and (self._fetch(inputs[0], like)[:, 1] < 0).all():
                break
            sampled, inputs = self._step(rows, sampler, inputs)
            columns.append(sampled)
        size = self._size_of(rows, 0)
        by_batch = [[column[i] for column in columns] for i in range(len(rows[0]))]
        return PendingTokens(self, size, sampler, by_batch, 1, limit)

    def _step(
        self, rows: list[list[steps.Rows]], sampler: SamplerSpec, inputs: list[jax.Array | None]
    ) -> tuple[list[steps.Outputs], list[jax.Array | None]]:
        """A decode step of each micro-batch, from and to their `steps.step_inputs`."""
        outputs, following, last = [], [], self.runners[-1]
        for batch, given in enumerate(inputs):
            x = self._before_last(rows, batch, given)
            program = last.decode_and_sample(sampler)
            self._caches[-1], self._state, sampled, new = program(
                last.params, self._caches[-1], x, self._state, rows[-1][batch], self._params
            )
            outputs.append(sampled)
            following.append(new)
        return outputs, following

    def _before_last(
        self, rows: list[list[steps.Rows]], batch: int, inputs: jax.Array | None
    ) -> jax.Array | None:
        """What the last stage takes in a decode step; None: there is a single stage."""
        if len(self.runners) == 1:
            return None
        size = self._size_of(rows, batch)
        like = jax.ShapeDtypeStruct((size, 2), np.int32)
        x, given = None, self._transfer(inputs, like, -1, 0)
        for i, runner in enumerate(self.runners[:-1]):
            program = runner.decode_layers()
            self._caches[i], x = program(runner.params, self._caches[i], x, given, rows[i][batch])
            x_like = self.runners[i + 1].input_shape(size, 1)
            x, given = self._transfer((x, given), (x_like, like), i, i + 1)
        return x

    def _masked_step(
        self, rows: list[list[steps.Rows]], sampler: SamplerSpec, masks: Masks
    ) -> PendingTokens:
        """A decode step. The layers of all micro-batches are enqueued before the masks are
        computed.

        Where the host runs ahead of the devices, so are the layers of the next step, which need
        the token that was sampled, but not the next mask: they run while the host reads the token
        and computes the mask. If the next step has other rows, they run again.
        """
        outputs, last, size = [], self.runners[-1], self._size_of(rows, 0)
        if [*map(id, self._ahead)] != [*map(id, rows[-1])]:
            self._masked_layers(rows)
        mask, count = masks(), size // self.partition.data
        for batch, own in enumerate(rows[-1]):
            part = last.split_masks(mask, batch * count, count)
            self._state, sampled = last.sample_next(sampler, count)(
                self._logits[batch, size], self._state, own, self._params, part
            )
            outputs.append([sampled])
        self._ahead = []
        if self.runs_ahead:
            self._masked_layers(rows)
            self._ahead = rows[-1]
        return PendingTokens(self, size, sampler, outputs, 1, 1)

    @property
    def runs_ahead(self) -> bool:
        """Whether the layers of a masked step may run before the host knows that the step is taken:
        their keys and values are overwritten, but recurrent states cannot be."""
        alone = len(self.runners) == 1 and jax.process_count() == 1
        return self.loops and alone and not self.stateful

    def _masked_layers(self, rows: list[list[steps.Rows]]) -> None:
        """Runs the layers of each micro-batch up to its logits."""
        last, size = self.runners[-1], self._size_of(rows, 0)
        program = last.decode_logits(size // self.partition.data)
        inputs = [None] * len(rows[-1])
        if len(self.runners) > 1:
            inputs = [last.step_inputs()(self._state, one) for one in rows[-1]]
        for batch, given in enumerate(inputs):
            x = self._before_last(rows, batch, given)
            old = self._logits.pop((batch, size), None)
            if old is None:
                old = last.empty_logits(size)
            self._caches[-1], self._logits[batch, size] = program(
                last.params, self._caches[-1], old, x, self._state, rows[-1][batch]
            )

    def _masked_arguments(self, rows: steps.Rows) -> list[tuple]:
        """For which the programs of a masked step of a single stage can be compiled."""
        [runner], count = self.runners, len(rows.slots)
        held = self.runners[0].params, self._caches[0], self._state, self._params
        params, cache, state, slot_params = map(runner.shapes_of, held)
        on_device, logits = runner.shapes_by_slot(rows), runner.logits_shape(count)
        mask = self._no_masks(count // self.partition.data)
        return [
            (params, cache, logits, None, state, on_device),
            (logits, state, on_device, slot_params, mask),
        ]

    def _no_masks(self, rows: int) -> np.ndarray | None:
        """Masks for which programs can be compiled."""
        return self.runners[-1].split_masks(
            np.zeros((self.partition.data, 1, 1), np.uint32), 0, rows
        )

    def step_inputs(self, rows: Sequence[Sequence[Row]]) -> jax.Array | None:
        """`steps.step_inputs` of rows, on the last stage, still being computed."""
        host = self.host_rows(rows, self.slots_per_replica)
        with self._consuming():
            self._set_slots()
        return self.runners[-1].step_inputs()(self._state, host)

    @staticmethod
    def _size_of(rows: list[list[steps.Rows]], batch: int) -> int:
        return rows[0][batch].slots.shape[0]

    def fetch(self, tree: Any, like: Any) -> Any:
        """Arrays of the last stage as NumPy arrays in every process; waits for them.

        Args:
          tree: the arrays; None in a process without a device of the last stage.
          like: their global shapes and dtypes.
        """
        with self._consuming():  # errors of the device surface here
            return self._fetch(tree, like)

    def _fetch(self, tree: Any, like: Any) -> Any:
        leaves, structure = jax.tree.flatten(like)
        arrays = [None] * len(leaves) if tree is None else jax.tree.leaves(tree)
        last, everywhere = self.partition.stages[-1].device_mesh, self.partition.global_mesh
        found = [fetch(x, one, last, everywhere) for x, one in zip(arrays, leaves, strict=True)]
        # NumPy views of an array on several CPUs may keep its buffer alive (jax 0.11).
        found = [x.addressable_data(0) if x.is_fully_replicated else x for x in found]
        return jax.tree.unflatten(structure, [np.array(x) for x in found])

    # Inspection

    def _prefill_arguments(self, rows: int, length: int, stage: int, wanted: str = "last") -> tuple:
        return self.runners[stage].prefill_arguments(rows, length, self._caches[stage], wanted)

    def trace_prefill(self, length: int) -> list[jax.stages.Traced]:
        """Traces each stage's prefill of a chunk, without compiling it."""
        return [
            runner.prefill(1, length).trace(*self._prefill_arguments(1, length, i))
            for i, runner in enumerate(self.runners)
        ]

    def trace_step(self, sampling: SamplingConfig, rows: int = 1) -> list[jax.stages.Traced]:
        """Traces each stage's decode step of `rows` rows on each device, without compiling it."""
        traced, sampler = [], SamplerSpec.of(sampling, self.context)
        host = self.host_rows([[]] * self.partition.data, rows)
        count = len(host.slots)
        for i, runner in enumerate(self.runners):
            x = runner.input_shape(count, 1) if i else None
            if runner.last:
                arguments = (runner.params, self._caches[i], x, self._state, host, self._params)
                traced.append(runner.decode_and_sample(sampler).trace(*arguments))
            else:
                inputs = jax.ShapeDtypeStruct((count, 2), np.int32)
                arguments = (runner.params, self._caches[i], x, inputs, host)
                traced.append(runner.decode_layers().trace(*arguments))
        return traced


def power_of_2(x: int) -> int:
    """The smallest power of 2 that is at least `x`."""
    return 1 << max(x - 1, 0).bit_length()


def _bytes_on_fullest(tree: Any) -> int:
    """Bytes of arrays on the device of this process that holds most."""
    held: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return max(held.values(), default=0)
