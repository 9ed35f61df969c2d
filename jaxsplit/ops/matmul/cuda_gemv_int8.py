"""GEMV of one or two rows with quantized matrices, in integer arithmetic: a CUDA C++ kernel.

As `triton_gemv_int8`, for GPUs from compute capability 6.1 on, which have `dp4a`.
"""

import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Kernel, Launch, cuda_call, source_of
from jaxsplit.ops.activations.int8 import SLICE, Int8Rows
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.quant.qtensor import QTensor, to_u32

MAX_ROWS = 2

THREADS = 128

_OUTPUTS = {"float32": "float", "float16": "Half", "bfloat16": "Bfloat16"}
_SCALES = {"float16": 0, "uint8": 1, "int8": 2}
_PLANES = ("scale", "minimum", "super_scale", "super_minimum")


def supports(w: QTensor) -> bool:
    """Whether `gemv_int8` can multiply with a matrix, or a stack."""
    layout = w.layout
    affine = layout.table is None and layout.decode_scale is None and layout.scale_bits == 8
    first, *more = [layout.chunk * bits // 8 for bits in layout.bits]  # bytes of a chunk
    planes = len(more) <= 1 and all(
        size % (4 if first <= 2 * SLICE else SLICE) == 0 for size in more
    )
    offset = layout.offset == int(layout.offset) and (layout.offset == 0 or layout.bits != (8,))
    columns, groups = w.shape[-1], w.scale.shape[-1]
    whole = columns % groups == 0 and columns // groups % SLICE == 0
    return affine and first % SLICE == 0 and planes and offset and whole and columns % BLOCK == 0


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How threads share a matrix.

    Attributes:
      lanes: threads of a row, 32 to 128.
      rows: of a thread.
      steps: units of a row that a thread loads before it multiplies.
    """

    lanes: int
    rows: int
    steps: int

    @staticmethod
    def of(w: QTensor) -> "Tiling":
        """The fastest on one H200 (docs/design/kernels.md): warps of their own for many rows, which
        need not wait for one another; more threads where rows are few."""
        units = _units(w)
        if units < 64:
            return Tiling(32, rows=4, steps=1)
        return Tiling(32, 2, 2) if w.shape[-2] >= 6144 else Tiling(64, 2, 2)


def _units(w: QTensor) -> int:
    """Units of a row; as in the kernel."""
    layout = w.layout
    size = layout.chunk * layout.bits[0] // 8
    return w.shape[-1] // layout.chunk * (1 if size <= 2 * SLICE else size // SLICE)


def gemv_int8(
    x: Int8Rows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    experts: Array | None = None,
    tiling: Tiling | None = None,
) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: supported matrices `[out, in]`.
      dtype: of the results.
      experts: int32 `[pairs]`, a multiple of the rows. The weights are then stacks `[experts, out,
        in]`, each row is multiplied with the matrices of its `pairs / rows` experts, and the
        results are `[pairs, out]`.
      tiling: None: `Tiling.of` each matrix.
    """
    launch = launch_of(x, weights, dtype, experts=experts, tiling=tiling)
    return cuda_call(launch, capability=current_context().policy.cuda)


def launch_of(
    x: Int8Rows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    *,
    experts: Array | None = None,
    tiling: Tiling | None = None,
) -> Launch:
    """The launch, arguments as of `gemv_int8`."""
    rows = len(x.codes)
    pairs = rows if experts is None else len(experts)
    weights = [w if w.codes[0].dtype == jnp.uint32 else to_u32(w) for w in weights]
    operands, text = [], _Text()
    squares = None if x.rms is None else x.rms.squares
    row_arrays = x.codes, x.scale, x.sums, x.half_sums, squares
    rows_given = [text.pointer(operands, array) for array in row_arrays]
    expert_ids = text.pointer(operands, experts)
    structs, calls, blocks = [], [], 0
    for i, w in enumerate(weights):
        t = tiling or Tiling.of(w)
        planes = [*w.codes, *[None] * (2 - len(w.codes))]
        planes += [getattr(w, name) for name in _PLANES]
        if w.super_scale is not None and w.super_minimum is None:
            planes[-1] = w.super_scale
        pointers = [text.pointer(operands, plane) for plane in planes]
        structs.append(_struct(f"W{i}", w))
        own = -(-w.shape[-2] // (THREADS // t.lanes * t.rows))
        tile = f"W{i}, {rows if experts is None else 1}, {t.lanes}, {t.rows}, {t.steps}"
        calls.append(
            f"  if (program < {own}) {{\n"
            f"    W{i} w = {{{', '.join(pointers)}}};\n"
            f"    multiply<{tile}>(w, x, expert * {w.shape[-2]}L, row, program, y{i}, pair);\n"
            "    return;\n  }\n"
            f"  program -= {own};\n"
        )
        blocks += own
    output = _OUTPUTS[jnp.dtype(dtype).name]
    parameters = [*text.parameters, *(f"{output}* y{i}" for i in range(len(weights)))]
    per_row = pairs // rows
    single = experts is None
    main = (
        f'extern "C" __global__ void __launch_bounds__({THREADS}) gemv_int8(\n    '
        + ",\n    ".join(parameters)
        + ") {\n"
        f"  Activations x = {{{', '.join(rows_given)}}};\n"
        "  int program = blockIdx.x, pair = blockIdx.y;\n"
        f"  int row = {'0' if single else f'pair / {per_row}'};\n"
        f"  long expert = {'0' if single else f'{expert_ids}[pair]'};\n" + "".join(calls) + "}\n"
    )
    file = importlib.resources.files("jaxsplit") / "ops" / "matmul" / "cuda_gemv_int8.cu"
    source = source_of(_constants(x), file, *structs, main)
    grid = blocks, 1 if single else pairs, 1
    results = [jax.ShapeDtypeStruct((pairs, w.shape[-2]), dtype) for w in weights]
    return Launch(Kernel("gemv_int8", source, grid, THREADS), operands, results)


class _Text:
    """Parameters of a kernel: one for each operand."""

    _TYPES = {
        "uint32": "u32",
        "float32": "float",
        "float16": "u16",
        "uint8": "u8",
        "int8": "u8",
        "int32": "int",
    }

    def __init__(self) -> None:
        self.parameters: list[str] = []

    def pointer(self, operands: list[Array], array: Array | None) -> str:
        """The name of the parameter for an operand, which is added."""
        if array is None:
            return "0"
        for i, other in enumerate(operands):
            if other is array:
                return f"p{i}"
        name = f"p{len(operands)}"
        self.parameters.append(f"const {self._TYPES[array.dtype.name]}* {name}")
        operands.append(array)
        return name


def _struct(name: str, w: QTensor) -> str:
    """A matrix as the kernel sees it."""
    layout, columns = w.layout, w.shape[-1]

    def size(plane: Array | None) -> int:
        return 0 if plane is None else columns // plane.shape[-1]

    minimum = w.scale if w.minimum is None else w.minimum
    constants: dict[str, Any] = {
        "OUT": w.shape[-2],
        "COLUMNS": columns,
        "CHUNK": layout.chunk,
        "BITS0": layout.bits[0],
        "BITS1": layout.bits[1] if len(layout.bits) > 1 else 0,
        "OFFSET": int(layout.offset),
        "GROUP": size(w.scale),
        "SUPER": size(w.super_scale),
        "SCALE": _SCALES[w.scale.dtype.name],
        "MINIMUM_KIND": _SCALES[minimum.dtype.name],
        "MINIMUM": int(w.minimum is not None),
    }
    stored = {0: "u16", 1: "u8", 2: "u8"}
    fields = "const u32 *first, *second;\n  "
    fields += f"const {stored[constants['SCALE']]}* scale;\n  "
    fields += f"const {stored[constants['MINIMUM_KIND']]}* minimum;\n  "
    fields += "const u16 *super_scale, *super_minimum;"
    declared = (f"static constexpr int {key} = {value};" for key, value in constants.items())
    lines = "\n  ".join(declared)
    return f"struct {name} {{\n  {lines}\n  {fields}\n}};\n"


def _constants(x: Int8Rows) -> str:
    parts = 0 if x.rms is None else x.rms.squares.shape[1]
    size, epsilon = (1, 0.0) if x.rms is None else (x.rms.size, x.rms.epsilon)
    return (
        f"constexpr int RMS_PARTS = {parts}, RMS_SIZE = {size};\n"
        f"constexpr float RMS_EPSILON = {float(epsilon)!r}f;\n"
    )
