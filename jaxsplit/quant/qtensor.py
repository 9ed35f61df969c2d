"""Quantized matrices on the device: integer codes in bit planes, and scales.

A few plane layouts cover every GGML type. A weight is

    w = scale * value(code) + minimum

where `value` subtracts an offset or looks up a table. A group of neighboring weights of a row
shares its scale and minimum. K-quants keep their two levels of scales: a small integer per group
times a float16 per super-group.

All planes of an `[out, in]` matrix have the shape `[out, n]`, with `n` proportional to `in`. One
partition spec therefore shards them all, and a slice of the matrix is a slice of each plane.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class PlaneLayout:
    """How planes encode weights: the static half of a `QTensor`.

    Attributes:
      bits: width of each code plane, lowest bits first: `(4, 2)` is a plane of the low 4 bits and
        a plane of the 2 bits above them. `(8,)` is a single plane of signed bytes.
      offset: subtracted from a code; ignored with a table.
      table: 8-bit integer value of each code; None: no table.
      decode_scale: decodes stored scales, to integers where there are super-scales and a shift;
        None: they are as they are.
      scale_bits: width of scales and minima. With 4 bits two neighbors share a byte, the first in
        the low half.
      chunk: weights that are packed together. Byte `j` of a chunk's plane, which has `bytes` bytes,
        holds the codes of weights `i * bytes + j`, lowest bits first. The `bytes` weights of one
        `i` must not exceed a group.
      shift: added to the values of a group where the lowest bit of its stored scale is set.
      trellis: the first plane holds 16 bits for each chunk, from which its values are computed;
        codes of one bit in a second plane are signs of their magnitudes.
    """

    bits: tuple[int, ...]
    offset: float = 0
    table: tuple[int, ...] | None = None
    decode_scale: Callable[[Array], Array] | None = None
    scale_bits: int = 8
    chunk: int = 32
    shift: int = 0
    trellis: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array `[..., out, in]`.

    Attributes:
      codes: one plane per entry of `layout.bits`, uint8 `[..., out, in * bits / 8]` (int8 for 8
        bits), or the same bytes as little-endian uint32 `[..., out, in * bits / 32]`.
      scale: `[..., out, in / group]` (half as many bytes for 4 bits): floating-point, integer
        factors of `super_scale`, or the integers that `layout.decode_scale` decodes.
      minimum: like `scale`, or None.
      super_scale: float16 or float32 `[..., out, in / super_group]`, or None.
      super_minimum: like `super_scale`, or None.
      layout: how the planes encode weights.
    """

    codes: tuple[Array, ...]
    scale: Array
    minimum: Array | None = None
    super_scale: Array | None = None
    super_minimum: Array | None = None
    layout: PlaneLayout = dataclasses.field(default=PlaneLayout((8,)), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., out, in]`."""
        plane = self.codes[0]
        weights = plane.shape[-1] * plane.dtype.itemsize * 8 // self.layout.bits[0]
        return (*plane.shape[:-1], weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


Weight = Array | QTensor


def to_u32(w: QTensor) -> QTensor:
    """Reinterprets code planes of bytes as uint32, the width in which kernels load them."""
    planes = [plane.reshape(*plane.shape[:-1], -1, 4) for plane in w.codes]
    codes = [lax.bitcast_convert_type(plane, jnp.uint32) for plane in planes]
    return dataclasses.replace(w, codes=tuple(codes))


def to_u8(w: QTensor) -> QTensor:
    """Converts code planes of uint32 back to bytes.

    It shifts: with a bitcast, XLA:GPU would copy a slice of a stack of matrices instead of reading
    it in place.
    """

    def unpacked(plane: Array) -> Array:
        if plane.dtype != jnp.uint32:
            return plane
        shifted = plane[..., None] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)
        return (shifted & 0xFF).astype(jnp.uint8).reshape(*plane.shape[:-1], -1)

    dtype = jnp.int8 if w.layout.bits == (8,) else jnp.uint8
    planes = [lax.bitcast_convert_type(unpacked(plane), dtype) for plane in w.codes]
    return dataclasses.replace(w, codes=tuple(planes))


def as_bytes(codes: Array, layout: PlaneLayout) -> Array:
    """Reinterprets a code plane, uint32 or bytes, as uint8 `[..., bytes]` (int8 for 8 bits)."""
    dtype = jnp.int8 if layout.bits == (8,) else jnp.uint8
    return lax.bitcast_convert_type(codes, dtype).reshape(*codes.shape[:-1], -1)


def unpack_bits(plane: Array, bits: int, chunk: int) -> Array:
    """Unpacks the codes of one plane: uint8 `[..., in * bits / 8]` to `[..., in]`."""
    if bits == 8:
        return plane
    codes_per_byte = 8 // bits
    packed = plane.reshape(*plane.shape[:-1], -1, 1, chunk // codes_per_byte)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    codes = (packed >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*plane.shape[:-1], -1)


def pack_bits(codes: Array, bits: int, chunk: int) -> Array:
    """The inverse of `unpack_bits`; packs the low `bits` of codes, uint8 `[..., in]`."""
    if bits == 8:
        return codes
    codes_per_byte = 8 // bits
    low = codes & jnp.uint8(2**bits - 1)
    split = low.reshape(*codes.shape[:-1], -1, codes_per_byte, chunk // codes_per_byte)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    packed = jnp.sum(split << shifts, axis=-2, dtype=jnp.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def pack_codes(codes: Array, layout: PlaneLayout) -> tuple[Array, ...]:
    """Packs codes `[..., in]` into planes, uint8 (int8 for 8 bits)."""
    planes, shift = [], 0
    for bits in layout.bits:
        planes.append(pack_bits(codes >> shift if shift else codes, bits, layout.chunk))
        shift += bits
    return tuple(planes)


def decode_codes(codes: Array, layout: PlaneLayout) -> Array:
    """Decodes codes to unscaled float32 values."""
    if layout.table is not None:
        return look_up(codes, layout.table)
    return codes.astype(jnp.float32) - layout.offset if layout.offset else codes.astype(jnp.float32)


TRELLIS_POWERS = tuple(pow(0xCBAC1FED, i, 2**32) for i in range(1, 9))
"""Factors of a state for each value of a trellis chunk."""


def trellis_values(states: Array, index: Array | np.ndarray) -> Array:
    """Values that 16-bit states encode, float32 integers from -126 to 126.

    Each state starts a linear congruential generator; a value is the sum of four of its bytes, cut
    to 6 bits (Tseng et al. 2024, QTIP, arXiv:2406.11235; ik_llama.cpp's multiplier).

    Args:
      states: unsigned `[...]`.
      index: of the value in its chunk, broadcastable to `[...]`.
    """
    if isinstance(index, np.ndarray):
        power = jnp.asarray(np.array(TRELLIS_POWERS, np.uint32)[index])
    else:  # kernels have no constant arrays
        power = jnp.zeros(index.shape, jnp.uint32)
        for i, value in enumerate(TRELLIS_POWERS):
            power = jnp.where(index == i, jnp.uint32(value), power)
    number = (states.astype(jnp.uint32) + 4096) * power
    total = ((number & 0x3F3F3F3F) * jnp.uint32(0x01010101)) >> 24
    return total.astype(jnp.float32) - 126


def trellis_slice(planes: Sequence[Array], index: np.ndarray) -> Array:
    """Values at one place of each chunk of a trellis layout.

    Args:
      planes: the states, unsigned `[..., chunks]`, and the signs, uint8 `[..., chunks]`, if any.
      index: of the value in its chunk, broadcastable to `[..., chunks]`.
    """
    values = trellis_values(planes[0], index)
    if len(planes) == 1:
        return values
    negative = (planes[1] >> jnp.asarray(index, jnp.uint8)) & 1
    return jnp.where(negative == 1, -jnp.abs(values), jnp.abs(values))


def trellis_planes(w: "QTensor") -> list[Array]:
    """The planes of a trellis layout with one element for each chunk, as in `trellis_slice`."""
    # Shifts, not a bitcast: XLA:CPU would copy the states.
    states, *signs = w.codes
    bits = 8 * states.dtype.itemsize
    if bits == 8:
        low, high = states[..., ::2].astype(jnp.uint16), states[..., 1::2].astype(jnp.uint16)
        return [low | (high << 8), *signs]
    shifted = states[..., None] >> jnp.arange(0, bits, 16, dtype=states.dtype)
    halves = (shifted & 0xFFFF).reshape(*states.shape[:-1], -1)
    return [halves, *(as_bytes(plane, w.layout) for plane in signs)]


def unscaled(w: "QTensor") -> Array:
    """The values of all weights before scaling, float32 `[..., out, in]`, without shifts."""
    layout = w.layout
    if layout.trellis:
        planes = [plane[..., None] for plane in trellis_planes(w)]
        return trellis_slice(planes, np.arange(layout.chunk)).reshape(w.shape)
    planes = [as_bytes(plane, layout) for plane in w.codes]
    unpacked = map(partial(unpack_bits, chunk=layout.chunk), planes, layout.bits)
    return decode_codes(combine_planes(unpacked, layout), layout)


def look_up(codes: Array, table: tuple[int, ...]) -> Array:
    """Looks up a table of int8 values, as float32.

    Four entries are packed into a uint32. The upper bits of a code select a uint32, its low two
    bits a byte, which two shifts extract and sign-extend. Inside a fused loop this is faster than a
    gather.
    """
    packed = np.pad(np.asarray(table, np.int8), (0, -len(table) % 4)).view("<u4")
    candidates = [jnp.uint32(entries) for entries in packed]
    bit = 4
    while len(candidates) > 1:
        is_set = (codes & bit) != 0
        pairs = zip(candidates[1::2], candidates[::2], strict=True)
        candidates = [jnp.where(is_set, *pair) for pair in pairs]
        bit *= 2
    in_top_byte = candidates[0] << (((codes & 3) ^ 3).astype(jnp.uint32) * 8)
    return (lax.bitcast_convert_type(in_top_byte, jnp.int32) >> 24).astype(jnp.float32)


def combine_planes(planes: Iterable[Array], layout: PlaneLayout) -> Array:
    """Combines the partial codes of all planes, lowest bits first, into whole codes."""
    codes, *others = planes
    shift = layout.bits[0]
    for plane, bits in zip(others, layout.bits[1:], strict=True):
        codes = codes | (plane << shift)
        shift += bits
    return codes


def pack_scales(values: Array | None, layout: PlaneLayout) -> Array | None:
    """Packs scales (or minima) `[..., groups]` to `layout.scale_bits`."""
    return None if values is None else pack_bits(values, layout.scale_bits, 8 // layout.scale_bits)


def scales(w: QTensor) -> Array:
    """The scales of the groups, float32 `[..., out, in / group]`."""
    return _decode_groups(w.scale, w.super_scale, w.layout, w.layout.decode_scale)


def shifts(w: QTensor) -> Array | None:
    """What values are shifted by, float32 `[..., out, in / group]`; None: nothing."""
    if not w.layout.shift:
        return None
    return group_shifts(w.scale, w.layout).astype(jnp.float32)


def group_shifts(scale: Array, layout: PlaneLayout) -> Array:
    """What stored scales shift their groups' values by, integers."""
    return (scale & 1) * layout.shift


def minima(w: QTensor) -> Array | None:
    """The minima of the groups, float32 `[..., out, in / group]`."""
    return None if w.minimum is None else _decode_groups(w.minimum, w.super_minimum, w.layout)


def row_bounds(w: QTensor) -> Array:
    """Upper bound of the magnitudes of each row's weights: float32 `[..., out]`.

    Integer scales inside super-groups count as the largest that their width allows. The bound is a
    few times looser for it, but only the super-scales are read.
    """
    layout, max_code = w.layout, 2 ** sum(w.layout.bits) - 1
    if layout.table is not None:
        max_value = max(map(abs, layout.table))
    else:
        max_value = 128 if layout.bits == (8,) else max(layout.offset, max_code - layout.offset)
    max_value = 126 if layout.trellis else max_value + layout.shift

    def bound(inner: Array, outer: Array | None, decode: Callable | None = None) -> Array:
        if outer is None or decode:
            return jnp.abs(_decode_groups(inner, outer, layout, decode))
        max_inner = 128 if inner.dtype == jnp.int8 else 2**layout.scale_bits - 1
        return jnp.abs(outer.astype(jnp.float32)) * max_inner

    bounds = bound(w.scale, w.super_scale, layout.decode_scale) * max_value
    if w.minimum is not None:
        bounds = bounds + bound(w.minimum, w.super_minimum)
    return jnp.max(bounds, axis=-1)


def inner_groups(plane: Array, layout: PlaneLayout, decode: Callable | None = None) -> Array:
    """Scales or minima, float32 `[..., groups]`, without those of super-groups."""
    inner = unpack_bits(plane, layout.scale_bits, 8 // layout.scale_bits)
    return (decode(inner) if decode else inner).astype(jnp.float32)


def _decode_groups(
    plane: Array, outer: Array | None, layout: PlaneLayout, decode: Callable | None = None
) -> Array:
    """Scales or minima, float32 `[..., groups]`, times those of super-groups if there are any."""
    inner = inner_groups(plane, layout, decode)
    if outer is None:
        return inner
    groups = inner.reshape(*outer.shape, -1)
    return (groups * outer.astype(jnp.float32)[..., None]).reshape(inner.shape)


def dequantize(w: Weight, dtype: jnp.dtype = jnp.float32) -> Array:
    """Dequantizes to a plain array `[..., out, in]`; computes in float32."""
    if not isinstance(w, QTensor):
        return w.astype(dtype)
    scale, shift, minimum = scales(w), shifts(w), minima(w)
    grouped = unscaled(w).reshape(*scale.shape, -1)
    if shift is not None:
        grouped = grouped + shift[..., None]
    grouped = grouped * scale[..., None]
    if minimum is not None:
        grouped = grouped + minimum[..., None]
    return grouped.reshape(w.shape).astype(dtype)


def take_rows(w: Weight, rows: Array, dtype: jnp.dtype) -> Array:
    """Gathers and dequantizes rows of a matrix: `[out, in]` and int `[...]` to `[..., in]`."""
    return dequantize(jax.tree.map(lambda plane: plane[rows], w), dtype)
