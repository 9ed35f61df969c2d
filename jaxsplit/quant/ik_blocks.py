"""Parsers of ik_llama.cpp's own blocks, one function per layout; see `jaxsplit.quant.blocks`.

A raw block follows its row's header. Blocks of interleaved types (`_r4`, `_r8`, `_r16`) hold the
bytes of one row, in the order of `StoredType.runs`. The layouts are defined in
https://github.com/ikawrakow/ik_llama.cpp, `ggml/src/ggml-common.h` and `iqk/iqk_quantize.cpp`.
"""

# Only trellis types have no codes.
# pyright: reportOptionalOperand=false

import dataclasses

import gguf.quants
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxsplit.quant.blocks import (
    BlockFields,
    codes_of,
    fields_of,
    flat,
    half,
    look_up,
    mxfp4,
    ternary,
    view,
)

T4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_S4 = np.array(T4, np.int8)  # also scales

# Values of two neighbors, as indices into a table of 8, the digits of an octal number: `IQ2_KL`.
_PAIRS = (
    *(0o02, 0o05, 0o10, 0o13, 0o15, 0o17, 0o21, 0o22, 0o24, 0o25, 0o26, 0o30, 0o34, 0o35),
    *(0o37, 0o42, 0o43, 0o44, 0o45, 0o46, 0o51, 0o52, 0o53, 0o54, 0o55, 0o60, 0o62, 0o64),
    *(0o66, 0o67, 0o72, 0o75),
)
_PAIRS = np.array([divmod(pair, 8) for pair in _PAIRS], np.uint8)

# Interleaved codes: the first weight of each 4 neighbors, in the order of their bits.
_N4 = (0, 8, 16, 24, 4, 12, 20, 28)
_IN_ORDER = tuple(range(0, 32, 4))
_P2_B = (0, 8, 4, 12, 16, 24, 20, 28)
_P1_D = (0, 8, 16, 24, 4, 12, 20, 28)
_P1_E = (0, 8, 4, 12, 16, 24, 20, 28)
_P1_F = (0, 16, 4, 20, 8, 24, 12, 28)
_NIBBLES = (0, 16, 4, 20, 8, 24, 12, 28)


def _floats(raw: Array) -> Array:
    """Reinterprets bytes `[..., 4 * n]` as float32 `[..., n]`."""
    return view(raw, jnp.float32)


def _signed(scales: Array, offset: int) -> Array:
    """Unsigned scales minus an offset, int8."""
    return scales.astype(jnp.int8) - jnp.int8(offset)


def _shifted(scales: Array, shift: Array) -> Array:
    """Scales with the bit that shifts their group's values as lowest bit."""
    return (scales << 1) | shift.astype(scales.dtype)


def _odd(scales: Array) -> Array:
    """Bytes `x` for scales `(x & 254) - 127` and shifts `x & 1`, as int8: `x - 128`."""
    return view(scales ^ jnp.uint8(128), jnp.int8)


def _scales_of_6(low: Array, high: Array) -> Array:
    """16 scales in 8 bytes with their low 4 bits, and 4 bytes with the 2 bits above."""
    return _signed(codes_of(low, 4, 1) | (codes_of(high, 2, 1) << 4), 32)


# Tables and group scales


def iq2_k(raw: Array) -> BlockFields:
    scale, shift, scales, codes = fields_of(raw, 2, 2, 8, 64)
    scales = _shifted(_signed(codes_of(scales, 4, 1), 8), codes_of(shift, 1, 1))
    return BlockFields(codes_of(codes, 2, 32), scales, super_scale=half(scale))


def _odd_scales(scales: Array, negative: Array) -> Array:
    """Scales 1, 3, ..., 31 with a bit for the sign."""
    scales = (scales.astype(jnp.int8) << 1) | 1
    return jnp.where(negative == 1, -scales, scales)


def iq3_k(raw: Array) -> BlockFields:
    scale, shift, negative, scales, low, high = fields_of(raw, 2, 2, 2, 8, 64, 32)
    scales = _odd_scales(codes_of(scales, 4, 1), codes_of(negative, 1, 1))
    return BlockFields(
        codes_of(low, 2, 32) | (codes_of(high, 1, 32) << 2),
        _shifted(scales, codes_of(shift, 1, 1)),
        super_scale=half(scale),
    )


def iq4_k(raw: Array) -> BlockFields:
    scale, shift, high, low, codes = fields_of(raw, 2, 2, 4, 8, 128)
    scales = _shifted(_scales_of_6(low, high), codes_of(shift, 1, 1))
    return BlockFields(codes_of(codes, 4, 16), scales, super_scale=half(scale))


