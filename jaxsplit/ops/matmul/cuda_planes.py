"""Quantized matrices as kernels in CUDA C++ read them."""

import functools
import importlib.resources
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.cuda.source import Arguments, constants, cpp_type, dispatch
from jaxsplit.ops.activations.int8 import SLICE
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.quant.qtensor import QTensor, to_u32
from jaxsplit.quant.scale_codes import (
    above_shift,
    e8m0,
    half_steps,
    odd,
    signed_4,
    signed_odd,
    ue4m3,
)

FOLDER = importlib.resources.files("jaxsplit") / "ops" / "matmul"
FILE = FOLDER / "cuda_planes.cuh"


_DECODED: dict[Callable[..., Array] | None, str] = {
    None: "{value}",
    e8m0: "e8m0(raw)",
    ue4m3: "ue4m3(raw)",
    half_steps: "half_steps(raw, {step!r}f)",
    signed_odd: "signed_odd(raw)",
    signed_4: "signed_4(raw)",
    above_shift: "{value} >> 1",
    odd: "{value} | 1",
}
"""What a stored scale `raw` encodes in C++, given its `value`; by what decodes it in Python."""

_MAX_TABLE = 64
"""Entries, of which `look_up` picks."""


def _scale_value(w: QTensor) -> str | None:
    """The expression for what a stored scale encodes; None: there is none."""
    decode, step = w.layout.decode_scale, 0.0
    if isinstance(decode, functools.partial):
        decode, step = decode.func, float(decode.keywords["step"])
    form = _DECODED.get(decode)
    value = f"Raw<{cpp_type(w.scale.dtype)}>::value(raw)"
    return form and form.format(value=value, step=step)


def supports(w: QTensor) -> bool:
    """Whether kernels in CUDA C++ can multiply with a matrix, or a stack."""
    layout = w.layout
    known = len(layout.table or ()) <= _MAX_TABLE and _scale_value(w) is not None
    first, *more = [chunk(w) * bits // 8 for bits in layout.bits]  # bytes of a chunk
    planes = len(more) <= 1 and all(
        size % (4 if first <= 2 * SLICE else SLICE) == 0 for size in more
    )
    offset = layout.offset == 0 or layout.bits != (8,)
    columns = w.shape[-1]
    groups = w.scale.shape[-1] * 8 // layout.scale_bits
    group = columns // groups if columns % groups == 0 else 0
    whole = group == SLICE or (group > 0 and group % BLOCK == 0)
    return known and first % SLICE == 0 and planes and offset and whole and columns % BLOCK == 0


def chunk(w: QTensor) -> int:
    """Weights that are packed together; of a trellis, in 16 bytes."""
    return w.layout.chunk * (8 if w.layout.trellis else 1)


def group(w: QTensor) -> int:
    """Weights that share a scale."""
    return w.shape[-1] * w.layout.scale_bits // 8 // w.scale.shape[-1]


def has_minima(w: QTensor) -> bool:
    """Whether groups have minima: stored ones, or those that shifts and fractional offsets make."""
    return w.minimum is not None or w.layout.shift > 0 or w.layout.offset % 1 > 0


def as_loaded(w: QTensor) -> QTensor:
    """With the code planes in words."""
    return w if w.codes[0].dtype == jnp.uint32 else to_u32(w)


def _chunk_bytes(w: QTensor) -> int:
    """Of the first plane."""
    return chunk(w) * w.layout.bits[0] // 8


def units(w: QTensor) -> int:
    """Units of a row; as in `Unit`."""
    return w.shape[-1] // chunk(w) * max(1, _chunk_bytes(w) // unit_bytes(w))


def unit_bytes(w: QTensor) -> int:
    """Bytes of a unit in the first plane; as in `Unit`."""
    size = _chunk_bytes(w)
    return size if size <= 2 * SLICE else SLICE


def segments(w: QTensor) -> int:
    """Scales of a unit; as in `Unit`."""
    size = unit_bytes(w)
    slices = size * 8 // w.layout.bits[0] // SLICE
    blocks = size == _chunk_bytes(w) and group(w) >= BLOCK
    return slices // 2 if blocks else slices


def struct_of(name: str, w: QTensor) -> str:
    """A matrix as `Unit` takes it: a type with its constants and pointers."""
    layout, columns = w.layout, w.shape[-1]
    scale = cpp_type(w.scale.dtype)
    minimum = scale if w.minimum is None else cpp_type(w.minimum.dtype)
    outer = "float" if w.super_scale is None else cpp_type(w.super_scale.dtype)
    table = layout.table or ()
    words = np.pad(np.array(table, np.int8), (0, _MAX_TABLE - len(table))).view("<u4")
    sizes = {
        "OUT": w.shape[-2],
        "COLUMNS": columns,
        "CHUNK": chunk(w),
        "BITS0": layout.bits[0],
        "BITS1": layout.bits[1] if len(layout.bits) > 1 else 0,
        "OFFSET": int(layout.offset),
        "FRACTION": float(layout.offset % 1),
        "SHIFT": layout.shift,
        "TABLE": len(table),
        "TRELLIS": layout.chunk if layout.trellis else 0,
        "SCALE_BITS": layout.scale_bits,
        "GROUP": group(w),
        "SUPER": 0 if w.super_scale is None else columns // w.super_scale.shape[-1],
        "MINIMUM": int(w.minimum is not None),
    }
    return (
        f"struct {name} {{\n{constants(sizes, '  static ')}"
        f"  static constexpr u32 TABLE_WORDS[] = {{{', '.join(f'{word}u' for word in words)}}};\n"
        f"  typedef {scale} Scale;\n  typedef {minimum} Minimum;\n  typedef {outer} Super;\n"
        f"  __device__ static auto scale_value(u32 raw) {{ return {_scale_value(w)}; }}\n"
        f"  const u32 *first, *second;\n  const Scale* scale;\n  const Minimum* minimum;\n"
        "  const Super *super_scale, *super_minimum;\n};\n"
    )


def launched(
    weights: Sequence[QTensor],
    blocks: Sequence[int],
    given: Arguments,
    call: Callable[[int], str],
) -> tuple[list[str], str]:
    """C++ types of the matrices of a launch, and statements that send each block of threads to its
    matrix: it works on `w`, as block `program` of this matrix.

    Args:
      weights: the matrices, with their planes in words.
      blocks: of threads, for each.
      given: the launch's arrays.
      call: what is called, given a matrix's number: its type is `W` and that number.
    """
    types = [struct_of(f"W{i}", w) for i, w in enumerate(weights)]
    calls = [f"W{i} w = {_pointers(w, given)};\n    {call(i)}" for i, w in enumerate(weights)]
    return types, dispatch(list(zip(blocks, calls, strict=True)))


def _pointers(w: QTensor, given: Arguments) -> str:
    """What initializes the type of a matrix."""
    planes = [*w.codes, *[None] * (2 - len(w.codes)), w.scale, w.minimum, w.super_scale]
    outer = w.super_scale if w.super_minimum is None else w.super_minimum
    return given.operands(*planes, outer)
