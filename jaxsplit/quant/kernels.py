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
_TILE = 2048  # weights of a row in each step of a warp
_ROUNDED_AT_ONCE = 16  # blocks in each program that rounds
_GROUPS = ("scale", "minimum", "super_scale", "super_minimum")


def supports(w: QTensor) -> bool:
    """Whether `products` can multiply with a matrix, once it has planes of words."""
    form = w.form
    plain = form.table is None and form.decode_scale is None and form.scale_bits == 8
    sizes = [form.chunk * bits // 8 for bits in form.bits]  # of a chunk of each plane
    whole = sizes[0] % _UNIT == 0 and all(size % 4 == 0 for size in sizes)
    return plain and whole and w.shape[-1] % _BLOCK == 0


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """Rows that are not computed yet, so that a kernel can compute them as it rounds them.

    Attributes:
      function: of the operands' elements, float32.
      operands: `[..., in]` or `[in]` each.
      dtype: of the rows.
      epsilon: the rows are then divided by the root of the mean square of the first operand, with
        this added to it; None: they are not.
      size: elements of which that is the mean.
    """

    function: Callable[..., Array]
    operands: tuple[Array, ...]
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
        operands = [x.astype(jnp.float32) for x in self.operands]
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
      squares: sums of so many squares, float32 like `scale`: products are to be divided by the root
        of their mean; None: they are not.
      epsilon, size: of that mean, as in `Pending`.
    """

    words: Array
    scale: Array
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


def _round_block(x: Array) -> tuple[Array, Array]:
    """`[..., 8, 4]` to words `[..., 8]` and scales `[...]`: the largest magnitude becomes 127."""
    scale = jnp.max(jnp.max(jnp.abs(x), axis=-1), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)[..., None, None]
    codes = jnp.floor(x * inverse + 0.5).astype(jnp.int32)
    bytes_ = (codes & 255) << jnp.broadcast_to(8 * jnp.arange(4, dtype=jnp.int32), codes.shape)
    return jnp.sum(bytes_, axis=-1), scale


def round_rows(x: Array) -> Rounded:
    """Rounds `[rows, in]`."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, _BLOCK // 4, 4)
    words, scale = _round_block(blocks)
    return Rounded(lax.bitcast_convert_type(words, jnp.uint32).reshape(x.shape[0], -1), scale)


def round_pending(x: Pending, *, interpret: bool = False) -> Rounded:
    """Computes and rounds rows in one kernel. What divides all of a row is left for later: it does
    not change the codes.

    Args:
      x: of `[..., in]`.
      interpret: run it without a GPU, to test it.
    """
    columns = x.shape[-1]
    operands = [y if y.ndim == 1 else y.reshape(-1, columns) for y in x.operands]
    rows, blocks = len(operands[0]), columns // _BLOCK
    shapes = [
        jax.ShapeDtypeStruct((rows, columns // 4), jnp.int32),
        *[jax.ShapeDtypeStruct((rows, blocks), jnp.float32)] * (1 + (x.epsilon is not None)),
    ]
    words, *scales = pl.pallas_call(
        partial(_round_kernel, function=x.function, operands=len(operands), blocks=blocks),
        grid=(rows, pl.cdiv(blocks, _ROUNDED_AT_ONCE)),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="round_rows",
    )(*operands)
    words = lax.bitcast_convert_type(words, jnp.uint32)
    if x.epsilon is None:
        return Rounded(words, *scales)
    return Rounded(words, *scales, epsilon=x.epsilon, size=x.size)


def _round_kernel(
    *refs: jax.Ref, function: Callable[..., Array], operands: int, blocks: int
) -> None:
    """Some blocks of a row.

    Args:
      *refs: the operands; words, scales and perhaps sums of squares.
      function: of the operands.
      operands: their count.
      blocks: of a row.
    """
    row, block = (
        pl.program_id(0),
        pl.program_id(1) * _ROUNDED_AT_ONCE + jnp.arange(_ROUNDED_AT_ONCE),
    )
    inside = block < blocks
    word = block[:, None] * (_BLOCK // 4) + jnp.arange(_BLOCK // 4)
    element = word[..., None] * 4 + jnp.arange(4)

    def load(ref: jax.Ref) -> Array:
        at = (element,) if ref.ndim == 1 else (row, element)
        mask = jnp.broadcast_to(inside[:, None, None], element.shape)
        x = plgpu.load(ref.at[at], mask=mask, other=jnp.zeros((), ref.dtype))
        return x.astype(jnp.float32)

    values = [load(ref) for ref in refs[:operands]]
    words_ref, scale_ref, *squares_ref = refs[operands:]
    words, scale = _round_block(function(*values))
    plgpu.store(words_ref.at[row, word], words, mask=jnp.broadcast_to(inside[:, None], word.shape))
    plgpu.store(scale_ref.at[row, block], scale, mask=inside)
    for ref in squares_ref:
        squares = jnp.sum(jnp.sum(values[0] * values[0], axis=-1), axis=-1)
        plgpu.store(ref.at[row, block], squares, mask=inside)


def products(
    x: Rounded,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    interpret: bool = False,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      interpret: run it without a GPU, to test it.
    """
    # Warps share a row of activations, or the activations of several rows are kept for more rows.
    rows, (height, warps, width) = len(x.words), (4, 4, 1) if len(x.words) == 1 else (8, 2, 2)
    programs = [pl.cdiv(w.shape[0], height) for w in weights]
    weights = [w if w.codes[0].dtype == jnp.uint32 else with_words(w) for w in weights]
    inputs, structure = jax.tree.flatten((x, list(weights)))
    kernel = partial(
        _kernel,
        structure=structure,
        programs=programs,
        height=height,
        tile=_TILE // width,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        grid=(sum(programs),),
        out_shape=[jax.ShapeDtypeStruct((rows, w.shape[0]), dtype) for w in weights],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="quantized_products",
    )(*inputs)


def _kernel(
    *refs: jax.Ref,
    structure: Any,
    programs: Sequence[int],
    height: int,
    tile: int,
    interpret: bool,
) -> None:
    """Some rows of one matrix, with all rows of activations.

    Args:
      *refs: activations, matrices and results.
      structure: of activations and matrices.
      programs: for each matrix.
      height: rows of the matrix in a program.
      tile: weights of a row in a step.
      interpret: as in `products`.
    """
    x, weights = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    first = 0
    for w, out_ref, count in zip(weights, refs[structure.num_leaves :], programs, strict=True):
        program = pl.program_id(0) - first
        multiply = partial(_rows, x, w, out_ref, program * height, height, tile, interpret)
        if len(weights) == 1:
            multiply()
        else:
            pl.when((program >= 0) & (program < count))(multiply)
        first += count


def _rows(
    x: Rounded, w: QTensor, out_ref: jax.Ref, first: Array, height: int, tile: int, interpret: bool
) -> None:
    """The products of `height` rows of `w`, from the row `first` on.

    A step multiplies some units: 16 bytes of the first plane, with what belongs to the same weights
    in the other planes. What a step needs of the matrix is read while the one before multiplies.
    """
    form, (out, columns) = w.form, w.shape
    pieces = 8 // form.bits[0]
    size = form.chunk // pieces  # bytes of a chunk in the first plane
    per_chunk = size // _UNIT
    count = columns // form.chunk * per_chunk
    units = min(tile // (_UNIT * pieces), pl.next_power_of_2(count))
    steps = pl.cdiv(count, units)
    groups = {name: getattr(w, name) for name in _GROUPS if getattr(w, name) is not None}
    run = min(columns // ref.shape[-1] for ref in groups.values())
    # Pieces whose weights share scales are added up before they are scaled.
    parts = [range(pieces)] if form.chunk <= min(run, _BLOCK) else [[p] for p in range(pieces)]
    row = jnp.minimum(first + jnp.arange(height), out - 1)

    def place(step: Array | int, piece: int) -> tuple[Array, Array]:
        """The first weight of each unit's piece, int32 `[units]`, and which units exist."""
        unit = step * units + jnp.arange(units)
        begin = unit // per_chunk * form.chunk + unit % per_chunk * _UNIT
        return begin + piece * size, unit < count

    def load(ref: jax.Ref, row: Array, index: Array, inside: Array) -> Array:
        """Elements `[*row.shape, units, ...]`."""
        inside = inside.reshape(-1, *[1] * (index.ndim - 1))
        shape = (*row.shape, *index.shape)
        row = jnp.broadcast_to(row.reshape(*row.shape, *[1] * index.ndim), shape)
        index, inside = (jnp.broadcast_to(a, shape) for a in (index, inside))
        if count % units == 0:
            return plgpu.load(ref.at[row, index])
        return plgpu.load(ref.at[row, index], mask=inside, other=jnp.zeros((), ref.dtype))

    def words(weight: Array) -> Array:
        """Indices `[units, 4]` of the words that begin with the byte of so many weights."""
        return (weight // 4)[:, None] + jnp.arange(_UNIT // 4)

    def fetch(step: Array | int) -> tuple[list[Array], list[dict[str, Array]]]:
        """What a step needs of the matrix: words of each plane, and what scales each part."""
        begin, inside = place(step, 0)
        places = (begin % form.chunk)[:, None] + 4 * jnp.arange(_UNIT // 4)
        planes = []
        for ref, bits in zip(w.codes, form.bits, strict=True):
            plane_size = form.chunk * bits // 8
            if plane_size >= _UNIT:
                byte = begin // form.chunk * plane_size + begin % form.chunk % plane_size
                index = words(byte)
            else:
                index = (begin // form.chunk * plane_size // 4)[:, None] + places % plane_size // 4
            planes.append(load(ref, row, index, inside))
        entries = [
            {
                name: load(ref, row, place(step, part[0])[0] // (columns // ref.shape[-1]), inside)
                for name, ref in groups.items()
            }
            for part in parts
        ]
        return planes, entries

    def codes(planes: list[Array], begin: Array, piece: int) -> Array:
        """Words of codes `[height, units, 4]`."""
        word, shift = None, 0
        for plane, bits in zip(planes, form.bits, strict=True):
            plane_size = form.chunk * bits // 8
            if bits < 8:
                if plane_size == size:
                    right = jnp.uint32(piece * bits)
                else:
                    places = (begin % form.chunk)[:, None] + piece * size
                    if plane_size < _UNIT:
                        places += 4 * jnp.arange(_UNIT // 4)
                    right = (places // plane_size * bits).astype(jnp.uint32)
                plane = (plane >> right) & jnp.uint32(0x01010101 * (2**bits - 1))
            word = plane if word is None else word | (plane << jnp.uint32(shift))
            shift += bits
        return word

    def multiply(
        step: Array | int,
        fetched: tuple[list[Array], list[dict[str, Array]]],
        totals: Sequence[Array],
    ) -> tuple[Array, ...]:
        planes, entries = fetched
        begin, inside = place(step, 0)
        for part, entry in zip(parts, entries, strict=True):
            entry = {name: value.astype(jnp.float32) for name, value in entry.items()}
            scale = entry["scale"] * entry.get("super_scale", 1)
            constant = -form.offset * scale if form.offset else None
            if "minimum" in entry:
                constant = entry["minimum"] * entry.get("super_minimum", 1)
            of_part = [codes(planes, begin, piece) for piece in part]
            added = []
            for m, total in enumerate(totals):
                m = jnp.asarray(m)
                x_scale = load(x.scale, m, place(step, part[0])[0] // _BLOCK, inside)
                dots, sums = 0, 0
                for piece, word in zip(part, of_part, strict=True):
                    y = load(x.words, m, words(place(step, piece)[0]), inside)
                    whole = jnp.broadcast_to(y, word.shape)
                    signed = form.bits == (8,)
                    dots += _dot4(word, whole, signed=signed, interpret=interpret)
                    if constant is not None:
                        ones = jnp.full(y.shape, 0x01010101, jnp.uint32)
                        sums += _dot4(ones, y, signed=False, interpret=interpret)
                total += jnp.sum(dots, axis=-1).astype(jnp.float32) * (x_scale * scale)
                if constant is not None:
                    total += jnp.sum(sums, axis=-1).astype(jnp.float32) * x_scale * constant
                added.append(total)
            totals = added
        return tuple(totals)

    def step(i: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        fetched, totals = carry
        following = fetch(i + 1)
        return following, multiply(i, fetched, totals)

    totals = (jnp.zeros((height, units), jnp.float32),) * x.words.shape[0]
    carry = fetch(0), totals
    if steps > 1:
        carry = lax.fori_loop(0, steps - 1, step, carry)
    totals = multiply(steps - 1, *carry)
    for m, total in enumerate(totals):
        y = jnp.sum(total, axis=1)
        if x.squares is not None:
            block = jnp.arange(pl.next_power_of_2(x.squares.shape[1]))
            squares = plgpu.load(x.squares.at[m, block], mask=block < x.squares.shape[1], other=0.0)
            y *= lax.rsqrt(jnp.sum(squares) / x.size + x.epsilon)
        at = first + jnp.arange(height)
        plgpu.store(out_ref.at[m, at], y.astype(out_ref.dtype), mask=at < out)


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
