"""Products of a few rows with quantized matrices, in integers: kernels for GPUs.

The activations are rounded to 8 bits with a scale for each 32 of a row, as ggml does, so that codes
are multiplied four at a time (`dp4a`) and scaled once for each group. Rounding is a kernel too: it
computes what it rounds, so that norms and activation functions need none of their own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.quant.forms import QTensor, with_words

MAX_ROWS = 8
"""More rows of activations are faster on the matrix unit."""

_BLOCK = 32  # activations that share a scale
_UNIT = 16  # bytes that a thread loads at once
_ROUNDED_AT_ONCE = 16  # blocks in each program that rounds
_GROUPS = ("scale", "minimum", "super_scale", "super_minimum")


def supports(w: QTensor) -> bool:
    """Whether `products` can multiply with a matrix, once it has planes of words."""
    form = w.form
    plain = form.table is None and form.decode_scale is None and form.scale_bits == 8
    sizes = [form.chunk * bits // 8 for bits in form.bits]  # of a chunk of each plane
    whole = sizes[0] % _UNIT == 0 and all(size % 4 == 0 for size in sizes)
    return plain and whole and w.shape[-1] % _BLOCK == 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """Two terms that are not added yet, so that the kernel that reads them can add them too.

    Attributes:
      stream: `[..., n]`, of the dtype of the sum.
      addend: likewise, float32.
    """

    stream: Array
    addend: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., n]`."""
        return self.stream.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Of the sum."""
        return self.stream.dtype

    @cached_property
    def array(self) -> Array:
        """The sum; a kernel that read the terms has left it here."""
        return self.stream + self.addend.astype(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """Rows that are not computed yet, so that a kernel can compute them as it rounds them.

    Attributes:
      function: of the operands' elements, float32.
      operands: `[..., in]` or `[in]` each, the first of them perhaps a `Sum`.
      dtype: of the rows.
      epsilon: the rows are then divided by the root of the mean square of the first operand, with
        this added to it; None: they are not.
      size: elements of which that is the mean.
    """

    function: Callable[..., Array]
    operands: tuple[Array | Sum, ...]
    dtype: jnp.dtype
    epsilon: float | None = None
    size: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., in]`."""
        return self.operands[0].shape

    @cached_property
    def array(self) -> Array:
        """The rows `[..., in]`."""
        operands = [x.array if isinstance(x, Sum) else x for x in self.operands]
        operands = [x.astype(jnp.float32) for x in operands]
        y = self.function(*operands)
        if self.epsilon is not None:
            squares = jnp.sum(operands[0] ** 2, axis=-1, keepdims=True)
            y = y * lax.rsqrt(squares / self.size + self.epsilon)
        return y.astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations in 8 bits.

    Attributes:
      words: four neighbouring codes each, uint32 `[rows, in / 4]`.
      scale: float32 `[rows, in / 32]`.
      sums: of 32 values each, likewise.
      squares: sums of so many squares, float32 like `scale`: products are to be divided by the root
        of their mean; None: they are not.
      epsilon, size: of that mean, as in `Pending`.
    """

    words: Array
    scale: Array
    sums: Array
    squares: Array | None = None
    epsilon: float = dataclasses.field(default=0.0, metadata={"static": True})
    size: int = dataclasses.field(default=0, metadata={"static": True})

    def dequantized(self) -> Array:
        """float32 `[rows, in]`."""
        rows = len(self.scale)
        codes = lax.bitcast_convert_type(self.words, jnp.int8)
        blocks = codes.reshape(*self.scale.shape, _BLOCK).astype(jnp.float32)
        x = (blocks * self.scale[..., None]).reshape(rows, -1)
        if self.squares is None:
            return x
        squares = jnp.sum(self.squares, axis=-1, keepdims=True)
        return x * lax.rsqrt(squares / self.size + self.epsilon)


def _round_block(x: Array) -> tuple[Array, Array, Array]:
    """`[..., 8, 4]` to words `[..., 8]`, scales and sums `[...]`: the largest magnitude becomes
    127."""
    scale = jnp.max(jnp.max(jnp.abs(x), axis=-1), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None, None]
    codes = jnp.floor(x * inverse + 0.5).astype(jnp.int32)
    bytes_ = (codes & 255) << jnp.broadcast_to(8 * jnp.arange(4, dtype=jnp.int32), codes.shape)
    sums = jnp.sum(jnp.sum(codes, axis=-1), axis=-1).astype(jnp.float32) * scale
    return jnp.sum(bytes_, axis=-1), scale, sums


def round_rows(x: Array) -> Rounded:
    """Rounds `[rows, in]`."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, _BLOCK // 4, 4)
    words, scale, sums = _round_block(blocks)
    words = lax.bitcast_convert_type(words, jnp.uint32).reshape(x.shape[0], -1)
    return Rounded(words, scale, sums)