def iq5_k(raw: Array) -> BlockFields:
    scale, shift, high, low, codes, top = fields_of(raw, 2, 2, 4, 8, 128, 32)
    return BlockFields(
        codes_of(codes, 4, 32) | (codes_of(top, 1, 32) << 4),
        _shifted(_scales_of_6(low, high), codes_of(shift, 1, 1)),
        super_scale=half(scale),
    )


def iq6_k(raw: Array) -> BlockFields:
    scale, shift, scales, low, high = fields_of(raw, 2, 2, 16, 128, 64)
    scales = view(scales, jnp.int8).astype(jnp.int16)
    return BlockFields(
        codes_of(low, 4, 32) | (codes_of(high, 2, 32) << 4),
        _shifted(scales, codes_of(shift, 1, 1)),
        super_scale=half(scale),
    )


def iq2_ks(raw: Array) -> BlockFields:
    scale, extra, scales, codes = fields_of(raw, 2, 2, 4, 64)
    shift, high = jnp.split(codes_of(extra, 1, 1), 2, axis=-1)
    scales = _signed(codes_of(scales, 4, 1) | (high << 4), 16)
    return BlockFields(codes_of(codes, 2, 32), _shifted(scales, shift), super_scale=half(scale))


def iq3_ks(raw: Array) -> BlockFields:
    scale, extra, scales, low, top = fields_of(raw, 2, 2, 4, 64, 32)
    high, shift = jnp.split(codes_of(extra, 1, 1), 2, axis=-1)
    scales = _signed(codes_of(scales, 4, 4) | (high << 4), 16)
    return BlockFields(
        codes_of(low, 2, 32) | (codes_of(top, 1, 32) << 2),
        _shifted(scales, shift),
        super_scale=half(scale),
    )


def iq4_ks(raw: Array) -> BlockFields:
    scale, scales, codes = fields_of(raw, 4, 8, 128)
    return BlockFields(codes_of(codes, 4, 16), _odd(scales), super_scale=_floats(scale))


def iq5_ks(raw: Array) -> BlockFields:
    scale, scales, codes, top = fields_of(raw, 4, 8, 128, 32)
    return BlockFields(
        codes_of(codes, 4, 32) | (codes_of(top, 1, 32) << 4),
        _odd(scales),
        super_scale=_floats(scale),
    )


def iq4_kss(raw: Array) -> BlockFields:
    """The lowest bits of a group's 8 words make its scale; each word is XORed with itself."""
    scale, words = fields_of(raw, 4, 128)
    words = view(words, jnp.uint16)
    bits = (words & 1).astype(jnp.uint8).reshape(*raw.shape[:-1], 8, 8)
    scales = jnp.sum(bits << jnp.arange(8, dtype=jnp.uint8), axis=-1, dtype=jnp.uint8)
    codes = words & jnp.uint16(0xFFFE)
    codes ^= codes >> 1
    low, high = (codes & 255).astype(jnp.uint8), (codes >> 8).astype(jnp.uint8)
    packed = flat(jnp.stack([low, high], axis=-1), raw)
    return BlockFields(codes_of(packed, 4, 16), _odd(scales), super_scale=_floats(scale))


def iq2_kl(raw: Array) -> BlockFields:
    """A codebook of pairs of neighbors."""
    scale, high, low, pairs, top = fields_of(raw, 2, 2, 4, 64, 16)
    scales = _signed(codes_of(low, 4, 4) | (codes_of(high, 2, 1) << 4), 32)
    index = codes_of(pairs, 4, 16) | (codes_of(top, 1, 16) << 4)
    return BlockFields(flat(jnp.asarray(_PAIRS)[index], raw), scales, super_scale=half(scale))


def q6_0(raw: Array) -> BlockFields:
    scale, high, low = fields_of(raw, 2, 8, 16)
    high = codes_of(high, 4, 8)
    high = jnp.concatenate([high & 3, high >> 2], axis=-1)
    return BlockFields(codes_of(low, 4, 16) | (high << 4), half(scale))


def iq1_bn(raw: Array) -> BlockFields:
    """Base-3 digits, as in `tq1_0`."""
    scale, digits, last = fields_of(raw, 2, 12, 1)
    powers = jnp.uint8([81, 27, 9, 3, 1])
    digits = (digits[..., None] * powers).reshape(*raw.shape[:-1], 4, 15)
    last = (last * powers[:4])[..., None]
    digits = jnp.concatenate([digits, last], axis=-1).astype(jnp.uint16) * 3 >> 8
    return BlockFields(flat(digits.astype(jnp.uint8), raw), half(scale))


