"""Products of a few rows with quantized matrices, in integers: one kernel for GPUs.

The activations are rounded to 8 bits, so that codes are multiplied four at a time (`dp4a`) and
scaled once for each group.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm import one_shot
from jaxsplit.comm.peers import WARPS, PeerGroup
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.int8 import SLICE, Int8Rows, bank_swizzle
from jaxsplit.ops.activations.layout import BLOCK
from jaxsplit.ops.launch import dispatch_programs, divmod_pow2
from jaxsplit.pallas import pl, plgpu
from jaxsplit.quant.qtensor import QTensor, to_u32

MAX_ROWS = 2
"""More rows of activations are faster on the matrix unit."""

GROUPS = ("scale", "minimum", "super_scale", "super_minimum")
"""What a `QTensor` has for groups of weights."""

_Codes = dict[tuple[str, int], Array]
_LONGEST_UNIT = 32  # bytes of the first plane that a thread multiplies in a step


def supports(w: QTensor) -> bool:
    """Whether `products` can multiply with a matrix, once it has planes of words."""
    layout = w.layout
    plain = layout.table is None and layout.decode_scale is None and layout.scale_bits == 8
    sizes = [layout.chunk * bits // 8 for bits in layout.bits]  # of a chunk of each plane
    whole = sizes[0] % SLICE == 0 and all(size % 4 == 0 for size in sizes)
    # Elements are counted in 32 bits.
    return plain and whole and w.shape[-1] % BLOCK == 0 and w.codes[0].size < 2**31


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How a program multiplies.

    Attributes:
      height: rows of the matrix.
      bytes: of each row, in the first plane, in a step.
      depth: steps that are read at once.
    """

    height: int = 4
    bytes: int = 2048
    depth: int = 1

    @staticmethod
    def of(w: QTensor) -> "_Tiling":
        """What was fast on H200s (benchmarks/RESULTS.md): rows of up to 4 KiB are read at once, so
        that none of a program's loads waits for others; longer ones in whole steps, if they can."""
        row = w.shape[-1] * w.layout.bits[0] // 8
        if row <= 2048:
            return _Tiling()
        if row <= 4096:
            return _Tiling(height=2, depth=2)
        return _Tiling(bytes=2048 if row % 2048 == 0 else 1024)


