"""Times the tilings that kernels may take, and keeps the fastest."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxsplit
from jaxsplit.bench.measure import seconds
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.engine import compiler_options
from jaxsplit.errors import JaxsplitError
from jaxsplit.ops import tilings
from jaxsplit.ops.tilings import Problem

_COLD_BYTES = 2**28
"""What a measurement reads, so that little of it is in the caches of a GPU."""

_MAX_COPIES = 32
_LEAST_GAIN = 0.02
"""By which a tiling must be faster than the usual one: less may be chance."""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found for a problem.

    Attributes:
      problem: the call.
      usual: seconds of the kernel with its usual tiling.
      best: seconds with the fastest one.
      tiling: the fastest; None: the usual one.
    """

    problem: Problem
    usual: float
    best: float
    tiling: Any


def problems_of(lm: jaxsplit.LM, prompt: int) -> list[Problem]:
    """The problems of decode steps of up to as many sequences as a model has slots, and of prompts
    of up to some tokens."""
    engine, slots = lm.engine, lm.engine.slots
    rows = {2**n for n in range(slots.bit_length())} | {slots}
    jax.clear_caches()  # what has been traced before is not traced again
    with tilings.collected() as problems:
        for count in sorted(rows):
            engine.trace_step(jaxsplit.SamplingConfig(temperature=0.0), count)
        for length in engine.chunks:
            if length <= max(prompt, min(engine.chunks)):
                engine.trace_prefill(length)
    return list(problems)


def tune(problems: Iterable[Problem], policy: MatmulPolicy, device: jax.Device) -> Iterator[Tuned]:
    """Times the candidates of each problem on a device, and writes the fastest to the table.

    Args:
      problems: from `tilings.collected`.
      policy: with which they were traced.
      device: of the mesh.
    """
    for problem in problems:
        inputs, tried = _inputs(problem, device), [None, *problem.candidates]
        programs = _compiled(problem, tried, inputs, policy, device)
        times = [math.inf if p is None else seconds(p) / len(inputs) for p in programs]
        best = min(range(len(tried)), key=times.__getitem__)
        if times[best] > times[0] * (1 - _LEAST_GAIN):
            best = 0
        tilings.write(policy.cuda, problem, tried[best])
        yield Tuned(problem, times[0], times[best], tried[best])


def _inputs(problem: Problem, device: jax.Device) -> list[tuple[tuple, dict[str, Any]]]:
    """Arguments and options for several calls, with random arrays of their own."""
    leaves = jax.tree.leaves((problem.args, problem.options))
    size = sum(x.size * x.dtype.itemsize for x in leaves if _is_array(x))
    copies = max(2, min(_MAX_COPIES, _COLD_BYTES // max(size, 1)))
    rng = np.random.default_rng(0)

    def array(like: Any) -> Any:
        if not _is_array(like):
            return like
        if like.dtype in (jnp.int32, jnp.bool):  # places and counts
            return jax.device_put(np.zeros(like.shape, like.dtype), device)
        if jnp.issubdtype(like.dtype, jnp.floating):
            x = rng.normal(size=like.shape).astype(np.float32)
            return jax.device_put(x, device).astype(like.dtype)
        x = rng.integers(0, 256, like.size * like.dtype.itemsize, np.uint8)
        return jax.device_put(x.view(like.dtype).reshape(like.shape), device)

    given = [jax.tree.map(array, (problem.args, dict(problem.options))) for _ in range(copies)]
    return [problem.filled(*one) for one in given]


def _compiled(
    problem: Problem,
    tried: Sequence[Any],
    inputs: Sequence[Any],
    policy: MatmulPolicy,
    device: jax.Device,
) -> list[Callable[[], Any] | None]:
    """Programs that call a kernel with all inputs, one for each tiling; None: it does not run."""
    leaves, structure = jax.tree.flatten(inputs)
    where = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
    arrays = [leaves[i] for i in where]

    def program(tiling: Any) -> Callable[[], Any] | None:
        def run(arrays: list[jax.Array]) -> Any:
            filled = list(leaves)
            for i, x in zip(where, arrays, strict=True):
                filled[i] = x
            with forward_context(policy=policy):
                calls = jax.tree.unflatten(structure, filled)
                return [problem.run(*args, tiling=tiling, **options) for args, options in calls]

        options = compiler_options(device.platform, decode=True)
        try:
            compiled = jax.jit(run, compiler_options=options).lower(arrays).compile()
            jax.block_until_ready(compiled(arrays))
        except (JaxsplitError, jax.errors.JaxRuntimeError):  # more registers or memory than exist
            return None
        return lambda: compiled(arrays)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(program, tried))


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct)