def iq2_bn(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 4, 16)
    return BlockFields(codes_of(codes, 2, 16), _floats(scale))


def q8_kv(raw: Array) -> BlockFields:
    scale, _, codes = fields_of(raw, 4, 4, 32)
    return BlockFields(view(codes, jnp.int8), _floats(scale))


def i2_s(raw: Array) -> BlockFields:
    """The first of four codes in a byte is the highest."""
    scale, codes = fields_of(raw, 4, 32)
    codes = codes_of(codes, 2, 32).reshape(*raw.shape[:-1], 4, 32)
    return BlockFields(flat(jnp.flip(codes, axis=-2), raw), _floats(scale))


# Trellis types. Their quantizer fits scales that are smaller than they should be by the factors of
# `iq2_kt` and `iq3_kt`; ik_llama.cpp's products multiply with them, its dequantization does not.


def iq1_kt(raw: Array) -> BlockFields:
    scale, scales, low, high = fields_of(raw, 4, 8, 32, 16)
    top = (scales[..., None] >> jnp.arange(4, 8, dtype=jnp.uint8)) & 1
    states = low.astype(jnp.uint16) | (codes_of(high, 4, 16).astype(jnp.uint16) << 8)
    return BlockFields(
        None,
        states=states | (flat(top, raw).astype(jnp.uint16) << 12),
        scale=jnp.asarray(_S4)[scales & 15],
        super_scale=_floats(scale),
    )


def iq2_kt(raw: Array) -> BlockFields:
    scale, scales, states = fields_of(raw, 4, 4, 64)
    return BlockFields(
        None,
        states=view(states, jnp.uint16),
        scale=jnp.asarray(_S4)[codes_of(scales, 4, 4)],
        super_scale=_floats(scale) * np.float32(1.05),
    )


def iq3_kt(raw: Array) -> BlockFields:
    scale, scales, states, signs = fields_of(raw, 4, 4, 64, 32)
    return BlockFields(
        codes_of(signs, 1, 32),
        states=view(states, jnp.uint16),
        scale=codes_of(scales, 4, 4),
        super_scale=_floats(scale) * np.float32(1.01),
    )


def iq4_kt(raw: Array) -> BlockFields:
    scale, packed, low, high = fields_of(raw, 4, 32, 64, 32)
    packed = view(packed, jnp.uint32)
    states = low.astype(jnp.uint16) | (codes_of(high, 4, 32).astype(jnp.uint16) << 8)
    top = (packed[..., None] >> jnp.arange(8, 32, 3, dtype=jnp.uint32)) & 7
    top = (top << 12) | ((packed[..., None] & 1) << 15)
    return BlockFields(
        None,
        states=states | flat(top, raw).astype(jnp.uint16),
        scale=_signed(((packed & 255) >> 1).astype(jnp.uint8), 64),
        super_scale=_floats(scale),
    )


# Interleaved types: bits of the groups of 32 weights are in orders of their own


def _ordered(raw: Array, bits: int, order: tuple[int, ...]) -> Array:
    """Unpacks 4 neighboring codes from each 4 bytes.

    Args:
      raw: `[..., n]`, `4 * bits` bytes for each 32 weights.
      bits: of a code.
      order: the first weight of each 4, lowest bits of the first bytes first.
    """
    quads = codes_of(raw, bits, 4).reshape(*raw.shape[:-1], -1, 8, 4)
    return flat(quads[..., np.argsort(order), :], raw)


def iq2_k_r4(raw: Array) -> BlockFields:
    scale, shift, scales, codes = fields_of(raw, 2, 2, 8, 64)
    scales = _shifted(_signed(codes_of(scales, 4, 8), 8), codes_of(shift, 1, 2))
    return BlockFields(_ordered(codes, 2, _IN_ORDER), scales, super_scale=half(scale))


def iq3_k_r4(raw: Array) -> BlockFields:
    scale, shift, negative, scales, low, high = fields_of(raw, 2, 2, 2, 8, 64, 32)
    scales = _odd_scales(codes_of(scales, 4, 8), codes_of(negative, 1, 2))
    return BlockFields(
        _ordered(low, 2, _IN_ORDER) | (_ordered(high, 1, _IN_ORDER) << 2),
        _shifted(scales, codes_of(shift, 1, 2)),
        super_scale=half(scale),
    )


def iq4_k_r4(raw: Array) -> BlockFields:
    scale, shift, high, low, codes = fields_of(raw, 2, 2, 4, 8, 128)
    scales = _signed(codes_of(low, 4, 8) | (codes_of(high, 2, 4) << 4), 32)
    return BlockFields(
        _ordered(codes, 4, _N4),
        _shifted(scales, codes_of(shift, 1, 2)),
        super_scale=half(scale),
    )


