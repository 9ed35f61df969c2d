"""The table of GGML types; unpacks their blocks into planes on the device."""

# Which optional fields a type has follows from its entry in the table.
# pyright: reportArgumentType=false, reportIndexIssue=false

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
from jaxsplit.quant.qtensor import PlaneLayout, QTensor, Weight, dequantize, pack_codes, pack_scales


@dataclasses.dataclass(frozen=True)
class QuantType:
    """One GGML type.

    Attributes:
      block: weights in a block.
      block_bytes: bytes of a block.
      layout: of the planes; None for a floating-point type.
      parse: parses raw blocks, uint8 `[..., block_bytes]`; None for a floating-point type.
      dtype: of a floating-point type; None for a quantized one.
    """

    block: int
    block_bytes: int
    layout: PlaneLayout | None = None
    parse: Callable[[Array], BlockFields] | None = None
    dtype: jnp.dtype | None = None


def _half_steps(scales: Array, step: float) -> Array:
    """`(scales + 0.5) * step`, float32."""
    return (scales.astype(jnp.float32) + 0.5) * step


def _signed(scales: Array) -> Array:
    """The odd number 1, 3, ..., 15 that the low 3 bits encode, negated if bit 3 is set."""
    magnitude = _half_steps(scales & 7, 2)
    return jnp.where(scales > 7, -magnitude, magnitude)


