"""How kernels are launched, and their programs shared out."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def compute_capability(device: jax.Device) -> float:
    """That of an NVIDIA GPU, such as 9.0; 0 of any other device."""
    found = str(getattr(device, "compute_capability", ""))
    nvidia = device.platform in ("gpu", "cuda") and found.replace(".", "").isdigit()
    return float(found) if nvidia else 0.0


@dataclasses.dataclass(frozen=True)
class Launch:
    """How kernels are launched.

    Attributes:
      interpret: they are interpreted, to test them without a GPU.
      overlap: kernel after kernel may be launched early, which takes compute capability 9.0.
    """

    interpret: bool = False
    overlap: bool = False

    def next_from(self, x: Array) -> Array:
        """An int32 as it is, and the sign that the next kernel may be launched: once all
        programs have given it, that of the next begin, and wait until those of this one have ended
        (PTX ISA, `griddepcontrol`; XLA writes the wait at the beginning of all kernels).

        Only for kernels whose results are read by kernels like these: those of XLA may read what
        does not change while they run before they wait.
        """
        if not self.overlap:
            return x
        [x] = plgpu.elementwise_inline_asm(
            "griddepcontrol.launch_dependents; mov.b32 $0, $1;",
            args=[jnp.full(1, x)],
            constraints="=r,r",
            pack=1,
            result_shape_dtypes=[jax.ShapeDtypeStruct((1,), jnp.int32)],
        )
        return jnp.sum(x)


def share_out(program: Array, tasks: Sequence[tuple[int, Callable[[Array], None]]]) -> None:
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