def iq5_k_r4(raw: Array) -> BlockFields:
    rest, top = fields_of(raw, 144, 32)
    low = iq4_k_r4(rest)
    return dataclasses.replace(low, codes=low.codes | (_ordered(top, 1, _P1_D) << 4))


def iq4_ks_r4(raw: Array) -> BlockFields:
    scale, scales, codes = fields_of(raw, 4, 8, 128)
    return BlockFields(_ordered(codes, 4, _N4), _odd(scales), super_scale=_floats(scale))


def iq5_ks_r4(raw: Array) -> BlockFields:
    rest, top = fields_of(raw, 140, 32)
    low = iq4_ks_r4(rest)
    return dataclasses.replace(low, codes=low.codes | (_ordered(top, 1, _P1_D) << 4))


def q2_k_r4(raw: Array) -> BlockFields:
    scale, minimum, scales, codes = fields_of(raw, 2, 2, 16, 64)
    return BlockFields(
        _ordered(codes, 2, _IN_ORDER),
        scales & 15,
        minimum=scales >> 4,
        super_scale=half(scale),
        super_minimum=-half(minimum),
    )


def q3_k_r4(raw: Array) -> BlockFields:
    scale, high, low, top, codes = fields_of(raw, 2, 4, 8, 32, 64)
    return BlockFields(
        _ordered(codes, 2, _IN_ORDER) | (_ordered(top, 1, _IN_ORDER) << 2),
        _signed(codes_of(low, 4, 8) | (codes_of(high, 2, 4) << 4), 32),
        super_scale=half(scale),
    )