def round_pending(x: Pending, *, interpret: bool = False) -> Rounded:
    """Computes and rounds rows in one kernel. What divides all of a row is left for later: it does
    not change the codes.

    Args:
      x: of `[..., in]`.
      interpret: run it without a GPU, to test it.
    """
    columns, total = x.shape[-1], x.operands[0]
    operands = jax.tree.map(lambda y: y if y.ndim == 1 else y.reshape(-1, columns), x.operands)
    inputs, structure = jax.tree.flatten(operands)
    rows, blocks = len(inputs[0]), columns // _BLOCK
    of_blocks = jax.ShapeDtypeStruct((rows, blocks), jnp.float32)
    shapes = [jax.ShapeDtypeStruct((rows, columns // 4), jnp.int32), of_blocks, of_blocks]
    if x.epsilon is not None:
        shapes.append(of_blocks)
    if isinstance(total, Sum):
        shapes.append(jax.ShapeDtypeStruct((rows, columns), x.dtype))
    words, scale, sums, *more = pl.pallas_call(
        partial(_round_kernel, function=x.function, structure=structure),
        grid=(rows, pl.cdiv(blocks, _ROUNDED_AT_ONCE)),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="round_rows",
    )(*inputs)
    if isinstance(total, Sum):
        vars(total)["array"] = more.pop().reshape(total.shape)
    words = lax.bitcast_convert_type(words, jnp.uint32)
    return Rounded(words, scale, sums, *more, epsilon=x.epsilon or 0.0, size=x.size)


def _round_kernel(*refs: jax.Ref, function: Callable[..., Array], structure: Any) -> None:
    """Some blocks of a row.

    Args:
      *refs: the operands; words, scales, sums, perhaps sums of squares, and perhaps the rows that
        the first operand adds up to.
      function: of the operands.
      structure: of the operands.
    """
    operands = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    words_ref, scale_ref, sums_ref, *more = refs[structure.num_leaves :]
    added_ref = more.pop() if isinstance(operands[0], Sum) else None
    row = pl.program_id(0)
    block = pl.program_id(1) * _ROUNDED_AT_ONCE + jnp.arange(_ROUNDED_AT_ONCE)
    blocks = scale_ref.shape[1]
    inside = block < blocks
    word = block[:, None] * (_BLOCK // 4) + jnp.arange(_BLOCK // 4)
    element = word[..., None] * 4 + jnp.arange(4)
    exists = jnp.broadcast_to(inside[:, None, None], element.shape)

    def load(operand: jax.Ref | Sum) -> Array:
        if isinstance(operand, Sum):
            x = load(operand.stream) + load(operand.addend)
            x = x.astype(added_ref.dtype)
            plgpu.store(added_ref.at[row, element], x, mask=exists)
            return x.astype(jnp.float32)
        at = (element,) if operand.ndim == 1 else (row, element)
        zero = jnp.zeros((), operand.dtype)
        return plgpu.load(operand.at[at], mask=exists, other=zero).astype(jnp.float32)

    values = [load(operand) for operand in operands]
    words, scale, sums = _round_block(function(*values))
    in_words = jnp.broadcast_to(inside[:, None], word.shape)
    plgpu.store(words_ref.at[row, word], words, mask=in_words)
    plgpu.store(scale_ref.at[row, block], scale, mask=inside)
    plgpu.store(sums_ref.at[row, block], sums, mask=inside)
    for squares_ref in more:
        squares = jnp.sum(jnp.sum(values[0] * values[0], axis=-1), axis=-1)
        plgpu.store(squares_ref.at[row, block], squares, mask=inside)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How a program multiplies: rows of the matrix, weights of each in a step, and warps."""

    height: int
    weights: int
    warps: int


def _tiling(rows: int) -> _Tiling:
    return _Tiling(4, 2048, 4) if rows == 1 else _Tiling(8, 1024, 2)


def products(
    x: Rounded,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    tiling: _Tiling | None = None,
    interpret: bool = False,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      tiling: of the work; None: a usual one.
      interpret: run it without a GPU, to test it.
    """
    rows = len(x.words)
    tiling = tiling or _tiling(rows)
    programs = [pl.cdiv(w.shape[0], tiling.height) for w in weights]
    weights = [w if w.codes[0].dtype == jnp.uint32 else with_words(w) for w in weights]
    inputs, structure = jax.tree.flatten((x, list(weights)))
    kernel = partial(
        _kernel,
        structure=structure,
        programs=programs,
        tiling=tiling,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        grid=(sum(programs),),
        out_shape=[jax.ShapeDtypeStruct((rows, w.shape[0]), dtype) for w in weights],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=1),
        interpret=interpret,
        name="quantized_products",
    )(*inputs)


def _kernel(
    *refs: jax.Ref,
    structure: Any,
    programs: Sequence[int],
    tiling: _Tiling,
    interpret: bool,
) -> None:
    """Some rows of one matrix, with all rows of activations.

    Args:
      *refs: activations, matrices and results.
      structure: of activations and matrices.
      programs: for each matrix.
      tiling: of the work.
      interpret: as in `products`.
    """
    x, weights = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    first = 0
    for w, out_ref, count in zip(weights, refs[structure.num_leaves :], programs, strict=True):
        program = pl.program_id(0) - first
        multiply = partial(_rows, x, w, out_ref, program * tiling.height, tiling, interpret)
        if len(weights) == 1:
            multiply()
        else:
            pl.when((program >= 0) & (program < count))(multiply)
        first += count


def _rows(
    x: Rounded, w: QTensor, out_ref: jax.Ref, first: Array, tiling: _Tiling, interpret: bool
) -> None:
    """The products of some rows of `w`, from the row `first` on.

    A step multiplies some units: 16 bytes of the first plane, with what belongs to the same weights
    in the other planes.
    """
    form, (out, columns) = w.form, w.shape
    pieces = 8 // form.bits[0]
    size = form.chunk // pieces  # bytes of a chunk in the first plane
    per_chunk = size // _UNIT
    count = columns // form.chunk * per_chunk
    units = min(tiling.weights // (_UNIT * pieces), pl.next_power_of_2(count))
    steps = pl.cdiv(count, units)
    groups = {name: getattr(w, name) for name in _GROUPS if getattr(w, name) is not None}
    run = min(columns // ref.shape[-1] for ref in groups.values())
    # An offset is taken off the codes, or off the sum of a block of activations.
    from_codes = form.offset if run < _BLOCK else 0
    # Pieces whose weights share scales are added up before they are scaled.
    parts = [range(pieces)] if form.chunk <= min(run, _BLOCK) else [[p] for p in range(pieces)]
    row = jnp.minimum(first + jnp.arange(tiling.height), out - 1)

    def place(step: Array | int) -> tuple[Array, Array, Array]:
        """For each unit, int32 `[units]`: its chunk, where in it its first weight is, and whether
        the unit exists."""
        unit = step * units + jnp.arange(units)
        chunk, of_chunk = _split(unit, per_chunk)
        return chunk, of_chunk * _UNIT, unit < count

    def load(ref: jax.Ref, row: Array, index: Array, inside: Array) -> Array:
        """Elements `[*row.shape, units, ...]`."""
        inside = inside.reshape(-1, *[1] * (index.ndim - 1))
        shape = (*row.shape, *index.shape)
        row = jnp.broadcast_to(row.reshape(*row.shape, *[1] * index.ndim), shape)
        index, inside = (jnp.broadcast_to(a, shape) for a in (index, inside))
        if count % units == 0:
            return plgpu.load(ref.at[row, index])
        return plgpu.load(ref.at[row, index], mask=inside, other=jnp.zeros((), ref.dtype))

    def words(byte: Array) -> Array:
        """Indices `[units, 4]` of the words that begin with a byte."""
        return (byte >> 2)[:, None] + jnp.arange(_UNIT // 4)

    def plane(ref: jax.Ref, bits: int, chunk: Array, begin: Array, inside: Array) -> Array:
        """The words of a plane that the units need, `[height, units, 4]`."""
        plane_size = form.chunk * bits // 8
        if plane_size >= _UNIT:
            index = words(chunk * plane_size + _split(begin, plane_size)[1])
        else:
            byte = _split(begin[:, None] + 4 * jnp.arange(_UNIT // 4), plane_size)[1]
            index = (chunk * (plane_size // 4))[:, None] + (byte >> 2)
        return load(ref, row, index, inside)

    def codes(planes: list[Array], begin: Array, piece: int) -> Array:
        """Words of codes `[height, units, 4]`."""
        word, shift = None, 0
        for part, bits in zip(planes, form.bits, strict=True):
            plane_size = form.chunk * bits // 8
            if bits < 8:
                if plane_size == size:
                    right = jnp.uint32(piece * bits)
                else:
                    places = begin[:, None] + piece * size
                    if plane_size < _UNIT:
                        places += 4 * jnp.arange(_UNIT // 4)
                    right = (_split(places, plane_size)[0] * bits).astype(jnp.uint32)
                part = (part >> right) & jnp.uint32(0x01010101 * (2**bits - 1))
            word = part if word is None else word | (part << jnp.uint32(shift))
            shift += bits
        if from_codes:  # in each byte, with its upper bit as a guard
            top = jnp.uint32(0x80808080)
            word = ((word | top) - jnp.uint32(0x01010101 * int(from_codes))) ^ top
        return word

    def multiply(step: Array | int, totals: Sequence[Array]) -> tuple[Array, ...]:
        chunk, begin, inside = place(step)
        planes = [
            plane(ref, bits, chunk, begin, inside)
            for ref, bits in zip(w.codes, form.bits, strict=True)
        ]
        first_weight = chunk * form.chunk + begin
        for part in parts:
            weight = first_weight + part[0] * size
            entry = {
                name: load(ref, row, _split(weight, columns // ref.shape[-1])[0], inside)
                for name, ref in groups.items()
            }
            entry = {name: value.astype(jnp.float32) for name, value in entry.items()}
            scale = entry["scale"] * entry.get("super_scale", 1)
            constant = None
            if form.offset and not from_codes:
                constant = -form.offset * scale
            if "minimum" in entry:
                constant = entry["minimum"] * entry.get("super_minimum", 1)
            of_part = [codes(planes, begin, piece) for piece in part]
            block = _split(weight, _BLOCK)[0]
            signed = form.bits == (8,) or bool(from_codes)
            added = []
            for m, total in enumerate(totals):
                m = jnp.asarray(m)
                dots = 0
                for piece, word in zip(part, of_part, strict=True):
                    y = load(x.words, m, words(first_weight + piece * size), inside)
                    y = jnp.broadcast_to(y, word.shape)
                    dots += _dot4(word, y, signed=signed, interpret=interpret)
                x_scale = load(x.scale, m, block, inside)
                total += jnp.sum(dots, axis=-1).astype(jnp.float32) * (x_scale * scale)
                if constant is not None:
                    share = len(part) * _UNIT / _BLOCK  # of the block that the unit multiplies
                    total += load(x.sums, m, block, inside) * share * constant
                added.append(total)
            totals = added
        return tuple(totals)

    totals = (jnp.zeros((tiling.height, units), jnp.float32),) * x.words.shape[0]
    totals = multiply(0, totals) if steps == 1 else lax.fori_loop(0, steps, multiply, totals)
    for m, total in enumerate(totals):
        y = jnp.sum(total, axis=1)
        if x.squares is not None:
            block = jnp.arange(pl.next_power_of_2(x.squares.shape[1]))
            squares = plgpu.load(x.squares.at[m, block], mask=block < x.squares.shape[1], other=0.0)
            y *= lax.rsqrt(jnp.sum(squares) / x.size + x.epsilon)
        at = first + jnp.arange(tiling.height)
        plgpu.store(out_ref.at[m, at], y.astype(out_ref.dtype), mask=at < out)


def _split(x: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder by a power of two of numbers that are not negative."""
    return x >> (by.bit_length() - 1), x & (by - 1)


def _dot4(a: Array, b: Array, *, signed: bool, interpret: bool) -> Array:
    """Four products of bytes each, added up: words of codes, and of int8, to int32."""
    if interpret:
        a = lax.bitcast_convert_type(a, jnp.int8 if signed else jnp.uint8).astype(jnp.int32)
        b = lax.bitcast_convert_type(b, jnp.int8).astype(jnp.int32)
        return (a * b).sum(axis=-1)
    [dots] = plgpu.elementwise_inline_asm(
        f"dp4a.{'s32' if signed else 'u32'}.s32 $0, $1, $2, 0;",
        args=[a, b],
        constraints="=r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, jnp.int32)],
    )
    return dots
