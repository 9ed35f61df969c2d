"""One entry per GGML type, and how its blocks become planes on the device."""

import dataclasses
from collections.abc import Callable
from functools import partial

import gguf.quants
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.errors import JaxsplitError
from jaxsplit.quant import blocks
from jaxsplit.quant.blocks import Parts
from jaxsplit.quant.qtensor import Form, QTensor, Weight, dequantize, pack_codes, pack_scales


@dataclasses.dataclass(frozen=True)
class QuantType:
    """One GGML type.

    Attributes:
      block: weights in a block.
      block_bytes: bytes of a block.
      form: the planes that the blocks become; None for a plain floating-point type.
      split: takes raw blocks, uint8 `[..., block_bytes]`, apart.
      dtype: of a plain floating-point type.
    """

    block: int
    block_bytes: int
    form: Form | None = None
    split: Callable[[Array], Parts] | None = None
    dtype: jnp.dtype | None = None


def _half_steps(scales: Array, step: float) -> Array:
    """Scales halfway between multiples of a step."""
    return (scales.astype(jnp.float32) + 0.5) * step


def _signed(scales: Array) -> Array:
    """1, 3, ..., 15 by the low 3 bits, negative where the fourth is set."""
    magnitude = _half_steps(scales & 7, 2)
    return jnp.where(scales > 7, -magnitude, magnitude)


