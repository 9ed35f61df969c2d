"""GEMV of a few rows with plain matrices in 16 bits: a CUDA C++ kernel.

Activations and matrices are bfloat16 or float16, and need not be alike: both become float32 in
registers. So GPUs from compute capability 6.1 on multiply them, and read each matrix once, as it is
stored.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants, dispatch
from jaxsplit.ops.matmul.cuda_planes import FOLDER

MAX_ROWS = 8

BELOW_CAPABILITY = 8.0
"""GPUs before this compute capability do not multiply bfloat16: for more than one row, XLA first
writes a matrix to memory in another type, if it or the rows are bfloat16."""

_TILE = 2  # rows of a matrix, of a warp
_STEPS = 2
_WARPS = 4
_RUN = 8  # elements of 16 bytes


def supports(w: Array, dtype: jnp.dtype) -> bool:
    """Whether `gemv_16bit` can multiply activations of a dtype with a matrix."""
    floats = jnp.bfloat16, jnp.float16
    return w.dtype in floats and dtype in floats and w.ndim == 2 and w.shape[1] % _RUN == 0


def gemv_16bit(x: Array, weights: Sequence[Array], dtype: jnp.dtype = jnp.float32) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[rows, out]`, accumulated in float32.

    Args:
      x: `[..., in]`, of up to `MAX_ROWS` rows.
      weights: supported matrices `[out, in]`.
      dtype: of the results.
    """
    return cuda_call(launch_of(x, weights, dtype), capability=current_context().policy.cuda)


def launch_of(x: Array, weights: Sequence[Array], dtype: jnp.dtype) -> Launch:
    """The launch, arguments as of `gemv_16bit`."""
    x = x.reshape(-1, x.shape[-1])
    rows, columns = x.shape
    given, calls = Arguments(), []
    activations = given.operand(x)
    for w in weights:
        outputs = w.shape[0]
        result = given.result(jax.ShapeDtypeStruct((rows, outputs), dtype))
        blocks = -(-outputs // (_TILE * _WARPS))
        call = f"multiply({given.operand(w)}, {outputs}, {activations}, program, {result})"
        calls.append((blocks, call))
    sizes = {"ROWS": rows, "COLUMNS": columns, "TILE": _TILE, "STEPS": _STEPS, "WARPS": _WARPS}
    return given.launch(
        "gemv_16bit",
        constants(sizes),
        FOLDER / "cuda_gemv_16bit.cu",
        body="  int program = blockIdx.x;\n" + dispatch(calls),
        grid=(sum(blocks for blocks, _ in calls), 1, 1),
        threads=32 * _WARPS,
    )
