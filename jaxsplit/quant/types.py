"""One entry per GGML type: its block layout, and how blocks become planes on the device.

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h and `gguf/quants.py`.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.errors import JaxsplitError
from jaxsplit.quant.forms import Form, QTensor, Weight, dequantize, pack_codes


@dataclasses.dataclass(frozen=True)
class Parts:
    """Blocks taken apart: codes `[..., block]`, the rest `[..., groups in a block]`.

    The fields are those of `QTensor`, with the codes unpacked: uint8, or int8 for 8 bits.
    """

    codes: Array
    scale: Array
    minimum: Array | None = None
    super_scale: Array | None = None
    super_minimum: Array | None = None


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


def _view(raw: Array, dtype: jnp.dtype) -> Array:
    """Little-endian bytes `[..., n * itemsize]` as numbers `[..., n]`."""
    size = jnp.dtype(dtype).itemsize
    if size == 1:
        return lax.bitcast_convert_type(raw, dtype)
    return lax.bitcast_convert_type(raw.reshape(*raw.shape[:-1], -1, size), dtype)


def _fields(raw: Array, *sizes: int) -> list[Array]:
    """The bytes of a block cut into consecutive fields."""
    fields, start = [], 0
    for size in sizes:
        fields.append(raw[..., start : start + size])
        start += size
    return fields


def _pieces(raw: Array, bits: int, run: int) -> Array:
    """Codes `[..., n * 8 / bits]` of bytes `[..., n]`; piece `i` of byte `j` of each run of bytes
    is code `i * run + j` of that run's codes."""
    packed = raw.reshape(*raw.shape[:-1], -1, 1, run)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    codes = (packed >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*raw.shape[:-1], -1)


def _q4_0(raw: Array) -> Parts:
    scale, codes = _fields(raw, 2, 16)
    return Parts(_pieces(codes, 4, 16), _view(scale, jnp.float16))


def _q4_1(raw: Array) -> Parts:
    scale, minimum, codes = _fields(raw, 2, 2, 16)
    return Parts(
        _pieces(codes, 4, 16), _view(scale, jnp.float16), minimum=_view(minimum, jnp.float16)
    )


def _q8_0(raw: Array) -> Parts:
    scale, codes = _fields(raw, 2, 32)
    return Parts(_view(codes, jnp.int8), _view(scale, jnp.float16))


def _scales_k4(packed: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima of 6 bits that Q4_K and Q5_K keep in 12 bytes."""
    low, high, mixed = _fields(packed, 4, 4, 4)
    scale = jnp.concatenate([low & 63, (mixed & 15) | ((low >> 6) << 4)], axis=-1)
    minimum = jnp.concatenate([high & 63, (mixed >> 4) | ((high >> 6) << 4)], axis=-1)
    return scale, minimum


def _q4_k(raw: Array) -> Parts:
    scale, minimum, packed, codes = _fields(raw, 2, 2, 12, 128)
    scales, minima = _scales_k4(packed)
    return Parts(
        _pieces(codes, 4, 32),
        scales,
        minimum=minima,
        super_scale=_view(scale, jnp.float16),
        super_minimum=-_view(minimum, jnp.float16),
    )


def _q6_k(raw: Array) -> Parts:
    low, high, scales, scale = _fields(raw, 128, 64, 16, 2)
    codes = _pieces(low, 4, 64) | (_pieces(high, 2, 32) << 4)
    return Parts(codes, _view(scales, jnp.int8), super_scale=_view(scale, jnp.float16))


TYPES: dict[str, QuantType] = {
    "F32": QuantType(1, 4, dtype=jnp.float32),
    "F16": QuantType(1, 2, dtype=jnp.float16),
    "BF16": QuantType(1, 2, dtype=jnp.bfloat16),
    "Q4_0": QuantType(32, 18, Form((4,), offset=8), _q4_0),
    "Q4_1": QuantType(32, 20, Form((4,)), _q4_1),
    "Q8_0": QuantType(32, 34, Form((8,)), _q8_0),
    "Q4_K": QuantType(256, 144, Form((4,)), _q4_k),
    "Q6_K": QuantType(256, 210, Form((4, 2), offset=32), _q6_k),
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
        form = dataclasses.replace(form, chunk=min(form.chunk, granule))
    join = {
        field.name: _join(getattr(parts, field.name))
        for field in dataclasses.fields(Parts)
        if field.name != "codes"
    }
    tensor = QTensor(codes=pack_codes(_join(parts.codes), form), form=form, **join)
    return tensor if dtype is None else dequantize(tensor, dtype)


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
