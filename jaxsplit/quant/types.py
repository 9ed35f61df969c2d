"""The table of GGML types; unpacks their blocks into planes on the device."""

# Which optional fields a type has follows from its entry in the table.
# pyright: reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import STORED_TYPES
from jaxsplit.quant import blocks, ik_blocks
from jaxsplit.quant.blocks import BlockFields
from jaxsplit.quant.qtensor import (
    PlaneLayout,
    QTensor,
    Weight,
    dequantize,
    pack_bits,
    pack_codes,
    pack_scales,
    trellis_slice,
)
from jaxsplit.quant.scale_codes import (
    above_shift,
    e8m0,
    half_steps,
    odd,
    signed_4,
    signed_odd,
    ue4m3,
)


@dataclasses.dataclass(frozen=True)
class QuantType:
    """One GGML type.

    Attributes:
      block: weights in a block.
      block_bytes: bytes of a block, behind its row's header if there is one.
      layout: of the planes; None for a floating-point type.
      parse: parses raw blocks, uint8 `[..., block_bytes]`; None for a floating-point type.
      dtype: of a floating-point type; None for a quantized one.
      row_scale: the outermost scale is the same in all blocks of a row.
      adds_offset: weights are defined as `scale * code - scale * offset`: zeros are never negative.
    """

    block: int
    block_bytes: int
    layout: PlaneLayout | None = None
    parse: Callable[[Array], BlockFields] | None = None
    dtype: jnp.dtype | None = None
    row_scale: bool = False
    adds_offset: bool = False


_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ4 = gguf.quants.IQ4_NL.kvalues

