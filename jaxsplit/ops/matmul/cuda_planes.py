"""Quantized matrices as kernels in CUDA C++ read them."""

import importlib.resources
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations.int8 import SLICE
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.quant import TYPES
from jaxsplit.quant.qtensor import QTensor, to_u32

FOLDER = importlib.resources.files("jaxsplit") / "ops" / "matmul"
FILE = FOLDER / "cuda_planes.cuh"


def _scale_decoder(kind: str) -> Callable[[Array], Array] | None:
    layout = TYPES[kind].layout
    assert layout is not None
    return layout.decode_scale


_DECODED = {None: "", _scale_decoder("MXFP4"): "E8m0", _scale_decoder("NVFP4"): "Ue4m3"}
"""Types of `types.cuh` that decode scales, by what does in Python."""

_MAX_TABLE = 16
"""Entries, which bytes of four words are picked from."""


def supports(w: QTensor) -> bool:
    """Whether kernels in CUDA C++ can multiply with a matrix, or a stack."""
    layout = w.layout
    known = len(layout.table or ()) <= _MAX_TABLE and not layout.shift and not layout.trellis
    affine = known and layout.decode_scale in _DECODED and layout.scale_bits == 8
    first, *more = [layout.chunk * bits // 8 for bits in layout.bits]  # bytes of a chunk
    planes = len(more) <= 1 and all(
        size % (4 if first <= 2 * SLICE else SLICE) == 0 for size in more
    )
    offset = layout.offset == int(layout.offset) and (layout.offset == 0 or layout.bits != (8,))
    columns, groups = w.shape[-1], w.scale.shape[-1]
    group = columns // groups if columns % groups == 0 else 0
    whole = group == SLICE or (group > 0 and group % BLOCK == 0)
    return affine and first % SLICE == 0 and planes and offset and whole and columns % BLOCK == 0


def as_loaded(w: QTensor) -> QTensor:
    """With the code planes in words."""
    return w if w.codes[0].dtype == jnp.uint32 else to_u32(w)


def _chunk_bytes(w: QTensor) -> int:
    """Of the first plane."""
    return w.layout.chunk * w.layout.bits[0] // 8


def units(w: QTensor) -> int:
    """Units of a row; as in `Unit`."""
    return w.shape[-1] // w.layout.chunk * max(1, _chunk_bytes(w) // unit_bytes(w))


def unit_bytes(w: QTensor) -> int:
    """Bytes of a unit in the first plane; as in `Unit`."""
    size = _chunk_bytes(w)
    return size if size <= 2 * SLICE else SLICE


def segments(w: QTensor) -> int:
    """Scales of a unit; as in `Unit`."""
    size = unit_bytes(w)
    slices = size * 8 // w.layout.bits[0] // SLICE
    blocks = size == _chunk_bytes(w) and w.shape[-1] // w.scale.shape[-1] >= BLOCK
    return slices // 2 if blocks else slices


def struct_of(name: str, w: QTensor) -> str:
    """A matrix as `Unit` takes it: a type with its constants and pointers."""
    layout, columns = w.layout, w.shape[-1]
    scale = cpp_type(w.scale.dtype)
    minimum, outer = (
        scale if plane is None else cpp_type(plane.dtype) for plane in (w.minimum, w.super_scale)
    )
    table = layout.table or ()
    words = np.pad(np.array(table, np.int8), (0, _MAX_TABLE - len(table))).view("<i4")
    sizes = {
        "OUT": w.shape[-2],
        "COLUMNS": columns,
        "CHUNK": layout.chunk,
        "BITS0": layout.bits[0],
        "BITS1": layout.bits[1] if len(layout.bits) > 1 else 0,
        "OFFSET": int(layout.offset),
        "TABLE": len(table),
        **{f"TABLE{i}": int(word) for i, word in enumerate(words)},
        "GROUP": columns // w.scale.shape[-1],
        "SUPER": 0 if w.super_scale is None else columns // w.super_scale.shape[-1],
        "MINIMUM": int(w.minimum is not None),
    }
    return (
        f"struct {name} {{\n{constants(sizes, '  static ')}"
        f"  typedef {_DECODED[layout.decode_scale] or scale} Scale;\n"
        f"  typedef {minimum} Minimum;\n  typedef {outer} Super;\n"
        f"  const u32 *first, *second;\n  const {scale}* scale;\n  const Minimum* minimum;\n"
        "  const Super *super_scale, *super_minimum;\n};\n"
    )


def pointers_of(w: QTensor, given: Arguments) -> str:
    """What initializes that type."""
    planes = [*w.codes, *[None] * (2 - len(w.codes)), w.scale, w.minimum, w.super_scale]
    outer = w.super_scale if w.super_minimum is None else w.super_minimum
    return given.operands(*planes, outer)
