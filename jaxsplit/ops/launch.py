"""What kernels share: dependent launch, the distribution of programs, index arithmetic."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.pallas import pl, plgpu


def launch_dependents(x: Array, early: bool = True) -> Array:
    """Passes an int32 through and signals that the next kernel may be launched.

    Once all programs have signalled, the programs of the next kernel start; they wait until this
    kernel has ended (PTX ISA, `griddepcontrol`; XLA emits the wait at the start of every kernel).

    Only for kernels whose results are read by Pallas kernels (else `early` is false): XLA's own
    kernels may hoist loads of read-only data above the wait.
    """
    if not (early and current_context().policy.pdl):
        return x
    [x] = plgpu.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[jnp.full(1, x)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(x)


@overload
def divmod_pow2(x: int, by: int) -> tuple[int, int]: ...
@overload
def divmod_pow2(x: Array, by: int) -> tuple[Array, Array]: ...
def divmod_pow2(x: Any, by: int) -> tuple[Any, Any]:
    """Quotient and remainder of numbers that are not negative by a power of two."""
    return x >> (by.bit_length() - 1), x & (by - 1)


def dispatch_programs(program: Array, tasks: Sequence[tuple[int, Callable[[Array], None]]]) -> None:
    """Runs the task that a program belongs to.

    Args:
      program: index of the program.
      tasks: the number of programs of each task, and what a program does, given its index among
        them.
    """
    if len(tasks) == 1:
        tasks[0][1](program)
        return
    for count, task in tasks:
        pl.when((program >= 0) & (program < count))(partial(task, program))
        program -= count