# Codebook types get one code per weight, with 4-bit scales. IQ3_S (odd integers from -15 to 15) and
# IQ1 (-1, 0 and 1, plus 1/8) need no table.
_IQ1 = PlaneLayout((2,), offset=0.875, decode_scale=signed_odd, scale_bits=4)
_IQ2 = PlaneLayout(
    (2, 1),
    table=(8, 25, 43, 0, -8, -25, -43, 0),
    decode_scale=partial(half_steps, step=0.25),
    scale_bits=4,
    chunk=64,
)
_IQ3_XXS = PlaneLayout(
    (4,),
    table=(-62, *range(-52, 53, 8), 62),
    decode_scale=partial(half_steps, step=0.5),
    scale_bits=4,
    chunk=64,
)
_IQ3_S = PlaneLayout(
    (4,), offset=7.5, decode_scale=partial(half_steps, step=4), scale_bits=4, chunk=64
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
    "MXFP4": QuantType(32, 17, PlaneLayout((4,), table=_E2M1, decode_scale=e8m0), blocks.mxfp4),
    "NVFP4": QuantType(64, 36, PlaneLayout((4,), table=_E2M1, decode_scale=ue4m3), blocks.nvfp4),
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


# ik_llama.cpp's own types.

_T2 = (-31, -13, 1, 17)
_T3 = (-63, -40, -23, -10, 1, 13, 28, 47)
_T5 = (
    *(-126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6),
    *(-1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121),
)
_T6 = (
    *(-127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54),
    *(-51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5),
    *(-2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44),
    *(47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121),
)
_IK2 = PlaneLayout((2,), table=_T2, shift=5, decode_scale=above_shift, chunk=64)
_IK3 = PlaneLayout((2, 1), table=_T3, shift=4, decode_scale=above_shift, chunk=64)
_IK4 = PlaneLayout((4,), table=ik_blocks.T4, shift=4, decode_scale=above_shift)
_IK5 = PlaneLayout((4, 1), table=_T5, shift=2, decode_scale=above_shift, chunk=128)
_IK6 = PlaneLayout((4, 2), table=_T6, shift=1, decode_scale=above_shift, chunk=64)
_IK4S = dataclasses.replace(_IK4, decode_scale=odd)
_IK5S = dataclasses.replace(_IK5, decode_scale=odd, chunk=256)
_IK2KL = PlaneLayout((2, 1), table=_T3, chunk=64)
_Q6_0 = PlaneLayout((4, 2), offset=32)
_BN = PlaneLayout((2,), offset=1, chunk=64)
_Q8 = PlaneLayout((8,))
_KT = PlaneLayout((2,), trellis=True, chunk=8)

_IK: dict[str, tuple[PlaneLayout | None, Callable[[Array], BlockFields]]] = {
    "I2_S": (dataclasses.replace(_BN, chunk=128), ik_blocks.i2_s),
    "Q6_0": (_Q6_0, ik_blocks.q6_0),
    "IQ1_BN": (_BN, ik_blocks.iq1_bn),
    "IQ2_BN": (_BN, ik_blocks.iq2_bn),
    "IQ2_K": (_IK2, ik_blocks.iq2_k),
    "IQ3_K": (_IK3, ik_blocks.iq3_k),
    "IQ4_K": (_IK4, ik_blocks.iq4_k),
    "IQ5_K": (_IK5, ik_blocks.iq5_k),
    "IQ6_K": (_IK6, ik_blocks.iq6_k),
    "IQ4_KS": (_IK4S, ik_blocks.iq4_ks),
    "IQ2_KS": (_IK2, ik_blocks.iq2_ks),
    "IQ4_KSS": (_IK4S, ik_blocks.iq4_kss),
    "Q8_KV": (_Q8, ik_blocks.q8_kv),
    "IQ5_KS": (_IK5S, ik_blocks.iq5_ks),
    "IQ2_KT": (_KT, ik_blocks.iq2_kt),
    "IQ3_KT": (dataclasses.replace(_KT, bits=(2, 1)), ik_blocks.iq3_kt),
    "IQ4_KT": (dataclasses.replace(_KT, bits=(4,), chunk=4), ik_blocks.iq4_kt),
    "IQ3_KS": (_IK3, ik_blocks.iq3_ks),
    "IQ2_KL": (_IK2KL, ik_blocks.iq2_kl),
    "IQ1_KT": (_KT, ik_blocks.iq1_kt),
    "Q4_0_R8": (TYPES["Q4_0"].layout, ik_blocks.q4_0_r8),
    "Q5_0_R4": (TYPES["Q5_0"].layout, ik_blocks.q5_0_r4),
    "Q8_0_R8": (TYPES["Q8_0"].layout, blocks.q8_0),
    "Q2_K_R4": (TYPES["Q2_K"].layout, ik_blocks.q2_k_r4),
    "Q3_K_R4": (TYPES["Q3_K"].layout, ik_blocks.q3_k_r4),
    "Q4_K_R4": (TYPES["Q4_K"].layout, ik_blocks.q4_k_r4),
    "Q5_K_R4": (TYPES["Q5_K"].layout, ik_blocks.q5_k_r4),
    "Q6_K_R4": (TYPES["Q6_K"].layout, ik_blocks.q6_k_r4),
    "IQ2_XXS_R4": (TYPES["IQ2_XXS"].layout, ik_blocks.iq2_xxs_r4),
    "IQ2_XS_R4": (TYPES["IQ2_XS"].layout, ik_blocks.iq2_xs_r4),
    "IQ3_XXS_R4": (TYPES["IQ3_XXS"].layout, ik_blocks.iq3_xxs_r4),
    "IQ1_S_R4": (dataclasses.replace(_IQ1, scale_bits=8), ik_blocks.iq1_s_r4),
    "IQ4_NL_R4": (TYPES["IQ4_NL"].layout, ik_blocks.iq4_nl_r4),
    "IQ3_S_R4": (TYPES["IQ3_S"].layout, ik_blocks.iq3_s_r4),
    "IQ2_S_R4": (TYPES["IQ2_S"].layout, ik_blocks.iq2_s_r4),
    "IQ4_XS_R8": (TYPES["IQ4_XS"].layout, ik_blocks.iq4_xs_r8),
    "IQ1_M_R4": (
        dataclasses.replace(_IQ1, decode_scale=signed_4, scale_bits=8),
        ik_blocks.iq1_m_r4,
    ),
    "Q6_0_R4": (_Q6_0, ik_blocks.q6_0_r4),
    "IQ2_BN_R4": (_BN, ik_blocks.iq2_bn_r4),
    "IQ2_K_R4": (_IK2, ik_blocks.iq2_k_r4),
    "IQ3_K_R4": (_IK3, ik_blocks.iq3_k_r4),
    "IQ4_K_R4": (_IK4, ik_blocks.iq4_k_r4),
    "IQ5_K_R4": (_IK5, ik_blocks.iq5_k_r4),
    "IQ4_KS_R4": (_IK4S, ik_blocks.iq4_ks_r4),
    "IQ5_KS_R4": (_IK5S, ik_blocks.iq5_ks_r4),
    "MXFP4_R8": (TYPES["MXFP4"].layout, ik_blocks.mxfp4_r8),
    "Q8_K_R16": (_Q8, ik_blocks.q8_k_r16),
    "Q8_KV_R8": (_Q8, ik_blocks.q8_kv_r8),
    "Q8_K_R8": (_Q8, ik_blocks.q8_k_r8),
}

for _name, (_layout, _parse) in _IK.items():
    _stored = STORED_TYPES[_name]
    TYPES[_name] = QuantType(
        _stored.block,
        _stored.block_bytes,
        _layout,
        _parse,
        row_scale=_stored.header > 0,
        adds_offset=_name in ("Q5_0_R4", "Q6_0_R4", "Q8_K_R16"),
    )
TYPES["BF16_R16"] = QuantType(2, 4, dtype=jnp.bfloat16)

_MAX_ROW_SCALE_SPAN = 1024
"""Weights for which the scale of a row is stored once, at most."""


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
    padded: bool = False,
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
      padded: some blocks of rows are padding, all zeros, and so are their weights: scales of rows
        are then repeated for each block.

    Returns:
      `[..., out, blocks * sub_block]`, a `QTensor` or a plain array.
    """
    entry = quant_type(name)
    sub_block = sub_block or entry.block
    count = entry.block // sub_block
    if entry.parse is None:
        weights = raw.reshape(*raw.shape[:-1], entry.block, -1)
        weights = lax.bitcast_convert_type(weights, entry.dtype)
        if count > 1:
            weights = _take_sub_block(weights, count, sub_block_index)
        return _merge_blocks(weights).astype(dtype or entry.dtype)
    fields, layout = entry.parse(raw), entry.layout
    if count > 1:
        if layout.trellis and sub_block < layout.chunk:
            fields, layout = _expand_trellis(fields, layout)
        fields = BlockFields(
            **{
                field.name: _take_sub_block(getattr(fields, field.name), count, sub_block_index)
                for field in dataclasses.fields(BlockFields)
            }
        )
        layout = _sub_block_layout(layout, sub_block, fields.scale.shape[-1])
    scale, super_scale = _merge_blocks(pack_scales(fields.scale, layout)), fields.super_scale
    super_scale = _merge_blocks(super_scale)
    if entry.row_scale and not padded:
        columns = raw.shape[-2] * sub_block
        if super_scale is None:
            scale = _once_per_span(scale, columns)
        else:
            super_scale = _once_per_span(super_scale, columns)
    tensor = QTensor(
        codes=_pack(fields, layout),
        scale=scale,
        minimum=_merge_blocks(pack_scales(fields.minimum, layout)),
        super_scale=super_scale,
        super_minimum=_merge_blocks(fields.super_minimum),
        layout=layout,
    )
    return tensor if dtype is None else dequantize(tensor, dtype)


def _pack(fields: BlockFields, layout: PlaneLayout) -> tuple[Array, ...]:
    """The planes of parsed blocks."""
    if not layout.trellis:
        return pack_codes(_merge_blocks(fields.codes), layout)
    states = lax.bitcast_convert_type(_merge_blocks(fields.states), jnp.uint8)
    planes = [states.reshape(*states.shape[:-2], -1)]
    if fields.codes is not None:
        planes.append(pack_bits(_merge_blocks(fields.codes), 1, layout.chunk))
    return tuple(planes)


def _expand_trellis(fields: BlockFields, layout: PlaneLayout) -> tuple[BlockFields, PlaneLayout]:
    """Values in place of states, for sub-blocks that are smaller than a chunk."""
    planes = [fields.states[..., None]]
    if fields.codes is not None:
        planes.append(pack_bits(fields.codes, 1, layout.chunk)[..., None])
    values = trellis_slice(planes, np.arange(layout.chunk)).astype(jnp.int8)
    codes = values.reshape(*values.shape[:-2], -1)
    return dataclasses.replace(fields, codes=codes, states=None), PlaneLayout((8,))


def _once_per_span(scales: Array, columns: int) -> Array:
    """The scale of each row, `[..., out, n]`, with one value for as many columns as possible."""
    span = math.gcd(columns, _MAX_ROW_SCALE_SPAN)
    return scales.reshape(*scales.shape[:-1], columns // span, -1)[..., 0]


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
