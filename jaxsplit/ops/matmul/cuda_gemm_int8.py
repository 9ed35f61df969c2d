"""GEMM of 3 to 64 rows with quantized matrices, on integer tensor cores: a CUDA C++ kernel.

Rows are rounded to 8 bits as for `cuda_gemv_int8`; weights are unpacked in registers into operands
of `mma`, for GPUs from compute capability 7.5 on.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.int8 import SLICE, Int8Blocks
from jaxsplit.ops.matmul import cuda_planes
from jaxsplit.ops.matmul.cuda_planes import supports
from jaxsplit.ops.tilings import tunable
from jaxsplit.quant.qtensor import QTensor

__all__ = ["MAX_ROWS", "MIN_CAPABILITY", "Tiling", "gemm_int8", "launch_of", "supports"]

MAX_ROWS = 64
"""Rows of activations whose sums a thread has in registers."""

MIN_CAPABILITY = 7.5
"""With tensor cores for 8-bit integers."""

_TILE = 16  # rows of a matrix, of an operand
_WARPS = 4  # of a block
_MIN_BLOCKS = 128  # of a matrix, for tilings that share activations
_MIN_WARPS = 1024  # with fewer, split-K adds parts to keep the GPU busy
_MAX_SCRATCH = 24576  # bytes, for tilings with several tiles: two blocks of a T4's multiprocessor
_STATIC_SHARED = 48 * 1024  # bytes that a block may declare
_FEW_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the four warps of a block share a matrix.

    Attributes:
      tiles: of 16 rows of the matrix, of a warp: the activations that it loads serve all of them.
      share: warps of a tile, each with some of its columns: 1, 2 or 4.
    """

    tiles: int
    share: int

    @property
    def rows(self) -> int:
        """Rows of the matrix of a block."""
        return _TILE * self.tiles * (_WARPS // self.share)

    def scratch(self, w: QTensor, rows: int) -> int:
        """Bytes of shared memory: units of all threads, and later sums of warps."""
        groups = cuda_planes.segments(w) * (2 if cuda_planes.has_minima(w) else 1)
        staged = cuda_planes.unit_bytes(w) + SLICE * (len(w.codes) - 1) + 4 * groups
        units = 32 * _WARPS * 2 * self.tiles * staged
        sums = 4 * _WARPS * _TILE * 8 * -(-rows // 8)
        return max(units, sums if self.share > 1 else 0)

    @staticmethod
    def of(w: QTensor, rows: int) -> "Tiling":
        """The largest tiling that leaves enough blocks, for a number of rows of activations.

        Few rows: warps share tiles, since activations cost little, and sums of warps too. Many
        rows: warps have tiles of their own, since each block loads the activations of its columns.
        """
        few = Tiling(2, 4), Tiling(1, 4)
        many = Tiling(2, 1), Tiling(1, 1), Tiling(1, 2)
        candidates = few if rows <= _FEW_ROWS else many
        for tiling in candidates[:-1]:
            enough = w.shape[-2] >= _MIN_BLOCKS * tiling.rows
            if enough and tiling.scratch(w, rows) <= _MAX_SCRATCH:
                return tiling
        return candidates[-1]


def _candidates(
    x: Int8Blocks,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    split_k: int | None = None,
    sum_parts: bool = True,
) -> list[Tiling]:
    rows = x.codes.shape[1]
    weights = [cuda_planes.as_loaded(w) for w in weights]
    tilings = [Tiling(tiles, share) for tiles in (1, 2) for share in (1, 2, 4)]
    return [t for t in tilings if all(t.scratch(w, rows) <= _STATIC_SHARED for w in weights)]


@tunable(_candidates)
def gemm_int8(
    x: Int8Blocks,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    tiling: Tiling | None = None,
    split_k: int | None = None,
    sum_parts: bool = True,
) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: supported matrices `[out, in]`.
      dtype: of the results.
      tiling: None: a tuned one, or `Tiling.of` each matrix.
      split_k: parts of the inner dimension. None: as many as keep the GPU busy, but 1 if they are
        to be summed.
      sum_parts: XLA sums the parts; else the results are float32 `[parts, rows, out]`.
    """
    split_k = 1 if split_k is None and sum_parts else split_k
    part_dtype = dtype if sum_parts and split_k == 1 else jnp.float32
    launch = launch_of(x, weights, part_dtype, tiling=tiling, split_k=split_k)
    ys = cuda_call(launch, capability=current_context().policy.cuda)
    if not sum_parts:
        return ys
    return [y[0] if split_k == 1 else jnp.sum(y, axis=0).astype(dtype) for y in ys]


def launch_of(
    x: Int8Blocks,
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    *,
    tiling: Tiling | None = None,
    split_k: int | None = None,
) -> Launch:
    """The launch, arguments as of `gemm_int8`; its results are `[parts, rows, out]` of a dtype."""
    rows = x.codes.shape[1]
    weights = [cuda_planes.as_loaded(w) for w in weights]
    tilings = [tiling or Tiling.of(w, rows) for w in weights]
    blocks = [-(-w.shape[-2] // t.rows) for w, t in zip(weights, tilings, strict=True)]
    rounds = max(-(-cuda_planes.units(w) // 4) for w in weights)
    parts = split_k or max(1, min(_MIN_WARPS // (_WARPS * sum(blocks)), rounds // _WARPS))
    given = Arguments()
    squares = None if x.rms is None else x.rms.squares
    body = f"  Activations x = {given.operands(x.codes, x.scale, x.sums, x.half_sums, squares)};\n"
    body += "  int program = blockIdx.x, part = blockIdx.y;\n"

    def call(i: int) -> str:
        t, out = tilings[i], weights[i].shape[-2]
        result = given.result(jax.ShapeDtypeStruct((parts, rows, out), dtype))
        return f"multiply<W{i}, {t.tiles}, {t.share}>(w, x, program, part, {result})"

    structs, products = cuda_planes.launched(weights, blocks, given, call)
    sizes = {
        "ROWS": rows,
        "PARTS": parts,
        "WARPS": _WARPS,
        "SCRATCH": max(t.scratch(w, rows) for w, t in zip(weights, tilings, strict=True)),
        "FACTORS": rows,
        **cuda_rows.normalization(x.rms),
    }
    return given.launch(
        "gemm_int8",
        constants(sizes),
        cuda_planes.FOLDER / "cuda_factors.cuh",
        cuda_planes.FILE,
        cuda_planes.FOLDER / "cuda_gemm_int8.cu",
        *structs,
        body=body + products,
        grid=(sum(blocks), parts, 1),
        threads=32 * _WARPS,
    )
