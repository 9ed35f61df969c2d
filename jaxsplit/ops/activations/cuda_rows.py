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
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.expression import expression
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import Readers, RMSStatistics, wrap_layouts

_THREADS = 128
_WIDTH = 4 * _THREADS
"""Elements of a block."""

FOLDER = importlib.resources.files("jaxsplit") / "ops" / "activations"


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
        parts = parts.reshape(-1, rows, columns).astype(jnp.float32)
    places = [_place(x, columns) for x in given]
    fields = "".join(f"  const {cpp_type(x.dtype)}* p{i};\n" for i, x in enumerate(given))
    loads = [f"float x{i} = load(p{i} + {at});" for i, at in enumerate(places) if i]
    structure = (
        f"typedef {cpp_type(given[0].dtype)} First;\n"
        f"struct Operands {{\n{fields}"
        "  __device__ float first(int row, int column) const {\n"
        f"    return load(p0 + {places[0]});\n  }}\n"
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
    body += f"  Int8Rows out = {arrays.results(*Int8Layout().shapes(rows, columns))};\n"
    squares = norm and jax.ShapeDtypeStruct((rows, programs), jnp.float32)
    total = None if parts is None else jax.ShapeDtypeStruct((rows, columns), first.dtype)
    out = f"out, {arrays.result(squares)}, {arrays.result(total)}"
    body += f"  store_row(operands, {arrays.operand(parts)}, {out});\n"
    return arrays.launch(
        "store_rows",
        FOLDER / "cuda_int8.cuh",
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
