"""Decode loops on the devices: one program for each stage, all running at the same time."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsplit.cache.layers import Cache
from jaxsplit.comm import p2p
from jaxsplit.comm.symmetric_memory import allocate_ring_buffers
from jaxsplit.engine import steps
from jaxsplit.engine.runner import StageRunner, compile_together
from jaxsplit.engine.sampling import SamplerParams, SamplerSpec


@dataclasses.dataclass
class MicroBatch:
    """Slots that pass through the pipeline stages together.

    Attributes:
      caches: one for each stage.
      state: decode state, on the last stage.
      step_inputs: `steps.step_inputs` of the state, on the last stage; None: not computed yet.
      sampler: sampler parameters, on the last stage.
      output_tokens: buffer for the tokens of a loop, int32 `[slots, length]`, on the last stage.
    """

    caches: list[Cache]
    state: steps.DecodeState | None = None
    step_inputs: jax.Array | None = None
    sampler: SamplerParams | None = None
    output_tokens: jax.Array | None = None


class DecodeLoops:
    """The decode loops of all stages. Several stages transfer activations in kernels.

    Args:
      runners: of the stages.
      stop_ids: int32 `[stop_ids]`: tokens that stop a slot, on the last stage.
      slots: slots of a micro-batch on each device.
      micro_batches: how many there are.
      peer_access: transfer in kernels where the devices support it.

    Attributes:
      in_ring: whether several stages transfer in kernels. Without, only one stage can loop.
    """

    def __init__(
        self,
        runners: Sequence[StageRunner],
        stop_ids: jax.Array,
        slots: int,
        micro_batches: int,
        *,
        peer_access: bool,
    ):
        self._runners, self._stop_ids = runners, stop_ids
        self._slots, self._micro_batches = slots, micro_batches
        self._slots_per_micro_batch = slots * runners[0].stage.mesh.shape["data"]
        self._limits: dict[int, list[jax.Array]] = {}
        pointers = self._ring_pointers() if peer_access and len(runners) > 1 else None
        self.in_ring = pointers is not None
        self._buffer_pointers = pointers or [None] * len(runners)
        self._epochs = [
            runner.put(np.ones(1, np.int32)) if self.in_ring else None for runner in runners
        ]

    def _ring_pointers(self) -> list[jax.Array] | None:
        """Buffer pointers of each stage; None: the stages cannot transfer in kernels."""
        meshes = [runner.stage.mesh for runner in self._runners]
        policy = self._runners[0].policy
        alike = all(isinstance(m, Mesh) and m.shape == meshes[0].shape for m in meshes)
        if not (policy.kernels and alike):
            return None
        if policy.interpret:
            if meshes[0].size > 1:  # a CPU runs one program of several devices at a time
                return None
            return [*jnp.asarray(p2p.host_buffer_pointers(len(meshes), meshes[0].devices.shape))]
        shapes = [runner.incoming_shapes(self._slots) for runner in self._runners]
        words = max(map(steps.word_count, shapes))
        return allocate_ring_buffers(meshes, p2p.buffer_bytes(self._micro_batches, words), self)

    def run(
        self, micro_batches: Sequence[MicroBatch], sampler: SamplerSpec, limit: int, length: int
    ) -> None:
        """Decodes up to `limit` tokens in each active slot, without waiting for the devices.

        The tokens go to the first columns of `output_tokens`, which have `length` columns. Buffers
        are donated in place: new addresses would force XLA to re-instantiate the CUDA graph.
        """
        if limit not in self._limits:
            value = np.asarray(limit, np.int32)
            self._limits[limit] = [runner.put(value) for runner in self._runners]
        empty = np.zeros((self._slots_per_micro_batch, length), np.int32)
        for one in micro_batches:
            if one.output_tokens is None or one.output_tokens.shape != empty.shape:
                one.output_tokens = self._runners[-1].put(empty, by_slot=True)
        programs = [
            runner.decode_loop(
                sampler, length, self._slots, self._micro_batches, in_ring=self.in_ring
            )
            for runner in self._runners
        ]
        arguments = [self._arguments(micro_batches, i, limit) for i in range(len(programs))]
        for i, carry in enumerate(_run_together(programs, arguments)):
            caches, states, output_tokens, self._epochs[i] = carry
            for one, cache in zip(micro_batches, caches, strict=True):
                one.caches[i] = cache
        for one, state, tokens in zip(micro_batches, states, output_tokens, strict=True):
            one.state, one.output_tokens, one.step_inputs = state, tokens, None

    def _arguments(self, micro_batches: Sequence[MicroBatch], i: int, limit: int) -> tuple:
        """Arguments of stage `i`'s `StageRunner.decode_loop`."""
        last = i == len(self._runners) - 1
        sampled = micro_batches if last else []  # only the last stage samples
        carry = (
            [one.caches[i] for one in micro_batches],
            [one.state for one in sampled],
            [one.output_tokens for one in sampled],
            self._epochs[i],
        )
        inputs = steps.LoopInputs(
            limit=self._limits[limit][i],
            stop_ids=self._stop_ids if last else None,
            params=[one.sampler for one in sampled],
        )
        return self._runners[i].params, carry, self._buffer_pointers[i], inputs


def _run_together(programs: Sequence[Callable], arguments: Sequence[tuple]) -> list[tuple]:
    """Runs programs on different devices that wait for one another's messages.

    All are compiled before the first one starts. Each is launched by its own thread, since a loop
    that XLA drives from the host blocks its thread.
    """
    if len(programs) == 1:
        return [programs[0](*arguments[0])]
    compile_together(programs, lambda i: arguments[i])
    with ThreadPoolExecutor(len(programs)) as threads:
        return list(threads.map(lambda loop, args: loop(*args), programs, arguments))
