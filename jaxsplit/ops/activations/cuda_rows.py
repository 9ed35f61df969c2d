"""A kernel in CUDA C++ between two matmuls: as `triton_rows`, in the layout of `Int8Rows`."""

import importlib.resources
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.comm.peers import PeerGroup
from jaxsplit.context import current_context
from jaxsplit.cuda.call import Kernel, Launch, cuda_call, source_of
from jaxsplit.cuda.expression import expression
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import Readers, RMSStatistics, wrap_layouts

_THREADS = 128
_WIDTH = 4 * _THREADS
"""Elements of a block."""

FOLDER = importlib.resources.files("jaxsplit") / "ops" / "activations"

_TYPES = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat16"}


def store_rows(
    function: Callable[..., Array],
    operands: Sequence[Array],
    readers: Readers,
    *,
    addend: tuple[Array, Array | None, PeerGroup | None] | None = None,
    norm: tuple[float, int] | None = None,
) -> tuple[tuple[Any, ...], RMSStatistics | None, Array]:
    """As `triton_rows.store_rows`, without peers."""
    launch = launch_of(function, operands, readers, addend=addend, norm=norm)
    capability = current_context().policy.cuda
    arrays = cuda_call(launch, capability=capability)
    first = operands[0]
    rows, columns = math.prod(first.shape[:-1]), first.shape[-1]
    total = arrays.pop().reshape(first.shape) if addend is not None else first
    rms = None if norm is None else RMSStatistics(arrays.pop(), *norm)
    return wrap_layouts(readers.layouts, arrays, rows, columns, rms), rms, total


def launch_of(
    function: Callable[..., Array],
    operands: Sequence[Array],
    readers: Readers,
    *,
    addend: tuple[Array, Array | None, PeerGroup | None] | None = None,
    norm: tuple[float, int] | None = None,
) -> Launch:
    """The launch, arguments as of `store_rows`."""
    assert readers.layouts == (Int8Layout(),)
    first, columns = operands[0], operands[0].shape[-1]
    rows, programs = math.prod(first.shape[:-1]), -(-columns // _WIDTH)
    lines = expression(function, [f"x{i}" for i in range(len(operands))])
    if lines is None:  # XLA computes it
        assert addend is None
        assert norm is None
        operands, lines = (function(*operands).astype(jnp.float32),), ["return x0;"]
    given = [x if x.ndim == 1 else x.reshape(rows, -1) for x in operands]
    parts = None
    if addend is not None:
        parts, epochs, peers = addend
        assert epochs is None
        assert peers is None
        parts = parts.reshape(-1, rows, columns)
    dtypes = [_TYPES[x.dtype.name] for x in given]
    parameters = [f"const {dtype}* p{i}" for i, dtype in enumerate(dtypes)]
    fields = "".join(f"  {parameter};\n" for parameter in parameters)
    loads = "".join(
        f"    float x{i} = load(p{i} + {_place(x, rows, columns)});\n"
        for i, x in enumerate(given)
        if i
    )
    body = "\n    ".join(lines)
    structure = (
        f"struct Operands {{\n{fields}"
        "  __device__ float first(int row, int column) const {\n"
        f"    return load(p0 + {_place(given[0], rows, columns)});\n  }}\n"
        "  __device__ float function(float x0, int row, int column) const {\n"
        f"{loads}    {body}\n  }}\n}};\n"
    )
    results = Int8Layout().shapes(rows, columns)
    constants = {
        "ROWS": rows,
        "COLUMNS": columns,
        "ADDENDS": 0 if parts is None else len(parts),
        "SQUARES": int(norm is not None),
        "PROGRAMS": programs,
    }
    declared = "".join(f"constexpr int {key} = {value};\n" for key, value in constants.items())
    outputs = ["u32* codes", "float* scales", "float* sums", "float* half_sums"]
    operands = [*given]
    if parts is not None:
        operands.append(parts.astype(jnp.float32))
        parameters.append("const float* parts")
    if norm is not None:
        results.append(jax.ShapeDtypeStruct((rows, programs), jnp.float32))
        outputs.append("float* squares")
    if parts is not None:
        results.append(jax.ShapeDtypeStruct((rows, columns), first.dtype))
        outputs.append("First* total")
    adds, squares = parts is not None, "0" if norm is None else "squares"
    main = (
        f'extern "C" __global__ void __launch_bounds__({_THREADS}) store_rows(\n    '
        + ", ".join([*parameters, *outputs])
        + f") {{\n  Operands operands = {{{', '.join(f'p{i}' for i in range(len(given)))}}};\n"
        + "  Int8Rows out = {codes, scales, sums, half_sums};\n"
        + f"  store_row(operands, {'parts, total' if adds else '0, 0'}, out, {squares});\n}}\n"
    )
    first_type = f"typedef {dtypes[0]} First;"
    source = source_of(
        FOLDER / "cuda_int8.cuh", first_type, declared, structure, FOLDER / "cuda_rows.cu", main
    )
    return Launch(Kernel("store_rows", source, (rows, programs, 1), _THREADS), operands, results)


def _place(x: Array, rows: int, columns: int) -> str:
    """The index of an operand's element: `[in]`, `[rows, 1]` or `[rows, in]`."""
    if x.ndim == 1:
        return "column"
    return "row" if x.shape[-1] == 1 != columns else f"(long)row * {columns} + column"
