"""GEMV of one or two rows with quantized matrices, in integer arithmetic: a CUDA C++ kernel.

As `triton_gemv_int8`, for GPUs from compute capability 6.1 on, which have `dp4a`.
"""

import dataclasses
import importlib.resources
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.int8 import SLICE, Int8Rows
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.quant.qtensor import QTensor, to_u32

THREADS = 128

_FILE = importlib.resources.files("jaxsplit") / "ops" / "matmul" / "cuda_gemv_int8.cu"


def supports(w: QTensor) -> bool:
    """Whether `gemv_int8` can multiply with a matrix, or a stack."""
    layout = w.layout
    plain = layout.table is None and layout.decode_scale is None and not layout.trellis
    outer = w.scale if w.super_scale is None else w.super_scale
    affine = plain and layout.scale_bits == 8 and outer.dtype != jnp.float32
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
    given, structs, body, blocks = Arguments(), [], "", 0
    squares = None if x.rms is None else x.rms.squares
    body += f"  Activations x = {given.operands(x.codes, x.scale, x.sums, x.half_sums, squares)};\n"
    body += "  int program = blockIdx.x, pair = blockIdx.y;\n"
    if experts is None:
        body += "  int row = 0;\n  long expert = 0;\n"
    else:
        body += f"  int row = pair / {pairs // rows};\n"
        body += f"  long expert = {given.operand(experts)}[pair];\n"
    for i, w in enumerate(weights):
        t = tiling or Tiling.of(w)
        planes = [*w.codes, *[None] * (2 - len(w.codes)), w.scale, w.minimum, w.super_scale]
        outer = w.super_scale if w.super_minimum is None else w.super_minimum
        result = given.result(jax.ShapeDtypeStruct((pairs, w.shape[-2]), dtype))
        structs.append(_struct(f"W{i}", w))
        own = -(-w.shape[-2] // (THREADS // t.lanes * t.rows))
        tile = f"W{i}, {rows if experts is None else 1}, {t.lanes}, {t.rows}, {t.steps}"
        body += (
            f"  if (program < {own}) {{\n"
            f"    W{i} w = {given.operands(*planes, outer)};\n"
            f"    multiply<{tile}>(w, x, expert * {w.shape[-2]}L, row, program, {result}, pair);\n"
            "    return;\n  }\n"
            f"  program -= {own};\n"
        )
        blocks += own
    return given.launch(
        "gemv_int8",
        cuda_rows.FOLDER / "cuda_int8.cuh",
        constants(_normalization(x)),
        _FILE,
        *structs,
        body=body,
        grid=(blocks, 1 if experts is None else pairs, 1),
        threads=THREADS,
    )


def _struct(name: str, w: QTensor) -> str:
    """A matrix as the kernel sees it."""
    layout, columns = w.layout, w.shape[-1]
    minimum = w.scale if w.minimum is None else w.minimum
    sizes = {
        "OUT": w.shape[-2],
        "COLUMNS": columns,
        "CHUNK": layout.chunk,
        "BITS0": layout.bits[0],
        "BITS1": layout.bits[1] if len(layout.bits) > 1 else 0,
        "OFFSET": int(layout.offset),
        "GROUP": columns // w.scale.shape[-1],
        "SUPER": 0 if w.super_scale is None else columns // w.super_scale.shape[-1],
        "MINIMUM": int(w.minimum is not None),
    }
    return (
        f"struct {name} {{\n{constants(sizes, '  static ')}"
        f"  typedef {cpp_type(w.scale.dtype)} Scale;\n"
        f"  typedef {cpp_type(minimum.dtype)} Minimum;\n"
        "  const u32 *first, *second;\n  const Scale* scale;\n  const Minimum* minimum;\n"
        "  const Half *super_scale, *super_minimum;\n};\n"
    )


def _normalization(x: Int8Rows) -> dict[str, float]:
    """What is left to divide by, as the kernel knows it."""
    if x.rms is None:
        return {"RMS_PARTS": 0, "RMS_SIZE": 1, "RMS_EPSILON": 0.0}
    parts = x.rms.squares.shape[1]
    return {"RMS_PARTS": parts, "RMS_SIZE": x.rms.size, "RMS_EPSILON": x.rms.epsilon}
