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

_MOST_WEIGHTS = 512  # of a row in a step
_PROGRAMS = 512  # fewer do not keep a GPU busy


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How a program multiplies: rows of the matrix, words of each in a step, warps, and stages of
    the pipeline that reads ahead."""

    height: int
    words: int
    warps: int
    stages: int


def _tiling(rows: int) -> _Tiling:
    """By what measured best."""
    if rows <= 8:
        return _Tiling(32, 64, 2, 3)
    if rows <= 16:
        return _Tiling(32, 64, 2, 2)
    return _Tiling(64, 64, 4, 2) if rows <= 32 else _Tiling(128, 32, 4, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Rows that are multiplied with one of a stack of matrices, some at a time.

    Attributes:
      matrix: int32 `[groups]`: which of the stack.
      first: likewise: the row of the results that a group begins with.
      stop: likewise: the row before which it ends.
      read: int32 `[groups, rows]`: the rows that it multiplies, the ones from `stop` on in vain.
      count: groups that there are.
    """

    matrix: Array
    first: Array
    stop: Array
    read: Array
    count: Array


def supports(w: QTensor, dtype: jnp.dtype) -> bool:
    """Whether `products` can multiply activations of a dtype with a matrix."""
    return dtype == jnp.bfloat16 and kernels.supports(w)


