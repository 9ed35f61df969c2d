"""Dequantizes matrices for matmuls with many rows: a Triton kernel."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.ops.launch import divmod_pow2
from jaxsplit.ops.matmul.float8 import LEAST_BOUND
from jaxsplit.ops.matmul.triton_gemv_int8 import GROUP_PLANES
from jaxsplit.pallas import ArrayRef, pl, plgpu
from jaxsplit.quant.qtensor import QTensor, decode_codes, group_shifts, to_u32, trellis_values

_WIDTH = 8  # neighboring weights that a thread dequantizes together: a unit
_UNITS = 256  # of a program
_WARPS = 4


def supports(w: QTensor) -> bool:
    """Whether `dequantize` supports a matrix."""
    # All planes are loaded as uint32.
    layout = w.layout
    unit = 32 if layout.trellis else layout.chunk
    aligned = all(unit * bits % 32 == 0 for bits in layout.bits) and w.shape[-1] % unit == 0
    groups = w.scale.shape[-1] * 8 // w.layout.scale_bits
    # Indices are 32-bit.
    return aligned and w.shape[-1] // groups % _WIDTH == 0 and math.prod(w.shape) < 2**31


def dequantize(
    weights: Sequence[QTensor],
    dtype: jnp.dtype,
    *,
    bounds: Sequence[Array] | None = None,
    after: Array | None = None,
) -> Array:
    """Dequantizes matrices and concatenates their rows: `[sum of out, in]`. Computes in float32.

    Args:
      weights: supported matrices `[out, in]`; planes of bytes are converted to uint32.
      dtype: of the result.
      bounds: float32 `[out]` for each matrix: every row is scaled so that its bound becomes the
        largest number of `dtype`; None: no scaling.
      after: an array that XLA must compute before it launches the kernel. The kernel ignores it.
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
    """Dequantizes neighboring weights of one matrix.

    Args:
      *refs: inputs, then the output.
      structure: of the inputs: matrices, bounds and `after`.
      sizes: number of weights of each matrix.
      columns: weights per row.
    """
    *inputs, out_ref = refs
    weights, bounds, _ = jax.tree.unflatten(structure, inputs)
    program, first = pl.program_id(0), 0
    bounds = bounds or [None] * len(weights)
    for w, size, row_bounds in zip(weights, sizes, bounds, strict=True):
        programs = pl.cdiv(size, _UNITS * _WIDTH)
        options = {"first": first, "row_bounds": row_bounds, "columns": columns}
        store = partial(_dequantize, w, size, program, out_ref, **options)
        if len(weights) == 1:
            store()
        else:
            pl.when((program >= 0) & (program < programs))(store)
        program, first = program - programs, first + size


