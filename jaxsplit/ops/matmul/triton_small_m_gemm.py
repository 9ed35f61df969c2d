"""GEMM of 2 to 64 rows with quantized matrices: a Triton kernel on tensor cores.

Weights are dequantized in registers into tensor core operands, so that memory traffic is that of
the packed codes.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.ops.activations.packed import (
    SUM_SIZES,
    PackedRows,
    group_size,
    keeps_places,
    packing_of,
)
from jaxsplit.ops.launch import dispatch_programs, divmod_pow2
from jaxsplit.ops.matmul import triton_gemv_int8
from jaxsplit.ops.matmul.byte_tables import look_up_ptx
from jaxsplit.ops.matmul.groups import GroupedGemmInfo
from jaxsplit.ops.matmul.scaling import both_halves, scale_by_jax, scale_ptx
from jaxsplit.ops.matmul.trellis import scaled_trellis
from jaxsplit.ops.tilings import tunable
from jaxsplit.pallas import ArrayRef, pl, plgpu
from jaxsplit.quant.qtensor import PlaneLayout, QTensor, group_shifts, look_up

MAX_ROWS = 64
"""With more rows, dequantizing the matrix first is as fast."""

_MAX_STEP_WEIGHTS = 512  # of a row
_MIN_WARPS = 1024  # with fewer, split-K adds parts to keep the GPU busy
_RESIDENT_WARPS = 1536  # about as many run at a time with the registers of long steps
_LONG_STEPS = 4  # steps of a program from which long ones pay
_MIN_MMA_K = 16  # fewest columns of a tensor core operand
_FEW_ROWS = 16  # up to which programs have few warps, and steps may be shorter

# The bits of a code, read as a bfloat16, are the code times 2**_CODE_EXPONENT: a subnormal or one
# of the smallest normals. This saves the conversion. Scales are multiplied in advance with
# 2**(_WEIGHT_EXPONENT - _CODE_EXPONENT), so that weights come out times 2**_WEIGHT_EXPONENT, clear
# of the subnormals; the final store undoes it.
_CODE_EXPONENT = -133
_WEIGHT_EXPONENT = -64


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """The tile of a program.

    Attributes:
      rows: rows of the matrix.
      pairs: byte pairs of each row, per step.
      warps: of a program.
      stages: of the software pipeline.
      accumulators: 1, or 2 used in turn: consecutive MMAs then do not wait for one another.
    """

    rows: int
    pairs: int
    warps: int
    stages: int
    accumulators: int = 1


def _tiling_for(rows: int) -> _Tiling:
    """The fastest tiling that was measured, for a number of rows of activations."""
    if rows <= _FEW_ROWS:
        return _Tiling(32, 128, 2, 3, accumulators=2 if rows <= 8 else 1)
    return _Tiling(64, 128, 4, 2, accumulators=2) if rows <= 32 else _Tiling(64, 64, 4, 2)


def _shorten_steps(tiling: _Tiling, weights: Sequence[QTensor]) -> _Tiling:
    """Fewer byte pairs per step, for lower register pressure."""
    codes_per_byte = max(packing_of(w.layout)[0] for w in weights)
    return dataclasses.replace(tiling, pairs=max(64, tiling.pairs // codes_per_byte))


def supports(w: QTensor, dtype: jnp.dtype) -> bool:
    """Whether `small_m_gemm` can multiply activations of a dtype with a matrix."""
    sum_size = None if w.minimum is None else group_size(w, w.minimum)
    has_sums = sum_size in (None, *SUM_SIZES)
    return dtype == jnp.bfloat16 and triton_gemv_int8.supports(w) and has_sums


def _candidates(
    x: PackedRows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    groups: GroupedGemmInfo | None = None,
    out_rows: int = 0,
    split_k: int | None = None,
    sum_parts: bool = True,
) -> list[_Tiling]:
    if groups is not None:
        return []
    accumulators = 2 if x.values[0].shape[1] <= 32 else 1
    shapes = itertools.product((32, 64), (64, 128), (2, 4), (2, 3))
    return [_Tiling(*shape, accumulators) for shape in shapes]


@tunable(_candidates)
def small_m_gemm(
    x: PackedRows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    groups: GroupedGemmInfo | None = None,
    out_rows: int = 0,
    tiling: _Tiling | None = None,
    split_k: int | None = None,
    sum_parts: bool = True,
) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[rows, out]`.

    Scales, and codes times scales, are rounded to bfloat16. A minimum multiplies the sum of its
    group's activations, both rounded to bfloat16.

    Args:
      x: `[rows, in]` in the order of the weights.
      weights: supported matrices `[out, in]`, with planes of uint32 or bytes.
      dtype: of the results.
      groups: the weights are stacks `[matrices, out, in]`, multiplied with these groups of rows.
      out_rows: with groups, the number of rows of the results.
      tiling: None: a tuned one, or one by the number of rows.
      split_k: parts of the inner dimension, each computed by its own programs. None: as many as
        keep the GPU busy, but 1 for several matrices whose parts are to be summed.
      sum_parts: a second kernel sums the parts; else the results are float32 `[parts, rows, out]`.
    """
    (x_rows, columns) = x.values[0].shape[1], weights[0].shape[-1]
    width = max(8, pl.next_power_of_2(x_rows)) if groups is None else groups.x_row.shape[1]
    weights = [_load_view(w) for w in weights]
    default, tiling = tiling is None, tiling or _tiling_for(width)
    programs = [pl.cdiv(w.shape[-2], tiling.rows) for w in weights]
    warps = sum(programs) * tiling.warps
    steps = pl.cdiv(columns, _MAX_STEP_WEIGHTS)
    if groups is not None:
        parts, count, rows = 1, len(groups.matrix), out_rows
    else:
        if split_k is None:
            split_k = 1 if sum_parts and len(weights) > 1 else max(1, _MIN_WARPS // warps)
        parts = count = pl.cdiv(steps, pl.cdiv(steps, split_k))
        rows = x_rows
    few_steps = steps < _LONG_STEPS * parts
    if default and width <= _FEW_ROWS and (few_steps or count * warps > _RESIDENT_WARPS):
        tiling = _shorten_steps(tiling, weights)
    inputs, structure = jax.tree.flatten((x, weights, groups))
    kernel = partial(
        _small_m_gemm_kernel,
        structure=structure,
        programs=programs,
        width=width,
        tiling=tiling,
    )
    shape = (rows,) if sum_parts and parts == 1 else (parts, rows)
    part_dtype = dtype if sum_parts and parts == 1 else jnp.float32
    ys = pl.pallas_call(
        kernel,
        grid=(count, sum(programs)),
        out_shape=[jax.ShapeDtypeStruct((*shape, w.shape[-2]), part_dtype) for w in weights],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpreted(),
        name="small_m_gemm",
    )(*inputs)
    return [jnp.sum(y, axis=0).astype(dtype) if sum_parts and parts > 1 else y for y in ys]


def _load_view(w: QTensor) -> QTensor:
    """Reinterprets a matrix in the widths in which the kernel loads it.

    Code planes become uint16, the element size of tensor core operands. Where a chunk has several
    1-byte scales, four of them become a uint32 or int32: byte loads would be issued one by one.
    """

    def to_u16(plane: Array) -> Array:
        if plane.dtype != jnp.uint32:
            plane = plane.reshape(*plane.shape[:-1], -1, 2)
        pairs = lax.bitcast_convert_type(plane, jnp.uint16)
        return pairs.reshape(*pairs.shape[: len(w.shape) - 1], -1)

    scale = w.scale
    if (
        not w.layout.shift
        and scale.dtype.itemsize == 1
        and w.layout.chunk % (4 * group_size(w, scale)) == 0
    ):
        dtype = jnp.int32 if scale.dtype == jnp.int8 else jnp.uint32
        scale = lax.bitcast_convert_type(scale.reshape(*scale.shape[:-1], -1, 4), dtype)
    return dataclasses.replace(w, codes=tuple(map(to_u16, w.codes)), scale=scale)


def _small_m_gemm_kernel(
    *refs: jax.Ref,
    structure: Any,
    programs: Sequence[int],
    width: int,
    tiling: _Tiling,
) -> None:
    """Computes a tile of rows of one matrix, for one split-K part or one group.

    Args:
      *refs: inputs, then outputs.
      structure: of the inputs: activations, matrices and groups.
      programs: number of programs of each matrix.
      width: rows of activations, padded.
      tiling: of a program.
    """
    x, weights, groups = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs, part = refs[structure.num_leaves :], pl.program_id(0)

    def task(w: QTensor, out_ref: jax.Ref, program: Array) -> None:
        first = program * tiling.rows
        _Tile(x, w, groups, out_ref, first=first, part=part, width=width, tiling=tiling).run()

    tasks = [partial(task, *operands) for operands in zip(weights, outs, strict=True)]
    run = partial(dispatch_programs, pl.program_id(1), list(zip(programs, tasks, strict=True)))
    if groups is None:
        run()
    else:
        pl.when(part < groups.count[()])(run)


class _Tile:
    """A tile of the results, inside a kernel: some rows of a matrix, for one part or group.

    A step covers some byte pairs of each row in the narrowest plane, and the codes of the same
    weights in the other planes. The codes at one position of all pairs are one MMA operand.

    Args:
      x: activations.
      w: the matrix, or a stack.
      groups: groups of rows, or None.
      out_ref: the results.
      first: index of the first row of the matrix.
      part: index of the split-K part, or of the group.
      width: rows of activations, padded.
      tiling: of the program.

    Attributes:
      x_values, x_sums: references to the activations in the order of the matrix, as in
        `PackedRows`.
      out, columns: shape of the matrix.
      codes_per_byte, pairs_per_chunk: see `packing_of`.
      row_pairs: byte pairs of a row.
      rows, accumulators: as in `_Tiling`.
      step_pairs, step_weights: byte pairs and weights of a row, per step.
      group_planes, group_sizes: the planes with one value per group, and the weights per group.
      row: rows of the matrix, int32 `[rows]`, clamped.
      steps: steps of a row; `full`: none of them needs a mask.
      start, stop: the steps of this part.
      x_row, out_row: rows of the activations and of the results, int32 `[width]`.
      row_stop: rows of the results at or past it are not stored.
      stack_index, part_index: leading indices of the matrix and of the results.
    """

    def __init__(
        self,
        x: PackedRows,
        w: QTensor,
        groups: GroupedGemmInfo | None,
        out_ref: jax.Ref,
        *,
        first: Array,
        part: Array,
        width: int,
        tiling: _Tiling,
    ):
        self.rms, self.w, self.out_ref = x.rms, w, out_ref
        self.x_values, self.x_sums = x.for_matrix(w)
        *_, self.out, self.columns = w.shape
        self.codes_per_byte, self.pairs_per_chunk = packing_of(w.layout)
        self.row_pairs = self.columns // (2 * self.codes_per_byte)
        self.rows, self.accumulators, self.first = tiling.rows, tiling.accumulators, first
        self.step_pairs = min(tiling.pairs, _MAX_STEP_WEIGHTS // (2 * self.codes_per_byte))
        self.step_weights = 2 * self.codes_per_byte * self.step_pairs
        self.group_planes = {
            name: getattr(w, name)
            for name in triton_gemv_int8.GROUP_PLANES
            if getattr(w, name) is not None
        }
        self.group_sizes = {name: group_size(w, ref) for name, ref in self.group_planes.items()}
        self.row = jnp.minimum(first + jnp.arange(tiling.rows), self.out - 1)
        self.steps = pl.cdiv(self.row_pairs, self.step_pairs)
        self.full = self.row_pairs % self.step_pairs == 0
        self.start, self.stop = 0, self.steps
        self.out_row = jnp.arange(width)
        self.x_row = jnp.minimum(self.out_row, self.x_values.shape[1] - 1)
        self.stack_index: tuple[Array, ...] = ()
        self.part_index: tuple[Array, ...] = ()
        if groups is not None:
            self.stack_index = (groups.matrix[part],)
            self.x_row = plgpu.load(groups.x_row.at[part, jnp.arange(width)])
            self.out_row = groups.start[part] + jnp.arange(width)
            self.row_stop = groups.stop[part]
        else:
            self.row_stop = out_ref.shape[-2]
            if out_ref.ndim == 3:
                part_steps = pl.cdiv(self.steps, out_ref.shape[0])
                self.start, self.part_index = part * part_steps, (part,)
                self.stop = jnp.minimum(self.start + part_steps, self.steps)

    def run(self) -> None:
        """Runs all steps and stores the results."""
        total = jnp.zeros((self.rows, len(self.x_row)), jnp.float32)
        rms_factor = None if self.rms is None else self.rms.inverse_of(self.x_row)
        carry = (total, self._load_super_groups(self.start))
        total, _ = lax.fori_loop(self.start, self.stop, self._step, carry)
        total *= 2.0**-_WEIGHT_EXPONENT
        if rms_factor is not None:
            total *= jnp.broadcast_to(rms_factor[None], total.shape)
        index = jnp.broadcast_to((self.first + jnp.arange(self.rows))[:, None], total.shape)
        out_row = jnp.broadcast_to(self.out_row[None], total.shape)
        mask = (out_row < self.row_stop) & (index < self.out)
        total = total.astype(self.out_ref.dtype)
        plgpu.store(self.out_ref.at[*self.part_index, out_row, index], total, mask=mask)

    def _load(self, ref: ArrayRef, column: Array, mask: Array | None) -> Array:
        """Loads columns of the tile's rows from a plane of the matrix: `[rows, columns]`."""
        shape = (len(self.row), len(column))
        row, column = (jnp.broadcast_to(a, shape) for a in (self.row[:, None], column[None]))
        index = (*self.stack_index, row, column) if ref.ndim == 3 else (row, column)
        if mask is None:
            return plgpu.load(ref.at[index])
        mask = jnp.broadcast_to(mask[None], shape)
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    def _load_x(self, ref: ArrayRef, column: Array, mask: Array | None, *leading: int) -> Array:
        """Loads columns of the rows of activations, or of their sums: `[width, columns]`."""
        shape = (len(self.x_row), len(column))
        row, column = (jnp.broadcast_to(a, shape) for a in (self.x_row[:, None], column[None]))
        index = (*leading, row, column)
        if mask is None:
            return plgpu.load(ref.at[index])
        mask = jnp.broadcast_to(mask[None], shape)
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    def _mask(self, index: Array, stop: int) -> Array | None:
        """The mask of the indices below `stop`; None: all are, in every step."""
        return None if self.full else index < stop

    def _first_group(self, size: int, step: Array | int) -> tuple[Array | int, int]:
        """The index of the first group of a step, and the number of its groups of `size`."""
        count = max(1, self.step_weights // size)
        if self.step_weights >= size:
            return step * count, count
        return divmod_pow2(step * self.step_weights, size)[0], count

    def _groups(self, size: int, step: Array, min_count: int = 1) -> tuple[Array, Array | None]:
        """Indices of the groups of a step, padded to `min_count`, and their mask (None: all)."""
        first, count = self._first_group(size, step)
        offset = jnp.arange(max(count, min_count))
        group = offset + first
        if count < min_count:
            return group, (offset < count) & (group < self.columns // size)
        return group, self._mask(group, self.columns // size)

    def _load_scales(self, step: Array) -> list[Array]:
        """Loads the scales of a step: `[rows, groups]` for each set of codes that has its own.

        The codes at one position of all bytes are weights that are `2 * pairs_per_chunk` apart in a
        chunk. With groups smaller than a chunk, different positions have different scales.
        """
        ref, size, pairs_per_chunk = self.w.scale, self.group_sizes["scale"], self.pairs_per_chunk
        chunk_weights = self.w.layout.chunk
        if ref.dtype in (jnp.int32, jnp.uint32):  # see `_load_view`
            count, per_chunk = self.step_weights // chunk_weights, chunk_weights // size
            first = per_chunk * (step * count + jnp.arange(count))
            loaded = [
                self._load(ref, first + i, self._mask(first + i, ref.shape[-1]))
                for i in range(per_chunk)
            ]
            return [(packed << (24 - 8 * byte)) >> 24 for packed in loaded for byte in range(4)]
        if size >= chunk_weights:
            return [self._load(ref, *self._groups(size, step))]
        shared = min(size // 2, pairs_per_chunk)  # pairs under one scale
        index = step * self.step_pairs + shared * jnp.arange(self.step_pairs // shared)
        chunk, pair = divmod_pow2(index, pairs_per_chunk)
        weight = 2 * (chunk * self.codes_per_byte * pairs_per_chunk + pair)
        offsets = range(0, chunk_weights, max(size, 2 * pairs_per_chunk))
        groups = [divmod_pow2(weight + offset, size)[0] for offset in offsets]
        return [self._load(ref, group, self._mask(group, ref.shape[-1])) for group in groups]

    def _load_super_groups(self, step: Array | int) -> dict[str, list[Array]]:
        """Loads the super-scales and super-minima of a step, `[rows]` for each super-group.

        They are few: each thread loads the ones that it needs itself.
        """
        loaded = {}
        for name in ("super_scale", "super_minimum"):
            if name in self.group_planes:
                ref = self.group_planes[name]
                first, count = self._first_group(self.group_sizes[name], step)
                groups = [jnp.minimum(first + i, ref.shape[-1] - 1) for i in range(count)]
                loaded[name] = [self._load(ref, group[None], None)[:, 0] for group in groups]
        return loaded

    def _apply_super_groups(
        self,
        values: Array,
        super_groups: dict[str, list[Array]],
        name: str,
        *,
        size: int,
        power: int,
    ) -> Array:
        """`2**power` times scales or minima, times their super-scale or super-minimum if any.

        Args:
          values: `[rows, groups]`, of a step.
          super_groups: from `_load_super_groups`.
          name: of the plane of super-groups.
          size: weights per group.
          power: of two.

        Returns:
          bfloat16 `[rows, groups]`, rounded once.
        """
        factor: Array | float = 2.0**power
        for i, x in enumerate(super_groups.get(name, ())):
            x = x.astype(jnp.float32)[:, None] * 2.0**power
            before = jnp.arange(values.shape[1])[None] < i * self.group_sizes[name] // size
            factor = jnp.where(before, factor, x) if i else x
        return (values.astype(jnp.float32) * factor).astype(jnp.bfloat16)

    def _step(self, i: Array, carry: tuple) -> tuple:
        """Adds a step's products to the carried total, and prefetches the next super-groups."""
        total, super_groups = carry
        w, size = self.w, self.group_sizes
        # The compiler pipelines the loads of MMA operands, but not these, which are too narrow.
        following = self._load_super_groups(jnp.minimum(i + 1, self.steps - 1))
        power, scales = _WEIGHT_EXPONENT - _CODE_EXPONENT, self._load_scales(i)
        shifts: list[Array] = []
        if w.layout.shift:
            shifts = [group_shifts(x, w.layout).astype(jnp.uint16) for x in scales]
        if w.layout.decode_scale:
            scales = [w.layout.decode_scale(x) for x in scales]
        options = {"size": self.step_weights // scales[0].shape[1], "power": power}
        scales = [
            self._apply_super_groups(x, super_groups, "super_scale", **options) for x in scales
        ]
        if w.minimum is not None:
            group, mask = self._groups(size["minimum"], i, _MIN_MMA_K)
            minimum = self._load(w.minimum, group, mask)
            options = {"size": size["minimum"], "power": _WEIGHT_EXPONENT}
            minimum = self._apply_super_groups(minimum, super_groups, "super_minimum", **options)
            assert self.x_sums is not None  # as for every order with minima
            total += _dot(minimum, self._load_x(self.x_sums, group, mask))
        return self._multiply_codes(i, scales, shifts, total), following

    def _multiply_codes(
        self, step: Array, scales: list[Array], shifts: list[Array], total: Array
    ) -> Array:
        """Adds the products of a step's codes and scales to `total`; shifts are those of the
        values, if the layout has them."""
        if self.w.layout.trellis:
            return self._multiply_trellis(step, scales[0], total)
        w, layout, pairs_per_chunk = self.w, self.w.layout, self.pairs_per_chunk
        index = step * self.step_pairs + jnp.arange(self.step_pairs)
        # Written as a division, not as shifts, so that the compiler sees contiguous runs of pairs.
        chunk, pair = lax.div(index, pairs_per_chunk), lax.rem(index, pairs_per_chunk)
        loaded: dict[tuple[int, int], Array] = {}
        spread: dict[int, list[Array]] = {}
        totals = [total] + [jnp.zeros_like(total)] * (self.accumulators - 1)
        for code in range(self.codes_per_byte):
            planes, places = [], []
            for p, (plane, bits) in enumerate(zip(w.codes, layout.bits, strict=True)):
                chunk_pairs = layout.chunk * bits // 16  # of this plane
                shift, offset = divmod(code * pairs_per_chunk, chunk_pairs)
                if (p, offset) not in loaded:
                    whole_chunk = chunk_pairs == pairs_per_chunk
                    column = index if whole_chunk else chunk * chunk_pairs + offset + pair
                    loaded[p, offset] = self._load(plane, column, self._mask(index, self.row_pairs))
                planes.append(loaded[p, offset])
                places.append(shift * bits)
            group = code * len(scales) // self.codes_per_byte
            if group not in spread:
                spread[group] = [_spread(x[group], self.step_pairs) for x in (scales, shifts) if x]
            for byte in range(2):
                mask = self._mask(index, self.row_pairs)
                x = self._load_x(self.x_values, index, mask, 2 * code + byte)
                weights = _scaled_codes(planes, places, byte, layout, *spread[group])
                totals[byte % self.accumulators] += _dot(weights, x)
        return sum(totals[1:], totals[0])

    def _multiply_trellis(self, step: Array, scale: Array, total: Array) -> Array:
        """As `_multiply_codes`, of a trellis layout, whose byte pairs are states."""
        index = step * self.step_pairs + jnp.arange(self.step_pairs)
        mask = self._mask(index, self.row_pairs)
        states, *signs = self.w.codes
        states, signs = self._load(states, index, mask), [*signs, None][0]
        if signs is not None:  # a byte for each state
            shift = jnp.broadcast_to((8 * (index & 1)).astype(jnp.uint16)[None], states.shape)
            signs = self._load(signs, index >> 1, mask) >> shift
        scale = _spread(scale, self.step_pairs)
        totals = [total] + [jnp.zeros_like(total)] * (self.accumulators - 1)
        for place in range(self.w.layout.chunk):
            x = self._load_x(self.x_values, index, mask, place)
            weights = scaled_trellis(states, place, scale, signs, exponent=_CODE_EXPONENT)
            totals[place % self.accumulators] += _dot(weights, x)
        return sum(totals[1:], totals[0])


def _spread(values: Array, count: int) -> Array:
    """`[rows, groups]`, each value repeated, to `[rows, count]`."""
    rows, groups = values.shape
    shape = (rows, groups, count // groups)
    return jnp.broadcast_to(values[:, :, None], shape).reshape(rows, count)


def _dot(a: Array, b: Array) -> Array:
    """`a @ b.T` on tensor cores, float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _scaled_codes(
    planes: Sequence[Array],
    shifts: Sequence[int],
    byte: int,
    layout: PlaneLayout,
    scale: Array,
    moved: Array | None = None,
) -> Array:
    """Unpacks one code of each byte pair, and multiplies it with its scale.

    Args:
      planes: byte pairs `[rows, pairs]` of each plane, uint16.
      shifts: position in its byte of each plane's bits of the code.
      byte: which byte of the pairs.
      layout: of the matrix.
      scale: bfloat16 `[rows, pairs]`, times `2**(_WEIGHT_EXPONENT - _CODE_EXPONENT)`.
      moved: what the values of the layout's table are shifted by, uint16 `[rows, pairs]`; None:
        nothing.

    Returns:
      the weights without their minima, bfloat16 `[rows, pairs]`, times `2**_WEIGHT_EXPONENT`. The
      codes of a single plane without a table stay where they are in their byte, so that these
      weights are `2**shifts[0]` times larger; `PackedRows` makes up for it.
    """
    base = shifts[0] if keeps_places(layout) else 0  # bit at which the code starts
    shifts = [8 * byte + shift - base for shift in shifts]
    # Of signed bytes, and of tables: 128 is added to what they hold.
    signed = layout.bits == (8,) or layout.table is not None
    offset = (128 if signed else layout.offset) * 2**base
    if interpreted():
        return _scaled_codes_by_jax(planes, shifts, layout, scale, moved, base=base, offset=offset)
    asm = _scaled_codes_ptx(shifts, layout, base, offset, moves=moved is not None)
    args = [*planes, scale] if moved is None else [*planes, scale, moved]
    [result] = plgpu.elementwise_inline_asm(
        asm,
        args=args,
        constraints=",".join(["=r", *["r"] * len(args)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16)],
    )
    return result


def _scaled_codes_by_jax(
    planes: Sequence[Array],
    shifts: Sequence[int],
    layout: PlaneLayout,
    scale: Array,
    moved: Array | None,
    *,
    base: int,
    offset: float,
) -> Array:
    """What `_scaled_codes_ptx` computes, bit for bit."""
    code, done = jnp.uint16(0), base
    for plane, shift, bits in zip(planes, shifts, layout.bits, strict=True):
        field = (plane >> jnp.uint16(shift)) << jnp.uint16(done - base)
        code |= field & jnp.uint16((2**bits - 1) << done)
        done += bits
    if layout.bits == (8,):
        code ^= jnp.uint16(128)
    if layout.table is not None:
        code = (look_up(code, layout.table) + 128).astype(jnp.uint16)
    if moved is not None:
        code += moved
    return scale_by_jax(code.astype(jnp.float32) - offset, scale, _CODE_EXPONENT)


def _scaled_codes_ptx(
    shifts: Sequence[int], layout: PlaneLayout, base: int, offset: float, *, moves: bool
) -> str:
    """PTX that computes `(code - offset) * scale` for two elements, in the halves of a register.

    The code's bits are read as bfloat16, without a conversion. On compute capability 8.0, `fma` is
    the only bfloat16 arithmetic instruction.

    Args:
      shifts: right shift of each plane; `$1`, `$2` ... are the planes, the next operand the scale.
      layout: of the matrix.
      base: bit of the result's low byte at which the code starts.
      offset: subtracted from the code.
      moves: the last operand is added to the code.
    """

    scale = f"${len(shifts) + 1}"
    lines = [".reg .b32 code, field;"]
    done = 0
    for i, (shift, bits) in enumerate(zip(shifts, layout.bits, strict=True)):
        shift, field = shift - done, f"${i + 1}"
        if shift:
            lines.append(f"sh{'r' if shift > 0 else 'l'}.b32 field, {field}, {abs(shift)};")
            field = "field"
        mask = both_halves((2**bits - 1) << (done + base))
        # `(field & mask) ^ code`: the planes have disjoint bits. For signed bytes, flipping the top
        # bit adds 128, which the offset subtracts.
        code = "code" if i else both_halves(128 if bits == 8 else 0)
        lines.append(f"lop3.b32 code, {field}, {mask}, {code}, 0x6A;")
        done += bits
    if layout.table is not None:
        lines += look_up_ptx("code", "code", [entry + 128 for entry in layout.table])
        lines.append("and.b32 code, code, 0x00ff00ff;")
    if moves:
        lines.append(f"add.u32 code, code, ${len(shifts) + 2};")
    lines += scale_ptx(scale, offset, _CODE_EXPONENT)
    return "{ " + " ".join(lines) + " }"