def _scales_of_k4(raw: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima of 6 bits each in 12 bytes."""
    high, low = fields_of(raw, 4, 8)
    high = codes_of(high, 4, 4)
    return (low & 15) | ((high & 3) << 4), (low >> 4) | ((high >> 2) << 4)


def q4_k_r4(raw: Array) -> BlockFields:
    scale, minimum, packed, codes = fields_of(raw, 2, 2, 12, 128)
    scales, minima = _scales_of_k4(packed)
    return BlockFields(
        _ordered(codes, 4, _N4),
        scales,
        minimum=minima,
        super_scale=half(scale),
        super_minimum=-half(minimum),
    )


def q5_k_r4(raw: Array) -> BlockFields:
    scale, minimum, packed, top, codes = fields_of(raw, 2, 2, 12, 32, 128)
    scales, minima = _scales_of_k4(packed)
    return BlockFields(
        _ordered(codes, 4, _N4) | (_ordered(top, 1, _P1_E) << 4),
        scales,
        minimum=minima,
        super_scale=half(scale),
        super_minimum=-half(minimum),
    )


def q6_k_r4(raw: Array) -> BlockFields:
    scale, scales, high, low = fields_of(raw, 2, 16, 64, 128)
    codes = _ordered(low, 4, _N4) | (_ordered(high, 2, _P2_B) << 4)
    return BlockFields(codes, view(scales, jnp.int8), super_scale=half(scale))


def iq4_xs_r8(raw: Array) -> BlockFields:
    scale, high, low, codes = fields_of(raw, 2, 2, 4, 128)
    return BlockFields(
        _ordered(codes, 4, _IN_ORDER),
        _signed(codes_of(low, 4, 4) | (codes_of(high, 2, 2) << 4), 32),
        super_scale=half(scale),
    )


def _signs_and_scales(raw: Array) -> tuple[Array, Array]:
    """Each uint32 has a bit of the scale at the bottom of each byte, and 32 signs, scrambled."""
    words = view(raw, jnp.uint32)
    bits = (words[..., None] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)) & 1
    scales = jnp.sum(bits << jnp.arange(4, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    words &= jnp.uint32(0xFEFEFEFE)
    words ^= words >> 1
    signs = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return flat(signs, raw).astype(jnp.uint8), scales.astype(jnp.uint8)


def iq2_xxs_r4(raw: Array) -> BlockFields:
    """Codes as in `iq2_xxs`."""
    scale, packed, entries = fields_of(raw, 2, 32, 32)
    signs, scales = _signs_and_scales(packed)
    codes = look_up(gguf.quants.IQ2_XXS, entries, raw) | (signs << 2)
    return BlockFields(codes, scales, super_scale=half(scale))


def iq3_xxs_r4(raw: Array) -> BlockFields:
    """Codes as in `iq3_xxs`."""
    scale, packed, entries = fields_of(raw, 2, 32, 64)
    signs, scales = _signs_and_scales(packed)
    index = look_up(gguf.quants.IQ3_XXS, entries, raw)
    return BlockFields(jnp.where(signs == 1, 7 - index, 8 + index), scales, super_scale=half(scale))


def iq2_xs_r4(raw: Array) -> BlockFields:
    """Codes as in `iq2_xxs`."""
    scale, entries, scales = fields_of(raw, 2, 64, 8)
    entries = view(entries, jnp.uint16)
    signs = entries >> 9
    signs = (signs ^ (signs << 1)).astype(jnp.uint8)
    codes = look_up(gguf.quants.IQ2_XS, entries & 511, raw) | (codes_of(signs, 1, 1) << 2)
    return BlockFields(codes, codes_of(scales, 4, 1), super_scale=half(scale))


def iq2_s_r4(raw: Array) -> BlockFields:
    """Codes as in `iq2_xxs`."""
    scale, low, high, signs, scales = fields_of(raw, 2, 32, 8, 32, 8)
    entries = low.astype(jnp.uint16) | (codes_of(high, 2, 1).astype(jnp.uint16) << 8)
    codes = look_up(gguf.quants.IQ2_S, entries, raw) | (codes_of(signs, 1, 1) << 2)
    return BlockFields(codes, codes_of(scales, 4, 1), super_scale=half(scale))


def iq3_s_r4(raw: Array) -> BlockFields:
    """Codes as in `iq3_xxs`."""
    scale, low, high, signs, scales = fields_of(raw, 2, 64, 8, 32, 4)
    low = flat(jnp.swapaxes(low.reshape(*raw.shape[:-1], 8, 4, 2), -1, -2), raw)
    entries = low.astype(jnp.uint16) | (codes_of(high, 1, 1).astype(jnp.uint16) << 8)
    index = look_up(gguf.quants.IQ3_S, entries, raw)
    return BlockFields(
        jnp.where(codes_of(signs, 1, 4) == 1, 7 - index, 8 + index),
        codes_of(scales, 4, 4),
        super_scale=half(scale),
    )


def iq1_s_r4(raw: Array) -> BlockFields:
    scale, low, high = fields_of(raw, 2, 4, 2)
    high = view(high, jnp.uint16)
    top = (high >> jnp.arange(0, 12, 3, dtype=jnp.uint16)) & 7
    scales = (high >> 12).astype(jnp.uint8)
    return ternary(low | (top << 8), scales >> 3, scales & 7, half(scale))


def iq1_m_r4(raw: Array) -> BlockFields:
    """Scales have 4 bits, below their sign."""
    scale, low, high, scales = fields_of(raw, 2, 4, 2, 1)
    high = codes_of(high, 4, 1)
    scales = jnp.repeat(codes_of(scales, 4, 1), 2, axis=-1)
    entries = low.astype(jnp.uint16) | ((high & 7).astype(jnp.uint16) << 8)
    found = ternary(entries, high >> 3, 0, half(scale))
    return dataclasses.replace(found, scale=(found.scale << 1) | scales)


def q4_0_r8(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 2, 16)
    return BlockFields(_ordered(codes, 4, _NIBBLES), half(scale))


def mxfp4_r8(raw: Array) -> BlockFields:
    return BlockFields(_ordered(raw[..., 1:], 4, _NIBBLES), mxfp4(raw).scale)


def iq4_nl_r4(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 2, 16)
    return BlockFields(_ordered(codes, 4, _N4), half(scale))


def q5_0_r4(raw: Array) -> BlockFields:
    scale, high, low = fields_of(raw, 2, 4, 16)
    return BlockFields(_ordered(low, 4, _N4) | (_ordered(high, 1, _P1_F) << 4), half(scale))


def q6_0_r4(raw: Array) -> BlockFields:
    scale, high, low = fields_of(raw, 2, 8, 16)
    return BlockFields(_ordered(low, 4, _N4) | (_ordered(high, 2, _IN_ORDER) << 4), half(scale))


def iq2_bn_r4(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 4, 16)
    return BlockFields(_ordered(codes, 2, _IN_ORDER), _floats(scale))


def q8_kv_r8(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 4, 32)
    return BlockFields(view(codes, jnp.int8), _floats(scale))


def q8_k_r8(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 2, 256)
    return BlockFields(view(codes, jnp.int8), half(scale))


def q8_k_r16(raw: Array) -> BlockFields:
    """Codes are stored plus 128."""
    scale, codes = fields_of(raw, 2, 256)
    return BlockFields(view(codes ^ jnp.uint8(128), jnp.int8), half(scale))