def _dequantize(
    w: QTensor,
    size: int,
    program: Array,
    out_ref: jax.Ref,
    *,
    first: int,
    row_bounds: jax.Ref | None,
    columns: int,
) -> None:
    """Dequantizes and stores the weights of a program.

    Args:
      w: the matrix, its planes flattened to `[n]`.
      size: number of weights of the matrix.
      program: index of the program among those of the matrix.
      out_ref: the result, flattened.
      first: index in the result of the matrix's first weight.
      row_bounds: bounds of the matrix's rows, or None.
      columns: weights per row.
    """
    layout = w.layout
    weight = (program * _UNITS + jnp.arange(_UNITS)) * _WIDTH  # the first of each unit
    offset = jnp.arange(_WIDTH)

    def mask_options(index: Array) -> dict[str, Array]:
        """The `mask` argument of loads and stores at indices `[units, ...]`; none if all exist."""
        if size % (_UNITS * _WIDTH) == 0:
            return {}
        mask = (weight < size).reshape(-1, *[1] * (index.ndim - 1))
        return {"mask": jnp.broadcast_to(mask, index.shape)}

    def load(ref: ArrayRef, index: Array) -> Array:
        options = mask_options(index)
        other = jnp.zeros((), ref.dtype) if options else None
        return plgpu.load(ref.at[index], **options, other=other)

    y = _values(load, w, weight, offset)
    values: dict[str, Array | float] = {"super_scale": 1, "super_minimum": 1}
    for name in GROUP_PLANES:
        if (ref := getattr(w, name)) is not None:
            per_byte = 8 // layout.scale_bits if name in ("scale", "minimum") else 1
            group = divmod_pow2(weight, size // (ref.shape[0] * per_byte))[0]
            byte, position = divmod_pow2(group, per_byte)
            value = load(ref, byte)
            if per_byte > 1:
                value = (value >> (position * layout.scale_bits).astype(value.dtype)) & 15
            if name == "scale" and layout.shift:
                y += group_shifts(value, layout).astype(jnp.float32)[:, None]
            decode = layout.decode_scale if name == "scale" else None
            values[name] = (decode(value) if decode else value).astype(jnp.float32)[:, None]
    y *= values["scale"] * values["super_scale"]
    if "minimum" in values:
        y += values["minimum"] * values["super_minimum"]
    if row_bounds is not None:
        bound = load(row_bounds, lax.div(weight, columns))
        largest = float(jnp.finfo(out_ref.dtype).max)
        y *= jnp.where(bound > LEAST_BOUND, largest / bound, 0)[:, None]
    index = first + weight[:, None] + offset
    plgpu.store(out_ref.at[index], y.astype(out_ref.dtype), **mask_options(index))


def _values(
    load: Callable[[ArrayRef, Array], Array], w: QTensor, weight: Array, offset: Array
) -> Array:
    """Values before scaling and shifting, float32 `[units, width]`.

    Args:
      load: loads elements of a plane.
      w: the matrix, its planes flattened.
      weight: index of the first weight of each unit, `[units]`.
      offset: of each weight in its unit, `[width]`.
    """
    layout = w.layout
    if layout.trellis:
        return _trellis(load, w, weight, offset)
    code, done = jnp.uint32(0), 0
    for plane, bits in zip(w.codes, layout.bits, strict=True):
        plane_bits = _load_codes(
            partial(load, plane), weight, offset, chunk=layout.chunk, bits=bits
        )
        code |= plane_bits << jnp.uint32(done)
        done += bits
    if layout.table is None:
        code = lax.bitcast_convert_type(code, jnp.int32)
    if layout.bits == (8,):
        code = (code ^ 128) - 128  # sign-extend
    return decode_codes(code, layout)


def _trellis(
    load: Callable[[ArrayRef, Array], Array], w: QTensor, weight: Array, offset: Array
) -> Array:
    """`_values` of a trellis layout: a unit is one state, or two in a uint32."""
    chunk = w.layout.chunk
    state, _ = divmod_pow2(weight, chunk)
    word, half = divmod_pow2(state, 2)
    part, index = divmod_pow2(offset, chunk)
    shift = 16 * (half[:, None] + part)
    states = (load(w.codes[0], word)[:, None] >> shift.astype(jnp.uint32)) & jnp.uint32(0xFFFF)
    index = jnp.broadcast_to(index, states.shape)
    if len(w.codes) == 1:
        return trellis_values(states, index)
    word, first = divmod_pow2(weight, 32)
    place = (first[:, None] + offset).astype(jnp.uint32)
    values = jnp.abs(trellis_values(states, index))
    negative = (load(w.codes[1], word)[:, None] >> place) & jnp.uint32(1)
    return jnp.where(negative == 1, -values, values)


def _load_codes(
    load: Callable[[Array], Array], weight: Array, offset: Array, *, chunk: int, bits: int
) -> Array:
    """Loads the bits of the codes of units from a plane.

    Args:
      load: loads uint32 of the plane.
      weight: index of the first weight of each unit, `[units]`.
      offset: of each weight in its unit, `[width]`.
      chunk: as in `PlaneLayout`.
      bits: of the plane.

    Returns:
      uint32 `[units, width]`.
    """

    def load_four(weight: Array) -> Array:
        """A uint32 whose bytes hold the codes of four neighboring weights in their low bits."""
        index, position = divmod_pow2(weight, chunk)
        code, byte = divmod_pow2(position, chunk * bits // 8)
        packed = load(index * (chunk * bits // 32) + (byte >> 2))
        return (packed >> (code * bits).astype(jnp.uint32))[:, None]

    packed = jnp.where(offset < 4, load_four(weight), load_four(weight + 4))
    return (packed >> (8 * (offset & 3)).astype(jnp.uint32)) & jnp.uint32(2**bits - 1)
