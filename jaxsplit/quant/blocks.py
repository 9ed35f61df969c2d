"""Parsers of raw GGML blocks: codes, scales and minima, one function per block layout.

The layouts are defined in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h and in
`gguf/quants.py`, whose codebooks ("grids" of 4 or 8 neighboring weights) are used unchanged.
Codebooks are looked up here, once, at load time: the device keeps one code per weight.
"""

import dataclasses
import functools

import gguf.quants
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class BlockFields:
    """Fields of parsed blocks: codes `[..., block]`, all others `[..., groups per block]`.

    They correspond to the fields of `QTensor` but are not packed: codes are uint8, int8 for 8 bits.
    Trellis types have `states`, uint16 `[..., block / chunk]`, and codes for signs only, if any.
    """

    codes: Array | None
    scale: Array
    states: Array | None = None
    minimum: Array | None = None
    super_scale: Array | None = None
    super_minimum: Array | None = None


def view(raw: Array, dtype: jnp.dtype) -> Array:
    """Reinterprets little-endian bytes `[..., n * itemsize]` as elements `[..., n]`."""
    size = jnp.dtype(dtype).itemsize
    if size == 1:
        return lax.bitcast_convert_type(raw, dtype)
    return lax.bitcast_convert_type(raw.reshape(*raw.shape[:-1], -1, size), dtype)


def half(raw: Array) -> Array:
    """Reinterprets bytes `[..., 2 * n]` as float16 `[..., n]`."""
    return view(raw, jnp.float16)


def fields_of(raw: Array, *sizes: int) -> list[Array]:
    """Splits the bytes of a block into consecutive fields of these sizes."""
    fields, start = [], 0
    for size in sizes:
        fields.append(raw[..., start : start + size])
        start += size
    return fields


def codes_of(raw: Array, bits: int, run: int) -> Array:
    """Unpacks bytes `[..., n]` into codes `[..., n * 8 / bits]`.

    Within each run of `run` bytes, code `i * run + j` starts at bit `i * bits` of byte `j`.
    """
    packed = raw.reshape(*raw.shape[:-1], -1, 1, run)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    codes = (packed >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*raw.shape[:-1], -1)


def flat(values: Array, raw: Array) -> Array:
    """Flattens values to `[*leading dimensions of raw, n]`."""
    return values.reshape(*raw.shape[:-1], -1)


# Blocks of 32, and NVFP4's of 64


def q4_0(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 2, 16)
    return BlockFields(codes_of(codes, 4, 16), half(scale))


def q4_1(raw: Array) -> BlockFields:
    scale, minimum, codes = fields_of(raw, 2, 2, 16)
    return BlockFields(codes_of(codes, 4, 16), half(scale), minimum=half(minimum))


def q5_0(raw: Array) -> BlockFields:
    scale, high, low = fields_of(raw, 2, 4, 16)
    return BlockFields(codes_of(low, 4, 16) | (codes_of(high, 1, 1) << 4), half(scale))


def q5_1(raw: Array) -> BlockFields:
    scale, minimum, high, low = fields_of(raw, 2, 2, 4, 16)
    codes = codes_of(low, 4, 16) | (codes_of(high, 1, 1) << 4)
    return BlockFields(codes, half(scale), minimum=half(minimum))


def q8_0(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 2, 32)
    return BlockFields(view(codes, jnp.int8), half(scale))


def mxfp4(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 1, 16)
    return BlockFields(codes_of(codes, 4, 16), scale)


def nvfp4(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 4, 32)
    return BlockFields(codes_of(codes, 4, 8), scale)


# Super-blocks of 256 weights with two levels of scales


def q2_k(raw: Array) -> BlockFields:
    scales, codes, scale, minimum = fields_of(raw, 16, 64, 2, 2)
    return BlockFields(
        codes_of(codes, 2, 32),
        scales & 15,
        minimum=scales >> 4,
        super_scale=half(scale),
        super_minimum=-half(minimum),
    )


def q3_k(raw: Array) -> BlockFields:
    high, low, scales, scale = fields_of(raw, 32, 64, 12, 2)
    codes = codes_of(low, 2, 32) | (codes_of(high, 1, 32) << 2)
    low, high = fields_of(scales, 8, 4)
    scales = codes_of(low, 4, 8) | (codes_of(high, 2, 4) << 4)
    return BlockFields(codes, scales.astype(jnp.int8) - 32, super_scale=half(scale))


