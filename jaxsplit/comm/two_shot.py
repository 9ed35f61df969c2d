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
    the others' flags.
    """
    size, pointers = tiles[0].shape, peers.buffer_pointers
    own = address_of(pointers, 0, size)
    rank = jnp.full(size, pointers[0].astype(jnp.int32))
    others = [address_of(pointers, step, size) for step in range(1, peers.size)]
    ptx = _Ptx(peers, len(tiles))
    half = _run(ptx.send_and_poll(), tiles, [rank, *own, *itertools.chain(*others)])
    ptx, steps = _Ptx(peers, 1), range(1, peers.size)
    return [_run(ptx.receive(step), [half], [rank, *own]) for step in steps]


def _run(lines: Sequence[str], tiles: Sequence[Array], operands: Sequence[Array]) -> Array:
    """Runs PTX in each thread. A register holds two elements of a tile, or one of another operand.
    The results are the first `_WORDS` registers."""
    registers = _WORDS * len(tiles) + 2 * _WORDS * len(operands)
    [y] = plgpu.elementwise_inline_asm(
        "\n".join(["{", *_DECLARATIONS, *lines, "}"]),
        args=[*tiles, *operands],
        constraints=",".join(["=&r"] * _WORDS + ["r"] * registers),
        pack=2 * _WORDS,
        result_shape_dtypes=[jax.ShapeDtypeStruct(tiles[0].shape, tiles[0].dtype)],
    )
    return y


_DECLARATIONS = (
    ".reg .pred round;",
    ".reg .b64 buffer, a, b;",
    ".reg .b32 tile, thread, epoch, half, place, index, sender, me;",
    "mov.u32 tile, %ctaid.x;",
    "mov.u32 thread, %tid.x;",
)


class _Ptx:
    """The instructions of a thread.

    Behind the room of `one_shot`, buffers have for each thread of the grid: its epoch; the flags of
    odd and of even epochs by sender; and the senders' words in the same order.

    Args:
      peers: the devices.
      tiles: that are among the operands.
    """

    def __init__(self, peers: PeerGroup, tiles: int):
        self.ranks, self.tiles = peers.size, tiles
        self.threads = _tiles(peers.max_elements, peers.size) * THREADS
        self.epochs = one_shot.buffer_bytes(peers.size)
        self.flags = self.epochs + 4 * self.threads
        words = self.flags + 4 * self.threads * 2 * peers.size
        # Sixteen bytes at a time; neighbouring threads side by side.
        self.quarters = [f"[b+{words + 16 * THREADS * k}]" for k in range(_WORDS // 4)]

    def operand(self, i: int) -> str:
        """The register of an operand that is no tile."""
        return f"${_WORDS * (1 + self.tiles) + 2 * _WORDS * i}"

    def load_buffer(self, i: int) -> str:
        """Sets `buffer` to an address in two operands."""
        return f"mov.b64 buffer, {{{self.operand(i)}, {self.operand(i + 1)}}};"

    def locate(self, sender: str) -> list[str]:
        """Sets `a` to the flag and `b` to the words of a sender in `buffer`."""
        return [
            f"mad.lo.u32 place, half, {self.ranks}, {sender};",
            f"mad.lo.u32 place, place, {self.threads // THREADS}, tile;",
            f"mad.lo.u32 index, place, {THREADS}, thread;",
            "mad.wide.u32 a, index, 4, buffer;",
            f"mad.lo.u32 index, place, {THREADS * _WORDS // 4}, thread;",
            "mad.wide.u32 b, index, 16, buffer;",
        ]

    def locate_before(self, step: int) -> list[str]:
        """As `locate`, of the rank `step` before this one."""
        return [
            f"add.u32 sender, me, {self.ranks - step};",
            f"setp.ge.u32 round, sender, {self.ranks};",
            f"@round sub.u32 sender, sender, {self.ranks};",
            *self.locate("sender"),
        ]

    def send_and_poll(self) -> list[str]:
        """Stores the tiles and flags of a new epoch in the others' buffers, and polls theirs. The
        results are the half of the buffer that the epoch uses."""
        lines = [
            f"mov.b32 me, {self.operand(0)};",
            self.load_buffer(1),
            f"mad.lo.u32 index, tile, {THREADS}, thread;",
            "mad.wide.u32 a, index, 4, buffer;",
            f"ld.relaxed.sys.global.b32 epoch, [a+{self.epochs}];",
            "add.u32 epoch, epoch, 1;",
            f"st.relaxed.sys.global.b32 [a+{self.epochs}], epoch;",
            "and.b32 half, epoch, 1;",
        ]
        for i in range(self.ranks - 1):
            lines += [self.load_buffer(3 + 2 * i), *self.locate("me")]
            first = _WORDS * (1 + i % self.tiles)
            words = enumerate(self.quarters)
            lines += [f"st.global.v4.b32 {at}, {_four(first + 4 * k)};" for k, at in words]
        lines += ["fence.acq_rel.sys;"]
        for i in range(self.ranks - 1):
            lines += [self.load_buffer(3 + 2 * i), *self.locate("me")]
            lines += [f"st.relaxed.sys.global.b32 [a+{self.flags}], epoch;"]
        steps, poll = range(1, self.ranks), []
        lines += [self.load_buffer(1), *[f".reg .b32 found{step};" for step in steps]]
        for step in steps:
            poll += self.locate_before(step)
            poll += [f"ld.relaxed.sys.global.b32 found{step}, [a+{self.flags}];"]
        poll += [f"setp.ne.or.u32 late, found{step}, epoch, late;" for step in steps]
        lines += [*spin_until_ready(poll), "fence.acq_rel.sys;"]
        return [*lines, *[f"mov.b32 ${k}, half;" for k in range(_WORDS)]]

    def receive(self, step: int) -> list[str]:
        """Loads the words of the rank `step` before this one, given the half of the buffer."""
        words = enumerate(self.quarters)
        return [
            f"mov.b32 half, ${_WORDS};",
            f"mov.b32 me, {self.operand(0)};",
            self.load_buffer(1),
            *self.locate_before(step),
            *[f"ld.relaxed.sys.global.v4.b32 {_four(4 * k)}, {at};" for k, at in words],
        ]


def _four(first: int) -> str:
    """Four registers, from the first one on."""
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"
