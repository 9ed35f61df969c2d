"""What stored scales of groups encode: functions of `PlaneLayout.decode_scale`."""

import jax.numpy as jnp
from jax import Array, lax


def half_steps(scales: Array, step: float) -> Array:
    """`(scales + 0.5) * step`, float32."""
    return (scales.astype(jnp.float32) + 0.5) * step


def signed_odd(scales: Array) -> Array:
    """The odd number 1, 3, ..., 15 that the low 3 bits encode, negated if bit 3 is set."""
    magnitude = half_steps(scales & 7, 2)
    return jnp.where(scales > 7, -magnitude, magnitude)


def signed_4(scales: Array) -> Array:
    """The number that the low 4 bits are, negated if bit 4 is set."""
    magnitude = (scales & 15).astype(jnp.float32)
    return jnp.where(scales > 15, -magnitude, magnitude)


def above_shift(scales: Array) -> Array:
    """The scale above the bit that shifts its group's values."""
    return scales >> 1


def odd(scales: Array) -> Array:
    """The odd scale whose lowest bit shifts its group's values."""
    return scales | 1


def e8m0(scales: Array) -> Array:
    """E8M0 scales, halved: `2**(e - 128)`. The smallest two are subnormal; XLA's CPU backend
    flushes them to zero."""
    bits = scales.astype(jnp.uint32)
    bits = jnp.where(bits < 2, jnp.uint32(0x00200000) << bits, (bits - 1) << 23)
    return lax.bitcast_convert_type(bits, jnp.float32)


def ue4m3(scales: Array) -> Array:
    """UE4M3 scales (4 exponent bits, 3 mantissa bits, top bit unused), halved; code 127 is zero.

    The bits are reinterpreted as float16, whose exponent bias differs: that value is 2**8 times too
    small.
    """
    small = lax.bitcast_convert_type((scales & 127).astype(jnp.uint16) << 7, jnp.float16)
    return jnp.where(scales == 127, 0, small.astype(jnp.float32) * 2.0**7)
