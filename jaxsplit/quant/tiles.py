"""Products of some tens of rows with quantized matrices: a kernel for GPUs.

Weights become tiles of the matrix unit in registers, so that they are read from memory as they are
stored.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.quant import kernels
from jaxsplit.quant.forms import Form, QTensor, with_words

MAX_ROWS = 64
"""More rows are faster if the matrix is dequantized first."""

_MIN_TILE = 16  # rows and columns of a tile
_PROGRAMS = 1024  # fewer do not keep a GPU busy
_GROUPS = ("scale", "minimum", "super_scale", "super_minimum")


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How a program multiplies: rows of the matrix, weights of each in a step, warps, and stages of
    the pipeline that reads ahead."""

    height: int
    weights: int
    warps: int
    stages: int


def _tiling(rows: int) -> _Tiling:
    return _Tiling(32, 512, 2, 3) if rows <= _MIN_TILE else _Tiling(64, 256, 4, 3)


def supports(w: QTensor, dtype: jnp.dtype) -> bool:
    """Whether `products` can multiply activations of a dtype with a matrix."""
    return dtype == jnp.bfloat16 and kernels.supports(w)


def products(
    x: Array,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    tiling: _Tiling | None = None,
    splits: int | None = None,
    interpret: bool = False,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Weights are rounded to bfloat16, and so are the scales that they are computed with.

    Args:
      x: bfloat16 `[rows, in]`.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      tiling: of the work; None: a usual one.
      splits: parts of the inner dimension that are multiplied by programs of their own; None: as
        many as keep a GPU busy.
      interpret: run it without a GPU, to test it.
    """
    rows = len(x)
    tiling = tiling or _tiling(rows)
    padded = max(8, pl.next_power_of_2(rows))
    weights = [w if w.codes[0].dtype == jnp.uint32 else with_words(w) for w in weights]
    programs = [pl.cdiv(w.shape[-2], tiling.height) for w in weights]
    if splits is None:
        splits = max(1, _PROGRAMS // sum(programs))
    splits = min(splits, pl.cdiv(x.shape[-1], tiling.weights))
    x = jnp.pad(x, ((0, padded - rows), (0, 0)))
    xs = {form: _by_words(x, form) for form in dict.fromkeys(w.form for w in weights)}
    inputs, structure = jax.tree.flatten(([xs[w.form] for w in weights], weights))
    kernel = partial(
        _kernel, structure=structure, programs=programs, tiling=tiling, interpret=interpret
    )
    shape = (rows,) if splits == 1 else (splits, rows)
    partial_dtype = dtype if splits == 1 else jnp.float32
    results = pl.pallas_call(
        kernel,
        grid=(splits, sum(programs)),
        out_shape=[jax.ShapeDtypeStruct((*shape, w.shape[-2]), partial_dtype) for w in weights],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="quantized_tiles",
    )(*inputs)
    return [y if splits == 1 else jnp.sum(y, axis=0).astype(dtype) for y in results]


def _pieces(form: Form) -> tuple[int, int]:
    """Codes in a byte of the narrowest plane, and words of a chunk in it."""
    pieces = 8 // min(form.bits)
    return pieces, form.chunk // pieces // 4


def _by_words(x: Array, form: Form) -> Array:
    """`[rows, in]` ordered by where the weights are: `[places in a word * rows, words]`."""
    pieces, words = _pieces(form)
    x = x.reshape(len(x), -1, pieces, words, 4).transpose(2, 4, 0, 1, 3)
    return x.reshape(pieces * 4 * x.shape[2], -1)


def _kernel(
    *refs: jax.Ref,
    structure: Any,
    programs: Sequence[int],
    tiling: _Tiling,
    interpret: bool,
) -> None:
    """Some rows of one matrix, with all rows of activations.

    Args:
      *refs: activations and matrices, and results.
      structure: of activations and matrices.
      programs: for each matrix.
      tiling: of the work.
      interpret: as in `products`.
    """
    xs, weights = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    first, outs = 0, refs[structure.num_leaves :]
    part = pl.program_id(0), pl.num_programs(0)
    for x_ref, w, out_ref, count in zip(xs, weights, outs, programs, strict=True):
        program = pl.program_id(1) - first
        multiply = partial(
            _tile, x_ref, w, out_ref, program * tiling.height, part, tiling, interpret
        )
        if len(weights) == 1:
            multiply()
        else:
            pl.when((program >= 0) & (program < count))(multiply)
        first += count


def _tile(
    x_ref: jax.Ref,
    w: QTensor,
    out_ref: jax.Ref,
    first: Array,
    part: tuple[Array, int],
    tiling: _Tiling,
    interpret: bool,
) -> None:
    """The products of some rows of `w`, from the row `first` on.

    A step takes some words of the narrowest plane of each row, and what belongs to them in the
    other planes. The codes at the same place of each word make a tile: a word has four bytes, and
    a byte some pieces.
    """
    form, (out, columns), rows = w.form, w.shape, out_ref.shape[-2]
    pieces, per_chunk = _pieces(form)
    total, padded = columns // (4 * pieces), x_ref.shape[0] // (4 * pieces)
    height, width = tiling.height, max(_MIN_TILE, tiling.weights // (4 * pieces))
    groups = {name: getattr(w, name) for name in _GROUPS if getattr(w, name) is not None}
    length = {name: columns // ref.shape[-1] for name, ref in groups.items()}
    # Neighbouring words that share scales.
    run = min(length["scale"] // 4, per_chunk, width)
    row = jnp.minimum(first + jnp.arange(height), out - 1)
    steps, whole = pl.cdiv(total, width), total % width == 0

    split = kernels.split

    def load(ref: jax.Ref, row: Array, at: Array, inside: Array) -> Array:
        """Elements `[rows, words]`."""
        shape = (len(row), len(at))
        row, at, inside = (
            jnp.broadcast_to(a, shape) for a in (row[:, None], at[None], inside[None])
        )
        if whole:
            return plgpu.load(ref.at[row, at])
        return plgpu.load(ref.at[row, at], mask=inside, other=jnp.zeros((), ref.dtype))

    def scales(step: Array, piece: int) -> tuple[Array, Array | None]:
        """Scales and minima of words, bfloat16 `[height, width]` each."""
        at = step * width + run * jnp.arange(width // run)
        chunk, word = split(at, per_chunk)
        weight = (chunk * pieces + piece) * (4 * per_chunk) + 4 * word
        entry = {
            name: load(ref, row, split(weight, length[name])[0], at < total).astype(jnp.float32)
            for name, ref in groups.items()
        }

        def spread(values: Array) -> Array:
            values = values.astype(jnp.bfloat16)[:, :, None]
            return jnp.broadcast_to(values, (height, width // run, run)).reshape(height, width)

        scale = spread(entry["scale"] * entry.get("super_scale", 1))
        if "minimum" not in entry:
            return scale, None
        return scale, spread(entry["minimum"] * entry.get("super_minimum", 1))

    def step(i: Array, total_: Array) -> Array:
        at = i * width + jnp.arange(width)
        chunk, word = split(at, per_chunk)
        read: dict[Any, Any] = {}
        for piece in range(pieces):
            words, shifts = [], []
            for p, (plane, bits) in enumerate(zip(w.codes, form.bits, strict=True)):
                size = form.chunk * bits // 32  # words of a chunk
                part, before = divmod(piece * per_chunk, size)
                if (p, before) not in read:
                    index = at if size == per_chunk else chunk * size + before + word
                    read[p, before] = load(plane, row, index, at < total)
                words.append(read[p, before])
                shifts.append(part * bits)
            group = piece * 4 * per_chunk // max(length["scale"], 4 * per_chunk)
            if group not in read:
                read[group] = scales(i, piece)
            for byte in range(4):
                tile = _weights(words, shifts, byte, form, *read[group], interpret)
                x_row = (4 * piece + byte) * padded + jnp.arange(padded)
                x = load(x_ref, x_row, at, at < total)
                total_ += lax.dot_general(
                    tile, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
        return total_

    result = jnp.zeros((height, padded), jnp.float32)
    part, parts = part
    per_part = pl.cdiv(steps, parts)
    start = part * per_part
    stop = jnp.minimum(start + per_part, steps)
    result = lax.fori_loop(start, stop, step, result)
    at, of_row = first + jnp.arange(height), jnp.arange(padded)
    at, of_row = (jnp.broadcast_to(a, result.shape) for a in (at[:, None], of_row[None]))
    place = (of_row, at) if out_ref.ndim == 2 else (part, of_row, at)
    inside = (of_row < rows) & (at < out)
    plgpu.store(out_ref.at[place], result.astype(out_ref.dtype), mask=inside)


_ONE = 0x3F80  # 1 in bfloat16
_BASE = 0x4300  # 128, to which an integer below it can be added as bits


def _weights(
    planes: Sequence[Array],
    shifts: Sequence[int],
    byte: int,
    form: Form,
    scale: Array,
    minimum: Array | None,
    interpret: bool,
) -> Array:
    """Weights as bfloat16, one of each word.

    Args:
      planes: words `[height, width]` of each plane.
      shifts: by how much to shift a byte of each plane, to have the code's bits in front.
      byte: which byte of the words.
      form: of the matrix.
      scale: bfloat16, like the words.
      minimum: likewise, or None.
      interpret: as in `products`.
    """
    if interpret:
        code, done = jnp.uint32(0), 0
        for plane, by, bits in zip(planes, shifts, form.bits, strict=True):
            shifted = plane >> jnp.uint32(8 * byte + by)
            code |= (shifted & jnp.uint32(2**bits - 1)) << jnp.uint32(done)
            done += bits
        code = code.astype(jnp.int32)
        value = jnp.where(code > 127, code - 256, code) if form.bits == (8,) else code
        weight = (value.astype(jnp.float32) - form.offset) * scale.astype(jnp.float32)
        if minimum is not None:
            weight += minimum.astype(jnp.float32)
        return weight.astype(jnp.bfloat16)

    # Two words at once, for each of which a register has 16 bits.
    args: list[Array] = []
    constraints = ["=r"]

    def operand(value: Array) -> str:
        """The first register of an operand."""
        name = f"${len(constraints)}"
        args.append(value)
        constraints.extend(["r"] * (value.dtype.itemsize // 2))
        return name

    def both(half: int) -> str:
        return f"0x{half:04x}{half:04x}"

    lines = [".reg .b32 code, part, one, more;", f"mov.b32 code, {both(_BASE)};"]
    done = 0
    for plane, by, bits in zip(planes, shifts, form.bits, strict=True):
        name = operand(plane)
        second = f"${int(name[1:]) + 1}"
        select = byte | byte << 4 | (byte + 4) << 8 | (byte + 4) << 12
        lines.append(f"prmt.b32 part, {name}, {second}, 0x{select:04x};")
        if by != done:
            shift = f"shr.b32 part, part, {by - done};"
            lines.append(shift if by > done else f"shl.b32 part, part, {done - by};")
        if bits == 8:
            # 128 + (code & 127), less 256 or 128 by the sign.
            lines.append(f"mov.b32 more, {both(0xC300)};")
            lines.append(f"lop3.b32 more, part, {both(128)}, more, 0x6A;")
            lines.append(f"lop3.b32 code, part, {both(127)}, code, 0xEA;")
        else:
            lines.append(f"lop3.b32 code, part, {both((2**bits - 1) << done)}, code, 0xEA;")
        done += bits
    if form.bits != (8,):
        less = np.asarray(-128 - form.offset, jnp.bfloat16).view(np.uint16)
        lines.append(f"mov.b32 more, {both(int(less))};")
    lines.append(f"mov.b32 one, {both(_ONE)}; fma.rn.bf16x2 code, code, one, more;")
    name = operand(scale)
    if minimum is None:
        lines.append(f"mov.b32 more, {both(0x8000)};")
        lines.append(f"fma.rn.bf16x2 $0, code, {name}, more;")
    else:
        lines.append(f"fma.rn.bf16x2 $0, code, {name}, {operand(minimum)};")
    [weights] = plgpu.elementwise_inline_asm(
        "{ " + " ".join(lines) + " }",
        args=args,
        constraints=",".join(constraints),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16)],
    )
    return weights
