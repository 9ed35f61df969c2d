"""Quantized matrices made plain, for products with many rows: a kernel for GPUs."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.ops.launch import divmod_pow2
from jaxsplit.ops.matmul.float8 import LEAST_BOUND
from jaxsplit.ops.matmul.triton_gemv_int8 import GROUP_PLANES
from jaxsplit.pallas import pl, plgpu
from jaxsplit.quant.qtensor import QTensor, decode_codes, to_u32

_WIDTH = 8  # neighbouring weights of a thread
_UNITS = 256  # of so many weights, in each program
_WARPS = 4


def supports(w: QTensor) -> bool:
    """Whether `dequantize` serves a matrix."""
    words = all(w.layout.chunk * bits % 32 == 0 for bits in w.layout.bits)
    groups = w.scale.shape[-1] * 8 // w.layout.scale_bits
    # Elements are counted in 32 bits.
    return words and w.shape[-1] // groups % _WIDTH == 0 and math.prod(w.shape) < 2**31


def dequantize(
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    *,
    bounds: Sequence[Array] | None = None,
    after: Array | None = None,
) -> Array:
    """The rows of matrices `[out, in]`, one after another, computed in float32: `[sum of out, in]`.

    Args:
      weights: ones that `supports`; planes of bytes are turned into words.
      dtype: of the result.
      bounds: float32 `[out]` for each matrix: rows are scaled so that these become the largest
        number of the result's dtype; None: they are not.
      after: computed first, whatever it is.
    """
    columns = weights[0].shape[1]
    sizes = [math.prod(w.shape) for w in weights]
    weights = [w if w.codes[0].dtype == jnp.uint32 else to_u32(w) for w in weights]
    flat = jax.tree.map(lambda plane: plane.reshape(-1), weights)
    inputs, structure = jax.tree.flatten((flat, bounds, after))
    y = pl.pallas_call(
        partial(_dequantize_kernel, structure=structure, sizes=sizes, columns=columns),
        grid=(sum(pl.cdiv(size, _UNITS * _WIDTH) for size in sizes),),
        out_shape=jax.ShapeDtypeStruct((sum(sizes),), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpreted(),
        name="dequantize",
    )(*inputs)
    return y.reshape(-1, columns)


def _dequantize_kernel(
    *refs: jax.Ref, structure: jax.tree_util.PyTreeDef, sizes: Sequence[int], columns: int
) -> None:
    """Some neighbouring weights of one matrix.

    Args:
      *refs: matrices, perhaps bounds of their rows, what is computed first, and the result.
      structure: of all but the result.
      sizes: weights of each matrix.
      columns: weights in a row.
    """
    *refs, out_ref = refs
    weights, bounds, _ = jax.tree.unflatten(structure, refs)
    program, first = pl.program_id(0), 0
    bounds = bounds or [None] * len(weights)
    for w, size, bound in zip(weights, sizes, bounds, strict=True):
        programs = pl.cdiv(size, _UNITS * _WIDTH)
        store = partial(_dequantize, w, size, program, first, out_ref, bound, columns)
        if len(weights) == 1:
            store()
        else:
            pl.when((program >= 0) & (program < programs))(store)
        program, first = program - programs, first + size


def _dequantize(
    w: QTensor,
    size: int,
    program: Array,
    first: int,
    out_ref: jax.Ref,
    bounds: jax.Ref | None,
    columns: int,
) -> None:
    """Some neighbouring weights of a matrix.

    Args:
      w: planes `[n]`.
      size: weights that there are.
      program: which of those for the matrix.
      first: where in the result the matrix begins.
      out_ref: the result.
      bounds: of its rows, or None.
      columns: weights in a row.
    """
    layout = w.layout
    weight = (program * _UNITS + jnp.arange(_UNITS)) * _WIDTH
    of_unit = jnp.arange(_WIDTH)

    def inside(at: Array) -> dict[str, Array]:
        """The mask of what there is at some indices `[units, ...]`."""
        if size % (_UNITS * _WIDTH) == 0:
            return {}
        exists = (weight < size).reshape(-1, *[1] * (at.ndim - 1))
        return {"mask": jnp.broadcast_to(exists, at.shape)}

    def load(ref: jax.Ref, at: Array) -> Array:
        mask = inside(at)
        return plgpu.load(ref.at[at], **mask, other=jnp.zeros((), ref.dtype) if mask else None)

    def codes(plane: jax.Ref, bits: int) -> Array:
        """`[units, width]` of one plane."""

        def word(weight: Array) -> Array:
            """With the codes of this and the next three weights in front in its bytes."""
            chunk, of_chunk = divmod_pow2(weight, layout.chunk)
            piece, byte = divmod_pow2(of_chunk, layout.chunk * bits // 8)
            word = load(plane, chunk * (layout.chunk * bits // 32) + (byte >> 2))
            return (word >> (piece * bits).astype(jnp.uint32))[:, None]

        words = jnp.where(of_unit < 4, word(weight), word(weight + 4))
        return (words >> (8 * (of_unit & 3)).astype(jnp.uint32)) & jnp.uint32(2**bits - 1)

    code, done = jnp.uint32(0), 0
    for plane, bits in zip(w.codes, layout.bits, strict=True):
        code |= codes(plane, bits) << jnp.uint32(done)
        done += bits
    if layout.table is None:
        code = lax.bitcast_convert_type(code, jnp.int32)
    if layout.bits == (8,):
        code = (code ^ 128) - 128  # signed
    entry: dict[str, Array | float] = {"super_scale": 1, "super_minimum": 1}
    for name in GROUP_PLANES:
        if (ref := getattr(w, name)) is not None:
            shared = 8 // layout.scale_bits if name in ("scale", "minimum") else 1
            group = divmod_pow2(weight, size // (ref.shape[0] * shared))[0]
            byte, place = divmod_pow2(group, shared)
            value = load(ref, byte)
            if shared > 1:
                value = (value >> (place * layout.scale_bits).astype(value.dtype)) & 15
            decode = layout.decode_scale if name == "scale" else None
            entry[name] = (decode(value) if decode else value.astype(jnp.float32))[:, None]
    y = decode_codes(code, layout) * (entry["scale"] * entry["super_scale"])
    if "minimum" in entry:
        y += entry["minimum"] * entry["super_minimum"]
    if bounds is not None:
        bound = load(bounds, lax.div(weight, columns))
        largest = float(jnp.finfo(out_ref.dtype).max)
        y *= jnp.where(bound > LEAST_BOUND, largest / bound, 0)[:, None]
    at = first + weight[:, None] + of_unit
    plgpu.store(out_ref.at[at], y.astype(out_ref.dtype), **inside(at))
