"""Small integers times bfloat16 scales, without a conversion of the integers: for kernels.

The bits of an integer below 256, read as a bfloat16, are the integer times a power of two: a
subnormal number or one of the smallest normals. Scales are multiplied in advance to make up for it.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def both_halves(bits: int) -> str:
    """16 bits in both halves of a PTX register."""
    return f"0x{bits * 0x10001:08x}"


def _bfloat16(x: float) -> str:
    return both_halves(int(np.asarray(x, jnp.bfloat16).view(np.uint16)))


def scale_ptx(scale: str, offset: float, exponent: int) -> list[str]:
    """PTX that stores `(code - offset) * scale` in `$0`, for the codes in the halves of `code`.

    On compute capability 8.0, `fma` is the only bfloat16 arithmetic instruction.

    Args:
      scale: register of two bfloat16.
      offset: subtracted from codes.
      exponent: of the power of two.
    """
    lines = [".reg .b32 offset, bias;", f"mov.b32 bias, {_bfloat16(-0.0)};"]
    if offset:
        lines.append(f"mov.b32 offset, {_bfloat16(-offset * 2.0**exponent)};")
        lines.append(f"fma.rn.bf16x2 bias, {scale}, offset, bias;")
    return [*lines, f"fma.rn.bf16x2 $0, code, {scale}, bias;"]


def scale_by_jax(values: Array, scale: Array, exponent: int) -> Array:
    """What `scale_ptx` computes, of values from which the offset is subtracted, float32."""
    # In two steps, which XLA must not merge: the whole power is subnormal in float32.
    half = exponent // 2
    factor = scale.astype(jnp.float32) * 2.0 ** (exponent - half)
    return (values * 2.0**half * lax.optimization_barrier(factor)).astype(scale.dtype)
