"""Products of a few rows with quantized matrices, in integers: one kernel for GPUs.

The activations are rounded to 8 bits, so that codes are multiplied four at a time (`dp4a`) and
scaled once for each group.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.quant.forms import QTensor, with_words
from jaxsplit.quant.rounding import BLOCK, Rounded

MAX_ROWS = 8
"""More rows of activations are faster on the matrix unit."""

_SLICE = 16  # bytes that a thread loads at once
_LONGEST_UNIT = 32  # bytes of the first plane that a thread multiplies in a step
_GROUPS = ("scale", "minimum", "super_scale", "super_minimum")


def supports(w: QTensor) -> bool:
    """Whether `products` can multiply with a matrix, once it has planes of words."""
    form = w.form
    plain = form.table is None and form.decode_scale is None and form.scale_bits == 8
    sizes = [form.chunk * bits // 8 for bits in form.bits]  # of a chunk of each plane
    whole = sizes[0] % _SLICE == 0 and all(size % 4 == 0 for size in sizes)
    # Elements are counted in 32 bits.
    return plain and whole and w.shape[-1] % BLOCK == 0 and w.codes[0].size < 2**31


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
    experts: Array | None = None,
    tiling: _Tiling | None = None,
    interpret: bool = False,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      experts: int32 `[pairs]`, a multiple of the rows: weights are stacks `[experts, out, in]`, of
        which each row is multiplied with its own few; the results are `[pairs, out]`.
      tiling: of the work; None: a usual one.
      interpret: run it without a GPU, to test it.
    """
    rows = len(x.words) if experts is None else len(experts)
    tiling = tiling or _tiling(len(x.words) if experts is None else 1)
    programs = [pl.cdiv(w.shape[-2], tiling.height) for w in weights]
    weights = [w if w.codes[0].dtype == jnp.uint32 else with_words(w) for w in weights]
    inputs, structure = jax.tree.flatten((x, list(weights), experts))
    kernel = partial(
        _kernel,
        structure=structure,
        programs=programs,
        tiling=tiling,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        grid=(sum(programs), 1 if experts is None else rows),
        out_shape=[jax.ShapeDtypeStruct((rows, w.shape[-2]), dtype) for w in weights],
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
    x, weights, experts = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    first, pair = 0, pl.program_id(1)
    for w, out_ref, count in zip(weights, refs[structure.num_leaves :], programs, strict=True):
        program = pl.program_id(0) - first
        first_row = program * tiling.height
        multiply = partial(_rows, x, w, experts, out_ref, first_row, pair, tiling, interpret)
        if len(weights) == 1:
            multiply()
        else:
            pl.when((program >= 0) & (program < count))(multiply)
        first += count


def _rows(
    x: Rounded,
    w: QTensor,
    experts: jax.Ref | None,
    out_ref: jax.Ref,
    first: Array,
    pair: Array,
    tiling: _Tiling,
    interpret: bool,
) -> None:
    """The products of some rows of `w`, from the row `first` on.

    A step multiplies some units: a chunk where it is short, else 16 bytes of the first plane, with
    what belongs to the same weights in the other planes. A unit is made of slices: 16 neighbouring
    weights each.
    """
    form, (*_, out, columns) = w.form, w.shape
    pieces = 8 // form.bits[0]
    size = form.chunk // pieces  # bytes of a chunk in the first plane
    unit_bytes = size if size <= _LONGEST_UNIT else _SLICE
    per_chunk = size // unit_bytes
    count = columns // form.chunk * per_chunk
    units = min(tiling.weights // (unit_bytes * pieces), pl.next_power_of_2(count))
    steps = pl.cdiv(count, units)
    groups = {name: getattr(w, name) for name in _GROUPS if getattr(w, name) is not None}
    run = min(BLOCK, *(columns // ref.shape[-1] for ref in groups.values()))
    slices = [(p * size + b, b) for p in range(pieces) for b in range(0, unit_bytes, _SLICE)]
    # Slices that share scales are added up before they are scaled.
    together = run if per_chunk == 1 else _SLICE
    parts = [list(part) for _, part in itertools.groupby(slices, lambda s: s[0] // together)]
    row = jnp.minimum(first + jnp.arange(tiling.height), out - 1)
    stack: tuple[Array, ...] = ()
    batch = [(jnp.asarray(m), jnp.asarray(m)) for m in range(x.words.shape[0])]  # rows of x, out
    if experts is not None:
        stack = (experts[pair],)
        batch = [(pair // (experts.shape[0] // x.words.shape[0]), pair)]

    def load(ref: jax.Ref, row: Array, index: Array, inside: Array) -> Array:
        """Elements `[*row.shape, units, ...]`."""
        inside = inside.reshape(-1, *[1] * (index.ndim - 1))
        shape = (*row.shape, *index.shape)
        row = jnp.broadcast_to(row.reshape(*row.shape, *[1] * index.ndim), shape)
        index, inside = (jnp.broadcast_to(a, shape) for a in (index, inside))
        at = (*stack, row, index) if ref.ndim == 3 else (row, index)
        if count % units == 0:
            return plgpu.load(ref.at[at])
        return plgpu.load(ref.at[at], mask=inside, other=jnp.zeros((), ref.dtype))

    def words(byte: Array) -> Array:
        """Indices `[units, 4]` of the words that begin with a byte."""
        return (byte >> 2)[:, None] + jnp.arange(_SLICE // 4)

    def in_plane(bits: int, begin: Array, weight: int) -> tuple[Array | int, Array | int]:
        """Where a slice is in a chunk of a plane: by how much its codes are shifted, and the bytes
        of its words; `begin` is where in the chunk a unit begins."""
        plane_size = form.chunk * bits // 8
        if plane_size < _SLICE:
            at = begin[:, None] + weight + 4 * jnp.arange(_SLICE // 4)
        else:
            at = weight if per_chunk == 1 else begin + weight
        piece, byte = _split(at, plane_size)
        return piece * bits, byte

    def codes(chunk: Array, begin: Array, inside: Array) -> list[Array]:
        """Words of codes of each slice, `[height, units, 4]`."""
        read: dict[Any, Array] = {}
        found = []
        for weight, offset in slices:
            word, shift = None, 0
            for i, (ref, bits) in enumerate(zip(w.codes, form.bits, strict=True)):
                plane_size = form.chunk * bits // 8
                right, byte = in_plane(bits, begin, weight)
                key = (i, byte if isinstance(byte, int) else offset)
                if key not in read:
                    if plane_size < _SLICE:
                        index = (chunk * (plane_size // 4))[:, None] + (byte >> 2)
                    else:
                        index = words(chunk * plane_size + byte)
                    read[key] = load(ref, row, index, inside)
                part = read[key]
                if bits < 8:
                    if not isinstance(right, int):
                        right = right.astype(jnp.uint32)
                        right = right if right.ndim == 2 else right[:, None]
                    part = (part >> jnp.asarray(right, jnp.uint32)) & jnp.uint32(
                        0x01010101 * (2**bits - 1)
                    )
                word = part if word is None else word | (part << jnp.uint32(shift))
                shift += bits
            found.append(word)
        return found

    def multiply(step: Array | int, totals: Sequence[Array]) -> tuple[Array, ...]:
        unit = step * units + jnp.arange(units)
        inside = unit < count
        chunk, of_chunk = _split(unit, per_chunk)
        begin = of_chunk * _SLICE
        first_weight = chunk * form.chunk + begin
        of_slices = dict(zip(slices, codes(chunk, begin, inside), strict=True))
        for part in parts:
            weight = first_weight + part[0][0]
            entry = {
                name: load(ref, row, _split(weight, columns // ref.shape[-1])[0], inside)
                for name, ref in groups.items()
            }
            entry = {name: value.astype(jnp.float32) for name, value in entry.items()}
            scale = entry["scale"] * entry.get("super_scale", 1)
            constant = -form.offset * scale if form.offset else None
            if "minimum" in entry:
                constant = entry["minimum"] * entry.get("super_minimum", 1)
            sums, of_sums = (x.sums, BLOCK) if len(part) == 2 else (x.half_sums, _SLICE)
            added = []
            for (m, _), total in zip(batch, totals, strict=True):
                dots = 0
                for member in part:
                    y = load(x.words, m, words(first_weight + member[0]), inside)
                    y = jnp.broadcast_to(y, of_slices[member].shape)
                    signed = form.bits == (8,)
                    dots += _dot4(of_slices[member], y, signed=signed, interpret=interpret)
                x_scale = load(x.scale, m, _split(weight, BLOCK)[0], inside)
                total += jnp.sum(dots, axis=-1).astype(jnp.float32) * (x_scale * scale)
                if constant is not None:
                    total += load(sums, m, _split(weight, of_sums)[0], inside) * constant
                added.append(total)
            totals = added
        return tuple(totals)

    totals = (jnp.zeros((tiling.height, units), jnp.float32),) * len(batch)
    totals = multiply(0, totals) if steps == 1 else lax.fori_loop(0, steps, multiply, totals)
    for (m, out_row), total in zip(batch, totals, strict=True):
        y = jnp.sum(total, axis=1)
        if x.squares is not None:
            block = jnp.arange(pl.next_power_of_2(x.squares.shape[1]))
            squares = plgpu.load(x.squares.at[m, block], mask=block < x.squares.shape[1], other=0.0)
            y *= lax.rsqrt(jnp.sum(squares) / x.size + x.epsilon)
        at = first + jnp.arange(tiling.height)
        plgpu.store(out_ref.at[out_row, at], y.astype(out_ref.dtype), mask=at < out)


def _split(x: Array | int, by: int) -> tuple[Array | int, Array | int]:
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
