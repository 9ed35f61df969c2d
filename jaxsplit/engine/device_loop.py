"""Loops of decode steps that devices run by themselves: a program for each stage, all at once."""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxsplit.cache.contiguous import Cache
from jaxsplit.comm import p2p
from jaxsplit.comm.symmetric_memory import make_ring
from jaxsplit.engine import steps
from jaxsplit.engine.runner import StageRunner, compile_together
from jaxsplit.engine.sampling import SamplingPlan, SamplingValues


@dataclasses.dataclass
class Group:
    """Slots that pass through the stages together.

    Attributes:
      caches: of each stage.
      state: on the last stage.
      fed: the state's `steps.feed`, on the last stage; None: not computed yet.
      values: how their tokens are chosen.
      texts: where loops leave their tokens, int32 `[slots, length]`, on the last stage.
    """

    caches: list[Cache]
    state: steps.DecodeState | None = None
    fed: jax.Array | None = None
    values: SamplingValues | None = None
    texts: jax.Array | None = None


class Loops:
    """The loops of the stages. Several of them hand over in kernels.

    Args:
      runners: of the stages.
      ends: tokens that end a text, on the last stage.
      slots: of a group, on one device.
      groups: of slots.
      peer_access: stages hand over, if their devices can.

    Attributes:
      in_ring: several stages hand over; if it is false, only a single one can be run.
    """

    def __init__(
        self,
        runners: Sequence[StageRunner],
        ends: jax.Array,
        slots: int,
        groups: int,
        *,
        peer_access: bool,
    ):
        self._runners, self._ends = runners, ends
        self._slots, self._groups = slots, groups
        self._group_slots = slots * runners[0].stage.mesh.shape["data"]
        self._limits: dict[int, list[jax.Array]] = {}
        tables = self._ring_tables() if peer_access and len(runners) > 1 else None
        self.in_ring = tables is not None
        self._tables = tables or [None] * len(runners)
        self._counts = [
            runner.place(np.ones(1, np.int32)) if self.in_ring else None for runner in runners
        ]

    def _ring_tables(self) -> list[jax.Array] | None:
        """Of each stage; None: its kernels cannot hand over."""
        meshes = [runner.stage.mesh for runner in self._runners]
        policy = self._runners[0].policy
        alike = all(isinstance(m, Mesh) and m.shape == meshes[0].shape for m in meshes)
        if not (policy.kernels and alike):
            return None
        if policy.interpret:
            if meshes[0].size > 1:  # CPUs run one program of several devices at a time
                return None
            return [*jnp.asarray(p2p.host_tables(len(meshes), meshes[0].devices.shape))]
        words = max(steps.word_count(runner.incoming(self._slots)) for runner in self._runners)
        return make_ring(meshes, p2p.mailbox_bytes(self._groups, words), self)

    def run(self, groups: Sequence[Group], plan: SamplingPlan, limit: int, length: int) -> None:
        """Decodes up to `limit` tokens in each active slot of all groups, to the first places of
        their texts of a length; does not wait for it.

        All arguments and results stay where they are: a CUDA graph is made again for others.
        """
        if limit not in self._limits:
            value = np.asarray(limit, np.int32)
            self._limits[limit] = [runner.place(value) for runner in self._runners]
        texts = np.zeros((self._group_slots, length), np.int32)
        for group in groups:
            if group.texts is None or group.texts.shape != texts.shape:
                group.texts = self._runners[-1].place(texts, by_slot=True)
        programs = [
            runner.loop(plan, length, self._slots, self._groups, in_ring=self.in_ring)
            for runner in self._runners
        ]
        arguments = [self._arguments(groups, i, limit) for i in range(len(programs))]
        for i, results in enumerate(_run_together(programs, arguments)):
            caches, states, texts, self._counts[i] = results
            for group, cache in zip(groups, caches, strict=True):
                group.caches[i] = cache
        for group, state, text in zip(groups, states, texts, strict=True):
            group.state, group.texts, group.fed = state, text, None

    def _arguments(self, groups: Sequence[Group], i: int, limit: int) -> tuple:
        """Of the loop of a stage, `StageRunner.loop`."""
        last = i == len(self._runners) - 1
        chosen = groups if last else []  # the last stage alone chooses tokens
        return (
            self._runners[i].params,
            [group.caches[i] for group in groups],
            [group.state for group in chosen],
            [group.texts for group in chosen],
            self._counts[i],
            self._tables[i],
            self._limits[limit][i],
            self._ends if last else None,
            [group.values for group in chosen],
        )


def _run_together(programs: Sequence[Callable], arguments: Sequence[tuple]) -> list[tuple]:
    """The results of programs of different devices, each of which waits for what others send.

    All are compiled before the first of them runs. Where XLA runs a loop from the host, a thread
    waits too.
    """
    if len(programs) == 1:
        return [programs[0](*arguments[0])]
    compile_together(programs, lambda i: arguments[i])
    with ThreadPoolExecutor(len(programs)) as threads:
        return list(threads.map(lambda loop, args: loop(*args), programs, arguments))
