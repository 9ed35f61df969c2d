"""Launches CUDA C++ kernels inside `jax.jit` and `shard_map`."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from jaxsplit.cuda.nvrtc import compile_ptx

_TARGET = "__gpu$xla.gpu.ptx"
"""XLA's custom call of a kernel in PTX, which it launches like one of its own: in CUDA graphs, too,
and without a function of another library."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and its launch.

    Attributes:
      name: of the function, and of its file in errors.
      source: CUDA C++. The function takes a pointer to each operand, then to each result.
      grid: number of blocks in x, y and z.
      threads: of a block.
    """

    name: str
    source: str
    grid: tuple[int, int, int]
    threads: int


def cuda_call(
    kernel: Kernel,
    operands: Sequence[Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    capability: float,
) -> list[Array]:
    """The results of a kernel, which is compiled while it is traced.

    Args:
      kernel: what to launch.
      operands: arrays, which the kernel finds in row-major order.
      results: shapes and dtypes.
      capability: compute capability of the GPUs.

    Raises:
      JaxsplitError: it cannot be compiled.
    """
    first = len(operands)
    return jax.ffi.ffi_call(_TARGET, [*results])(
        *operands,
        name=kernel.name,
        kernel_type="ptx",
        kernel_data=compile_ptx(kernel.source, capability, f"{kernel.name}.cu"),
        output_indices=np.arange(first, first + len(results), dtype=np.int32),
        shared_mem_bytes=np.int32(0),
        **_sizes("grid", kernel.grid),
        **_sizes("block", (kernel.threads, 1, 1)),
    )


def _sizes(name: str, sizes: Sequence[int]) -> dict[str, np.int32]:
    return {f"{name}_{axis}": np.int32(size) for axis, size in zip("xyz", sizes, strict=True)}
