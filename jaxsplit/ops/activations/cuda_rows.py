"""A kernel in CUDA C++ between two matmuls: as `triton_rows`, for rows in 8 bits."""

import importlib.resources
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.expression import expression
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations.int8 import Int8BlockLayout, Int8Layout
from jaxsplit.ops.activations.layout import (
    ActivationLayout,
    Addend,
    Readers,
    RMSStatistics,
    wrap_layouts,
)
from jaxsplit.ops.activations.swizzled import SwizzledLayout

_THREADS = 128
_WIDTH = 4 * _THREADS
"""Elements of a block."""

_STRUCTS: dict[type[ActivationLayout], str] = {
    Int8Layout: "Int8Rows",
    Int8BlockLayout: "Int8Blocks",
    SwizzledLayout: "Swizzled",
}
"""What stores rows in a layout; of `FILES`."""

FOLDER = importlib.resources.files("jaxsplit") / "ops" / "activations"
FILES = FOLDER / "cuda_int8.cuh", FOLDER / "cuda_swizzled.cuh"


def supports(readers: Readers) -> bool:
    """Whether kernels store rows for some readers."""
    return len(readers.layouts) == 1 and type(readers.layouts[0]) in _STRUCTS


def declare_out(readers: Readers, given: Arguments, rows: int, columns: int) -> str:
    """Declares `out`, which stores rows for supported readers."""
    [layout] = readers.layouts
    shapes = layout.shapes(rows, columns)
    return f"  {_STRUCTS[type(layout)]} out = {given.results(*shapes)};\n"


def normalization(rms: RMSStatistics | None) -> dict[str, float]:
    """What results are left to be divided by, as constants of a kernel."""
    if rms is None:
        return {"RMS_PARTS": 0, "RMS_SIZE": 1, "RMS_EPSILON": 0.0}
    parts = rms.squares.shape[1]
    return {"RMS_PARTS": parts, "RMS_SIZE": rms.size, "RMS_EPSILON": rms.epsilon}


def store_rows(
    function: Callable[..., Array],
    operands: Sequence[Array],
    readers: Readers,
    *,
    addend: Addend | None = None,
    bias: Array | None = None,
    norm: tuple[float, int] | None = None,
) -> tuple[tuple[Any, ...], RMSStatistics | None, Array]:
    """As `triton_rows.store_rows`, without peers."""
    launch = launch_of(function, operands, readers, addend=addend, bias=bias, norm=norm)
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
    addend: Addend | None = None,
    bias: Array | None = None,
    norm: tuple[float, int] | None = None,
) -> Launch:
    """The launch, arguments as of `store_rows`."""
    assert supports(readers)
    first, columns = operands[0], operands[0].shape[-1]
    rows, programs = math.prod(first.shape[:-1]), -(-columns // _WIDTH)
    lines = expression(function, [f"x{i}" for i in range(len(operands))])
    if lines is None:  # XLA computes it
        assert addend is None
        assert norm is None
        operands, lines = (function(*operands).astype(jnp.float32),), ["return x0;"]
    vectors = operands if bias is None else (*operands, bias)
    given = [x if x.ndim == 1 else x.reshape(rows, -1) for x in vectors]
    parts = None
    if addend is not None:
        parts, epochs, peers = addend
        assert epochs is None
        assert peers is None
        parts = parts.reshape(-1, rows, columns).astype(jnp.float32)
    places = [_place(x, columns) for x in given]
    fields = "".join(f"  const {cpp_type(x.dtype)}* p{i};\n" for i, x in enumerate(given))
    loads = [f"float x{i} = load(p{i} + {places[i]});" for i in range(1, len(operands))]
    first_value = f"load(p0 + {places[0]})"
    if bias is not None:
        first_value += f" + load(p{len(operands)} + {places[-1]})"
    structure = (
        f"typedef {cpp_type(given[0].dtype)} First;\n"
        f"struct Operands {{\n{fields}"
        "  __device__ float first(int row, int column) const {\n"
        f"    return {first_value};\n  }}\n"
        "  __device__ float function(float x0, int row, int column) const {\n    "
        + "\n    ".join([*loads, *lines])
        + "\n  }\n};\n"
    )
    sizes = {
        "ROWS": rows,
        "COLUMNS": columns,
        "ADDENDS": 0 if parts is None else len(parts),
        "SQUARES": int(norm is not None),
        "PROGRAMS": programs,
    }
    arrays = Arguments()
    body = f"  Operands operands = {arrays.operands(*given)};\n"
    body += declare_out(readers, arrays, rows, columns)
    squares = norm and jax.ShapeDtypeStruct((rows, programs), jnp.float32)
    total = None if parts is None else jax.ShapeDtypeStruct((rows, columns), first.dtype)
    out = f"out, {arrays.result(squares)}, {arrays.result(total)}"
    body += f"  store_row(operands, {arrays.operand(parts)}, {out});\n"
    return arrays.launch(
        "store_rows",
        *FILES,
        constants(sizes),
        structure,
        FOLDER / "cuda_rows.cu",
        body=body,
        grid=(rows, programs, 1),
        threads=_THREADS,
    )


def _place(x: Array, columns: int) -> str:
    """The index of an operand's element: `[in]`, `[rows, 1]` or `[rows, in]`."""
    if x.ndim == 1:
        return "column"
    return "row" if x.shape[-1] == 1 != columns else f"(long)row * {columns} + column"
