"""Launches CUDA C++ kernels inside `jax.jit` and `shard_map`."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax import Array

from jaxsplit.cuda.nvrtc import compile_ptx

_TARGET = "__gpu$xla.gpu.ptx"
"""XLA's custom call of a kernel in PTX, which it launches like one of its own: in CUDA graphs, too,
and without a function of another library."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, its arrays, and how many threads run it.

    Attributes:
      name: of the function, and of its file in errors.
      source: CUDA C++. The function takes a pointer to each operand, then to each result.
      grid: number of blocks in x, y and z.
      threads: of a block.
      operands: arrays, which the kernel finds in row-major order.
      results: shapes and dtypes.
      aliases: results that overwrite an operand: its index to theirs.
      shared_bytes: of shared memory, beside what the source declares.
    """

    name: str
    source: str
    grid: tuple[int, ...]
    threads: int
    operands: Sequence[Array]
    results: Sequence[jax.ShapeDtypeStruct]
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)
    shared_bytes: int = 0


def cuda_call(launch: Launch, *, capability: float) -> list[Array]:
    """The results of a kernel, which is compiled while it is traced.

    Args:
      launch: the kernel and its arrays.
      capability: compute capability of the GPUs.

    Raises:
      JaxsplitError: it cannot be compiled.
    """
    first = len(launch.operands)
    outputs = np.arange(first, first + len(launch.results), dtype=np.int32)
    return list(
        jax.ffi.ffi_call(_TARGET, [*launch.results], input_output_aliases=dict(launch.aliases))(
            *launch.operands,
            name=launch.name,
            kernel_type="ptx",
            kernel_data=compile_ptx(launch.source, capability, f"{launch.name}.cu"),
            output_indices=outputs,
            shared_mem_bytes=np.int32(launch.shared_bytes),
            **_sizes("grid", launch.grid),
            **_sizes("block", (launch.threads, 1, 1)),
        )
    )


def _sizes(name: str, sizes: Sequence[int]) -> dict[str, np.int32]:
    return {f"{name}_{axis}": np.int32(size) for axis, size in zip("xyz", sizes, strict=True)}
