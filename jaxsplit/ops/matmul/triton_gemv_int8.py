"""GEMV of one or two rows with quantized matrices, in integer arithmetic: a Triton kernel.

Activations are quantized to int8, so that `dp4a` multiplies four codes at a time. Each group of
weights is scaled once, after its integer sum.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm import one_shot
from jaxsplit.comm.peers import WARPS, PeerGroup
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.int8 import SLICE, Int8Rows, bank_swizzle
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.ops.launch import dispatch_programs, divmod_pow2
from jaxsplit.ops.matmul.byte_tables import (
    MAX_ENTRIES,
    look_up_bytes,
    look_up_nibbles,
    select_bytes,
)
from jaxsplit.ops.matmul.trellis import four_values
from jaxsplit.ops.tilings import tunable
from jaxsplit.pallas import ArrayRef, pl, plgpu
from jaxsplit.quant.qtensor import PlaneLayout, QTensor, group_shifts, to_u32

MAX_ROWS = 2
"""With more rows of activations, tensor cores are faster."""

GROUP_PLANES = ("scale", "minimum", "super_scale", "super_minimum")
"""The planes of a `QTensor` with one value per group of weights."""

_MAX_UNIT_BYTES = 32  # of the first plane, that a thread multiplies in a step

_Slice = tuple[int, int]  # the offset of its first weight and of its first byte, see `_Schedule`
_Codes = dict[tuple[str, int], Any]  # loaded codes, by `_Schedule.load_key`


def supports(w: QTensor) -> bool:
    """Whether `gemv_int8` can multiply with a matrix, once its planes are uint32."""
    layout = _kernel_layout(w.layout)
    known = layout.scale_bits == 8 and len(layout.table or ()) <= MAX_ENTRIES
    sizes = [layout.chunk * bits // 8 for bits in layout.bits]  # bytes of a chunk in each plane
    aligned = sizes[0] % SLICE == 0 and all(size % 4 == 0 for size in sizes)
    # Indices are 32-bit.
    columns = w.shape[-1] % math.lcm(BLOCK, layout.chunk) == 0
    return known and aligned and columns and w.codes[0].size < 2**31


def _kernel_layout(layout: PlaneLayout) -> PlaneLayout:
    """The layout as the K loop walks it: of a trellis, chunks of 16 bytes of states."""
    if not layout.trellis:
        return layout
    return dataclasses.replace(layout, chunk=SLICE * 8 // layout.bits[0])


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """The tile of a program.

    Attributes:
      rows: rows of the matrix.
      step_bytes: bytes of each row, in the first plane, per step.
      steps_in_flight: steps whose loads are issued together.
    """

    rows: int = 4
    step_bytes: int = 2048
    steps_in_flight: int = 1

    @staticmethod
    def of(w: QTensor) -> "_Tiling":
        """The fastest tiling on H200s (docs/design/kernels.md).

        All loads of a row of up to 4 KiB are issued at once, so that no load waits for another.
        Longer rows are cut into equal steps where that is possible.
        """
        row_bytes = w.shape[-1] * w.layout.bits[0] // 8
        if row_bytes <= 2048:
            return _Tiling()
        if row_bytes <= 4096:
            return _Tiling(rows=2, steps_in_flight=2)
        return _Tiling(step_bytes=2048 if row_bytes % 2048 == 0 else 1024)


def _candidates(
    x: Int8Rows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    experts: Array | None = None,
    peers: PeerGroup | None = None,
) -> list[_Tiling]:
    if experts is not None or peers is not None:
        return []
    shapes = itertools.product((2, 4, 8), (1024, 2048), (1, 2))
    return [_Tiling(rows, step_bytes, steps) for rows, step_bytes, steps in shapes]


@tunable(_candidates)
def gemv_int8(
    x: Int8Rows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    experts: Array | None = None,
    peers: PeerGroup | None = None,
    tiling: _Tiling | None = None,
) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: supported matrices `[out, in]`; planes of bytes are converted to uint32.
      dtype: of the results.
      experts: int32 `[pairs]`, a multiple of the rows. The weights are then stacks `[experts, out,
        in]`, each row is multiplied with the matrices of its `pairs / rows` experts, and the
        results are `[pairs, out]`.
      peers: devices to which the kernel sends its result, with a single matrix, ahead of an
        all-reduce. The epochs, int32 `[rows, out]`, follow the result.
      tiling: None: a tuned one, or `_Tiling.of` each matrix.
    """
    rows = len(x.codes) if experts is None else len(experts)
    tilings = [tiling or _Tiling.of(w) for w in weights]
    programs = [pl.cdiv(w.shape[-2], t.rows) for w, t in zip(weights, tilings, strict=True)]
    weights = [w if w.codes[0].dtype == jnp.uint32 else to_u32(w) for w in weights]
    inputs, structure = jax.tree.flatten((x, list(weights), experts, peers))
    kernel = partial(
        _gemv_int8_kernel,
        structure=structure,
        programs=programs,
        tilings=tilings,
    )
    return pl.pallas_call(
        kernel,
        grid=(1 if experts is None else rows, sum(programs)),
        out_shape=one_shot.out_shapes([(rows, w.shape[-2]) for w in weights], dtype, peers),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="gemv_int8",
    )(*inputs)


