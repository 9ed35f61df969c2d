"""How kernels are launched, and their programs shared out."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import KernelLaunch
from jaxsplit.pallas import pl, plgpu


def launch_dependents(x: Array, launch: KernelLaunch) -> Array:
    """An int32 as it is, and the sign that the next kernel may be launched: once all programs have
    given it, that of the next begin, and wait until those of this one have ended (PTX ISA,
    `griddepcontrol`; XLA writes the wait at the beginning of all kernels).

    Only for kernels whose results are read by kernels like these: those of XLA may read what does
    not change while they run before they wait.
    """
    if not launch.pdl:
        return x
    [x] = plgpu.elementwise_inline_asm(
        "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        args=[jnp.full(1, x)],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
    )
    return jnp.sum(x)


def dispatch_programs(program: Array, tasks: Sequence[tuple[int, Callable[[Array], None]]]) -> None:
    """Runs the task that a program belongs to.

    Args:
      program: which of the programs of all.
      tasks: how many programs each has, and what one does, given its number among them.
    """
    if len(tasks) == 1:
        tasks[0][1](program)
        return
    for count, task in tasks:
        pl.when((program >= 0) & (program < count))(partial(task, program))
        program -= count
