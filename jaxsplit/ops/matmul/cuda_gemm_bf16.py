"""GEMM of rows in 16 bits with quantized matrices, on tensor cores: a CUDA C++ kernel.

Weights are dequantized in registers, to the dtype of the activations, and multiplied from there:
for GPUs from compute capability 8.0 on, and on 9.0 with products of warpgroups.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.limits import shared_kib
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations import cuda_rows, swizzled
from jaxsplit.ops.activations.swizzled import SwizzledRows
from jaxsplit.ops.matmul import cuda_planes
from jaxsplit.ops.matmul.groups import GroupedGemmInfo
from jaxsplit.ops.tilings import tunable
from jaxsplit.quant.qtensor import QTensor

MAX_GROUP_ROWS = 256
"""Of a group, at most."""

FASTER = (9.0,)
"""Compute capabilities where it was measured to be faster than dequantizing a matrix first, up to
`max_rows`, and than a kernel in Triton, from `faster_from` on."""

MIN_CAPABILITY = 8.0
"""With tensor cores for bfloat16, and copies to shared memory that do not wait."""

_WARPGROUPS = 9.0
"""Compute capability with products of warpgroups."""

_TILE = 16  # rows of a matrix, of a warp
_BATCH = 2  # slices of 16 columns that are multiplied at a time
_MAX_TILE = 128  # rows of activations, of two blocks on a multiprocessor
_MAX_ALONE = 256  # the same of one block
_ROUND = 64  # bytes of a row
_MANY_BLOCKS = 256  # with half as many or fewer, split-K adds parts to keep the GPU busy
_FEW_OUTPUTS = 8192  # of matrices; half as many blocks as multiprocessors
_MANY_DEEP_BLOCKS = 128  # the same, where a multiprocessor has one block with all stages
_FEW_ROWS = 32  # whose rounds end so soon that several must be under way
_MIN_ROUNDS = 4  # of a part
_MULTIPROCESSORS = 132  # of an H100
# Of a row of activations on a multiprocessor, measured: rounds that cost as much as the rest of a
# block, and the time of a round; for two blocks on it, and for one of 256 rows.
_PAIRED_MICROS = 2.0, 0.0074
_ALONE_MICROS = 10.0, 0.0054
_PART_MICROS = 2e-6  # of a result, which is written and read
_RESERVED = 2048  # bytes of shared memory, for the runtime and for normalizations

_REGISTERS = 65_536  # of a multiprocessor
_OTHER_REGISTERS = 64  # of a thread, beside sums


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a launch is divided.

    Attributes:
      warps: of a block, each with 16 rows of a matrix.
      rows: of activations, of a block.
      stages: rounds in shared memory: one is multiplied while others are copied.
    """

    warps: int
    rows: int
    stages: int

    def shared_bytes(self, weights: Sequence[QTensor]) -> int:
        """Bytes of shared memory."""
        slab = 4 * min(self.rows, 32) * (_TILE * self.warps + 4)  # of results
        return max(slab, *(self._bytes(w) for w in weights))

    def _bytes(self, w: QTensor) -> int:
        tiles = 8 // w.layout.bits[0]
        codes = self.warps * _pieces(w) * (16 * _TILE + 32)
        stage = -(-(tiles * 2 * swizzled.COLUMNS * self.rows + codes) // 1024) * 1024
        planes = [w.scale, w.minimum, w.super_scale, w.super_minimum]
        scales = sum(self._plane_bytes(w, plane) for plane in planes if plane is not None)
        return self.stages * stage + self.warps * scales

    def _plane_bytes(self, w: QTensor, plane: Array) -> int:
        """Of a warp's rows of a plane of scales: see `GroupPlane`."""
        columns, of_row = w.shape[-1], plane.shape[-1] * plane.dtype.itemsize
        of_round = swizzled.COLUMNS * 8 // w.layout.bits[0]  # columns
        least = next(size for size in (16, 8, 4, 2) if of_row % size == 0)
        step = max(least, of_round * of_row // columns)
        unit = max(least, 4)
        copies = step // unit if least >= 4 else 1 if step == 2 else step // 4 + 1
        places = -(-max(1, self.stages - 2) // (step * columns // of_row // of_round)) + 1
        return places * _TILE * copies * unit

    def blocks(self, weights: Sequence[QTensor], capability: float) -> int:
        """That a multiprocessor can run at a time."""
        threads = 32 * self.warps
        of_registers = _REGISTERS // (threads * (self.rows // 2 + _OTHER_REGISTERS))
        of_memory = 1024 * shared_kib(capability) // (self.shared_bytes(weights) + 1024)
        return max(1, min(of_registers, of_memory))

    def fits(self, weights: Sequence[QTensor], capability: float) -> bool:
        """Whether a GPU of a compute capability has the memory and registers for a block."""
        registers = 32 * self.warps * (self.rows // 2 + _OTHER_REGISTERS)
        memory = self.shared_bytes(weights)
        return registers <= _REGISTERS and memory <= 1024 * shared_kib(capability) - _RESERVED

    @staticmethod
    def of(
        weights: Sequence[QTensor], rows: int, capability: float, *, deep: bool = False
    ) -> "Tiling":
        """The fewest tiles of rows that leave shared memory for two stages; for few rows, or if it
        is to be `deep`, for four."""
        tiles = -(-rows // _MAX_TILE)
        while True:
            height = -(-rows // (8 * tiles)) * 8
            for stages in (4, 3, 2) if deep or height <= _FEW_ROWS else (2,):
                tiling = Tiling(8, height, stages)
                if tiling.fits(weights, capability):
                    return tiling
            tiles *= 2


def _pieces(w: QTensor) -> int:
    """Of 16 bytes, of a row of the matrix in a round: see `Round`."""
    first, *second = [cuda_planes.chunk(w) * bits // 8 for bits in w.layout.bits]
    return (_ROUND + sum(second) * max(1, _ROUND // first)) // 16


def supports(w: QTensor, dtype: jnp.dtype) -> bool:
    """Whether the kernel can multiply rows of a dtype with a matrix."""
    if dtype not in (jnp.bfloat16, jnp.float16) or not cuda_planes.supports(w):
        return False
    first, *second = [cuda_planes.chunk(w) * bits // 8 for bits in w.layout.bits]
    columns = swizzled.COLUMNS if first < _ROUND and not second else _ROUND * 8 // w.layout.bits[0]
    rounds = w.shape[-1] % columns == 0
    chunks = first in (16, 32) or first % _ROUND == 0
    whole = all(size * max(1, _ROUND // first) % 16 == 0 for size in second)
    group = cuda_planes.group(w)
    spans = group in (16, 32) or group % swizzled.COLUMNS == 0
    return rounds and chunks and whole and spans


def max_rows(capability: float) -> int:
    """Beyond, a dequantized matrix costs less than it saves (docs/design/kernels.md)."""
    return 512 if capability in FASTER else 256


def faster_from(w: QTensor) -> int:
    """The fewest rows for which it is faster than `small_m_gemm` on those GPUs
    (docs/design/kernels.md)."""
    return 65 if w.layout.bits[0] == 8 else 33


def _candidates(
    x: SwizzledRows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    groups: GroupedGemmInfo | None = None,
    out_rows: int = 0,
    split_k: int | None = None,
    sum_parts: bool = True,
) -> list[Tiling]:
    if groups is not None:
        return []
    rows, capability = x.values.shape[1], current_context().policy.cuda
    weights = [cuda_planes.as_loaded(w) for w in weights]
    heights = {-(-rows // (8 * tiles)) * 8 for tiles in (1, 2, 4, 8)}
    shapes = itertools.product((4, 8), sorted(h for h in heights if h <= _MAX_TILE), (2, 3, 4))
    tilings = [Tiling(warps, height, stages) for warps, height, stages in shapes]
    return [t for t in tilings if t.fits(weights, capability)]


@tunable(_candidates)
def gemm_bf16(
    x: SwizzledRows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    groups: GroupedGemmInfo | None = None,
    out_rows: int = 0,
    tiling: Tiling | None = None,
    split_k: int | None = None,
    sum_parts: bool = True,
) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: supported matrices `[out, in]`.
      dtype: of the results.
      groups: the weights are stacks `[matrices, out, in]`, multiplied with these groups of rows: 8
        times a power of 2 each.
      out_rows: with groups, the number of rows of the results.
      tiling: None: a tuned one, or `Tiling.of` the matrices.
      split_k: parts of the inner dimension. None: as many as keep the GPU busy, but 1 if they are
        to be summed.
      sum_parts: XLA sums the parts; else the results are float32 `[parts, rows, out]`.
    """
    split_k = 1 if split_k is None and sum_parts else split_k
    part_dtype = dtype if sum_parts and split_k == 1 else jnp.float32
    capability = current_context().policy.cuda
    more = {"groups": groups, "out_rows": out_rows, "tiling": tiling, "split_k": split_k}
    launch = launch_of(x, weights, part_dtype, capability, **more)
    ys = cuda_call(launch, capability=capability)
    if not sum_parts:
        return ys
    return [y[0] if split_k == 1 else jnp.sum(y, axis=0).astype(dtype) for y in ys]


def launch_of(
    x: SwizzledRows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    capability: float,
    *,
    groups: GroupedGemmInfo | None = None,
    out_rows: int = 0,
    tiling: Tiling | None = None,
    split_k: int | None = None,
) -> Launch:
    """The launch for a GPU of some compute capability, other arguments as of `gemm_bf16`; its
    results are `[parts, rows, out]` of a dtype."""
    rows = x.values.shape[1]
    weights = [cuda_planes.as_loaded(w) for w in weights]
    height = rows if groups is None else groups.x_row.shape[1]
    warpgroups = capability == _WARPGROUPS
    # With bulk copies, few blocks had better be deep than many.
    deep = warpgroups and groups is None and sum(w.shape[-2] for w in weights) <= _FEW_OUTPUTS
    if warpgroups and groups is None and tiling is None and rows > _MAX_ALONE:
        tiling, split_k = _of_many_rows(weights, rows, split_k)
    tiling = tiling or Tiling.of(weights, height, capability, deep=deep)
    blocks = [-(-w.shape[-2] // (_TILE * tiling.warps)) for w in weights]
    given = Arguments()
    squares = None if x.rms is None else x.rms.squares
    body = f"  Activations x = {given.operands(x.values, squares)};\n"
    if groups is None:
        tiles, result_rows = -(-rows // tiling.rows), rows
        many = _MANY_DEEP_BLOCKS if deep else _MANY_BLOCKS
        parts = split_k or _parts(sum(blocks) * tiles, _rounds(weights), many)
        body += "  Neighbors rows;\n"
    else:
        tiles, result_rows = len(groups.matrix) * (height // tiling.rows), out_rows
        parts = 1
        arrays = groups.matrix, groups.start, groups.stop, groups.x_row, groups.count
        body += f"  Group rows = {given.operands(*arrays)};\n"
        body += "  if (!rows.exists()) return;\n"
    body += "  int program = blockIdx.x, part = blockIdx.y;\n"

    def call(i: int) -> str:
        shape = parts, result_rows, weights[i].shape[-2]
        result = given.result(jax.ShapeDtypeStruct(shape, dtype))
        return f"multiply<W{i}, {tiling.stages}>(w, x, rows, program, part, {result})"

    structs, products = cuda_planes.launched(weights, blocks, given, call)
    element = cpp_type(x.values.dtype)
    sizes = {
        "ROWS": rows,
        "RESULTS": result_rows,
        "GROUP": tiling.rows if groups is None else height,
        "TILE": tiling.rows,
        "BATCH": _BATCH,
        "PARTS": parts,
        "WARPS": tiling.warps,
        "SHARED": tiling.shared_bytes(weights),
        "FACTORS": tiling.rows,
        **cuda_rows.normalization(x.rms),
    }
    return given.launch(
        "gemm_bf16",
        "#define WARPGROUPS\n" if warpgroups else "",
        constants(sizes) + f"typedef {element} X;\n",
        cuda_planes.FOLDER / "cuda_factors.cuh",
        cuda_planes.FILE,
        cuda_planes.FOLDER / "cuda_gemm_bf16.cu",
        *structs,
        body=body + products,
        grid=(sum(blocks), parts, tiles),
        threads=32 * tiling.warps,
        blocks=tiling.blocks(weights, capability),
        shared_bytes=tiling.shared_bytes(weights),
        device=_products_of_warpgroups(element, tiling.rows) if warpgroups else "",
    )


def _rounds(weights: Sequence[QTensor]) -> int:
    return max(w.shape[-1] * w.layout.bits[0] // 8 // _ROUND for w in weights)


def _of_many_rows(weights: Sequence[QTensor], rows: int, split_k: int | None) -> tuple[Tiling, int]:
    """A tiling and parts of the inner dimension on Hopper, for rows of several tiles: two
    blocks of low tiles on a multiprocessor, or one of a high one. Which takes less time depends on
    how they divide into multiprocessors."""
    rounds, outputs = _rounds(weights), sum(w.shape[-2] for w in weights)
    most = max(1, rounds // _MIN_ROUNDS)
    counts = [1 << i for i in range(most.bit_length())] if split_k is None else [split_k]
    choices = []
    for limit, parts in itertools.product((_MAX_TILE, _MAX_ALONE), counts):
        tiles = -(-rows // limit)
        tiling = Tiling(8, -(-rows // (8 * tiles)) * 8, 2)
        if not tiling.fits(weights, _WARPGROUPS):
            continue
        blocks = parts * tiles * sum(-(-w.shape[-2] // (_TILE * tiling.warps)) for w in weights)
        fixed, each = _PAIRED_MICROS
        if limit == _MAX_ALONE or blocks <= _MULTIPROCESSORS:
            fixed, each = _ALONE_MICROS
            each *= 1 + ((_MAX_ALONE - tiling.rows) / 160) ** 2
        waves = -(-blocks // _MULTIPROCESSORS)
        micros = waves * tiling.rows * each * (rounds / parts + fixed)
        if parts > 1:
            micros += parts * rows * outputs * _PART_MICROS
        choices.append((micros, parts, tiling))
    _, parts, tiling = min(choices, key=lambda choice: choice[:2])
    return tiling, parts


def _parts(blocks: int, rounds: int, many: int) -> int:
    """Of the inner dimension: a power of 2."""
    most = min(many // blocks, rounds // _MIN_ROUNDS)
    return 1 << max(0, most.bit_length() - 1)


def _products_of_warpgroups(element: str, columns: int) -> str:
    """Declares `multiply_add_columns`: as `multiply_add`, for columns in shared memory. The
    instruction names all of its registers."""
    count, kind = columns // 2, {"Bfloat16": "bf16", "Half": "f16"}[element]
    sums = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(y[{i}])' for i in range(count))
    return f"""
struct {element};
template <class T, int COLUMNS>
__device__ void multiply_add_columns(float* y, const u32* a, unsigned long long columns);

template <>
__device__ __forceinline__ void multiply_add_columns<{element}, {columns}>(
    float* y, const u32* a, unsigned long long columns) {{
  asm volatile(
      "{{ .reg .pred add; setp.ne.b32 add, %{count + 5}, 0;"
      "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{sums}}}, "
      "{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, add, 1, 1, 0; }}"
      : {outputs}
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "r"(1));
}}
"""
