"""Sums of many numbers inside a kernel, as a two-shot all-reduce.

Each device adds up a part of the numbers and sends the others its sums. Numbers are written first
and a count after them, so that little else than numbers crosses the link; what else holds for
mailboxes, `exchange` says.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm import one_shot
from jaxsplit.comm.one_shot import THREADS, WARPS, Peers, address_of
from jaxsplit.context import interpreted
from jaxsplit.pallas import pl, plgpu

_WORDS = 16  # of a thread, two numbers in each
_TILE = 2 * _WORDS * THREADS


def mailbox_bytes(devices: int, most: int) -> int:
    """Of one device: room for an `exchange`, then for a sum of many numbers.

    Args:
      devices: that exchange numbers.
      most: numbers of 2 bytes.
    """
    threads = _tiles(most, devices) * THREADS
    return one_shot.mailbox_bytes(devices) + 4 * threads * (1 + 2 * devices * (1 + _WORDS))


def _tiles(size: int, devices: int) -> int:
    """Those of the part of so many numbers that each device adds up."""
    return -(-size // (devices * _TILE))


def supports(size: int, dtype: jnp.dtype, peers: Peers) -> bool:
    """Whether the sum of so many numbers can be exchanged."""
    return jnp.dtype(dtype).itemsize == 2 and size <= peers.most


def total(x: Array, peers: Peers) -> Array:
    """The sum over the devices, added up in float32: the shape and dtype of `x`.

    Args:
      x: bfloat16 or float16, as many as are supported.
      peers: the devices.
    """
    y = pl.pallas_call(
        partial(_kernel, axes=peers.axes, most=peers.most),
        grid=(_tiles(x.size, peers.count),),
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="two_shot",
    )(x.reshape(-1), peers.table)
    return y.reshape(x.shape)


def _kernel(
    x_ref: jax.Ref,
    table: jax.Ref,
    out_ref: jax.Ref,
    *,
    axes: tuple[str, ...],
    most: int,
) -> None:
    """The sums of a tile of this device's part, and those of the others' parts."""
    peers = Peers(table, axes, most)
    me = lax.axis_index(axes) if interpreted() else table[0].astype(jnp.int32)
    devices = peers.count
    size, tiles, tile = x_ref.shape[0], pl.num_programs(0), pl.program_id(0)

    def places(step: int) -> tuple[Array, Array]:
        """Of the tile in the part of the device so many places after this one."""
        at = ((me + step) % devices * tiles + tile) * _TILE + jnp.arange(_TILE)
        return at, at < size

    def load(step: int) -> Array:
        at, inside = places(step)
        return plgpu.load(x_ref.at[at], mask=inside, other=jnp.zeros((), x_ref.dtype))

    def store(step: int, sums: Array) -> None:
        at, inside = places(step)
        plgpu.store(out_ref.at[at], sums, mask=inside)

    def swap(tiles: Sequence[Array]) -> list[Array]:
        """A tile for each step, or the same for all, to the device so many places after this one:
        those of the devices so many places before."""
        if not interpreted():
            return _swap_tiles(tiles, peers)
        tos = [[(d, (d + step) % devices) for d in range(devices)] for step in steps]
        return [lax.ppermute(tiles[i % len(tiles)], axes, to) for i, to in enumerate(tos)]

    steps, sums = range(1, devices), load(0).astype(jnp.float32)
    for other in swap([load(step) for step in steps]):
        sums += other.astype(jnp.float32)
    sums = sums.astype(out_ref.dtype)
    store(0, sums)
    for step, other in zip(steps, swap([sums]), strict=True):
        store(-step, other)


def _swap_tiles(tiles: Sequence[Array], peers: Peers) -> list[Array]:
    """`swap` in `_kernel`.

    A thread writes its words to all others, then a count behind them, and looks for the others'
    counts. After the room for an exchange, mailboxes have, for each thread of the grid: a count
    of swaps; the counts of odd and even ones by sender; and their words, likewise.
    """
    devices, (size, dtype) = peers.count, (tiles[0].shape, tiles[0].dtype)
    threads = _tiles(peers.most, devices) * THREADS
    counts = one_shot.mailbox_bytes(devices)
    flags = counts + 4 * threads
    words = flags + 4 * threads * 2 * devices
    mine = address_of(peers.table, 0, size)
    me = jnp.full(size, peers.table[0].astype(jnp.int32))
    theirs = [address_of(peers.table, step, size) for step in range(1, devices)]

    quarters = [f"[b+{words + 16 * THREADS * k}]" for k in range(_WORDS // 4)]  # of the words

    def four(first: int, k: int) -> str:
        return "{" + ", ".join(f"${first + 4 * k + i}" for i in range(4)) + "}"

    def slot(mailbox: str, sender: str) -> list[str]:
        """`a` of the count and `b` of the words of a sender in the mailbox of a device."""
        return [
            f"mad.lo.u32 place, half, {devices}, {sender};",
            f"mad.lo.u32 place, place, {threads // THREADS}, tile;",
            f"mad.lo.u32 index, place, {THREADS}, thread;",
            f"mad.wide.u32 a, index, 4, {mailbox};",
            f"mad.lo.u32 index, place, {THREADS * _WORDS // 4}, thread;",
            f"mad.wide.u32 b, index, 16, {mailbox};",
        ]

    def before(step: int) -> list[str]:
        """`sender`: the device so many places before this one."""
        return [
            f"add.u32 sender, me, {devices - step};",
            f"setp.ge.u32 round, sender, {devices};",
            f"@round sub.u32 sender, sender, {devices};",
        ]

    begin = [
        ".reg .pred round;",
        ".reg .b64 mailbox, a, b;",
        ".reg .b32 tile, thread, count, half, place, index, sender, me;",
        "mov.u32 tile, %ctaid.x;",
        "mov.u32 thread, %tid.x;",
    ]

    def run(lines: Sequence[str], tiles: Sequence[Array], numbers: Sequence[Array]) -> Array:
        """Instructions of a thread; a register holds two of the tiles' numbers, or one of the
        others. The results are the first `_WORDS` registers."""
        inputs = _WORDS * len(tiles) + 2 * _WORDS * len(numbers)
        [y] = plgpu.elementwise_inline_asm(
            "\n".join(["{", *begin, *lines, "}"]),
            args=[*tiles, *numbers],
            constraints=",".join(["=&r"] * _WORDS + ["r"] * inputs),
            pack=2 * _WORDS,
            result_shape_dtypes=[jax.ShapeDtypeStruct(size, dtype)],
        )
        return y

    def number(i: int, tiles: int) -> str:
        """The register of one of the numbers."""
        return f"${_WORDS * (1 + tiles) + 2 * _WORDS * i}"

    def mailbox(i: int, tiles: int) -> str:
        return f"mov.b64 mailbox, {{{number(i, tiles)}, {number(i + 1, tiles)}}};"

    given = len(tiles)
    lines = [
        f"mov.b32 me, {number(0, given)};",
        mailbox(1, given),
        f"mad.lo.u32 index, tile, {THREADS}, thread;",
        "mad.wide.u32 a, index, 4, mailbox;",
        f"ld.relaxed.sys.global.b32 count, [a+{counts}];",
        "add.u32 count, count, 1;",
        f"st.relaxed.sys.global.b32 [a+{counts}], count;",
        "and.b32 half, count, 1;",
    ]
    for i in range(devices - 1):
        lines += [mailbox(3 + 2 * i, given), *slot("mailbox", "me")]
        first = _WORDS * (1 + i % given)
        lines += [f"st.global.v4.b32 {at}, {four(first, k)};" for k, at in enumerate(quarters)]
    lines += ["fence.acq_rel.sys;"]
    for i in range(devices - 1):
        lines += [mailbox(3 + 2 * i, given), *slot("mailbox", "me")]
        lines += [f"st.relaxed.sys.global.b32 [a+{flags}], count;"]
    lines += [
        mailbox(1, given),
        *[f".reg .b32 found{step};" for step in range(1, devices)],
    ]
    look = []
    for step in range(1, devices):
        look += [*before(step), *slot("mailbox", "sender")]
        look += [f"ld.relaxed.sys.global.b32 found{step}, [a+{flags}];"]
    look += [f"setp.ne.or.u32 late, found{step}, count, late;" for step in range(1, devices)]
    lines += [*one_shot.until_found(look), "fence.acq_rel.sys;"]
    lines += [f"mov.b32 ${k}, half;" for k in range(_WORDS)]
    half = run(lines, tiles, [me, *mine, *itertools.chain(*theirs)])

    received = []
    for step in range(1, devices):
        lines = [
            f"mov.b32 half, ${_WORDS};",
            f"mov.b32 me, {number(0, 1)};",
            mailbox(1, 1),
            *before(step),
            *slot("mailbox", "sender"),
            *[f"ld.relaxed.sys.global.v4.b32 {four(0, k)}, {at};" for k, at in enumerate(quarters)],
        ]
        received.append(run(lines, [half], [me, *mine]))
    return received
