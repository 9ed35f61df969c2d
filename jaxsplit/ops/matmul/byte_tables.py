"""Lookups of 8-bit tables in registers, four at a time: for kernels, with byte permutations.

`prmt` picks four of the eight bytes of two registers; tables of more entries take several, and
select by the upper bits of the codes. The bytes' masks are signs that `prmt` replicates.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.pallas import plgpu
from jaxsplit.quant.qtensor import look_up

MAX_ENTRIES = 64


def look_up_bytes(codes: Array, table: Sequence[int]) -> Array:
    """Looks up the codes in the bytes of uint32: int8 entries in the same places."""
    if interpreted():
        return _look_up_by_jax(codes, table)
    lines = ["{", *look_up_ptx("$1", "$0", table), "}"]
    return _elementwise(" ".join(lines), codes)


def look_up_nibbles(packed: Array, table: Sequence[int]) -> tuple[Array, Array]:
    """Looks up 4-bit codes in uint32: of the low half of each byte, and of the high half."""
    if interpreted():
        low, high = packed & jnp.uint32(0x0F0F0F0F), (packed >> 4) & jnp.uint32(0x0F0F0F0F)
        return _look_up_by_jax(low, table), _look_up_by_jax(high, table)
    # Pallas-Triton allows one result; the assembler computes what both have in common once.
    low, high = (_elementwise(nibbles_ptx(table, picks), packed) for picks in ("0x6420", "0x7531"))
    return low, high


def select_bytes(options: Sequence[Array], codes: Array) -> Array:
    """Selects each byte of uint32 by the code in the same place among as many options, a power of
    two."""
    options, bit = list(options), 0
    while len(options) > 1:
        mask = ((codes >> bit) & jnp.uint32(0x01010101)) * jnp.uint32(255)
        pairs = zip(options[::2], options[1::2], strict=True)
        options = [(low & ~mask) | (high & mask) for low, high in pairs]
        bit += 1
    return options[0]


def _look_up_by_jax(codes: Array, table: Sequence[int]) -> Array:
    values = look_up(lax.bitcast_convert_type(codes, jnp.uint8), tuple(table))
    return lax.bitcast_convert_type(values.astype(jnp.int8), jnp.uint32)


def _elementwise(asm: str, operand: Array) -> Array:
    [result] = plgpu.elementwise_inline_asm(
        asm,
        args=[operand],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operand.shape, jnp.int32)],
    )
    return lax.bitcast_convert_type(result, jnp.uint32)


def _words(table: Sequence[int]) -> list[int]:
    """The table in uint32, a power of two of at least two."""
    size = max(8, 1 << (len(table) - 1).bit_length())
    return np.pad(np.asarray(table).astype(np.uint8), (0, size - len(table))).view("<u4").tolist()


def look_up_ptx(code: str, result: str, table: Sequence[int]) -> list[str]:
    """PTX that looks up the four bytes of the register `code`, which it keeps.

    For 8 entries it takes 5 instructions; 9 for 16, 15 for 32, 26 for 64.
    """
    words = _words(table)
    count = len(words)
    lines = [f".reg .b32 low, sel, bits, mask<8>, entry<{count}>;"]
    lines += [f"mov.b32 entry{i}, 0x{word:08x};" for i, word in enumerate(words)]
    # A nibble for each byte, in the low 16 bits.
    lines += [
        f"and.b32 low, {code}, 0x07070707;",
        "shr.b32 sel, low, 4;",
        "or.b32 sel, sel, low;",
        "prmt.b32 sel, sel, sel, 0x0020;",
    ]
    for i in range(count // 2):
        lines.append(f"prmt.b32 entry{i}, entry{2 * i}, entry{2 * i + 1}, sel;")
    count //= 2
    bit = 3
    while count > 1:
        lines += [
            f"shl.b32 bits, {code}, {7 - bit};",
            f"prmt.b32 mask{bit}, bits, bits, 0xba98;",
        ]
        for i in range(count // 2):
            picked = f"entry{i}, entry{2 * i}, entry{2 * i + 1}, mask{bit}"
            lines.append(f"lop3.b32 {picked}, 0xd8;")
        count, bit = count // 2, bit + 1
    return [*lines, f"mov.b32 {result}, entry0;"]


def nibbles_ptx(table: Sequence[int], picks: str) -> str:
    """PTX of one result of `look_up_nibbles`, for 16 entries: 13 instructions for both.

    Args:
      table: the entries.
      picks: selector of the low or the high codes among the looked-up pairs.
    """
    lines = [".reg .b32 sel, pick, a, b, low, high, entry<4>;"]
    lines += [f"mov.b32 entry{i}, 0x{word:08x};" for i, word in enumerate(_words(table))]
    lines += ["and.b32 sel, $1, 0x77777777;", "shr.b32 pick, $1, 1;"]
    lines.append("lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xea;")
    for half in ("low", "high"):
        lines += [
            "prmt.b32 a, entry0, entry1, sel;",
            "prmt.b32 b, entry2, entry3, sel;",
            f"prmt.b32 {half}, a, b, pick;",
        ]
        if half == "low":
            lines += ["shr.b32 sel, sel, 16;", "shr.b32 pick, pick, 16;"]
    lines.append(f"prmt.b32 $0, low, high, {picks};")
    return "{ " + " ".join(lines) + " }"
