"""Sources of kernels: files, with the shapes and arrays of a launch written around them."""

import importlib.resources
from collections.abc import Mapping, Sequence
from importlib.resources.abc import Traversable

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cuda.call import Launch

CPP_TYPES = {
    "float32": "float",
    "float16": "Half",
    "bfloat16": "Bfloat16",
    "float8_e4m3fn": "Float8",
    "int32": "int",
    "uint32": "u32",
    "int16": "Int16",
    "int8": "Int8",
    "uint8": "u8",
}
"""Types of `types.cuh`, by dtype."""

_FOLDER = importlib.resources.files("jaxsplit") / "cuda"


def cpp_type(dtype: jnp.dtype) -> str:
    """The C++ type of an array's elements."""
    return CPP_TYPES[jnp.dtype(dtype).name]


def constants(numbers: Mapping[str, float], prefix: str = "") -> str:
    """Declarations of integers and float32 numbers."""
    lines = []
    for name, number in numbers.items():
        whole = isinstance(number, int)
        value = str(int(number)) if whole else f"{float(number)!r}f"
        lines.append(f"{prefix}constexpr {'int' if whole else 'float'} {name} = {value};\n")
    return "".join(lines)


def dispatch(calls: Sequence[tuple[int, str]]) -> str:
    """Statements that send each block of threads to its call.

    Args:
      calls: how many blocks, and what each executes as block `program` of these.
    """
    return "".join(
        f"  if (program < {blocks}) {{\n    {call};\n    return;\n  }}\n  program -= {blocks};\n"
        for blocks, call in calls
    )


class Arguments:
    """The arrays of a launch. Methods return the pointers by which a kernel refers to them, null
    for what is None."""

    def __init__(self) -> None:
        self._operands: list[Array] = []
        self._results: list[jax.ShapeDtypeStruct] = []
        self._aliases: dict[int, int] = {}

    def operand(self, array: Array | None) -> str:
        """An array that the kernel reads; the same for the same array."""
        if array is None:
            return "0"
        for i, other in enumerate(self._operands):
            if other is array:
                return f"in{i}"
        self._operands.append(array)
        return f"in{len(self._operands) - 1}"

    def operands(self, *arrays: Array | None) -> str:
        """Some pointers, as C++ initializes a struct with them."""
        return "{" + ", ".join(map(self.operand, arrays)) + "}"

    def result(self, shape: jax.ShapeDtypeStruct | None) -> str:
        """An array that it writes."""
        if shape is None:
            return "0"
        self._results.append(shape)
        return f"out{len(self._results) - 1}"

    def results(self, *shapes: jax.ShapeDtypeStruct | None) -> str:
        """Some of them, as `operands`."""
        return "{" + ", ".join(map(self.result, shapes)) + "}"

    def overwritten(self, array: Array | None) -> str:
        """An array of which it writes a part: the result takes the place of the operand."""
        if array is None:
            return "0"
        self._operands.append(array)
        name = self.result(jax.ShapeDtypeStruct(array.shape, array.dtype))
        self._aliases[len(self._operands) - 1] = len(self._results) - 1
        return name

    def launch(
        self,
        name: str,
        *parts: str | Traversable,
        body: str,
        grid: Sequence[int],
        threads: int,
        blocks: int = 1,
        shared_bytes: int = 0,
        device: str = "",
    ) -> Launch:
        """A launch with these arrays.

        Args:
          name: of the kernel.
          *parts: texts and files that come before it.
          body: its statements.
          grid: number of blocks in x, y and z.
          threads: of a block.
          blocks: that a multiprocessor should run at a time: limits registers.
          shared_bytes: of `dynamic_shared`.
          device: what it uses of the GPU beside `device.cuh`.
        """
        parameters = [f"const {cpp_type(x.dtype)}* in{i}" for i, x in enumerate(self._operands)]
        parameters += [f"{cpp_type(x.dtype)}* out{i}" for i, x in enumerate(self._results)]
        kernel = (
            f'extern "C" __global__ void __launch_bounds__({threads}, {blocks})\n{name}('
            + ", ".join(parameters)
            + f") {{\n  wait_for_inputs();\n{body}}}\n"
        )
        return Launch(
            name,
            source_of(*parts, kernel, device=device),
            tuple(grid),
            threads,
            self._operands,
            self._results,
            self._aliases,
            shared_bytes,
        )


def source_of(*parts: str | Traversable, device: str = "") -> str:
    """CUDA C++ after what all kernels use, from texts and files; `device` as for a launch."""
    shared = _FOLDER / "device.cuh", device, _FOLDER / "types.cuh"
    return "\n".join(
        part if isinstance(part, str) else f'#line 1 "{part.name}"\n{part.read_text()}'
        for part in (*shared, *parts)
    )
