"""Decode loops on the devices: one program for each stage, all running at the same time."""

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
from jaxsplit.engine.sampling import MAX_TOP_LOGPROBS, SamplerSpec


class DecodeLoops:
    """The decode loops of all stages. Several stages transfer activations in kernels.

    Args:
      runners: of the stages.
      most_rows: most rows of a micro-batch on each device.
      most_micro_batches: how many there may be.
      peer_access: transfer in kernels where the devices support it.

    Attributes:
      in_ring: whether several stages transfer in kernels. Without, only one stage can loop.
    """

    def __init__(
        self,
        runners: Sequence[StageRunner],
        most_rows: int,
        most_micro_batches: int,
        *,
        peer_access: bool,
    ):
        self._runners = runners
        self._limit = 0
        self._limits = [runner.put(np.zeros((), np.int32)) for runner in runners]
        self._outputs: dict[tuple, list[steps.Outputs]] = {}
        shapes = [runner.incoming_shapes(most_rows) for runner in runners]
        words = max(map(steps.word_count, shapes))
        pointers = None
        if peer_access and len(runners) > 1:
            pointers = self._ring_pointers(p2p.buffer_bytes(most_micro_batches, words))
        self.in_ring = pointers is not None
        self._buffer_pointers = pointers or [None] * len(runners)
        self._epochs = [
            runner.put(np.ones(1, np.int32)) if self.in_ring else None for runner in runners
        ]

    def _ring_pointers(self, size: int) -> list[jax.Array] | None:
        """Pointers to buffers of `size` bytes of each stage; None: the stages cannot transfer in
        kernels."""
        policy = self._runners[0].policy
        meshes = [m for runner in self._runners if isinstance(m := runner.stage.mesh, Mesh)]
        alike = all(mesh.shape == meshes[0].shape for mesh in meshes)
        if not (policy.kernels and alike and len(meshes) == len(self._runners)):
            return None
        if policy.interpret:
            if meshes[0].size > 1:  # a CPU runs one program of several devices at a time
                return None
            return [*jnp.asarray(p2p.host_buffer_pointers(len(meshes), meshes[0].devices.shape))]
        return allocate_ring_buffers(meshes, size, self)

    def prepared(
        self, sampler: SamplerSpec, size: int, length: int, rows: steps.Rows, held: tuple
    ) -> tuple[Callable, tuple]:
        """The program of a single stage's loop over one micro-batch, and what to compile it for.

        Args:
          sampler, length: as in `run`.
          size: rows on each device.
          rows: of NumPy.
          held: the caches, the state and the parameters.
        """
        [runner] = self._runners
        caches, state, params = held
        outputs = steps.Outputs.empty(len(rows.slots), length, self._alternatives(sampler))
        carry = (
            runner.shapes_of(caches[0]),
            runner.shapes_of(state),
            [runner.shapes_by_slot(outputs)],
            None,
        )
        inputs = steps.LoopInputs(
            runner.shapes_of(self._limits[0]),
            [runner.shapes_by_slot(rows)],
            runner.shapes_of(params),
        )
        program = runner.decode_loop(sampler, length, size, 1, in_ring=False)
        return program, (runner.shapes_of(runner.params), carry, None, inputs)

    def _alternatives(self, sampler: SamplerSpec) -> int:
        return min(MAX_TOP_LOGPROBS, self._runners[-1].vocab) if sampler.logprobs else 0

    def run(
        self,
        caches: Sequence[Cache],
        state: steps.DecodeState | None,
        rows: Sequence[Sequence[steps.Rows]],
        params: steps.SlotParams,
        sampler: SamplerSpec,
        *,
        limit: int,
        length: int,
    ) -> tuple[list[Cache], steps.DecodeState | None, list[steps.Outputs]]:
        """Decodes up to `limit` tokens in each row, without waiting for the devices.

        All arrays but the rows and parameters are donated in place: new addresses would force XLA
        to re-instantiate the CUDA graph.

        Args:
          caches: of each stage.
          state: of all slots, on the last stage.
          rows: for each stage, those of each micro-batch.
          params: of all slots, on the last stage.
          sampler: the spec of these rows.
          limit: steps to run.
          length: steps that the outputs have room for.

        Returns:
          the caches and the state, and the outputs of each micro-batch, which the next call
          overwrites.
        """
        if limit != self._limit:
            value = np.asarray(limit, np.int32)
            self._limits = [
                runner.overwrite(by_slot=False)(old, value)
                for runner, old in zip(self._runners, self._limits, strict=True)
            ]
            self._limit = limit
        count, data = len(rows[-1]), self._runners[0].stage.mesh.shape["data"]
        of_batch = rows[-1][0].slots.shape[0]
        last = self._runners[-1]
        key = (of_batch, count, length, sampler.logprobs)
        if key not in self._outputs:
            empty = steps.Outputs.empty(of_batch, length, self._alternatives(sampler))
            self._outputs[key] = [last.put(empty, by_slot=True) for _ in range(count)]
        programs = [
            runner.decode_loop(sampler, length, of_batch // data, count, in_ring=self.in_ring)
            for runner in self._runners
        ]
        arguments = []
        for i, runner in enumerate(self._runners):
            own = runner.last
            carry = (
                caches[i],
                state if own else None,
                self._outputs[key] if own else [],
                self._epochs[i],
            )
            inputs = steps.LoopInputs(self._limits[i], rows[i], params if own else None)
            arguments.append((runner.params, carry, self._buffer_pointers[i], inputs))
        carries = _run_together(programs, arguments)
        self._epochs = [carry[-1] for carry in carries]
        _, state, self._outputs[key], _ = carries[-1]
        return [carry[0] for carry in carries], state, self._outputs[key]


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