def products(
    x: Array,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    groups: Groups | None = None,
    results: int = 0,
    tiling: _Tiling | None = None,
    parts: int | None = None,
    interpret: bool = False,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Weights are rounded to bfloat16, and so are the scales that they are computed with.

    Args:
      x: bfloat16 `[rows, in]`.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      groups: weights are stacks `[matrices, out, in]`, which these are multiplied with.
      results: rows of the results of groups.
      tiling: of the work; None: a usual one.
      parts: of the inner dimension, which are multiplied by programs of their own; None: as many
        as keep a GPU busy.
      interpret: run it without a GPU, to test it.
    """
    width = max(8, pl.next_power_of_2(len(x))) if groups is None else groups.read.shape[1]
    tiling = tiling or _tiling(width)
    weights = [w if w.codes[0].dtype == jnp.uint32 else with_words(w) for w in weights]
    programs = [pl.cdiv(w.shape[-2], tiling.height) for w in weights]
    if groups is not None:
        parts, count, rows = 1, len(groups.matrix), results
    else:
        if parts is None:
            parts = max(1, _PROGRAMS // sum(programs))
        parts = count = min(parts, pl.cdiv(x.shape[-1], _MOST_WEIGHTS))
        rows = len(x)
        x = jnp.pad(x, ((0, width - rows), (0, 0)))
    xs = {form: _by_words(x, form) for form in dict.fromkeys(w.form for w in weights)}
    inputs, structure = jax.tree.flatten(([xs[w.form] for w in weights], weights, groups))
    kernel = partial(
        _kernel,
        structure=structure,
        programs=programs,
        width=width,
        tiling=tiling,
        interpret=interpret,
    )
    shape = (rows,) if parts == 1 else (parts, rows)
    of_part = dtype if parts == 1 else jnp.float32
    ys = pl.pallas_call(
        kernel,
        grid=(count, sum(programs)),
        out_shape=[jax.ShapeDtypeStruct((*shape, w.shape[-2]), of_part) for w in weights],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="quantized_tiles",
    )(*inputs)
    return [y if parts == 1 else jnp.sum(y, axis=0).astype(dtype) for y in ys]


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
    width: int,
    tiling: _Tiling,
    interpret: bool,
) -> None:
    """Some rows of one matrix, with all rows of activations, or those of a group.

    Args:
      *refs: activations, matrices and groups, and results.
      structure: of activations, matrices and groups.
      programs: for each matrix.
      width: rows of activations.
      tiling: of the work.
      interpret: as in `products`.
    """
    xs, weights, groups = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    begin, outs, number = 0, refs[structure.num_leaves :], pl.program_id(0)
    for x_ref, w, out_ref, count in zip(xs, weights, outs, programs, strict=True):
        program = pl.program_id(1) - begin
        first = program * tiling.height
        multiply = partial(
            _tile, x_ref, w, groups, out_ref, first, number, width, tiling, interpret
        )
        here = (program >= 0) & (program < count)
        if groups is not None:
            here &= number < groups.count[()]
        if len(weights) == 1 and groups is None:
            multiply()
        else:
            pl.when(here)(multiply)
        begin += count


def _tile(
    x_ref: jax.Ref,
    w: QTensor,
    groups: Groups | None,
    out_ref: jax.Ref,
    first: Array,
    number: Array,
    width: int,
    tiling: _Tiling,
    interpret: bool,
) -> None:
    """The products of some rows of `w`, from the row `first` on, with the group of a number or a
    part of the columns.

    A step takes some words of the narrowest plane of each row, and what belongs to them in the
    other planes. The codes at the same place of each word make a tile: a word has four bytes, and
    a byte some pieces.
    """
    form, (*_, out, columns) = w.form, w.shape
    pieces, per_chunk = _pieces(form)
    total, x_rows = columns // (4 * pieces), x_ref.shape[0] // (4 * pieces)
    height, words = tiling.height, min(tiling.words, _MOST_WEIGHTS // (4 * pieces))
    entries = {name: getattr(w, name) for name in kernels.GROUPS if getattr(w, name) is not None}
    length = {name: columns // ref.shape[-1] for name, ref in entries.items()}
    row = jnp.minimum(first + jnp.arange(height), out - 1)
    steps, whole = pl.cdiv(total, words), total % words == 0
    start, stop = 0, steps
    read_row = out_row = jnp.arange(width)
    stack: tuple[Array, ...] = ()
    place: tuple[Array, ...] = ()
    if groups is not None:
        stack = (groups.matrix[number],)
        read_row = plgpu.load(groups.read.at[number, jnp.arange(width)])
        out_row = groups.first[number] + jnp.arange(width)
        last_row = groups.stop[number]
    else:
        last_row = out_ref.shape[-2]
        if out_ref.ndim == 3:
            per_part = pl.cdiv(steps, out_ref.shape[0])
            start, place = number * per_part, (number,)
            stop = jnp.minimum(start + per_part, steps)
    split = kernels.split

    def load(ref: jax.Ref, row: Array, at: Array, inside: Array) -> Array:
        """Elements `[rows, words]`."""
        shape = (len(row), len(at))
        row, at, inside = (
            jnp.broadcast_to(a, shape) for a in (row[:, None], at[None], inside[None])
        )
        index = (*stack, row, at) if ref.ndim == 3 else (row, at)
        if whole:
            return plgpu.load(ref.at[index])
        return plgpu.load(ref.at[index], mask=inside, other=jnp.zeros((), ref.dtype))

    def read_entries(step: Array | int) -> dict[str, list[Array]]:
        """Scales and the like of a step, for each piece that has its own."""
        found = {}
        for name, ref in entries.items():
            if length[name] >= form.chunk:
                shared = per_chunk * (length[name] // form.chunk)  # words for an entry
                count = max(1, words // shared)
                at = split(step * words, shared)[0] if count == 1 else step * count
                of_pieces = [at + jnp.arange(count)]
            else:
                shared = min(length[name] // 4, per_chunk)
                at = step * words + shared * jnp.arange(words // shared)
                chunk, word = split(at, per_chunk)
                weight = 4 * (chunk * pieces * per_chunk + word)
                begins = range(0, form.chunk, max(length[name], 4 * per_chunk))
                of_pieces = [split(weight + begin, length[name])[0] for begin in begins]
            found[name] = [load(ref, row, at, at < ref.shape[-1]) for at in of_pieces]
        return found

    def scales(read: dict[str, list[Array]], piece: int) -> tuple[Array, Array | None]:
        """Scales and minima of words, bfloat16 `[height, words]` each."""

        def entry(name: str) -> Array:
            of_pieces = read[name]
            return of_pieces[piece * len(of_pieces) // pieces].astype(jnp.float32)

        def spread(values: Array, count: int) -> Array:
            shape = (height, values.shape[1], count // values.shape[1])
            return jnp.broadcast_to(values[:, :, None], shape).reshape(height, count)

        def both(name: str) -> Array:
            values = entry(name)
            if f"super_{name}" in entries:
                values *= spread(entry(f"super_{name}"), values.shape[1])
            return spread(values.astype(jnp.bfloat16), words)

        return both("scale"), both("minimum") if "minimum" in entries else None

    def step(i: Array, carry: tuple) -> tuple:
        result, of_step = carry
        # Too few bytes for the compiler to read them ahead.
        ahead = read_entries(jnp.minimum(i + 1, steps - 1))
        at = i * words + jnp.arange(words)
        chunk, word = split(at, per_chunk)
        read: dict[tuple[int, int], Array] = {}
        expanded: dict[int, tuple[Array, Array | None]] = {}
        for piece in range(pieces):
            parts, shifts = [], []
            for p, (plane, bits) in enumerate(zip(w.codes, form.bits, strict=True)):
                size = form.chunk * bits // 32  # words of a chunk
                shift, before = divmod(piece * per_chunk, size)
                if (p, before) not in read:
                    index = at if size == per_chunk else chunk * size + before + word
                    read[p, before] = load(plane, row, index, at < total)
                parts.append(read[p, before])
                shifts.append(shift * bits)
            group = piece * len(of_step["scale"]) // pieces
            if group not in expanded:
                expanded[group] = scales(of_step, piece)
            for byte in range(4):
                tile = _weights(parts, shifts, byte, form, *expanded[group], interpret)
                x_row = (4 * piece + byte) * x_rows + read_row
                x = load(x_ref, x_row, at, at < total)
                result += lax.dot_general(
                    tile, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
                )
        return result, ahead

    result = jnp.zeros((height, width), jnp.float32)
    result, _ = lax.fori_loop(start, stop, step, (result, read_entries(start)))
    at = jnp.broadcast_to((first + jnp.arange(height))[:, None], result.shape)
    out_row = jnp.broadcast_to(out_row[None], result.shape)
    inside = (out_row < last_row) & (at < out)
    plgpu.store(out_ref.at[*place, out_row, at], result.astype(out_ref.dtype), mask=inside)


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
      planes: words `[height, words]` of each plane.
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
