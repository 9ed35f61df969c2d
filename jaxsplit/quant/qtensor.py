"""Quantized matrices on the device: integer codes in bit planes, and scales.

Every GGML type takes one of a few forms. A weight is

    w = scale * value(code) + minimum

where `value` subtracts an offset or looks up a table, and scale and minimum belong to a group of
neighboring weights of a row. K-quants keep their two levels of scales: a small integer for each
group times a float16 for each super-group.

All planes of an `[out, in]` matrix have a shape `[out, n]` with `n` proportional to `in`, so that
one partition spec shards them all, and a slice of the matrix consists of slices of its planes.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class Form:
    """How planes encode weights: the static half of a `QTensor`.

    Attributes:
      bits: widths of the code planes, lowest bits first: `(4, 2)` is a plane of the low 4 bits and
        one of the 2 bits above. `(8,)` is one plane of signed bytes.
      offset: subtracted from a code, without a table.
      table: value of each code, an 8-bit integer.
      decode_scale: decodes stored scales to float32; None: they are plain numbers.
      scale_bits: width of scales and minima. With 4 bits, two neighbors share a byte, the first in
        its low half.
      chunk: weights whose codes are packed together. Byte `j` of a chunk's plane holds the codes of
        weights `i * bytes + j`, lowest bits first. The run of weights of one `i` must not be longer
        than a group.
    """

    bits: tuple[int, ...]
    offset: float = 0
    table: tuple[int, ...] | None = None
    decode_scale: Callable[[Array], Array] | None = None
    scale_bits: int = 8
    chunk: int = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array `[..., out, in]`.

    Attributes:
      codes: a plane for each of `form.bits`, uint8 `[..., out, in * bits / 8]` (int8 for 8 bits);
        or the same bytes as little-endian uint32 `[..., out, in * bits / 32]`.
      scale: `[..., out, in / group]` (half as many bytes for 4 bits): float16, integer factors of
        `super_scale`, or bytes for `form.decode_scale`.
      minimum: like `scale`, or None.
      super_scale: float16 `[..., out, in / super_group]`, or None.
      super_minimum: like `super_scale`, or None.
      form: how the planes encode weights.
    """

    codes: tuple[Array, ...]
    scale: Array
    minimum: Array | None = None
    super_scale: Array | None = None
    super_minimum: Array | None = None
    form: Form = dataclasses.field(default=Form((8,)), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., out, in]`."""
        plane = self.codes[0]
        weights = plane.shape[-1] * plane.dtype.itemsize * 8 // self.form.bits[0]
        return (*plane.shape[:-1], weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


Weight = Array | QTensor


def with_words(w: QTensor) -> QTensor:
    """Converts code planes to uint32."""
    planes = [plane.reshape(*plane.shape[:-1], -1, 4) for plane in w.codes]
    words = [lax.bitcast_convert_type(plane, jnp.uint32) for plane in planes]
    return dataclasses.replace(w, codes=tuple(words))


def with_bytes(w: QTensor) -> QTensor:
    """The inverse of `with_words`, by shifts: a bitcast would make XLA:GPU copy a slice of a stack
    of matrices instead of reading it in place."""

    def as_bytes(plane: Array) -> Array:
        if plane.dtype != jnp.uint32:
            return plane
        shifted = plane[..., None] >> jnp.arange(0, 32, 8, dtype=jnp.uint32)
        return (shifted & 0xFF).astype(jnp.uint8).reshape(*plane.shape[:-1], -1)

    dtype = jnp.int8 if w.form.bits == (8,) else jnp.uint8
    planes = [lax.bitcast_convert_type(as_bytes(plane), dtype) for plane in w.codes]
    return dataclasses.replace(w, codes=tuple(planes))


def as_bytes(codes: Array, form: Form) -> Array:
    """Reinterprets words or bytes of codes as bytes `[..., bytes]`, int8 for 8 bits."""
    dtype = jnp.int8 if form.bits == (8,) else jnp.uint8
    return lax.bitcast_convert_type(codes, dtype).reshape(*codes.shape[:-1], -1)


def unpack_bits(plane: Array, bits: int, chunk: int) -> Array:
    """Unpacks the codes of one plane: uint8 `[..., in * bits / 8]` to `[..., in]`."""
    if bits == 8:
        return plane
    per_byte = 8 // bits
    packed = plane.reshape(*plane.shape[:-1], -1, 1, chunk // per_byte)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    codes = (packed >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*plane.shape[:-1], -1)


def pack_bits(codes: Array, bits: int, chunk: int) -> Array:
    """The inverse of `unpack_bits`: the low `bits` of uint8 `[..., in]`."""
    if bits == 8:
        return codes
    per_byte = 8 // bits
    low = codes & jnp.uint8(2**bits - 1)
    split = low.reshape(*codes.shape[:-1], -1, per_byte, chunk // per_byte)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    packed = jnp.sum(split << shifts, axis=-2, dtype=jnp.uint8)
    return packed.reshape(*codes.shape[:-1], -1)


def pack_codes(codes: Array, form: Form) -> tuple[Array, ...]:
    """Packs codes `[..., in]` into planes, uint8 (int8 for 8 bits)."""
    planes, shift = [], 0
    for bits in form.bits:
        planes.append(pack_bits(codes >> shift if shift else codes, bits, form.chunk))
        shift += bits
    return tuple(planes)


def value_of(codes: Array, form: Form) -> Array:
    """Decodes codes to unscaled float32 values."""
    if form.table is not None:
        return _look_up(codes, form.table)
    return codes.astype(jnp.float32) - form.offset if form.offset else codes.astype(jnp.float32)


def _look_up(codes: Array, table: tuple[int, ...]) -> Array:
    """Looks up a table of bytes, as float32: the code's upper bits select a word of four entries,
    its lower bits shift out a byte. Inside a fused loop this is faster than a gather."""
    packed = np.pad(np.asarray(table, np.int8), (0, -len(table) % 4)).view("<u4")
    words = [jnp.uint32(word) for word in packed]
    bit = 4
    while len(words) > 1:
        upper = (codes & bit) != 0
        words = [jnp.where(upper, *pair) for pair in zip(words[1::2], words[::2], strict=True)]
        bit *= 2
    on_top = words[0] << (((codes & 3) ^ 3).astype(jnp.uint32) * 8)
    return (lax.bitcast_convert_type(on_top, jnp.int32) >> 24).astype(jnp.float32)


def combine(planes: Iterable[Array], form: Form) -> Array:
    """Combines the codes of all planes, lowest bits first."""
    codes, shift = None, 0
    for plane, bits in zip(planes, form.bits, strict=True):
        codes = plane if codes is None else codes | (plane << shift)
        shift += bits
    return codes


def pack_scales(values: Array | None, form: Form) -> Array | None:
    """Packs scales (or minima) `[..., groups]` to the form's width."""
    return None if values is None else pack_bits(values, form.scale_bits, 8 // form.scale_bits)


def scales(w: QTensor) -> Array:
    """The scales of the groups, float32 `[..., out, in / group]`."""
    return _per_group(w.scale, w.super_scale, w.form, w.form.decode_scale)


def minima(w: QTensor) -> Array | None:
    """The minima of the groups, float32 `[..., out, in / group]`."""
    return None if w.minimum is None else _per_group(w.minimum, w.super_minimum, w.form)


def row_bounds(w: QTensor) -> Array:
    """Upper bound of the magnitudes of each row's weights: float32 `[..., out]`.

    Scales inside super-groups count as their largest possible value: reading only the super-scales
    is worth a bound that is a few times looser.
    """
    form, code = w.form, 2 ** sum(w.form.bits) - 1
    if form.table is not None:
        value = max(map(abs, form.table))
    else:
        value = 128 if form.bits == (8,) else max(form.offset, code - form.offset)

    def bound(inner: Array, outer: Array | None, decode: Callable | None = None) -> Array:
        if outer is None or decode:
            return jnp.abs(_per_group(inner, outer, form, decode))
        most = 128 if inner.dtype == jnp.int8 else 2**form.scale_bits - 1
        return jnp.abs(outer.astype(jnp.float32)) * most

    bounds = bound(w.scale, w.super_scale, form.decode_scale) * value
    if w.minimum is not None:
        bounds = bounds + bound(w.minimum, w.super_minimum)
    return jnp.max(bounds, axis=-1)


def _per_group(
    plane: Array, outer: Array | None, form: Form, decode: Callable | None = None
) -> Array:
    inner = unpack_bits(plane, form.scale_bits, 8 // form.scale_bits)
    inner = decode(inner) if decode else inner.astype(jnp.float32)
    if outer is None:
        return inner
    groups = inner.reshape(*outer.shape, -1)
    return (groups * outer.astype(jnp.float32)[..., None]).reshape(inner.shape)


def dequantize(w: Weight, dtype: jnp.dtype = jnp.float32) -> Array:
    """Dequantizes to a plain array `[..., out, in]`, computed in float32."""
    if not isinstance(w, QTensor):
        return w.astype(dtype)
    form = w.form
    planes = [as_bytes(plane, form) for plane in w.codes]
    codes = combine(map(partial(unpack_bits, chunk=form.chunk), planes, form.bits), form)
    scale, minimum = scales(w), minima(w)
    grouped = value_of(codes, form).reshape(*scale.shape, -1) * scale[..., None]
    if minimum is not None:
        grouped = grouped + minimum[..., None]
    return grouped.reshape(w.shape).astype(dtype)


def take_rows(w: Weight, rows: Array, dtype: jnp.dtype) -> Array:
    """Gathers and dequantizes rows of a matrix: `[out, in]` and int `[...]` to `[..., in]`."""
    return dequantize(jax.tree.map(lambda plane: plane[rows], w), dtype)
