"""Values of trellis layouts in registers, four at a time: for kernels."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.ops.matmul.scaling import scale_by_jax, scale_ptx
from jaxsplit.pallas import plgpu
from jaxsplit.quant.qtensor import TRELLIS_POWERS, trellis_values


def four_values(states: Array, first: Array, signs: Array | None = None) -> Array:
    """Four neighboring values of each state, int8 in the bytes of uint32.

    Args:
      states: uint32 `[...]`, of 16 bits.
      first: index of the first value in its chunk, 0 or 4: int32 `[...]`.
      signs: uint32 `[...]`, whose low 4 bits are the signs of the values' magnitudes; None: the
        values have their own.
    """
    if interpreted():
        return _four_values_by_jax(states, first, signs)
    power = jnp.where(first == 4, jnp.uint32(TRELLIS_POWERS[3]), jnp.uint32(1))
    args = [(states + jnp.uint32(4096)) * power]
    args += [] if signs is None else [signs]
    [result] = plgpu.elementwise_inline_asm(
        four_values_ptx(signed=signs is not None),
        args=args,
        constraints=",".join(["=r", *["r"] * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(states.shape, jnp.int32)],
    )
    return lax.bitcast_convert_type(result, jnp.uint32)


def _four_values_by_jax(states: Array, first: Array, signs: Array | None) -> Array:
    packed = jnp.zeros_like(states)
    for i in range(4):
        value = trellis_values(states, first + i).astype(jnp.int32)
        if signs is not None:
            magnitude = jnp.abs(value)
            value = jnp.where((signs >> i) & 1 == 1, -magnitude, magnitude)
        packed |= (lax.bitcast_convert_type(value, jnp.uint32) & 255) << (8 * i)
    return packed


def four_values_ptx(*, signed: bool) -> str:
    """PTX of `four_values`: `$1` is the state's number before the first value, `$2` the signs."""
    lines = [".reg .b32 number, ones, bias, mask, negative, value<4>;"]
    lines += ["mov.b32 ones, 0x01010101;", f"mov.b32 bias, 0x{-126 % 2**32:08x};"]
    for i, power in enumerate(TRELLIS_POWERS[:4]):
        lines += [
            f"mul.lo.u32 number, $1, 0x{power:08x};",
            "and.b32 number, number, 0x3f3f3f3f;",
            f"dp4a.u32.s32 value{i}, number, ones, bias;",
        ]
        if signed:
            lines.append(f"abs.s32 value{i}, value{i};")
    lines += [
        "prmt.b32 value0, value0, value1, 0x0040;",
        "prmt.b32 value2, value2, value3, 0x0040;",
    ]
    if not signed:
        lines.append("prmt.b32 $0, value0, value2, 0x5410;")
        return "{ " + " ".join(lines) + " }"
    # The factor moves bit `i` to the top of byte `i`; `prmt` replicates it. Bytes are negated
    # without borrows, since magnitudes are below 128.
    lines += [
        "prmt.b32 value0, value0, value2, 0x5410;",
        "and.b32 mask, $2, 15;",
        "mul.lo.u32 mask, mask, 0x10204080;",
        "prmt.b32 mask, mask, mask, 0xba98;",
        "sub.u32 negative, 0x80808080, value0;",
        "xor.b32 negative, negative, 0x80808080;",
        "lop3.b32 $0, value0, negative, mask, 0xd8;",
    ]
    return "{ " + " ".join(lines) + " }"


def scaled_trellis(
    states: Array, place: int, scale: Array, signs: Array | None, *, exponent: int
) -> Array:
    """The values at one place of their chunks, times scales: bfloat16 `[...]`.

    Args:
      states: uint16 `[...]`.
      place: of the values in their chunks.
      scale: bfloat16 `[...]`, times `2**-exponent` and more.
      signs: uint16 `[...]`, of which bit `place` is the sign of the value's magnitude; None: the
        values have their own.
      exponent: see `scale_ptx`.
    """
    if interpreted():
        values = trellis_values(states, jnp.full(states.shape, place))
        if signs is not None:
            negative = (signs >> jnp.uint16(place)) & jnp.uint16(1)
            values = jnp.where(negative == 1, -jnp.abs(values), jnp.abs(values))
        return scale_by_jax(values, scale, exponent)
    args = [states, scale] if signs is None else [states, scale, signs]
    [result] = plgpu.elementwise_inline_asm(
        scaled_trellis_ptx(place, exponent, signed=signs is not None),
        args=args,
        constraints=",".join(["=r", *["r"] * len(args)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16)],
    )
    return result


def scaled_trellis_ptx(place: int, exponent: int, *, signed: bool) -> str:
    """PTX of `scaled_trellis`, for two states in the halves of a register."""
    power = TRELLIS_POWERS[place]
    lines = [".reg .b32 code, number, ones, bias_, sign, value<2>;", "mov.b32 ones, 0x01010101;"]
    # Codes are values plus 128.
    lines.append(f"mov.b32 bias_, 0x{(-126 if signed else 2) % 2**32:08x};")
    for i, extract in enumerate(("and.b32 number, $1, 0xffff;", "shr.b32 number, $1, 16;")):
        lines += [
            extract,
            f"mad.lo.u32 number, number, 0x{power:08x}, 0x{4096 * power % 2**32:08x};",
            "and.b32 number, number, 0x3f3f3f3f;",
            f"dp4a.u32.s32 value{i}, number, ones, bias_;",
        ]
        if signed:
            lines += [
                f"abs.s32 value{i}, value{i};",
                f"shl.b32 sign, $3, {31 - 16 * i - place};",
                "shr.s32 sign, sign, 31;",
                f"xor.b32 value{i}, value{i}, sign;",
                f"sub.u32 value{i}, value{i}, sign;",
                f"add.u32 value{i}, value{i}, 128;",
            ]
    lines.append("prmt.b32 code, value0, value1, 0x5410;")
    lines += scale_ptx("$2", 128, exponent)
    return "{ " + " ".join(lines) + " }"