def _scales_k4(packed: Array) -> tuple[Array, Array]:
    """Unpacks the 8 scales and 8 minima of 6 bits each that Q4_K and Q5_K store in 12 bytes."""
    low, high, mixed = fields_of(packed, 4, 4, 4)
    scale = jnp.concatenate([low & 63, (mixed & 15) | ((low >> 6) << 4)], axis=-1)
    minimum = jnp.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], axis=-1)
    return scale, minimum


def q4_k(raw: Array) -> BlockFields:
    scale, minimum, packed, codes = fields_of(raw, 2, 2, 12, 128)
    scales, minima = _scales_k4(packed)
    return BlockFields(
        codes_of(codes, 4, 32),
        scales,
        minimum=minima,
        super_scale=half(scale),
        super_minimum=-half(minimum),
    )


def q5_k(raw: Array) -> BlockFields:
    scale, minimum, packed, high, low = fields_of(raw, 2, 2, 12, 32, 128)
    scales, minima = _scales_k4(packed)
    return BlockFields(
        codes_of(low, 4, 32) | (codes_of(high, 1, 32) << 4),
        scales,
        minimum=minima,
        super_scale=half(scale),
        super_minimum=-half(minimum),
    )


def q6_k(raw: Array) -> BlockFields:
    low, high, scales, scale = fields_of(raw, 128, 64, 16, 2)
    codes = codes_of(low, 4, 64) | (codes_of(high, 2, 32) << 4)
    return BlockFields(codes, view(scales, jnp.int8), super_scale=half(scale))


def iq4_xs(raw: Array) -> BlockFields:
    scale, high, low, codes = fields_of(raw, 2, 2, 4, 128)
    scales = codes_of(low, 4, 1) | (codes_of(high, 2, 1) << 4)
    return BlockFields(
        codes_of(codes, 4, 16), scales.astype(jnp.int8) - 32, super_scale=half(scale)
    )


# One and two bits


def q1_0(raw: Array) -> BlockFields:
    scale, codes = fields_of(raw, 2, 16)
    return BlockFields(codes_of(codes, 1, 1), half(scale))


def tq1_0(raw: Array) -> BlockFields:
    """Each byte holds 5 base-3 digits (the last four bytes: 4), as a fraction of 256.

    A multiplication by a power of 3, modulo 256, brings a digit to the front of the fraction.
    """
    scale, digits = raw[..., 52:], []
    for start, end, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        powers = jnp.uint8([[1], [3], [9], [27], [81]][:count])
        digits.append(flat(raw[..., None, start:end] * powers, raw))
    digits = jnp.concatenate(digits, axis=-1).astype(jnp.uint16) * 3 >> 8
    return BlockFields(digits.astype(jnp.uint8), half(scale))


def tq2_0(raw: Array) -> BlockFields:
    codes, scale = fields_of(raw, 64, 2)
    return BlockFields(codes_of(codes, 2, 32), half(scale))


# Codebooks


@functools.cache
def _grid(codebook: type) -> np.ndarray:
    """A codebook of the gguf package, uint8 `[entries, weights]`, as indices into its sorted
    distinct weights."""
    codebook.init_grid()
    return np.searchsorted(codebook.grid_map, codebook.grid[0, 0]).astype(np.uint8)


def look_up(codebook: type, index: Array, raw: Array) -> Array:
    """Looks up codebook entries: `[..., block]`."""
    return flat(jnp.asarray(_grid(codebook))[index], raw)


def _signs(packed: Array) -> Array:
    """Unpacks uint32 `[..., n]` with 4 x 7 sign bits each into `[..., n, 32]`, 1 for negative.

    The eighth sign of each group is implicit: the number of negative signs is even.
    """
    signs = (packed[..., None] >> jnp.arange(0, 28, 7, dtype=jnp.uint32)) & 127
    signs = signs | ((lax.population_count(signs) & 1) << 7)
    return codes_of(signs.astype(jnp.uint8), 1, 1)


def iq2_xxs(raw: Array) -> BlockFields:
    """Codes: index of the magnitude, plus 4 for a negative weight."""
    scale, rest = fields_of(raw, 2, 64)
    rest = rest.reshape(*raw.shape[:-1], 8, 8)
    signs_and_scales = view(rest[..., 4:], jnp.uint32)[..., 0]
    codes = look_up(gguf.quants.IQ2_XXS, rest[..., :4], raw)
    return BlockFields(
        codes | (flat(_signs(signs_and_scales), raw) << 2),
        (signs_and_scales >> 28).astype(jnp.uint8),
        super_scale=half(scale),
    )