def _e8m0(scales: Array) -> Array:
    """Exponents to half their power of two, `2**(e - 128)`: the smallest two are subnormal, which
    XLA's CPU backend takes for zero."""
    bits = scales.astype(jnp.uint32)
    bits = jnp.where(bits < 2, jnp.uint32(0x00200000) << bits, (bits - 1) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _ue4m3(scales: Array) -> Array:
    """Half of numbers with 4 bits of exponent and 3 of mantissa, of which the last means zero; as
    float16, which has another bias, they are too small by 2**8. The highest bit is unused."""
    small = lax.bitcast_convert_type((scales & 127).astype(jnp.uint16) << 7, jnp.float16)
    return jnp.where(scales == 127, 0, small.astype(jnp.float32) * 2.0**7)


_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = gguf.quants.IQ4_NL.kvalues

# Codebook types: the code of a weight alone, with scales of 4 bits. IQ3_S's weights, the odd
# numbers from -15 to 15, and IQ1's, which are -1, 0 and 1 plus 1/8, need no table.
_IQ1 = Form((2,), offset=0.875, decode_scale=_signed, scale_bits=4)
_IQ2 = Form(
    (2, 1),
    table=(8, 25, 43, 0, -8, -25, -43, 0),
    decode_scale=partial(_half_steps, step=0.25),
    scale_bits=4,
    chunk=64,
)
_IQ3_XXS = Form(
    (4,),
    table=(-62, *range(-52, 53, 8), 62),
    decode_scale=partial(_half_steps, step=0.5),
    scale_bits=4,
    chunk=64,
)
_IQ3_S = Form((4,), offset=7.5, decode_scale=partial(_half_steps, step=4), scale_bits=4, chunk=64)

TYPES: dict[str, QuantType] = {
    "F32": QuantType(1, 4, dtype=jnp.float32),
    "F16": QuantType(1, 2, dtype=jnp.float16),
    "BF16": QuantType(1, 2, dtype=jnp.bfloat16),
    "Q4_0": QuantType(32, 18, Form((4,), offset=8), blocks.q4_0),
    "Q4_1": QuantType(32, 20, Form((4,)), blocks.q4_1),
    "Q5_0": QuantType(32, 22, Form((4, 1), offset=16), blocks.q5_0),
    "Q5_1": QuantType(32, 24, Form((4, 1)), blocks.q5_1),
    "Q8_0": QuantType(32, 34, Form((8,)), blocks.q8_0),
    "MXFP4": QuantType(32, 17, Form((4,), table=_E2M1, decode_scale=_e8m0), blocks.mxfp4),
    "NVFP4": QuantType(64, 36, Form((4,), table=_E2M1, decode_scale=_ue4m3), blocks.nvfp4),
    "Q2_K": QuantType(256, 84, Form((2,), scale_bits=4, chunk=64), blocks.q2_k),
    "Q3_K": QuantType(256, 110, Form((2, 1), offset=4, chunk=64), blocks.q3_k),
    "Q4_K": QuantType(256, 144, Form((4,)), blocks.q4_k),
    "Q5_K": QuantType(256, 176, Form((4, 1), chunk=256), blocks.q5_k),
    "Q6_K": QuantType(256, 210, Form((4, 2), offset=32, chunk=64), blocks.q6_k),
    "IQ1_S": QuantType(256, 50, dataclasses.replace(_IQ1, chunk=64), blocks.iq1_s),
    "IQ1_M": QuantType(256, 56, _IQ1, blocks.iq1_m),
    "IQ2_XXS": QuantType(256, 66, dataclasses.replace(_IQ2, chunk=128), blocks.iq2_xxs),
    "IQ2_XS": QuantType(256, 74, _IQ2, blocks.iq2_xs),
    "IQ2_S": QuantType(256, 82, _IQ2, blocks.iq2_s),
    "IQ3_XXS": QuantType(256, 98, _IQ3_XXS, blocks.iq3_xxs),
    "IQ3_S": QuantType(256, 110, _IQ3_S, blocks.iq3_s),
    "IQ4_NL": QuantType(32, 18, Form((4,), table=_IQ4), blocks.q4_0),
    "IQ4_XS": QuantType(256, 136, Form((4,), table=_IQ4, chunk=64), blocks.iq4_xs),
    "TQ1_0": QuantType(256, 54, Form((2,), offset=1, chunk=128), blocks.tq1_0),
    "TQ2_0": QuantType(256, 66, Form((2,), offset=1, chunk=128), blocks.tq2_0),
    "Q1_0": QuantType(128, 18, Form((1,), table=(-1, 1), chunk=128), blocks.q1_0),
}


def quant_type(name: str) -> QuantType:
    """The entry of a GGML type.

    Raises:
      JaxsplitError: the type is not supported; the message lists those that are.
    """
    if name not in TYPES:
        raise JaxsplitError(
            f"weights of type {name} are not supported; supported are {', '.join(TYPES)}"
        )
    return TYPES[name]


def unpack(
    name: str,
    raw: Array,
    *,
    granule: int | None = None,
    part: Array | None = None,
    dtype: jnp.dtype | None = None,
) -> Weight:
    """Raw blocks of a matrix to its form on the device.

    A matrix may be cut along `in` inside its blocks: then `granule` weights of each given block
    are kept, and the scales of a group or super-group that is cut are repeated.

    Args:
      name: the GGML type.
      raw: uint8 `[..., out, blocks, block_bytes]`.
      granule: weights kept of each block, a divisor of the block's size; None keeps all.
      part: int32 `[blocks]`: which granule of each block is kept.
      dtype: dequantize to this dtype; None keeps the weights quantized.

    Returns:
      `[..., out, blocks * granule]`, a `QTensor` or a plain array.
    """
    kind = quant_type(name)
    if kind.split is None:
        weights = lax.bitcast_convert_type(raw, kind.dtype)
        return weights.astype(dtype or kind.dtype)
    parts = kind.split(raw)
    form = kind.form
    if granule is not None and granule != kind.block:
        parts = Parts(
            **{
                field.name: _cut(getattr(parts, field.name), kind.block // granule, part)
                for field in dataclasses.fields(Parts)
            }
        )
        form = _fit(form, granule, parts.scale.shape[-1])
    tensor = QTensor(
        codes=pack_codes(_join(parts.codes), form),
        scale=_join(pack_scales(parts.scale, form)),
        minimum=_join(pack_scales(parts.minimum, form)),
        super_scale=_join(parts.super_scale),
        super_minimum=_join(parts.super_minimum),
        form=form,
    )
    return tensor if dtype is None else dequantize(tensor, dtype)


@partial(jax.jit, static_argnums=0)
def float32_blocks(name: str, raw: Array) -> Array:
    """Raw blocks of any type as blocks of the type F32.

    Args:
      name: the GGML type.
      raw: uint8 `[..., blocks, block_bytes]`.

    Returns:
      uint8 `[..., blocks * block, 4]`.
    """
    weights = unpack(name, raw[None], dtype=jnp.float32)[0]
    return lax.bitcast_convert_type(weights, jnp.uint8)


def _fit(form: Form, granule: int, groups: int) -> Form:
    """The form of blocks of which a granule with so many groups is left: codes and scales of
    different granules share no byte."""
    chunk = min(form.chunk, granule)
    return dataclasses.replace(
        form,
        chunk=chunk,
        bits=tuple(max(bits, 8 // chunk) for bits in form.bits),
        scale_bits=form.scale_bits if groups * form.scale_bits % 8 == 0 else 8,
    )


def _cut(values: Array | None, count: int, part: Array) -> Array | None:
    """Of each block's values `[..., blocks, n]` those of one granule in `count`."""
    if values is None:
        return None
    n = values.shape[-1]
    if n < count:  # a group spans several granules: each gets a copy of its scale
        values, n = jnp.repeat(values, count // n, axis=-1), count
    granules = values.reshape(*values.shape[:-1], count, n // count)
    index = part.reshape(*[1] * (granules.ndim - 3), -1, 1, 1)
    return jnp.take_along_axis(granules, index, axis=-2, mode="clip")[..., 0, :]


def _join(values: Array | None) -> Array | None:
    """`[..., blocks, n]` to `[..., blocks * n]`."""
    return None if values is None else values.reshape(*values.shape[:-2], -1)
