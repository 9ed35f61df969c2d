"""Launches CUDA C++ kernels inside `jax.jit` and `shard_map`."""

import dataclasses
import importlib.resources
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable

import jax
import numpy as np
from jax import Array

from jaxsplit.cuda.nvrtc import compile_ptx

_TARGET = "__gpu$xla.gpu.ptx"
"""XLA's custom call of a kernel in PTX, which it launches like one of its own: in CUDA graphs, too,
and without a function of another library."""


_FOLDER = importlib.resources.files("jaxsplit") / "cuda"


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


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with its arrays.

    Attributes:
      kernel: what to launch.
      operands: arrays, which the kernel finds in row-major order.
      results: shapes and dtypes.
      aliases: results that overwrite an operand: its index to theirs.
    """

    kernel: Kernel
    operands: Sequence[Array]
    results: Sequence[jax.ShapeDtypeStruct]
    aliases: Mapping[int, int] = dataclasses.field(default_factory=dict)


def source_of(*parts: str | Traversable) -> str:
    """CUDA C++ after what all kernels use, from texts and files."""
    files = [_FOLDER / "device.cuh", _FOLDER / "types.cuh", *parts]
    return "\n".join(
        part if isinstance(part, str) else f'#line 1 "{part.name}"\n{part.read_text()}'
        for part in files
    )


def cuda_call(launch: Launch, *, capability: float) -> list[Array]:
    """The results of a kernel, which is compiled while it is traced.

    Args:
      launch: the kernel and its arrays.
      capability: compute capability of the GPUs.

    Raises:
      JaxsplitError: it cannot be compiled.
    """
    kernel, first = launch.kernel, len(launch.operands)
    outputs = np.arange(first, first + len(launch.results), dtype=np.int32)
    return list(
        jax.ffi.ffi_call(_TARGET, [*launch.results], input_output_aliases=dict(launch.aliases))(
            *launch.operands,
            name=kernel.name,
            kernel_type="ptx",
            kernel_data=compile_ptx(kernel.source, capability, f"{kernel.name}.cu"),
            output_indices=outputs,
            shared_mem_bytes=np.int32(0),
            **_sizes("grid", kernel.grid),
            **_sizes("block", (kernel.threads, 1, 1)),
        )
    )


def _sizes(name: str, sizes: Sequence[int]) -> dict[str, np.int32]:
    return {f"{name}_{axis}": np.int32(size) for axis, size in zip("xyz", sizes, strict=True)}
