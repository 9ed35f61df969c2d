"""The table of GGML types, and unpacking their blocks into planes on the device."""

import dataclasses
from collections.abc import Callable
from functools import partial

import gguf.quants
import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.errors import JaxsplitError
from jaxsplit.quant import blocks
from jaxsplit.quant.blocks import BlockFields
from jaxsplit.quant.qtensor import Form, QTensor, Weight, dequantize, pack_codes, pack_scales


@dataclasses.dataclass(frozen=True)
class QuantType:
    """One GGML type.

    Attributes:
      block: weights in a block.
      block_bytes: bytes of a block.
      form: planes of the unpacked blocks; None for a floating-point type.
      parse: parses raw blocks, uint8 `[..., block_bytes]`; None for a floating-point type.
      dtype: of a floating-point type.
    """

    block: int
    block_bytes: int
    form: Form | None = None
    parse: Callable[[Array], BlockFields] | None = None
    dtype: jnp.dtype | None = None


def _half_steps(scales: Array, step: float) -> Array:
    """Scales halfway between multiples of a step."""
    return (scales.astype(jnp.float32) + 0.5) * step


def _signed(scales: Array) -> Array:
    """1, 3, ..., 15 by the low 3 bits, negative if the fourth is set."""
    magnitude = _half_steps(scales & 7, 2)
    return jnp.where(scales > 7, -magnitude, magnitude)


def _e8m0(scales: Array) -> Array:
    """Exponents to half their power of two, `2**(e - 128)`. The smallest two are subnormal, which
    XLA's CPU backend flushes to zero."""
    bits = scales.astype(jnp.uint32)
    bits = jnp.where(bits < 2, jnp.uint32(0x00200000) << bits, (bits - 1) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _ue4m3(scales: Array) -> Array:
    """Half of each number of 4 exponent and 3 mantissa bits, of which the last encodes zero.
    Reinterpreted as float16, which has another bias, they are too small by 2**8. The highest bit is
    unused."""
    small = lax.bitcast_convert_type((scales & 127).astype(jnp.uint16) << 7, jnp.float16)
    return jnp.where(scales == 127, 0, small.astype(jnp.float32) * 2.0**7)


_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = gguf.quants.IQ4_NL.kvalues

# Codebook types: an individual code for each weight, with 4-bit scales. IQ3_S (odd numbers from -15
# to 15) and IQ1 (-1, 0 and 1, plus 1/8) need no table.
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
      JaxsplitError: the type is unsupported; the message lists the supported ones.
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
    """Unpacks the raw blocks of a matrix into planes.

    A matrix may be split along `in` inside its blocks: then only one sub-block of each block is
    kept, and scales of groups or super-groups that span several sub-blocks are replicated.

    Args:
      name: the GGML type.
      raw: uint8 `[..., out, blocks, block_bytes]`.
      granule: weights of a sub-block, a divisor of the block size; None keeps whole blocks.
      part: int32 `[blocks]`: index of the sub-block to keep of each block.
      dtype: dequantize to this dtype; None keeps the weights quantized.

    Returns:
      `[..., out, blocks * granule]`, a `QTensor` or a plain array.
    """
    entry = quant_type(name)
    if entry.parse is None:
        weights = lax.bitcast_convert_type(raw, entry.dtype)
        return weights.astype(dtype or entry.dtype)
    fields, form = entry.parse(raw), entry.form
    if granule is not None and granule != entry.block:
        count = entry.block // granule
        fields = BlockFields(
            **{
                field.name: _take_sub_block(getattr(fields, field.name), count, part)
                for field in dataclasses.fields(BlockFields)
            }
        )
        form = _sub_block_form(form, granule, fields.scale.shape[-1])
    tensor = QTensor(
        codes=pack_codes(_join(fields.codes), form),
        scale=_join(pack_scales(fields.scale, form)),
        minimum=_join(pack_scales(fields.minimum, form)),
        super_scale=_join(fields.super_scale),
        super_minimum=_join(fields.super_minimum),
        form=form,
    )
    return tensor if dtype is None else dequantize(tensor, dtype)


@partial(jax.jit, static_argnums=0)
def float32_blocks(name: str, raw: Array) -> Array:
    """Converts raw blocks of any type to blocks of the type F32.

    Args:
      name: the GGML type.
      raw: uint8 `[..., blocks, block_bytes]`.

    Returns:
      uint8 `[..., blocks * block, 4]`.
    """
    weights = unpack(name, raw[None], dtype=jnp.float32)[0]
    return lax.bitcast_convert_type(weights, jnp.uint8)


def _sub_block_form(form: Form, sub_block: int, groups: int) -> Form:
    """The form of sub-blocks with `groups` groups: codes and scales of different sub-blocks must
    not share a byte."""
    chunk = min(form.chunk, sub_block)
    return dataclasses.replace(
        form,
        chunk=chunk,
        bits=tuple(max(bits, 8 // chunk) for bits in form.bits),
        scale_bits=form.scale_bits if groups * form.scale_bits % 8 == 0 else 8,
    )


def _take_sub_block(values: Array | None, count: int, index: Array) -> Array | None:
    """Of each block's values `[..., blocks, n]`, keeps one of `count` sub-blocks."""
    if values is None:
        return None
    n = values.shape[-1]
    if n < count:  # a group spans several sub-blocks: each gets a copy of its scale
        values, n = jnp.repeat(values, count // n, axis=-1), count
    split = values.reshape(*values.shape[:-1], count, n // count)
    index = index.reshape(*[1] * (split.ndim - 3), -1, 1, 1)
    return jnp.take_along_axis(split, index, axis=-2, mode="clip")[..., 0, :]


def _join(values: Array | None) -> Array | None:
    """`[..., blocks, n]` to `[..., blocks * n]`."""
    return None if values is None else values.reshape(*values.shape[:-2], -1)
