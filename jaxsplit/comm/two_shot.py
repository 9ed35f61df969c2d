"""Two-shot all-reduce of larger arrays, inside a kernel.

Each device sums a shard of the elements, and sends the others its sums. Payloads are stored first,
then a flag with the epoch behind a fence, so that hardly anything but payloads crosses the link.
Consecutive epochs use the two halves of a buffer in turn, as in `one_shot`.
"""

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm import one_shot
from jaxsplit.comm.peers import THREADS, WARPS, PeerGroup, address_of, spin_until_ready
from jaxsplit.context import interpreted
from jaxsplit.pallas import pl, plgpu

_WORDS = 16  # of a thread, two elements each
_TILE = 2 * _WORDS * THREADS


def buffer_bytes(ranks: int, max_elements: int) -> int:
    """Bytes of a device's buffer: the room of `one_shot`, then that of a two-shot all-reduce.

    Args:
      ranks: number of devices.
      max_elements: of the largest array, of 2 bytes each.
    """
    threads = _tiles(max_elements, ranks) * THREADS
    return one_shot.buffer_bytes(ranks) + 4 * threads * (1 + 2 * ranks * (1 + _WORDS))


def _tiles(size: int, ranks: int) -> int:
    """Tiles of a device's shard of `size` elements."""
    return -(-size // (ranks * _TILE))


def supports(size: int, dtype: jnp.dtype, peers: PeerGroup) -> bool:
    """Whether buffers have room for an array of `size` elements of a dtype."""
    return jnp.dtype(dtype).itemsize == 2 and size <= peers.max_elements


def all_reduce(x: Array, peers: PeerGroup) -> Array:
    """The sum over the devices, computed in float32: shape and dtype of `x`.

    Args:
      x: bfloat16 or float16, of a supported size.
      peers: the devices.
    """
    y = pl.pallas_call(
        partial(_two_shot_kernel, axes=peers.axes, max_elements=peers.max_elements),
        grid=(_tiles(x.size, peers.size),),
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="two_shot_all_reduce",
    )(x.reshape(-1), peers.buffer_pointers)
    return y.reshape(x.shape)


def _two_shot_kernel(
    x_ref: jax.Ref,
    pointers: jax.Ref,
    out_ref: jax.Ref,
    *,
    axes: tuple[str, ...],
    max_elements: int,
) -> None:
    """The sums of a tile of this device's shard, and those of the other shards."""
    peers = PeerGroup(pointers, axes, max_elements)
    me = lax.axis_index(axes) if interpreted() else pointers[0].astype(jnp.int32)
    devices = peers.size
    size, tiles, tile = x_ref.shape[0], pl.num_programs(0), pl.program_id(0)

    def indices(step: int) -> tuple[Array, Array]:
        """Indices of the tile in the shard of the rank `step` after this one, and their mask."""
        at = ((me + step) % devices * tiles + tile) * _TILE + jnp.arange(_TILE)
        return at, at < size

    def load(step: int) -> Array:
        at, mask = indices(step)
        return plgpu.load(x_ref.at[at], mask=mask, other=jnp.zeros((), x_ref.dtype))

    def store(step: int, sums: Array) -> None:
        at, mask = indices(step)
        plgpu.store(out_ref.at[at], sums, mask=mask)

    def swap(tiles: Sequence[Array]) -> list[Array]:
        """Sends a tile for each step, or the same for all, to the rank `step` after this one.
        Returns those of the ranks before."""
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


def _swap_tiles(tiles: Sequence[Array], peers: PeerGroup) -> list[Array]:
    """`swap` in `_two_shot_kernel`.

    A thread stores its words in the buffers of all others, then a flag with the epoch, and polls
    the others' flags. Behind the room of `one_shot`, buffers have for each thread of the grid: its
    epoch; the flags of odd and of even epochs by sender; and the senders' words in the same order.
    """
    devices, (size, dtype) = peers.size, (tiles[0].shape, tiles[0].dtype)
    threads = _tiles(peers.max_elements, devices) * THREADS
    epochs = one_shot.buffer_bytes(devices)
    flags = epochs + 4 * threads
    words = flags + 4 * threads * 2 * devices
    mine = address_of(peers.buffer_pointers, 0, size)
    me = jnp.full(size, peers.buffer_pointers[0].astype(jnp.int32))
    theirs = [address_of(peers.buffer_pointers, step, size) for step in range(1, devices)]

    quarters = [f"[b+{words + 16 * THREADS * k}]" for k in range(_WORDS // 4)]  # of the words

    def four(first: int, k: int) -> str:
        return "{" + ", ".join(f"${first + 4 * k + i}" for i in range(4)) + "}"

    def slot(buffer: str, sender: str) -> list[str]:
        """Sets `a` to the flag and `b` to the words of a sender in a device's buffer."""
        return [
            f"mad.lo.u32 place, half, {devices}, {sender};",
            f"mad.lo.u32 place, place, {threads // THREADS}, tile;",
            f"mad.lo.u32 index, place, {THREADS}, thread;",
            f"mad.wide.u32 a, index, 4, {buffer};",
            f"mad.lo.u32 index, place, {THREADS * _WORDS // 4}, thread;",
            f"mad.wide.u32 b, index, 16, {buffer};",
        ]

    def before(step: int) -> list[str]:
        """Sets `sender` to the rank `step` before this one."""
        return [
            f"add.u32 sender, me, {devices - step};",
            f"setp.ge.u32 round, sender, {devices};",
            f"@round sub.u32 sender, sender, {devices};",
        ]

    begin = [
        ".reg .pred round;",
        ".reg .b64 buffer, a, b;",
        ".reg .b32 tile, thread, epoch, half, place, index, sender, me;",
        "mov.u32 tile, %ctaid.x;",
        "mov.u32 thread, %tid.x;",
    ]

    def run(lines: Sequence[str], tiles: Sequence[Array], numbers: Sequence[Array]) -> Array:
        """Instructions of a thread; a register holds two elements of a tile, or one of the other
        operands. The results are the first `_WORDS` registers."""
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
        """The register of one of the other operands."""
        return f"${_WORDS * (1 + tiles) + 2 * _WORDS * i}"

    def buffer(i: int, tiles: int) -> str:
        return f"mov.b64 buffer, {{{number(i, tiles)}, {number(i + 1, tiles)}}};"

    given = len(tiles)
    lines = [
        f"mov.b32 me, {number(0, given)};",
        buffer(1, given),
        f"mad.lo.u32 index, tile, {THREADS}, thread;",
        "mad.wide.u32 a, index, 4, buffer;",
        f"ld.relaxed.sys.global.b32 epoch, [a+{epochs}];",
        "add.u32 epoch, epoch, 1;",
        f"st.relaxed.sys.global.b32 [a+{epochs}], epoch;",
        "and.b32 half, epoch, 1;",
    ]
    for i in range(devices - 1):
        lines += [buffer(3 + 2 * i, given), *slot("buffer", "me")]
        first = _WORDS * (1 + i % given)
        lines += [f"st.global.v4.b32 {at}, {four(first, k)};" for k, at in enumerate(quarters)]
    lines += ["fence.acq_rel.sys;"]
    for i in range(devices - 1):
        lines += [buffer(3 + 2 * i, given), *slot("buffer", "me")]
        lines += [f"st.relaxed.sys.global.b32 [a+{flags}], epoch;"]
    lines += [
        buffer(1, given),
        *[f".reg .b32 found{step};" for step in range(1, devices)],
    ]
    look = []
    for step in range(1, devices):
        look += [*before(step), *slot("buffer", "sender")]
        look += [f"ld.relaxed.sys.global.b32 found{step}, [a+{flags}];"]
    look += [f"setp.ne.or.u32 late, found{step}, epoch, late;" for step in range(1, devices)]
    lines += [*spin_until_ready(look), "fence.acq_rel.sys;"]
    lines += [f"mov.b32 ${k}, half;" for k in range(_WORDS)]
    half = run(lines, tiles, [me, *mine, *itertools.chain(*theirs)])

    received = []
    for step in range(1, devices):
        lines = [
            f"mov.b32 half, ${_WORDS};",
            f"mov.b32 me, {number(0, 1)};",
            buffer(1, 1),
            *before(step),
            *slot("buffer", "sender"),
            *[f"ld.relaxed.sys.global.v4.b32 {four(0, k)}, {at};" for k, at in enumerate(quarters)],
        ]
        received.append(run(lines, [half], [me, *mine]))
    return received
