"""GEMV of one or two rows with quantized matrices, in integer arithmetic: a CUDA C++ kernel.

As `triton_gemv_int8`, for GPUs from compute capability 6.1 on, which have `dp4a`.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.int8 import Int8Rows
from jaxsplit.ops.matmul import cuda_planes
from jaxsplit.ops.matmul.cuda_planes import supports
from jaxsplit.ops.tilings import tunable
from jaxsplit.quant.qtensor import QTensor

__all__ = ["FASTER", "Tiling", "gemv_int8", "is_faster", "launch_of", "supports"]

FASTER = (9.0,)
"""Compute capabilities where it was measured to be faster than the kernel in Triton for some
matrices: see `is_faster`."""

_THREADS = 128


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
        if cuda_planes.units(w) < 64:
            return Tiling(32, rows=4, steps=1)
        return Tiling(32, 2, 2) if w.shape[-2] >= 6144 else Tiling(64, 2, 2)


def _candidates(
    x: Int8Rows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    experts: Array | None = None,
) -> list[Tiling]:
    if experts is not None:
        return []
    shapes = itertools.product((32, 64, 128), (1, 2, 4), (1, 2))
    return [Tiling(lanes, rows, steps) for lanes, rows, steps in shapes]


def is_faster(w: QTensor) -> bool:
    """Whether it is faster than the kernel in Triton on those GPUs, launches included
    (docs/design/kernels.md)."""
    looked_up = w.layout.table is not None
    two_bits, eight_bits = w.layout.bits[0] == 2, w.layout.bits[0] == 8
    return eight_bits or (looked_up and (two_bits or w.layout.shift == 0))


@tunable(_candidates)
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
      tiling: None: a tuned one, or `Tiling.of` each matrix.
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
    weights = [cuda_planes.as_loaded(w) for w in weights]
    tilings = [tiling or Tiling.of(w) for w in weights]
    given = Arguments()
    squares = None if x.rms is None else x.rms.squares
    body = f"  Activations x = {given.operands(x.codes, x.scale, x.sums, x.half_sums, squares)};\n"
    body += "  int program = blockIdx.x, pair = blockIdx.y;\n"
    if experts is None:
        body += "  int row = 0;\n  long expert = 0;\n"
    else:
        body += f"  int row = pair / {pairs // rows};\n"
        body += f"  long expert = {given.operand(experts)}[pair];\n"

    def call(i: int) -> str:
        t, at_once = tilings[i], rows if experts is None else 1
        tile = f"W{i}, {at_once}, {t.lanes}, {t.rows}, {t.steps}"
        of_expert = f"expert * {weights[i].shape[-2]}L"
        result = given.result(jax.ShapeDtypeStruct((pairs, weights[i].shape[-2]), dtype))
        return f"multiply<{tile}>(w, x, {of_expert}, row, program, {result}, pair)"

    blocks = [
        -(-w.shape[-2] // (_THREADS // t.lanes * t.rows))
        for w, t in zip(weights, tilings, strict=True)
    ]
    structs, products = cuda_planes.launched(weights, blocks, given, call)
    return given.launch(
        "gemv_int8",
        cuda_rows.FOLDER / "cuda_int8.cuh",
        constants(cuda_rows.normalization(x.rms)),
        cuda_planes.FILE,
        cuda_planes.FOLDER / "cuda_gemv_int8.cu",
        *structs,
        body=body + products,
        grid=(sum(blocks), 1 if experts is None else pairs, 1),
        threads=_THREADS,
    )
