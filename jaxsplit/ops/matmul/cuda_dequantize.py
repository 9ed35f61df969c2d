"""Dequantizes matrices for matmuls with many rows: a CUDA C++ kernel.

As `triton_dequantize`, for GPUs from compute capability 6.1 on.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants
from jaxsplit.ops.matmul import cuda_planes
from jaxsplit.ops.matmul.cuda_planes import supports
from jaxsplit.ops.matmul.float8 import LEAST_BOUND
from jaxsplit.quant.qtensor import QTensor

__all__ = ["dequantize", "launch_of", "supports"]

_WARPS = 2  # of a block: as many blocks as a multiprocessor takes, have all of its threads
_BLOCKS = 12  # of a multiprocessor, for which registers must do


def dequantize(
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    *,
    bounds: Sequence[Array] | None = None,
    after: Array | None = None,
) -> Array:
    """Dequantizes matrices and concatenates their rows: `[sum of out, in]`. Computes in float32.

    Args:
      weights: supported matrices `[out, in]`.
      dtype: of the result: float32, float16 or bfloat16; from compute capability 8.9 on
        float8_e4m3fn, too.
      bounds: float32 `[out]` for each matrix: every row is scaled so that its bound becomes the
        largest number of `dtype`; None: no scaling.
      after: an array that XLA must compute before it launches the kernel. The kernel ignores it.
    """
    launch = launch_of(weights, dtype, bounds=bounds, after=after)
    [y] = cuda_call(launch, capability=current_context().policy.cuda)
    return y


def launch_of(
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    *,
    bounds: Sequence[Array] | None = None,
    after: Array | None = None,
) -> Launch:
    """The launch, arguments as of `dequantize`."""
    weights = [cuda_planes.as_loaded(w) for w in weights]
    rows, columns = [w.shape[0] for w in weights], weights[0].shape[1]
    given = Arguments()
    given.operand(after)
    result = given.result(jax.ShapeDtypeStruct((sum(rows), columns), dtype))

    def call(i: int) -> str:
        bound, first = given.operand(bounds[i] if bounds else None), sum(rows[:i]) * columns
        return f"dequantize_units(w, {bound}, program, {result} + {first}L)"

    units = [out * cuda_planes.units(w) for out, w in zip(rows, weights, strict=True)]
    blocks = [-(-count // (32 * _WARPS)) for count in units]
    structs, calls = cuda_planes.launched(weights, blocks, given, call)
    most = max(columns // cuda_planes.units(w) for w in weights)  # weights of a unit
    sizes = {
        "WARPS": _WARPS,
        "LARGEST": float(jnp.finfo(dtype).max),
        "LEAST_BOUND": LEAST_BOUND,
    }
    return given.launch(
        "dequantize",
        constants(sizes),
        cuda_planes.FILE,
        cuda_planes.FOLDER / "cuda_dequantize.cu",
        *structs,
        body="  int program = blockIdx.x;\n" + calls,
        grid=(sum(blocks), 1, 1),
        threads=32 * _WARPS,
        blocks=_BLOCKS,
        shared_bytes=32 * _WARPS * most * jnp.dtype(dtype).itemsize,
    )