def products(
    x: Int8Rows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    experts: Array | None = None,
    peers: PeerGroup | None = None,
    tiling: _Tiling | None = None,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Args:
      x: `[rows, in]`.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      experts: int32 `[pairs]`, a multiple of the rows: weights are stacks `[experts, out, in]`, of
        which each row is multiplied with its own few; the results are `[pairs, out]`.
      peers: devices to which the results are sent, of one matrix, ahead of an exchange: its counts
        follow, int32 likewise.
      tiling: of the work; None: a usual one.
    """
    rows = len(x.codes) if experts is None else len(experts)
    tilings = [tiling or _Tiling.of(w) for w in weights]
    programs = [pl.cdiv(w.shape[-2], t.height) for w, t in zip(weights, tilings, strict=True)]
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
    """Some rows of one matrix, with all rows of activations.

    Args:
      *refs: activations, matrices and results.
      structure: of activations and matrices.
      programs: for each matrix.
      tilings: of the work with each.
    """
    x, weights, experts, peers = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs, pair = refs[structure.num_leaves :], pl.program_id(0)

    def some_rows(i: int, program: Array) -> None:
        row = program * tilings[i].height
        rows = _Rows(x, weights[i], experts, row, pair, tilings[i])
        rows.multiply(outs[i :: len(weights)], peers)

    tasks = [partial(some_rows, i) for i in range(len(weights))]
    dispatch_programs(pl.program_id(1), list(zip(programs, tasks, strict=True)))


class _Steps:
    """How rows of a matrix are multiplied: in steps, each of some units.

    A unit is a chunk where it is short, else 16 bytes of the first plane, with what belongs to the
    same weights in the other planes. It is made of slices: 16 neighbouring weights each.

    Args:
      w: the matrix.
      tiling: of the work.

    Attributes:
      layout, columns: of the matrix.
      per_chunk: units of a chunk.
      units: of a step.
      depth: steps that are read at once.
      rounds: in which so many are read; these steps have all units.
      rest: the other steps.
      groups: what `w` has for groups of weights.
      slices: for each of a unit, its first weight and its first byte in the first plane.
      parts: slices that share scales, which are added up before they are scaled.
      blocks: the parts, by number, that share a scale of the activations.
      lifted: by how many bits codes whose offset is half of them move to the front of their byte:
        there an exchange of the first bit subtracts it. 0: codes have another offset, or none.
      has_constant: whether sums of activations are multiplied too, with minima or the offset.
    """

    def __init__(self, w: QTensor, tiling: _Tiling):
        self.layout, self.columns = w.layout, w.shape[-1]
        pieces = 8 // self.layout.bits[0]
        size = self.layout.chunk // pieces  # bytes of a chunk in the first plane
        unit_bytes = size if size <= _LONGEST_UNIT else SLICE
        self.per_chunk = size // unit_bytes
        self._all = self.columns // self.layout.chunk * self.per_chunk  # units of a row
        self.units = min(tiling.bytes // unit_bytes, pl.next_power_of_2(self._all))
        count = pl.cdiv(self._all, self.units)
        self.depth = min(tiling.depth, count)
        self.rounds = self._all // (self.units * self.depth)
        self.rest = range(self.rounds * self.depth, count)
        self.groups = {name: getattr(w, name) for name in GROUPS if getattr(w, name) is not None}
        starts = range(0, unit_bytes, SLICE)
        self.slices = [(p * size + b, b) for p in range(pieces) for b in starts]
        shared = min(BLOCK, self.columns // w.scale.shape[-1]) if self.per_chunk == 1 else SLICE
        parts = itertools.groupby(self.slices, lambda s: s[0] // shared)
        self.parts = [list(part) for _, part in parts]
        blocks = itertools.groupby(range(len(self.parts)), lambda p: self.parts[p][0][0] // BLOCK)
        self.blocks = [list(block) for _, block in blocks]
        width, offset = sum(self.layout.bits), self.layout.offset
        self.lifted = 8 - width if offset == 2 ** (width - 1) else 0
        self.has_constant = "minimum" in self.groups or (offset != 0 and not self.lifted)

    def places(self, step: Array | int) -> tuple[Array, Array, Array | None]:
        """Of a step's units: the chunk, the place in the chunk, and whether there is one."""
        unit = step * self.units + jnp.arange(self.units)
        whole = not isinstance(step, int) or (step + 1) * self.units <= self._all
        return *divmod_pow2(unit, self.per_chunk), None if whole else unit < self._all

    def first_slices(self, step: Array | int) -> Array:
        """Of a step's units, each the first."""
        chunk, of_chunk, _ = self.places(step)
        return chunk * (self.layout.chunk // SLICE) + of_chunk

    def in_plane(self, bits: int, of_chunk: Array, weight: int) -> tuple[Array | int, Array | int]:
        """Where a slice is in a chunk of a plane: by how much its codes are shifted, and which 16
        bytes they are, or bytes where a piece has fewer; `of_chunk` is the unit's place."""
        plane_size = self.layout.chunk * bits // 8
        if plane_size < SLICE:
            at = (of_chunk * SLICE)[:, None] + weight + 4 * jnp.arange(SLICE // 4)
            piece, place = divmod_pow2(at, plane_size)
        else:
            at = weight // SLICE if self.per_chunk == 1 else of_chunk + weight // SLICE
            piece, place = divmod_pow2(at, plane_size // SLICE)
        return piece * bits, place

    def key_of_codes(
        self, plane: int, place: Array | int, slice_: tuple[int, int]
    ) -> tuple[str, int]:
        """By which a plane's part of a slice is found: slices share 16 bytes in a narrow plane."""
        return f"codes {plane}", place if isinstance(place, int) else slice_[1]


class _Rows:
    """The products of some rows of a matrix, in a kernel.

    Args:
      x: activations.
      w: the matrix, or a stack.
      experts: as in `products`.
      first: of the rows.
      pair: of activations and expert.
      tiling: of the work.
    """

    def __init__(
        self,
        x: Int8Rows,
        w: QTensor,
        experts: jax.Ref | None,
        first: Array,
        pair: Array,
        tiling: _Tiling,
    ):
        self.x, self.w = x, w
        self.steps, self.height, self.out = _Steps(w, tiling), tiling.height, w.shape[-2]
        self.first = first
        self.row = jnp.minimum(first + jnp.arange(tiling.height), self.out - 1)
        self.stack: tuple[Array, ...] = ()
        rows = x.codes.shape[0]
        # Rows of x, and of the results.
        self.batch = [(jnp.asarray(m), jnp.asarray(m)) for m in range(rows)]
        if experts is not None:
            self.stack = (experts[pair],)
            self.batch = [(pair // (experts.shape[0] // rows), pair)]

    def multiply(self, outs: Sequence[jax.Ref], peers: PeerGroup | None) -> None:
        """All steps; results are stored, and sent to peers, with counts."""
        steps = self.steps
        writers: list[one_shot.PeerWriter | None] = [None] * len(self.batch)
        if peers is not None and not interpreted():
            writers = [one_shot.peer_writer(peers, m * self.out + self.row) for m, _ in self.batch]
        zeros = [jnp.zeros(self.height, jnp.float32) if o is None else o.zero for o in writers]
        shape = (self.height, steps.units)
        totals = tuple(jnp.broadcast_to(zero[:, None], shape) for zero in zeros)
        rms = self.x.rms
        factors = [None if rms is None else rms.inverse_of(m) for m, _ in self.batch]

        def one_round(i: Array | int, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            return self._together([i * steps.depth + d for d in range(steps.depth)], totals)

        if steps.rounds == 1:
            totals = one_round(0, totals)
        elif steps.rounds:
            totals = lax.fori_loop(0, steps.rounds, one_round, totals)
        if steps.rest:
            totals = self._together(steps.rest, totals)
        for (_, row), total, factor, writer in zip(
            self.batch, totals, factors, writers, strict=True
        ):
            y = jnp.sum(total, axis=1) * 2.0**-steps.lifted
            if factor is not None:
                y *= factor
            at, y = self.first + jnp.arange(self.height), y.astype(outs[0].dtype)
            one_shot.store(outs, at, y, at < self.out, writer, row)

    def _together(
        self, which: Sequence[Array | int], totals: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        """`totals` with the products of some steps, which are read at once."""
        # What is most is asked for first. Without barriers, the compiler moves loads down to where
        # they are used and what is computed up between them: one wait after another. Words of
        # activations, which all multiplications need, are read behind it.
        codes = [self._read_codes(step) for step in which]
        self._keep_in_order()
        groups = [self._read_groups(step) for step in which]
        scales = [self._read_scales(step) for step in which]
        self._keep_in_order()
        for step in zip(which, codes, groups, scales, strict=True):
            totals = self._step(*step, totals)
        return totals

    def _keep_in_order(self) -> None:
        """Loads stay before this or after it."""
        if not interpreted():
            plgpu.debug_barrier()

    def _load(self, ref: jax.Ref, row: Array, index: Array, inside: Array | None) -> Array:
        """Elements `[*row.shape, units, ...]`."""
        shape = (*row.shape, *index.shape)
        row = jnp.broadcast_to(row.reshape(*row.shape, *[1] * index.ndim), shape)
        at = (row, jnp.broadcast_to(index, shape))
        at = (*self.stack, *at) if ref.ndim == 3 else at
        if inside is None:
            return plgpu.load(ref.at[at])
        inside = jnp.broadcast_to(inside.reshape(-1, *[1] * (index.ndim - 1)), shape)
        return plgpu.load(ref.at[at], mask=inside, other=jnp.zeros((), ref.dtype))

    def _read_codes(self, step: Array | int) -> _Codes:
        """The planes of a step."""
        steps, layout = self.steps, self.steps.layout
        chunk, of_chunk, inside = steps.places(step)
        found: _Codes = {}
        for slice_ in steps.slices:
            for i, (ref, bits) in enumerate(zip(self.w.codes, layout.bits, strict=True)):
                plane_size = layout.chunk * bits // 8
                _, place = steps.in_plane(bits, of_chunk, slice_[0])
                key = steps.key_of_codes(i, place, slice_)
                if plane_size < SLICE:
                    index = (chunk * (plane_size // 4))[:, None] + (place >> 2)
                else:
                    index = _words(chunk * (plane_size // SLICE) + place)
                if key not in found:
                    found[key] = self._load(ref, self.row, index, inside)
        return found

    def _read_groups(self, step: Array | int) -> dict[str, list[Array]]:
        """What a step's groups have, for each part."""
        starts = [part[0][0] for part in self.steps.parts]
        groups = self.steps.groups.items()
        return {name: self._read_of(ref, self.row, step, starts) for name, ref in groups}

    def _read_scales(self, step: Array | int) -> list[tuple[list[Array], list[Array]]]:
        """Of the activations of a step: for each row, the scales of blocks, and sums of parts if
        weights have a constant."""
        steps, x = self.steps, self.x
        starts = [part[0][0] for part in steps.parts]
        of_blocks = [starts[block[0]] for block in steps.blocks]
        # A part is half a block or a whole one.
        sums = x.sums if len(steps.parts[0]) * SLICE == BLOCK else x.half_sums

        def of_row(m: Array) -> tuple[list[Array], list[Array]]:
            row = jnp.broadcast_to(m, self.row.shape)
            scales = self._read_of(x.scale, row, step, of_blocks)
            return scales, self._read_of(sums, row, step, starts) if steps.has_constant else []

        return [of_row(m) for m, _ in self.batch]

    def _read_of(
        self, ref: jax.Ref, row: Array, step: Array | int, starts: Sequence[int]
    ) -> list[Array]:
        """Of a step's units, what a group of weights has, `[height, units]`: of those that begin
        with these."""
        steps = self.steps
        chunk, _, inside = steps.places(step)
        first = steps.first_slices(step) * SLICE
        length = steps.columns // ref.shape[-1]
        if steps.per_chunk > 1:
            at = [divmod_pow2(first + start, length)[0] for start in starts]
            return [self._load(ref, row, index, inside) for index in at]
        if length >= steps.layout.chunk:
            return [self._load(ref, row, divmod_pow2(first, length)[0], inside)] * len(starts)
        # Those of a unit are neighbours, which are read at once.
        group = jnp.arange(steps.layout.chunk // length)
        found = self._load(ref, row, (chunk * group.size)[:, None] + group, inside)
        chosen = [jnp.where(group == start // length, found, 0) for start in starts]
        return [jnp.sum(one, axis=-1, dtype=found.dtype) for one in chosen]

    def _step(
        self,
        step: Array | int,
        codes: _Codes,
        groups: dict[str, list[Array]],
        x_scales: list[tuple[list[Array], list[Array]]],
        totals: tuple[Array, ...],
    ) -> tuple[Array, ...]:
        """`totals` with the products of a step."""
        steps = self.steps
        _, of_chunk, inside = steps.places(step)
        first = steps.first_slices(step)
        signed = steps.layout.bits == (8,) or steps.lifted > 0
        dot4 = partial(_dot4, signed=signed)
        words = [[self._codes(s, of_chunk, codes) for s in part] for part in steps.parts]
        # Scales that are integers multiply integers, whose sums stay below 2^31.
        kind = jnp.int32 if "super_scale" in groups else jnp.float32
        factors = [scale.astype(kind) for scale in groups["scale"]]
        constants = groups.get("minimum", [])
        if steps.has_constant and not constants:
            constants = [-steps.layout.offset * factor for factor in factors]

        def dots(m: Array, part: int) -> Array:
            total = jnp.zeros((self.height, steps.units, SLICE // 4), jnp.int32)
            for (weight, _), word in zip(steps.parts[part], words[part], strict=True):
                at = _words(bank_swizzle(first + weight // SLICE))
                x = self._load(self.x.codes, jnp.broadcast_to(m, self.row.shape), at, inside)
                total = dot4(word, x, total)
            return jnp.sum(total, axis=-1)

        def with_row(m: Array, scales: list[Array], sums: list[Array], total: Array) -> Array:
            scaled = [dots(m, part).astype(kind) * factor for part, factor in enumerate(factors)]
            blocks = [reduce(add, (scaled[part] for part in block)) for block in steps.blocks]
            total = self._add(total, blocks, scales, groups.get("super_scale"))
            if not constants:
                return total
            outer = groups.get("super_minimum", groups.get("super_scale"))
            return self._add(total, constants, sums, outer)

        rows = zip(self.batch, x_scales, totals, strict=True)
        return tuple(with_row(m, *of_x, total) for (m, _), of_x, total in rows)

    def _add(
        self, total: Array, some: list[Array], others: list[Array], shared: list[Array] | None
    ) -> Array:
        """`total` and the products of some and others, each of them times what they share."""
        y = total if shared is None else jnp.zeros_like(total)
        for a, b in zip(some, others, strict=True):
            y = _fma(a.astype(jnp.float32), jnp.broadcast_to(b, total.shape), y)
        return y if shared is None else _fma(y, shared[0].astype(jnp.float32), total)

    def _codes(self, slice_: tuple[int, int], of_chunk: Array, found: _Codes) -> Array:
        """Words of codes of a slice, `[height, units, 4]`: signed bytes where they are lifted."""
        word, shift = jnp.uint32(0), self.steps.lifted
        for i, bits in enumerate(self.steps.layout.bits):
            right, place = self.steps.in_plane(bits, of_chunk, slice_[0])
            part = found[self.steps.key_of_codes(i, place, slice_)]
            if self.steps.lifted and i == len(self.steps.layout.bits) - 1:  # the first bit of each
                part ^= jnp.uint32(0xFFFFFFFF // (2**bits - 1) << (bits - 1))
            if bits < 8:
                if not isinstance(right, int):
                    right = right.astype(jnp.uint32)
                    right = right if right.ndim == 2 else right[:, None]
                mask = jnp.uint32(0x01010101 * (2**bits - 1))
                part = (part >> jnp.asarray(right, jnp.uint32)) & mask
            word ^= part << jnp.uint32(shift)
            shift += bits
        return word


def _words(slice_: Array) -> Array:
    """Indices `[units, 4]` of the words of 16 bytes, as a product that tells the compiler of their
    alignment."""
    return (slice_ * (SLICE // 4))[:, None] + jnp.arange(SLICE // 4)


def _dot4(a: Array, b: Array, c: Array, *, signed: bool) -> Array:
    """`c`, to which four products of bytes each are added: words of codes, and of int8."""
    if interpreted():
        a = lax.bitcast_convert_type(a, jnp.int8 if signed else jnp.uint8).astype(jnp.int32)
        b = lax.bitcast_convert_type(b, jnp.int8).astype(jnp.int32)
        return c + (a * b).sum(axis=-1)
    return _instruction(f"dp4a.{'s32' if signed else 'u32'}.s32", "r", a, b, c)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """`a * b + c`, float32."""
    return a * b + c if interpreted() else _instruction("fma.rn.f32", "f", a, b, c)


def _instruction(name: str, kind: str, *operands: Array) -> Array:
    """One instruction for each element; the result is like the last operand."""
    [result] = plgpu.elementwise_inline_asm(
        f"{name} {', '.join(f'${i}' for i in range(len(operands) + 1))};",
        args=operands,
        constraints=",".join([f"={kind}", *kind * len(operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[-1].shape, operands[-1].dtype)],
    )
    return result