def _e8m0(scales: Array) -> Array:
    """E8M0 scales, halved: `2**(e - 128)`. The smallest two are subnormal; XLA's CPU backend
    flushes them to zero."""
    bits = scales.astype(jnp.uint32)
    bits = jnp.where(bits < 2, jnp.uint32(0x00200000) << bits, (bits - 1) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _ue4m3(scales: Array) -> Array:
    """UE4M3 scales (4 exponent bits, 3 mantissa bits, top bit unused), halved; code 127 is zero.

    The bits are reinterpreted as float16, whose exponent bias differs: that value is 2**8 times too
    small.
    """
    small = lax.bitcast_convert_type((scales & 127).astype(jnp.uint16) << 7, jnp.float16)
    return jnp.where(scales == 127, 0, small.astype(jnp.float32) * 2.0**7)


_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = gguf.quants.IQ4_NL.kvalues

# Codebook types get one code per weight, with 4-bit scales. IQ3_S (odd integers from -15 to 15) and
# IQ1 (-1, 0 and 1, plus 1/8) need no table.
_IQ1 = PlaneLayout((2,), offset=0.875, decode_scale=_signed, scale_bits=4)
_IQ2 = PlaneLayout(
    (2, 1),
    table=(8, 25, 43, 0, -8, -25, -43, 0),
    decode_scale=partial(_half_steps, step=0.25),
    scale_bits=4,
    chunk=64,
)
_IQ3_XXS = PlaneLayout(
    (4,),
    table=(-62, *range(-52, 53, 8), 62),
    decode_scale=partial(_half_steps, step=0.5),
    scale_bits=4,
    chunk=64,
)
_IQ3_S = PlaneLayout(
    (4,), offset=7.5, decode_scale=partial(_half_steps, step=4), scale_bits=4, chunk=64
)

TYPES: dict[str, QuantType] = {
    "F32": QuantType(1, 4, dtype=jnp.float32),
    "F16": QuantType(1, 2, dtype=jnp.float16),
    "BF16": QuantType(1, 2, dtype=jnp.bfloat16),
    "I32": QuantType(1, 4, dtype=jnp.int32),
    "Q4_0": QuantType(32, 18, PlaneLayout((4,), offset=8), blocks.q4_0),
    "Q4_1": QuantType(32, 20, PlaneLayout((4,)), blocks.q4_1),
    "Q5_0": QuantType(32, 22, PlaneLayout((4, 1), offset=16), blocks.q5_0),
    "Q5_1": QuantType(32, 24, PlaneLayout((4, 1)), blocks.q5_1),
    "Q8_0": QuantType(32, 34, PlaneLayout((8,)), blocks.q8_0),
    "MXFP4": QuantType(32, 17, PlaneLayout((4,), table=_E2M1, decode_scale=_e8m0), blocks.mxfp4),
    "NVFP4": QuantType(64, 36, PlaneLayout((4,), table=_E2M1, decode_scale=_ue4m3), blocks.nvfp4),
    "Q2_K": QuantType(256, 84, PlaneLayout((2,), scale_bits=4, chunk=64), blocks.q2_k),
    "Q3_K": QuantType(256, 110, PlaneLayout((2, 1), offset=4, chunk=64), blocks.q3_k),
    "Q4_K": QuantType(256, 144, PlaneLayout((4,)), blocks.q4_k),
    "Q5_K": QuantType(256, 176, PlaneLayout((4, 1), chunk=256), blocks.q5_k),
    "Q6_K": QuantType(256, 210, PlaneLayout((4, 2), offset=32, chunk=64), blocks.q6_k),
    "IQ1_S": QuantType(256, 50, dataclasses.replace(_IQ1, chunk=64), blocks.iq1_s),
    "IQ1_M": QuantType(256, 56, _IQ1, blocks.iq1_m),
    "IQ2_XXS": QuantType(256, 66, dataclasses.replace(_IQ2, chunk=128), blocks.iq2_xxs),
    "IQ2_XS": QuantType(256, 74, _IQ2, blocks.iq2_xs),
    "IQ2_S": QuantType(256, 82, _IQ2, blocks.iq2_s),
    "IQ3_XXS": QuantType(256, 98, _IQ3_XXS, blocks.iq3_xxs),
    "IQ3_S": QuantType(256, 110, _IQ3_S, blocks.iq3_s),
    "IQ4_NL": QuantType(32, 18, PlaneLayout((4,), table=_IQ4), blocks.q4_0),
    "IQ4_XS": QuantType(256, 136, PlaneLayout((4,), table=_IQ4, chunk=64), blocks.iq4_xs),
    "TQ1_0": QuantType(256, 54, PlaneLayout((2,), offset=1, chunk=128), blocks.tq1_0),
    "TQ2_0": QuantType(256, 66, PlaneLayout((2,), offset=1, chunk=128), blocks.tq2_0),
    "Q1_0": QuantType(128, 18, PlaneLayout((1,), table=(-1, 1), chunk=128), blocks.q1_0),
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
    sub_block: int | None = None,
    sub_block_index: Array | None = None,
    dtype: jnp.dtype | None = None,
) -> Weight:
    """Unpacks the raw blocks of a matrix into planes.

    A split along `in` may fall inside blocks. Each shard then keeps one sub-block of each block,
    and the scale of a group or super-group that spans several sub-blocks is replicated.

    Args:
      name: the GGML type.
      raw: uint8 `[..., out, blocks, block_bytes]`.
      sub_block: weights of a sub-block, a divisor of the block size; None keeps whole blocks.
      sub_block_index: int32 `[blocks]`: which sub-block of each block to keep.
      dtype: dequantize to this dtype; None keeps the weights quantized.

    Returns:
      `[..., out, blocks * sub_block]`, a `QTensor` or a plain array.
    """
    entry = quant_type(name)
    if entry.parse is None:
        weights = lax.bitcast_convert_type(raw, entry.dtype)
        return weights.astype(dtype or entry.dtype)
    fields, layout = entry.parse(raw), entry.layout
    if sub_block is not None and sub_block != entry.block:
        count = entry.block // sub_block
        fields = BlockFields(
            **{
                field.name: _take_sub_block(getattr(fields, field.name), count, sub_block_index)
                for field in dataclasses.fields(BlockFields)
            }
        )
        layout = _sub_block_layout(layout, sub_block, fields.scale.shape[-1])
    tensor = QTensor(
        codes=pack_codes(_merge_blocks(fields.codes), layout),
        scale=_merge_blocks(pack_scales(fields.scale, layout)),
        minimum=_merge_blocks(pack_scales(fields.minimum, layout)),
        super_scale=_merge_blocks(fields.super_scale),
        super_minimum=_merge_blocks(fields.super_minimum),
        layout=layout,
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


def _sub_block_layout(layout: PlaneLayout, sub_block: int, groups: int) -> PlaneLayout:
    """The layout of sub-blocks with `groups` groups each: no byte may hold codes or scales of two
    sub-blocks."""
    chunk = min(layout.chunk, sub_block)
    return dataclasses.replace(
        layout,
        chunk=chunk,
        bits=tuple(max(bits, 8 // chunk) for bits in layout.bits),
        scale_bits=layout.scale_bits if groups * layout.scale_bits % 8 == 0 else 8,
    )


def _take_sub_block(values: Array | None, count: int, index: Array) -> Array | None:
    """Keeps one of the `count` sub-blocks of each block's values `[..., blocks, n]`."""
    if values is None:
        return None
    n = values.shape[-1]
    if n < count:  # a group spans several sub-blocks: replicate its scale
        values, n = jnp.repeat(values, count // n, axis=-1), count
    split = values.reshape(*values.shape[:-1], count, n // count)
    index = index.reshape(*[1] * (split.ndim - 3), -1, 1, 1)
    return jnp.take_along_axis(split, index, axis=-2, mode="clip")[..., 0, :]


def _merge_blocks(values: Array | None) -> Array | None:
    """`[..., blocks, n]` to `[..., blocks * n]`."""
    return None if values is None else values.reshape(*values.shape[:-2], -1)
