"""The few PTX instructions of inline assembly in kernels, run on the host (PTX ISA 9.0)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def elementwise_inline_asm(
    asm: str,
    *,
    args: Sequence[jax.Array],
    constraints: str,
    pack: int,
    result_shape_dtypes: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Stands in for the function of that name, for registers of one or two elements."""
    count = len(result_shape_dtypes)
    assert constraints == ",".join([*["=r"] * count, *["r"] * len(args)])
    registers = {}
    for i, x in enumerate(args, count):
        assert x.dtype.itemsize * pack == 4
        registers[f"${i}"] = np.asarray(x).reshape(-1, pack).copy().view(np.uint32)[:, 0]
    count = len(registers[f"${count}"])

    def value(operand: str) -> np.ndarray:
        if operand[0].isdigit():
            return np.full(count, int(operand, 0), np.uint32)
        return registers[operand]

    def numbers(operand: str) -> np.ndarray:
        halves = value(operand).view(np.uint16).view(jnp.bfloat16)
        return halves.astype(np.float64)

    def lop3(a: str, b: str, c: str, table: str) -> np.ndarray:
        found = np.zeros(count, np.uint32)
        for case in range(8):
            if int(table, 0) >> case & 1:
                bits = zip((a, b, c), (4, 2, 1), strict=True)
                found |= np.bitwise_and.reduce(
                    [value(x) if case & bit else ~value(x) for x, bit in bits]
                )
        return found

    def fma(a: str, b: str, c: str) -> np.ndarray:
        # Exact in float64, then rounded once.
        rounded = (numbers(a) * numbers(b) + numbers(c)).astype(jnp.bfloat16)
        return rounded.view(np.uint16).view(np.uint32)

    def prmt(a: str, b: str, selector: str) -> np.ndarray:
        pool, found = value(a).astype(np.uint64) | value(b).astype(np.uint64) << 32, 0
        for byte in range(4):
            pick = value(selector) >> (4 * byte) & 15
            chosen = (pool >> (8 * (pick & 7))).astype(np.uint32) & 255
            sign = np.where(chosen > 127, np.uint32(255), np.uint32(0))
            found |= np.where(pick > 7, sign, chosen) << 8 * byte
        return found.astype(np.uint32)

    def dp4a(a: str, b: str, c: str) -> np.ndarray:
        products = value(a).view(np.uint8).astype(np.int32) * value(b).view(np.int8)
        total = products.reshape(-1, 4).sum(axis=1, dtype=np.int32) + value(c).view(np.int32)
        return total.view(np.uint32)

    instructions = {
        "mov.b32": value,
        "and.b32": lambda a, b: value(a) & value(b),
        "or.b32": lambda a, b: value(a) | value(b),
        "xor.b32": lambda a, b: value(a) ^ value(b),
        "sub.u32": lambda a, b: value(a) - value(b),
        "shr.s32": lambda a, by: (value(a).view(np.int32) >> int(by)).view(np.uint32),
        "mad.lo.u32": lambda a, b, c: value(a) * value(b) + value(c),
        "mul.lo.u32": lambda a, b: value(a) * value(b),
        "abs.s32": lambda a: np.abs(value(a).view(np.int32)).view(np.uint32),
        "dp4a.u32.s32": dp4a,
        "add.u32": lambda a, b: value(a) + value(b),
        "prmt.b32": prmt,
        "shr.b32": lambda a, by: value(a) >> int(by),
        "shl.b32": lambda a, by: value(a) << int(by),
        "lop3.b32": lop3,
        "fma.rn.bf16x2": fma,
    }
    for line in asm.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name and name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            registers[target] = instructions[name](*sources)
    return [
        jnp.asarray(registers[f"${i}"].view(result.dtype).reshape(result.shape))
        for i, result in enumerate(result_shape_dtypes)
    ]
