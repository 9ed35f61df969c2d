"""Products of a few rows with quantized matrices, in integers: one kernel on GPUs.

The activations are rounded to 8 bits with a scale for each 32 of a row, as ggml does, so that codes
are multiplied four at a time (`dp4a`) and scaled once for each group.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxsplit.quant.forms import Form, QTensor

MAX_ROWS = 8
"""More rows of activations are faster on the matrix unit."""

_BLOCK = 32  # activations that share a scale
_UNIT = 16  # weights whose codes are loaded together: four words of a plane of bytes
_TILE_WORDS = 256  # of the first plane, in each step of a warp
_PLANES = ("scale", "minimum", "super_scale", "super_minimum")


def supports(w: QTensor) -> bool:
    """Whether `product` can multiply with a matrix, once it has planes of words."""
    form = w.form
    plain = form.table is None and form.decode_scale is None and form.scale_bits == 8
    return plain and form.chunk % _BLOCK == 0


def _run(w: QTensor) -> int:
    """Neighbours that share a scale in the matrix and in the activations."""
    return min(w.shape[-1] // w.scale.shape[-1], _BLOCK)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """Activations in 8 bits.

    Attributes:
      codes: int8 `[rows, in]`.
      scale: float32 `[rows, in / 32]`.
    """

    codes: Array
    scale: Array

    def dequantized(self) -> Array:
        """float32 `[rows, in]`."""
        blocks = self.codes.astype(jnp.float32).reshape(*self.scale.shape, _BLOCK)
        return (blocks * self.scale[..., None]).reshape(self.codes.shape)

    def sums(self, run: int) -> Array:
        """Of so many neighbours each: float32 `[rows, in / run]`."""
        rows = self.codes.shape[0]
        counts = self.codes.reshape(rows, -1, run).sum(axis=-1, dtype=jnp.int32)
        scale = jnp.repeat(self.scale, _BLOCK // run, axis=-1)
        return counts.astype(jnp.float32) * scale


def round_rows(x: Array) -> Rounded:
    """Rounds `[rows, in]`: the largest magnitude of 32 becomes 127."""
    blocks = x.astype(jnp.float32).reshape(x.shape[0], -1, _BLOCK)
    scale = jnp.max(jnp.abs(blocks), axis=-1) / 127
    inverse = jnp.where(scale > 0, 1 / scale, 0)
    codes = jnp.round(blocks * inverse[..., None]).astype(jnp.int8)
    return Rounded(codes.reshape(x.shape), scale)


def product(x: Rounded, w: QTensor, *, interpret: bool = False) -> Array:
    """`x @ w.T`: float32 `[rows, out]`. One program and one warp for each row of the matrix.

    Args:
      x: `[rows, in]`.
      w: `[out, in]`, one that is supported, with planes of words.
      interpret: run it without a GPU, to test it.
    """
    rows, (out, columns) = x.codes.shape[0], w.shape
    words = lax.bitcast_convert_type(x.codes.reshape(rows, -1, 4), jnp.uint32)
    planes = {name: getattr(w, name) for name in _PLANES if getattr(w, name) is not None}
    kernel = partial(
        _kernel,
        form=w.form,
        run=_run(w),
        groups={name: columns // plane.shape[-1] for name, plane in planes.items()},
        chunks=columns // w.form.chunk,
        interpret=interpret,
    )
    return pl.pallas_call(
        kernel,
        grid=(out,),
        out_shape=jax.ShapeDtypeStruct((rows, out), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=4),
        interpret=interpret,
        name="quantized_product",
    )(words, x.scale, x.sums(_run(w)), *w.codes, *planes.values())


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


def _kernel(
    x_ref: jax.Ref,
    x_scale_ref: jax.Ref,
    x_sum_ref: jax.Ref,
    *refs: jax.Ref,
    form: Form,
    run: int,
    groups: dict[str, int],
    chunks: int,
    interpret: bool,
) -> None:
    """One row of the matrix, with all rows of activations.

    Args:
      x_ref: words `[rows, in / 4]`.
      x_scale_ref: `[rows, in / 32]`.
      x_sum_ref: `[rows, in / run]`.
      *refs: the planes of codes, words `[out, ...]`; those of `groups`; and the result.
      form: of the matrix.
      run: neighbours with the same scales.
      groups: the planes of scales and minima, and how many weights share an entry of each.
      chunks: in a row.
      interpret: as in `product`.
    """
    *refs, out_ref = refs
    code_refs, group_refs = refs[: len(form.bits)], refs[len(form.bits) :]
    group_refs = dict(zip(groups, group_refs, strict=True))
    row, chunk, rows = pl.program_id(0), form.chunk, out_ref.shape[0]
    tile = min(max(1, 32 * _TILE_WORDS // (chunk * form.bits[0])), pl.next_power_of_2(chunks))

    def step(i: Array | int, totals: Sequence[Array]) -> tuple[Array, ...]:
        chunk_index = i * tile + jnp.arange(tile)
        inside = chunk_index < chunks
        four = jnp.arange(4)

        def load(ref: jax.Ref, row: Array | int, index: Array) -> Array:
            mask = jnp.broadcast_to(inside.reshape(-1, *[1] * (index.ndim - 1)), index.shape)
            return plgpu.load(ref.at[row, index], mask=mask, other=jnp.zeros((), ref.dtype))

        def codes(first: int) -> Array:
            """Words `[tile, 4]`: codes of the unit that begins with this weight of each chunk."""
            word, shift = None, 0
            for ref, bits in zip(code_refs, form.bits, strict=True):
                size = chunk * bits // 8  # of the chunk's bytes: weight w is in byte w % size
                if size < _UNIT:
                    piece, byte = (first + 4 * four) // size, (first + 4 * four) % size
                else:
                    piece, byte = first // size, first % size + 4 * four
                part = load(ref, row, chunk_index[:, None] * (size // 4) + byte // 4)
                if bits < 8:
                    right = jnp.asarray(piece * bits, jnp.uint32)
                    part = (part >> right) & (0x01010101 * (2**bits - 1))
                word = part if word is None else word | (part << shift)
                shift += bits
            return word

        def entry(name: str, weight: int) -> Array:
            """Of a plane of `groups`, for a weight of each chunk: float32 `[tile]`."""
            size = groups[name]
            index = (chunk_index * chunk + weight) // size
            return load(group_refs[name], row, index).astype(jnp.float32)

        for first in range(0, chunk, run):
            units = range(first, first + run, _UNIT)
            words = [codes(unit) for unit in units]
            scale = entry("scale", first)
            if "super_scale" in groups:
                scale *= entry("super_scale", first)
            constant = -form.offset * scale
            if "minimum" in groups:
                minimum = entry("minimum", first)
                constant += (
                    minimum * entry("super_minimum", first)
                    if "super_minimum" in groups
                    else minimum
                )
            place = chunk_index * chunk + first
            added = []
            for m, total in enumerate(totals):
                dots = sum(
                    _dot4(
                        word,
                        load(x_ref, m, (chunk_index * chunk + unit)[:, None] // 4 + four),
                        signed=form.bits == (8,),
                        interpret=interpret,
                    )
                    for unit, word in zip(units, words, strict=True)
                )
                dots = dots.sum(axis=-1).astype(jnp.float32)
                total += dots * load(x_scale_ref, m, place // _BLOCK) * scale
                if form.offset or "minimum" in groups:
                    total += load(x_sum_ref, m, place // run) * constant
                added.append(total)
            totals = added
        return tuple(totals)

    totals = (jnp.zeros(tile, jnp.float32),) * rows
    totals = lax.fori_loop(0, pl.cdiv(chunks, tile), step, totals)
    for m, total in enumerate(totals):
        out_ref[m, row] = total.sum()