def iq2_xs(raw: Array) -> BlockFields:
    """Codes as in `iq2_xxs`."""
    scale, entries, scales = fields_of(raw, 2, 64, 8)
    entries = view(entries, jnp.uint16)
    signs = (entries >> 9).astype(jnp.uint8)
    signs = codes_of(signs | ((lax.population_count(signs) & 1) << 7), 1, 1)
    return BlockFields(
        look_up(gguf.quants.IQ2_XS, entries & 511, raw) | (signs << 2),
        codes_of(scales, 4, 1),
        super_scale=half(scale),
    )


def iq2_s(raw: Array) -> BlockFields:
    """Codes as in `iq2_xxs`."""
    scale, low, signs, high, scales = fields_of(raw, 2, 32, 32, 8, 8)
    entries = low.astype(jnp.uint16) | (codes_of(high, 2, 1).astype(jnp.uint16) << 8)
    return BlockFields(
        look_up(gguf.quants.IQ2_S, entries, raw) | (codes_of(signs, 1, 1) << 2),
        codes_of(scales, 4, 1),
        super_scale=half(scale),
    )


def iq3_xxs(raw: Array) -> BlockFields:
    """Codes: 8 + index of the magnitude, or 7 - index for a negative weight."""
    scale, entries, signs_and_scales = fields_of(raw, 2, 64, 32)
    signs_and_scales = view(signs_and_scales, jnp.uint32)
    index = look_up(gguf.quants.IQ3_XXS, entries, raw)
    return BlockFields(
        jnp.where(flat(_signs(signs_and_scales), raw) == 1, 7 - index, 8 + index),
        (signs_and_scales >> 28).astype(jnp.uint8),
        super_scale=half(scale),
    )


def iq3_s(raw: Array) -> BlockFields:
    """Codes as in `iq3_xxs`."""
    scale, low, high, signs, scales = fields_of(raw, 2, 64, 8, 32, 4)
    entries = low.astype(jnp.uint16) | (codes_of(high, 1, 1).astype(jnp.uint16) << 8)
    index = look_up(gguf.quants.IQ3_S, entries, raw)
    return BlockFields(
        jnp.where(codes_of(signs, 1, 1) == 1, 7 - index, 8 + index),
        codes_of(scales, 4, 1),
        super_scale=half(scale),
    )


def ternary(entries: Array, negative: Array, scales: Array | int, scale: Array) -> BlockFields:
    """IQ1: weights -1, 0 and 1, to which a group adds or from which it subtracts 1/8.

    A group that subtracts is encoded as the negative of a group that adds.

    Args:
      entries: codebook indices, `[..., block / 8]`.
      negative: 1 for groups that subtract, uint8 `[..., groups]`.
      scales: of 3 bits, uint8 `[..., groups]`.
      scale: float16 `[..., 1]`.

    Returns:
      codes 0, 1 and 2, and 4-bit scales whose top bit is the sign.
    """
    index = look_up(gguf.quants.IQ1_S, entries, scale)
    flip = jnp.repeat(negative, index.shape[-1] // negative.shape[-1], axis=-1) == 1
    codes = jnp.where(flip, 2 - index, index)
    return BlockFields(codes, scales | (negative << 3), super_scale=scale)


def iq1_s(raw: Array) -> BlockFields:
    scale, low, high = fields_of(raw, 2, 32, 16)
    high = view(high, jnp.uint16)
    entries = (high[..., None] >> jnp.arange(0, 12, 3, dtype=jnp.uint16)) & 7
    entries = low.astype(jnp.uint16) | (flat(entries, raw) << 8)
    scales = (high >> 12).astype(jnp.uint8)
    return ternary(entries, scales >> 3, scales & 7, half(scale))


def iq1_m(raw: Array) -> BlockFields:
    """Two neighboring groups of 8 share a scale. Each uint16 holds four scales of 3 bits and, in
    its top 4 bits, a quarter of the float16 super-scale."""
    low, high, packed = fields_of(raw, 32, 16, 8)
    packed = view(packed, jnp.uint16)
    scale = jnp.sum((packed >> 12) << jnp.arange(0, 16, 4, dtype=jnp.uint16), -1, dtype=jnp.uint16)
    scales = (packed[..., None] >> jnp.arange(0, 12, 3, dtype=jnp.uint16)) & 7
    high = codes_of(high, 4, 1)
    entries = low.astype(jnp.uint16) | ((high & 7).astype(jnp.uint16) << 8)
    return ternary(
        entries,
        high >> 3,
        jnp.repeat(flat(scales, raw).astype(jnp.uint8), 2, axis=-1),
        lax.bitcast_convert_type(scale, jnp.float16)[..., None],
    )
