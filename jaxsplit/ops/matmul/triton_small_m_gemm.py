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

from jaxsplit.context import interpreted
from jaxsplit.ops.activations.packed import SUM_SIZES, PackedRows, group_size, packing_of
from jaxsplit.ops.launch import dispatch_programs, divmod_pow2
from jaxsplit.ops.matmul import triton_gemv_int8
from jaxsplit.pallas import pl, plgpu
from jaxsplit.quant.qtensor import PlaneLayout, QTensor

MAX_ROWS = 64
"""With more rows it is as fast to dequantize the matrix first."""

_MOST_WEIGHTS = 512  # of a row in a step
_WARPS = 1024  # fewer do not keep a GPU busy
_AT_ONCE = 1536  # about as many run at a time, where each has the registers of long steps
_LONG = 4  # steps that make long ones worth while
_FEW = 16  # the least that a matrix unit adds up
_FEW_ROWS = 16  # for which programs are of few warps, and steps may be shorter

# The bits of a byte are a bfloat16 that is this power of two times the byte: a number below the
# normal ones, or of the least of these. Scales therefore have large powers, and weights small ones.
_OF_BITS = -133
_OF_WEIGHTS = -64


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How a program multiplies.

    Attributes:
      height: rows of the matrix.
      pairs: of bytes of each row, in a step.
      warps: of a program.
      stages: of the pipeline that reads ahead.
      sums: one, or two side by side, since a product waits for the one that it is added to.
    """

    height: int
    pairs: int
    warps: int
    stages: int
    sums: int = 1


def _tiling(rows: int) -> _Tiling:
    """By what measured best."""
    if rows <= _FEW_ROWS:
        return _Tiling(32, 128, 2, 3, sums=2 if rows <= 8 else 1)
    return _Tiling(64, 128, 4, 2, sums=2) if rows <= 32 else _Tiling(64, 64, 4, 2)


def _with_shorter_steps(tiling: _Tiling, weights: Sequence[QTensor]) -> _Tiling:
    """Fewer pairs at a time, which takes fewer registers."""
    pieces = max(packing_of(w.layout)[0] for w in weights)
    return dataclasses.replace(tiling, pairs=max(64, tiling.pairs // pieces))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedGemmInfo:
    """Groups of rows, each multiplied with one matrix of a stack.

    Attributes:
      matrix: int32 `[groups]`: index into the stack.
      first: int32 `[groups]`: first row of the results of a group.
      stop: int32 `[groups]`: end of its rows.
      read: int32 `[groups, rows]`: rows of activations that it multiplies; those past `stop` are
        padding.
      count: int32: groups that exist.
    """

    matrix: Array
    first: Array
    stop: Array
    read: Array
    count: Array


def supports(w: QTensor, dtype: jnp.dtype) -> bool:
    """Whether `products` can multiply activations of a dtype with a matrix."""
    length = None if w.minimum is None else group_size(w, w.minimum)
    ordered = length in (None, *SUM_SIZES)
    return dtype == jnp.bfloat16 and triton_gemv_int8.supports(w) and ordered


def products(
    x: PackedRows,
    weights: Sequence[QTensor],
    dtype: jnp.dtype = jnp.float32,
    *,
    groups: GroupedGemmInfo | None = None,
    results: int = 0,
    tiling: _Tiling | None = None,
    parts: int | None = None,
    joined: bool = True,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[rows, out]`.

    Codes times scales are rounded to bfloat16, and so are scales. A minimum is multiplied with the
    sum of its group's activations, both rounded likewise.

    Args:
      x: `[rows, in]` in the order of the weights.
      weights: `[out, in]` each, ones that are supported; planes of bytes are turned into words.
      dtype: of the results.
      groups: weights are stacks `[matrices, out, in]`, which these are multiplied with.
      results: rows of the results of groups.
      tiling: of the work; None: a usual one.
      parts: of the inner dimension, which are multiplied by programs of their own and added up by
        another kernel; None: as many as keep a GPU busy, but one for several that are to be joined.
      joined: the parts are added up; else results are float32 `[parts, rows, out]`.
    """
    (read, columns) = x.values[0].shape[1], weights[0].shape[-1]
    width = max(8, pl.next_power_of_2(read)) if groups is None else groups.read.shape[1]
    weights = [_as_read(w) for w in weights]
    usual, tiling = tiling is None, tiling or _tiling(width)
    programs = [pl.cdiv(w.shape[-2], tiling.height) for w in weights]
    warps = sum(programs) * tiling.warps
    steps = pl.cdiv(columns, _MOST_WEIGHTS)
    if groups is not None:
        parts, count, rows = 1, len(groups.matrix), results
    else:
        if parts is None:
            parts = 1 if joined and len(weights) > 1 else max(1, _WARPS // warps)
        parts = count = pl.cdiv(steps, pl.cdiv(steps, parts))
        rows = read
    few_steps = steps < _LONG * parts
    if usual and width <= _FEW_ROWS and (few_steps or count * warps > _AT_ONCE):
        tiling = _with_shorter_steps(tiling, weights)
    inputs, structure = jax.tree.flatten((x, weights, groups))
    kernel = partial(
        _small_m_gemm_kernel,
        structure=structure,
        programs=programs,
        width=width,
        tiling=tiling,
    )
    shape = (rows,) if joined and parts == 1 else (parts, rows)
    of_part = dtype if joined and parts == 1 else jnp.float32
    ys = pl.pallas_call(
        kernel,
        grid=(count, sum(programs)),
        out_shape=[jax.ShapeDtypeStruct((*shape, w.shape[-2]), of_part) for w in weights],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpreted(),
        name="small_m_gemm",
    )(*inputs)
    return [jnp.sum(y, axis=0).astype(dtype) if joined and parts > 1 else y for y in ys]


def _as_read(w: QTensor) -> QTensor:
    """A matrix with planes of uint16, what the matrix unit takes at a time. Where a chunk has
    several scales of a byte each, four are a word: threads would read each by itself."""

    def paired(plane: Array) -> Array:
        if plane.dtype != jnp.uint32:
            plane = plane.reshape(*plane.shape[:-1], -1, 2)
        pairs = lax.bitcast_convert_type(plane, jnp.uint16)
        return pairs.reshape(*pairs.shape[: len(w.shape) - 1], -1)

    scale = w.scale
    if scale.dtype.itemsize == 1 and w.layout.chunk % (4 * group_size(w, scale)) == 0:
        word = jnp.int32 if scale.dtype == jnp.int8 else jnp.uint32
        scale = lax.bitcast_convert_type(scale.reshape(*scale.shape[:-1], -1, 4), word)
    return dataclasses.replace(w, codes=tuple(map(paired, w.codes)), scale=scale)


def _small_m_gemm_kernel(
    *refs: jax.Ref,
    structure: Any,
    programs: Sequence[int],
    width: int,
    tiling: _Tiling,
) -> None:
    """Some rows of one matrix, with all rows of activations, or those of a group.

    Args:
      *refs: activations, matrices and groups, and results.
      structure: of activations, matrices and groups.
      programs: for each matrix.
      width: rows of activations.
      tiling: of the work.
    """
    x, weights, groups = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs, number = refs[structure.num_leaves :], pl.program_id(0)

    def some_rows(w: QTensor, out_ref: jax.Ref, program: Array) -> None:
        first = program * tiling.height
        _Tile(x, w, groups, out_ref, first, number, width, tiling).multiply()

    tasks = [partial(some_rows, *task) for task in zip(weights, outs, strict=True)]
    run = partial(dispatch_programs, pl.program_id(1), list(zip(programs, tasks, strict=True)))
    if groups is None:
        run()
    else:
        pl.when(number < groups.count[()])(run)


class _Tile:
    """The products of some rows of a matrix, in a kernel, with a group of rows or a part of the
    columns.

    A step takes some pairs of bytes of the narrowest plane of each row, and what belongs to them in
    the other planes. The codes at the same place of each pair make a tile: a byte has some pieces.

    Args:
      x: activations.
      w: the matrix, or a stack.
      groups: of rows, or None.
      out_ref: results.
      first: of the rows of the matrix.
      number: of the group, or of the part.
      width: rows of activations.
      tiling: of the work.
    """

    def __init__(
        self,
        x: PackedRows,
        w: QTensor,
        groups: GroupedGemmInfo | None,
        out_ref: jax.Ref,
        first: Array,
        number: Array,
        width: int,
        tiling: _Tiling,
    ):
        self.rms, self.w, self.out_ref = x.rms, w, out_ref
        self.x_pairs, self.x_sums = x.for_matrix(w)
        *_, self.out, self.columns = w.shape
        self.pieces, self.per_chunk = packing_of(w.layout)
        self.total = self.columns // (2 * self.pieces)  # pairs of a row
        self.height, self.sums, self.first = tiling.height, tiling.sums, first
        self.pairs = min(tiling.pairs, _MOST_WEIGHTS // (2 * self.pieces))  # of a step
        self.of_step = 2 * self.pieces * self.pairs  # weights
        self.entries = {
            name: getattr(w, name)
            for name in triton_gemv_int8.GROUP_PLANES
            if getattr(w, name) is not None
        }
        self.length = {name: group_size(w, ref) for name, ref in self.entries.items()}
        self.row = jnp.minimum(first + jnp.arange(tiling.height), self.out - 1)
        self.steps, self.whole = pl.cdiv(self.total, self.pairs), self.total % self.pairs == 0
        self.start, self.stop = 0, self.steps
        self.out_row = jnp.arange(width)
        self.read_row = jnp.minimum(self.out_row, self.x_pairs.shape[1] - 1)
        self.stack: tuple[Array, ...] = ()
        self.place: tuple[Array, ...] = ()
        if groups is not None:
            self.stack = (groups.matrix[number],)
            self.read_row = plgpu.load(groups.read.at[number, jnp.arange(width)])
            self.out_row = groups.first[number] + jnp.arange(width)
            self.last_row = groups.stop[number]
        else:
            self.last_row = out_ref.shape[-2]
            if out_ref.ndim == 3:
                per_part = pl.cdiv(self.steps, out_ref.shape[0])
                self.start, self.place = number * per_part, (number,)
                self.stop = jnp.minimum(self.start + per_part, self.steps)

    def multiply(self) -> None:
        """All steps; results are stored."""
        result = jnp.zeros((self.height, len(self.read_row)), jnp.float32)
        factor = None if self.rms is None else self.rms.inverse_of(self.read_row)
        carry = (result, self._read_outer(self.start))
        result, _ = lax.fori_loop(self.start, self.stop, self._step, carry)
        result *= 2.0**-_OF_WEIGHTS
        if factor is not None:
            result *= jnp.broadcast_to(factor[None], result.shape)
        at = jnp.broadcast_to((self.first + jnp.arange(self.height))[:, None], result.shape)
        out_row = jnp.broadcast_to(self.out_row[None], result.shape)
        inside = (out_row < self.last_row) & (at < self.out)
        result = result.astype(self.out_ref.dtype)
        plgpu.store(self.out_ref.at[*self.place, out_row, at], result, mask=inside)

    def _load(self, ref: jax.Ref, at: Array, inside: Array | None) -> Array:
        """Elements `[rows, ...]` of the matrix."""
        shape = (len(self.row), len(at))
        row, at = (jnp.broadcast_to(a, shape) for a in (self.row[:, None], at[None]))
        index = (*self.stack, row, at) if ref.ndim == 3 else (row, at)
        if inside is None:
            return plgpu.load(ref.at[index])
        mask = jnp.broadcast_to(inside[None], shape)
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    def _load_x(self, ref: jax.Ref, at: Array, inside: Array | None, *before: int) -> Array:
        """Elements of the rows of activations, or of their sums: `[rows, ...]`."""
        shape = (len(self.read_row), len(at))
        row, at = (jnp.broadcast_to(a, shape) for a in (self.read_row[:, None], at[None]))
        index = (*before, row, at)
        if inside is None:
            return plgpu.load(ref.at[index])
        mask = jnp.broadcast_to(inside[None], shape)
        return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

    def _below(self, at: Array, count: int) -> Array | None:
        return None if self.whole else at < count

    def _groups_of(self, length: int, step: Array) -> tuple[Array, int]:
        """The first group of a step, and how many there are."""
        count = max(1, self.of_step // length)
        if self.of_step >= length:
            return step * count, count
        return divmod_pow2(step * self.of_step, length)[0], count

    def _of_groups(self, length: int, step: Array, least: int = 1) -> tuple[Array, Array | None]:
        """Where the groups of a step are, at least so many places, and which of these have any."""
        first, count = self._groups_of(length, step)
        place = jnp.arange(max(count, least))
        at = place + first
        if count < least:
            return at, (place < count) & (at < self.columns // length)
        return at, self._below(at, self.columns // length)

    def _read_scales(self, step: Array) -> list[Array]:
        """Scales of a step, for each piece that has its own: `[height, groups]` each."""
        ref, length, per_chunk = self.w.scale, self.length["scale"], self.per_chunk
        of_chunk = self.w.layout.chunk
        if ref.dtype.itemsize == 4:  # four in a word
            count, words = self.of_step // of_chunk, of_chunk // length
            first = words * (step * count + jnp.arange(count))
            found = [
                self._load(ref, first + i, self._below(first + i, ref.shape[-1]))
                for i in range(words)
            ]
            return [(word << (24 - 8 * byte)) >> 24 for word in found for byte in range(4)]
        if length >= of_chunk:
            return [self._load(ref, *self._of_groups(length, step))]
        shared = min(length // 2, per_chunk)
        at = step * self.pairs + shared * jnp.arange(self.pairs // shared)
        chunk, pair = divmod_pow2(at, per_chunk)
        weight = 2 * (chunk * self.pieces * per_chunk + pair)
        begins = range(0, of_chunk, max(length, 2 * per_chunk))
        of_pieces = [divmod_pow2(weight + begin, length)[0] for begin in begins]
        return [self._load(ref, at, self._below(at, ref.shape[-1])) for at in of_pieces]

    def _read_outer(self, step: Array) -> dict[str, list[Array]]:
        """Entries of groups of groups, of a step: `[height]` each. Threads read the few that they
        need by themselves."""
        found = {}
        for name in ("super_scale", "super_minimum"):
            if name in self.entries:
                ref = self.entries[name]
                first, count = self._groups_of(self.length[name], step)
                at = [jnp.minimum(first + i, ref.shape[-1] - 1) for i in range(count)]
                found[name] = [self._load(ref, x[None], None)[:, 0] for x in at]
        return found

    def _times_outer(
        self, entries: Array, each: int, outer: dict[str, list[Array]], name: str, power: int
    ) -> Array:
        """`2**power` times entries of groups, times those of groups of these if there are.

        Args:
          entries: `[height, groups]`, of a step.
          each: weights that have one.
          outer: from `_read_outer`.
          name: of the plane of groups of groups.
          power: of two.

        Returns:
          bfloat16 `[height, groups]`, rounded once.
        """
        factor: Array | float = 2.0**power
        for i, x in enumerate(outer.get(name, ())):
            x = x.astype(jnp.float32)[:, None] * 2.0**power
            before = jnp.arange(entries.shape[1])[None] < i * self.length[name] // each
            factor = jnp.where(before, factor, x) if i else x
        return (entries.astype(jnp.float32) * factor).astype(jnp.bfloat16)

    def _step(self, i: Array, carry: tuple) -> tuple:
        result, outer = carry
        w, layout, per_chunk = self.w, self.w.layout, self.per_chunk
        # The compiler reads ahead what is multiplied, not these, which are too few bytes.
        ahead = self._read_outer(jnp.minimum(i + 1, self.steps - 1))
        power, scales = _OF_WEIGHTS - _OF_BITS, self._read_scales(i)
        each = self.of_step // scales[0].shape[1]
        scales = [self._times_outer(x, each, outer, "super_scale", power) for x in scales]
        if w.minimum is not None:
            length = self.length["minimum"]
            group, inside = self._of_groups(length, i, _FEW)
            minimum = self._load(w.minimum, group, inside)
            minimum = self._times_outer(minimum, length, outer, "super_minimum", _OF_WEIGHTS)
            result += _dot(minimum, self._load_x(self.x_sums, group, inside))
        at = i * self.pairs + jnp.arange(self.pairs)
        # In this layout the compiler sees which of them are neighbours.
        chunk, pair = lax.div(at, per_chunk), lax.rem(at, per_chunk)
        read: dict[tuple[int, int], Array] = {}
        expanded: dict[int, Array] = {}
        sums = [result] + [jnp.zeros_like(result)] * (self.sums - 1)
        for piece in range(self.pieces):
            parts, shifts = [], []
            for p, (plane, bits) in enumerate(zip(w.codes, layout.bits, strict=True)):
                size = layout.chunk * bits // 16  # pairs of a chunk
                shift, before = divmod(piece * per_chunk, size)
                if (p, before) not in read:
                    index = at if size == per_chunk else chunk * size + before + pair
                    read[p, before] = self._load(plane, index, self._below(at, self.total))
                parts.append(read[p, before])
                shifts.append(shift * bits)
            group = piece * len(scales) // self.pieces
            if group not in expanded:
                expanded[group] = _spread(scales[group], self.pairs)
            for byte in range(2):
                x = self._load_x(self.x_pairs, at, self._below(at, self.total), 2 * piece + byte)
                scaled = _scaled(parts, shifts, byte, layout, expanded[group])
                sums[byte % self.sums] += _dot(scaled, x)
        return sum(sums[1:], sums[0]), ahead


def _spread(values: Array, count: int) -> Array:
    """`[height, groups]`, repeated to `[height, count]`."""
    height, groups = values.shape
    shape = (height, groups, count // groups)
    return jnp.broadcast_to(values[:, :, None], shape).reshape(height, count)


def _dot(a: Array, b: Array) -> Array:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _scaled(
    planes: Sequence[Array],
    shifts: Sequence[int],
    byte: int,
    layout: PlaneLayout,
    scale: Array,
) -> Array:
    """Weights without their minima as bfloat16, one of each pair of bytes, `2**_OF_WEIGHTS` times
    what they are; those of a single plane also `2**shifts[0]` times, by where they are in a byte.

    Args:
      planes: pairs of bytes `[height, pairs]` of each plane, uint16.
      shifts: by how much to shift a byte of each plane, to have the code's bits in front.
      byte: which byte of the pairs.
      layout: of the matrix.
      scale: bfloat16, like the pairs, times `2**(_OF_WEIGHTS - _OF_BITS)`.
    """
    front = shifts[0] if len(planes) == 1 else 0  # bits before the code that stay
    shifts = [8 * byte + shift - front for shift in shifts]
    offset = (128 if layout.bits == (8,) else layout.offset) * 2**front
    if interpreted():
        code, done = jnp.uint16(0), front
        for plane, by, bits in zip(planes, shifts, layout.bits, strict=True):
            part = (plane >> jnp.uint16(by)) << jnp.uint16(done - front)
            code |= part & jnp.uint16((2**bits - 1) << done)
            done += bits
        if layout.bits == (8,):
            code ^= jnp.uint16(128)
        half = _OF_BITS // 2  # the whole power is no normal float32
        value = (code.astype(jnp.float32) - offset) * 2.0**half
        return (value * (scale.astype(jnp.float32) * 2.0 ** (_OF_BITS - half))).astype(scale.dtype)

    # Two at once, in the halves of a register. Compute capability 8.0 has no other instruction than
    # `fma` for numbers.
    def both(bits: int) -> str:
        return f"0x{bits * 0x10001:08x}"

    def number(x: float) -> str:
        return both(int(np.asarray(x, jnp.bfloat16).view(np.uint16)))

    scaled = f"${len(planes) + 1}"
    lines = [".reg .b32 code, part, by, less;", f"mov.b32 less, {number(-0.0)};"]
    done = 0
    for i, (by, bits) in enumerate(zip(shifts, layout.bits, strict=True)):
        by, part = by - done, f"${i + 1}"
        if by:
            lines.append(f"sh{'r' if by > 0 else 'l'}.b32 part, {part}, {abs(by)};")
            part = "part"
        mask = both((2**bits - 1) << (done + front))
        # And, then exclusive or: with the bits before, or to add 128 to signed bytes.
        before = "code" if i else both(128 if bits == 8 else 0)
        lines.append(f"lop3.b32 code, {part}, {mask}, {before}, 0x6A;")
        done += bits
    if offset:
        lines.append(f"mov.b32 by, {number(-offset * 2.0**_OF_BITS)};")
        lines.append(f"fma.rn.bf16x2 less, {scaled}, by, less;")
    lines.append(f"fma.rn.bf16x2 $0, code, {scaled}, less;")
    [result] = plgpu.elementwise_inline_asm(
        "{ " + " ".join(lines) + " }",
        args=[*planes, scale],
        constraints=",".join(["=r", *["r"] * (len(planes) + 1)]),
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scale.shape, jnp.bfloat16)],
    )
    return result