def _gemv_int8_kernel(
    *refs: jax.Ref,
    structure: Any,
    programs: Sequence[int],
    tilings: Sequence[_Tiling],
) -> None:
    """Computes a tile of rows of one matrix, for all rows of activations or for one expert pair.

    Args:
      *refs: inputs, then outputs.
      structure: of the inputs: activations, matrices, experts and peers.
      programs: number of programs of each matrix.
      tilings: of each matrix.
    """
    x, weights, experts, peers = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs, pair = refs[structure.num_leaves :], pl.program_id(0)

    def task(i: int, program: Array) -> None:
        first = program * tilings[i].rows
        tile = _RowTile(x, weights[i], experts, first=first, pair=pair, tiling=tilings[i])
        tile.run(outs[i :: len(weights)], peers)

    tasks = [partial(task, i) for i in range(len(weights))]
    dispatch_programs(pl.program_id(1), list(zip(programs, tasks, strict=True)))


class _Schedule:
    """How the K loop walks a row of the matrix: steps of units, units of slices.

    A slice is 16 neighboring weights. A unit is what one thread multiplies per step: a chunk if
    that is short, else 16 bytes of the first plane, with the codes of the same weights in the other
    planes.

    Args:
      w: the matrix.
      tiling: of the program.

    Attributes:
      layout, columns: of the matrix.
      units_per_chunk: units of a chunk.
      row_units: units of a row.
      step_units: units of a step, a power of two.
      in_flight: steps of a round, whose loads are issued together.
      full_rounds: rounds without a partial step.
      tail: indices of the steps after the full rounds.
      group_planes: the planes of `w` with one value per group, by name.
      slices: of a unit: each slice's offset from the unit's first weight, and from its first byte
        in the first plane.
      segments: runs of slices under one weight scale; their products are summed as integers.
      blocks: for each scale of the activations, the indices of the segments that share it.
      sign_shift: where the offset is half the number of codes, flipping the top bit of a code and
        moving it to the top of an int8 subtracts the offset: by this many bits. 0: the matrix has
        another offset, or none.
      looks_up_nibbles: the low 4 bits of both codes of a byte are looked up together.
      first_plane_bytes: of a chunk in the first plane.
      needs_sums: the minima, the offset or shifts multiply sums of activations.
    """

    def __init__(self, w: QTensor, tiling: _Tiling):
        self.layout, self.columns = _kernel_layout(w.layout), w.shape[-1]
        codes_per_byte = 8 // self.layout.bits[0]
        chunk_bytes = self.layout.chunk // codes_per_byte  # in the first plane
        unit_bytes = chunk_bytes if chunk_bytes <= _MAX_UNIT_BYTES else SLICE
        self.units_per_chunk = chunk_bytes // unit_bytes
        self.row_units = self.columns // self.layout.chunk * self.units_per_chunk
        self.step_units = min(tiling.step_bytes // unit_bytes, pl.next_power_of_2(self.row_units))
        steps = pl.cdiv(self.row_units, self.step_units)
        self.in_flight = min(tiling.steps_in_flight, steps)
        self.full_rounds = self.row_units // (self.step_units * self.in_flight)
        self.tail = range(self.full_rounds * self.in_flight, steps)
        self.group_planes = {
            name: getattr(w, name) for name in GROUP_PLANES if getattr(w, name) is not None
        }
        starts = range(0, unit_bytes, SLICE)
        self.slices = [(c * chunk_bytes + b, b) for c in range(codes_per_byte) for b in starts]
        whole_chunk = self.units_per_chunk == 1
        segment = min(BLOCK, self.columns // w.scale.shape[-1]) if whole_chunk else SLICE
        segments = itertools.groupby(self.slices, lambda s: s[0] // segment)
        self.segments = [list(slices) for _, slices in segments]
        blocks = itertools.groupby(
            range(len(self.segments)), lambda i: self.segments[i][0][0] // BLOCK
        )
        self.blocks = [list(block) for _, block in blocks]
        width, offset = sum(self.layout.bits), self.layout.offset
        self.sign_shift = 8 - width if offset == 2 ** (width - 1) else 0
        affine = offset != 0 and not self.sign_shift
        self.looks_up_nibbles = self.layout.bits[0] == 4 and self.layout.table is not None
        self.first_plane_bytes = chunk_bytes
        self.needs_sums = "minimum" in self.group_planes or affine or self.layout.shift > 0

    def units(self, step: Array | int) -> tuple[Array, Array, Array | None]:
        """The units of a step: index of the chunk, index inside it, and the mask of the units that
        exist (None: all)."""
        unit = step * self.step_units + jnp.arange(self.step_units)
        full = not isinstance(step, int) or (step + 1) * self.step_units <= self.row_units
        return *divmod_pow2(unit, self.units_per_chunk), None if full else unit < self.row_units

    def first_slice(self, step: Array | int) -> Array:
        """The index in the row of the first slice of each unit of a step."""
        chunk, unit, _ = self.units(step)
        return chunk * (self.layout.chunk // SLICE) + unit

    def locate(self, bits: int, unit: Array, weight: int) -> tuple[Array | int, Array | int]:
        """Locates a slice in a chunk of a plane.

        Args:
          bits: of the plane.
          unit: index of the unit in its chunk.
          weight: offset of the slice in the unit.

        Returns:
          the bit at which its codes start, and the index of its 16 bytes; of its bytes, in a plane
          with fewer than 16 bytes per chunk.
        """
        plane_bytes = self.layout.chunk * bits // 8
        if plane_bytes < SLICE:
            index = (unit * SLICE)[:, None] + weight + 4 * jnp.arange(SLICE // 4)
            code, position = divmod_pow2(index, plane_bytes)
        else:
            index = weight // SLICE if self.units_per_chunk == 1 else unit + weight // SLICE
            code, position = divmod_pow2(index, plane_bytes // SLICE)
        return code * bits, position

    def load_key(self, plane: int, position: Array | int, slice_: _Slice) -> tuple[str, int]:
        """Identifies the load with a slice's codes: in a narrow plane, slices share 16 bytes."""
        return f"codes {plane}", position if isinstance(position, int) else slice_[1]


class _Step(NamedTuple):
    """The loaded operands of a step, except for the codes of activations.

    Attributes:
      index: of the step.
      codes: of the weights, uint32 `[rows, units, 4]` each.
      groups: for each group plane and segment, `[rows, units]`.
      x_scales: for each row of activations, the scales of the blocks and, if needed, the sums of
        the segments, float32 `[rows, units]` each.
    """

    index: Array | int
    codes: _Codes
    groups: dict[str, list[Array]]
    x_scales: list[tuple[list[Array], list[Array]]]


class _RowTile:
    """The results of some rows of a matrix, inside a kernel.

    Args:
      x: activations.
      w: the matrix, or a stack.
      experts: as in `gemv_int8`.
      first: index of the first row.
      pair: index of the pair of a row of activations and an expert.
      tiling: of the program.
    """

    def __init__(
        self,
        x: Int8Rows,
        w: QTensor,
        experts: jax.Ref | None,
        *,
        first: Array,
        pair: Array,
        tiling: _Tiling,
    ):
        self.x, self.w = x, w
        self.schedule, self.rows, self.out = _Schedule(w, tiling), tiling.rows, w.shape[-2]
        self.first = first
        self.row = jnp.minimum(first + jnp.arange(tiling.rows), self.out - 1)
        self.stack_index: tuple[Array, ...] = ()
        x_rows = x.codes.shape[0]
        # Rows of x and of the results.
        self.batch = [(jnp.asarray(m), jnp.asarray(m)) for m in range(x_rows)]
        if experts is not None:
            self.stack_index = (experts[pair],)
            self.batch = [(pair // (experts.shape[0] // x_rows), pair)]

    def run(self, outs: Sequence[jax.Ref], peers: PeerGroup | None) -> None:
        """Runs all steps; stores the results and sends them to the peers, with epochs."""
        schedule = self.schedule
        writers: list[one_shot.PeerWriter | None] = [None] * len(self.batch)
        if peers is not None and not interpreted():
            writers = [one_shot.peer_writer(peers, m * self.out + self.row) for m, _ in self.batch]
        zeros = [
            jnp.zeros(self.rows, jnp.float32) if writer is None else writer.zero
            for writer in writers
        ]
        shape = (self.rows, schedule.step_units)
        totals = tuple(jnp.broadcast_to(zero[:, None], shape) for zero in zeros)
        rms = self.x.rms
        rms_factors = [None if rms is None else rms.inverse_of(m) for m, _ in self.batch]

        def full_round(i: Array | int, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            steps = [i * schedule.in_flight + d for d in range(schedule.in_flight)]
            return self._round(steps, totals)

        if schedule.full_rounds == 1:
            totals = full_round(0, totals)
        elif schedule.full_rounds:
            totals = lax.fori_loop(0, schedule.full_rounds, full_round, totals)
        if schedule.tail:
            totals = self._round(schedule.tail, totals)
        for (_, out_row), total, factor, writer in zip(
            self.batch, totals, rms_factors, writers, strict=True
        ):
            y = jnp.sum(total, axis=1) * 2.0**-schedule.sign_shift
            if factor is not None:
                y *= factor
            index, y = self.first + jnp.arange(self.rows), y.astype(outs[0].dtype)
            one_shot.store(outs, index, y, index < self.out, writer, out_row)

    def _round(self, steps: Sequence[Array | int], totals: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds the products of some steps to `totals`, with all loads issued first."""
        # The largest loads are issued first. Without the barriers, the compiler sinks loads to
        # their uses and hoists arithmetic above them, and the latencies add up. The codes of
        # activations, which every multiplication needs, are loaded after the barriers.
        codes = [self._load_codes(step) for step in steps]
        self._keep_order()
        groups = [self._load_groups(step) for step in steps]
        x_scales = [self._load_x_scales(step) for step in steps]
        self._keep_order()
        for step in zip(steps, codes, groups, x_scales, strict=True):
            totals = self._multiply(_Step(*step), totals)
        return totals

    def _keep_order(self) -> None:
        """Prevents the compiler from moving loads across this point."""
        if not interpreted():
            plgpu.debug_barrier()

    def _load(self, ref: ArrayRef, row: Array, index: Array, mask: Array | None) -> Array:
        """Loads elements `[*row.shape, units, ...]`.

        Args:
          ref: `[rows, n]`, or a stack.
          row: `[...]`.
          index: `[units, ...]`.
          mask: units that exist; None: all.
        """
        shape = (*row.shape, *index.shape)
        row = jnp.broadcast_to(row.reshape(*row.shape, *[1] * index.ndim), shape)
        indices = (row, jnp.broadcast_to(index, shape))
        indices = (*self.stack_index, *indices) if ref.ndim == 3 else indices
        if mask is None:
            return plgpu.load(ref.at[indices])
        mask = jnp.broadcast_to(mask.reshape(-1, *[1] * (index.ndim - 1)), shape)
        return plgpu.load(ref.at[indices], mask=mask, other=jnp.zeros((), ref.dtype))

    def _load_codes(self, step: Array | int) -> _Codes:
        """Loads the codes of a step from all planes."""
        schedule, layout = self.schedule, self.schedule.layout
        chunk, unit, mask = schedule.units(step)
        loaded: _Codes = {}
        for slice_ in schedule.slices:
            for plane, (ref, bits) in enumerate(zip(self.w.codes, layout.bits, strict=True)):
                plane_bytes = layout.chunk * bits // 8
                _, position = schedule.locate(bits, unit, slice_[0])
                key = schedule.load_key(plane, position, slice_)
                if plane_bytes < SLICE:
                    index = (chunk * (plane_bytes // 4))[:, None] + (position >> 2)
                else:
                    index = _u32_index(chunk * (plane_bytes // SLICE) + position)
                if key not in loaded:
                    loaded[key] = self._load(ref, self.row, index, mask)
        return loaded

    def _load_groups(self, step: Array | int) -> dict[str, list[Array]]:
        """Loads the group planes of a step, for each segment."""
        starts = [segment[0][0] for segment in self.schedule.segments]
        planes = self.schedule.group_planes.items()
        return {name: self._load_group_plane(ref, self.row, step, starts) for name, ref in planes}

    def _load_x_scales(self, step: Array | int) -> list[tuple[list[Array], list[Array]]]:
        """Loads `_Step.x_scales`."""
        schedule, x = self.schedule, self.x
        segment_starts = [segment[0][0] for segment in schedule.segments]
        block_starts = [segment_starts[block[0]] for block in schedule.blocks]
        # A segment is a block or half a block.
        sums = x.sums if len(schedule.segments[0]) * SLICE == BLOCK else x.half_sums

        def load_row(m: Array) -> tuple[list[Array], list[Array]]:
            row = jnp.broadcast_to(m, self.row.shape)
            scales = self._load_group_plane(x.scale, row, step, block_starts)
            if not schedule.needs_sums:
                return scales, []
            return scales, self._load_group_plane(sums, row, step, segment_starts)

        return [load_row(m) for m, _ in self.batch]

    def _load_group_plane(
        self, ref: ArrayRef, row: Array, step: Array | int, starts: Sequence[int]
    ) -> list[Array]:
        """Loads values of groups for the units of a step: `[rows, units]` for each offset.

        Args:
          ref: `[rows, groups]`, or a stack.
          row: `[rows]`.
          step: index of the step.
          starts: offsets of weights in a unit.
        """
        schedule = self.schedule
        chunk, _, mask = schedule.units(step)
        first = schedule.first_slice(step) * SLICE
        size = schedule.columns // ref.shape[-1]
        if schedule.units_per_chunk > 1:
            groups = [divmod_pow2(first + start, size)[0] for start in starts]
            return [self._load(ref, row, group, mask) for group in groups]
        if size >= schedule.layout.chunk:
            return [self._load(ref, row, divmod_pow2(first, size)[0], mask)] * len(starts)
        # The groups of a unit are neighbors: one vector load instead of several.
        group = jnp.arange(schedule.layout.chunk // size)
        loaded = self._load(ref, row, (chunk * group.size)[:, None] + group, mask)
        selected = [jnp.where(group == start // size, loaded, 0) for start in starts]
        return [jnp.sum(one, axis=-1, dtype=loaded.dtype) for one in selected]

    def _multiply(self, step: _Step, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        """Adds the products of a step to `totals`, float32 `[rows, units]` per row of x."""
        schedule, groups = self.schedule, step.groups
        _, unit, mask = schedule.units(step.index)
        first = schedule.first_slice(step.index)
        layout = schedule.layout
        signed = layout.bits == (8,) or schedule.sign_shift > 0 or layout.table is not None
        signed = signed or layout.trellis
        dot4 = partial(_dot4, signed=signed)
        codes = step.codes
        if schedule.looks_up_nibbles and layout.table is not None:
            tables = [layout.table[i : i + 16] for i in range(0, len(layout.table), 16)]
            codes = {
                key: [look_up_nibbles(packed, table) for table in tables]
                if key[0] == "codes 0"
                else packed
                for key, packed in codes.items()
            }
        segment_codes = [
            [self._unpack_slice(s, unit, codes) for s in segment] for segment in schedule.segments
        ]
        # Integer scales multiply the integer sums, which stay below 2^31.
        kind = jnp.int32 if "super_scale" in groups else jnp.float32
        decode = layout.decode_scale or (lambda scale: scale)
        stored = groups["scale"]
        if "super_scale" in groups:
            stored = [scale.astype(kind) for scale in stored]
        factors = [decode(scale).astype(kind) for scale in stored]
        constants = groups.get("minimum", [])
        if layout.shift:
            pairs = zip(stored, factors, strict=True)
            constants = [group_shifts(scale, layout) * factor for scale, factor in pairs]
        elif schedule.needs_sums and not constants:
            constants = [-layout.offset * factor for factor in factors]

        def segment_dot(m: Array, segment: int) -> Array:
            """The integer dot product of a segment with row `m` of x."""
            total = jnp.zeros((self.rows, schedule.step_units, SLICE // 4), jnp.int32)
            pairs = zip(schedule.segments[segment], segment_codes[segment], strict=True)
            for (weight, _), codes in pairs:
                index = _u32_index(bank_swizzle(first + weight // SLICE))
                x = self._load(self.x.codes, jnp.broadcast_to(m, self.row.shape), index, mask)
                total = dot4(codes, x, total)
            return jnp.sum(total, axis=-1)

        def add_row(m: Array, scales: list[Array], sums: list[Array], total: Array) -> Array:
            scaled = [segment_dot(m, i).astype(kind) * factor for i, factor in enumerate(factors)]
            blocks = [reduce(add, (scaled[i] for i in block)) for block in schedule.blocks]
            total = _add_products(total, blocks, scales, groups.get("super_scale"))
            if not constants:
                return total
            outer = groups.get("super_minimum", groups.get("super_scale"))
            return _add_products(total, constants, sums, outer)

        rows = zip(self.batch, step.x_scales, totals, strict=True)
        return tuple(add_row(m, *scales, total) for (m, _), scales, total in rows)

    def _unpack_slice(self, slice_: _Slice, unit: Array, loaded: _Codes) -> Array:
        """The codes of a slice, four per uint32 `[rows, units, 4]`; int8 with a `sign_shift`, or
        from a table."""
        schedule = self.schedule
        if schedule.layout.trellis:
            return self._trellis_slice(slice_, loaded)
        if schedule.looks_up_nibbles:
            _, position = schedule.locate(4, unit, slice_[0])
            halves = loaded[schedule.load_key(0, position, slice_)]
            options = [half[slice_[0] // schedule.first_plane_bytes] for half in halves]
            upper = self._combine_planes(slice_, unit, loaded, first=1)
            return select_bytes(options, upper)
        codes, table = self._combine_planes(slice_, unit, loaded), schedule.layout.table
        return codes if table is None else look_up_bytes(codes, table)

    def _combine_planes(self, slice_: _Slice, unit: Array, loaded: _Codes, first: int = 0) -> Array:
        """The bits of a slice's codes in all planes but the `first`, as in `_unpack_slice`."""
        schedule = self.schedule
        codes, shift = jnp.uint32(0), schedule.sign_shift
        for plane, bits in list(enumerate(schedule.layout.bits))[first:]:
            start, position = schedule.locate(bits, unit, slice_[0])
            packed = loaded[schedule.load_key(plane, position, slice_)]
            if schedule.sign_shift and plane == len(schedule.layout.bits) - 1:  # flip the top bits
                packed ^= jnp.uint32(0xFFFFFFFF // (2**bits - 1) << (bits - 1))
            if bits < 8:
                if not isinstance(start, int):
                    start = start.astype(jnp.uint32)
                    start = start if start.ndim == 2 else start[:, None]
                mask = jnp.uint32(0x01010101 * (2**bits - 1))
                packed = (packed >> jnp.asarray(start, jnp.uint32)) & mask
            codes ^= packed << jnp.uint32(shift)
            shift += bits
        return codes

    def _trellis_slice(self, slice_: _Slice, loaded: _Codes) -> Array:
        """The values of a slice of a trellis, four int8 per uint32 `[rows, units, 4]`."""
        lane, index = jnp.arange(SLICE // 4), slice_[0] // SLICE
        states, *signs = (loaded[f"codes {plane}", 0] for plane in range(len(self.w.codes)))

        def word(words: Array, i: int) -> Array:
            """One uint32 of each unit, for all lanes."""
            picked = jnp.sum(jnp.where(lane == i, words, jnp.uint32(0)), axis=-1, dtype=words.dtype)
            return jnp.broadcast_to(picked[..., None], words.shape)

        lane = jnp.broadcast_to(lane, states.shape)
        if self.w.layout.chunk == 4:  # a state for each lane
            pair = jnp.where(lane < 2, word(states, 2 * index), word(states, 2 * index + 1))
            half, first = lane & 1, jnp.zeros_like(lane)
        else:  # a state for two
            pair = word(states, index)
            half, first = lane >> 1, 4 * (lane & 1)
        state = (pair >> (16 * half).astype(jnp.uint32)) & jnp.uint32(0xFFFF)
        if not signs:
            return four_values(state, first)
        place = 16 * (index % 2) + 4 * lane
        return four_values(state, first, word(signs[0], index // 2) >> place.astype(jnp.uint32))


def _add_products(
    total: Array, a: list[Array], b: list[Array], outer_scale: list[Array] | None
) -> Array:
    """`total + outer_scale * sum(a * b)`, float32; all products share the outer scale."""
    y = total if outer_scale is None else jnp.zeros_like(total)
    for left, right in zip(a, b, strict=True):
        y = _fma(left.astype(jnp.float32), jnp.broadcast_to(right, total.shape), y)
    return y if outer_scale is None else _fma(y, outer_scale[0].astype(jnp.float32), total)


def _u32_index(slice_: Array) -> Array:
    """The indices `[units, 4]` of the uint32 of slices. The multiplication shows the compiler that
    they are aligned, so that it emits 16-byte loads."""
    return (slice_ * (SLICE // 4))[:, None] + jnp.arange(SLICE // 4)


def _dot4(a: Array, b: Array, c: Array, *, signed: bool) -> Array:
    """`c` plus a dot product of four bytes per uint32: `a` holds weights, `b` int8 activations."""
    if interpreted():
        a = lax.bitcast_convert_type(a, jnp.int8 if signed else jnp.uint8).astype(jnp.int32)
        b = lax.bitcast_convert_type(b, jnp.int8).astype(jnp.int32)
        return c + (a * b).sum(axis=-1)
    return _instruction(f"dp4a.{'s32' if signed else 'u32'}.s32", "r", a, b, c)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """`a * b + c` in float32, rounded once."""
    return a * b + c if interpreted() else _instruction("fma.rn.f32", "f", a, b, c)


def _instruction(name: str, constraint: str, *operands: Array) -> Array:
    """One PTX instruction per element; the result has the dtype and shape of the last operand."""
    [result] = plgpu.elementwise_inline_asm(
        f"{name} {', '.join(f'${i}' for i in range(len(operands) + 1))};",
        args=operands,
        constraints=",".join([f"={constraint}", *constraint * len(operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[-1].shape, operands[-1].dtype)],
    )
    return result
