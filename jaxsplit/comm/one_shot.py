"""One-shot all-reduce and all-gather of small arrays, inside kernels.

Each device sends its elements to all others and sums what it receives (`jaxsplit.comm.peers` has
the protocol). Larger arrays: `two_shot`.

Consecutive exchanges use the two halves of a buffer in turn. A device starts the next exchange but
one only after it has received all elements of the next one, which the others send after they have
read all of this one: nothing is overwritten before it is read.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm.peers import (
    PER_THREAD,
    POLL_AGAIN,
    SEND,
    THREADS,
    WARPS,
    WIDTH,
    PeerGroup,
    address_of,
    inline_asm,
    interleaved,
    spin_until_ready,
)
from jaxsplit.context import interpreted
from jaxsplit.pallas import pl, plgpu

PROGRAMS = 128
"""Programs for which a buffer has room."""

_STRIDE = 8 * PROGRAMS * WIDTH  # bytes from one sender's elements to those of the next


def buffer_bytes(ranks: int) -> int:
    """Bytes of a device's buffer: an epoch for each element, and two slots of 8 bytes for each
    element of each rank."""
    return PROGRAMS * WIDTH * (4 + 2 * 8 * ranks)


def supports(size: int) -> bool:
    """Whether buffers have room for an array of `size` elements."""
    return size <= PROGRAMS * WIDTH


def all_gather(x: Array, peers: PeerGroup) -> Array:
    """The arrays of all devices: `[ranks, *x.shape]`.

    Args:
      x: elements of at most 4 bytes.
      peers: the devices.
    """
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    y = _exchange(wide, peers, (peers.size, x.size), name="one_shot_all_gather")
    return y.astype(x.dtype).reshape(peers.size, *x.shape)


def all_reduce(x: Array, peers: PeerGroup, *, epochs: Array | None = None) -> Array:
    """The sum over the devices, in float32 and in rank order on all: shape and dtype of `x`.

    Args:
      x: this device's addend.
      peers: the devices.
      epochs: int32, shaped as `x`: see `all_reduce_block`.
    """
    y = _exchange(x.astype(jnp.float32), peers, (x.size,), epochs, name="one_shot_all_reduce")
    return y.astype(x.dtype).reshape(x.shape)


def _exchange(
    x: Array,
    peers: PeerGroup,
    shape: tuple[int, ...],
    epochs: Array | None = None,
    *,
    name: str,
) -> Array:
    sent = [] if epochs is None else [epochs.reshape(-1)]
    return pl.pallas_call(
        partial(_one_shot_kernel, axes=peers.axes),
        grid=(pl.cdiv(x.size, WIDTH),),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name=name,
    )(x.reshape(-1), peers.buffer_pointers, *sent)


def _one_shot_kernel(
    x_ref: jax.Ref, pointers: jax.Ref, *refs: jax.Ref, axes: tuple[str, ...]
) -> None:
    """Some elements; the last reference is the result's."""
    *epochs, out_ref = refs
    program, index = pl.program_id(0), jnp.arange(WIDTH)
    at = program * WIDTH + index
    mask = at < x_ref.shape[0]
    x = plgpu.load(x_ref.at[at], mask=mask, other=jnp.zeros((), x_ref.dtype))
    peers = PeerGroup(pointers, axes)
    if len(out_ref.shape) == 1:
        epochs = [plgpu.load(ref.at[at], mask=mask, other=0) for ref in epochs]
        y = all_reduce_block(x, peers, program, index, *epochs)
        plgpu.store(out_ref.at[at], y, mask=mask)
    else:
        for rank, part in enumerate(_all_gather_block(x, peers, program, index)):
            plgpu.store(out_ref.at[rank, at], part, mask=mask)


def all_reduce_block(
    x: Array, peers: PeerGroup, program: Array, index: Array, epochs: Array | None = None
) -> Array:
    """The sum over the devices in rank order, inside a kernel of four warps.

    All devices run the same exchanges in the same order.

    Args:
      x: `WIDTH` float32 elements, in any shape; ignored if they are sent already.
      peers: with the reference to the pointers.
      program: index of the program, below `PROGRAMS`.
      index: of each element of `x`, from 0 to `WIDTH - 1`.
      epochs: int32, shaped as `x`: an earlier kernel has sent the elements with `store`, under
        these epochs; None: they are sent now.
    """
    if interpreted():
        first, *others = lax.all_gather(x, peers.axes)
        return sum(others, first)
    ranks = range(peers.size)
    if epochs is None:
        y = inline_asm(_receive(ranks), *_send_to_others(x, peers, program, index))
    else:
        at = program * WIDTH + index
        own = address_of(peers.buffer_pointers, 0, at.shape)
        operands = *own, _offset(peers, epochs, at), epochs, at * 4
        y = inline_asm(_receive_sent_by_store(ranks), *operands)
    return lax.bitcast_convert_type(y, x.dtype)


def _all_gather_block(x: Array, peers: PeerGroup, program: Array, index: Array) -> list[Array]:
    """The elements of all devices in rank order; arguments as in `all_reduce_block`."""
    if interpreted():
        return list(lax.all_gather(x, peers.axes))
    operands = _send_to_others(x, peers, program, index)
    parts = [inline_asm(_receive([rank]), *operands) for rank in range(peers.size)]
    return [lax.bitcast_convert_type(part, x.dtype) for part in parts]


def _send_to_others(x: Array, peers: PeerGroup, program: Array, index: Array) -> list[Array]:
    """Sends elements to the other devices. Returns the operands of `_receive`."""
    at, pointers = program * WIDTH + interleaved(index), peers.buffer_pointers
    own = address_of(pointers, 0, at.shape)
    rank = jnp.full(at.shape, pointers[0].astype(jnp.int32))
    epoch = inline_asm(_NEXT_EPOCH, *own, at * 4)
    first, bits = _offset(peers, epoch, at), lax.bitcast_convert_type(x, jnp.int32)
    for step in range(1, peers.size):
        address = address_of(pointers, step, at.shape)
        bits = inline_asm(SEND, *address, first + rank * _STRIDE, bits, epoch)
    return [*own, first, bits, epoch, rank]


class PeerWriter(NamedTuple):
    """What a kernel needs to send its results ahead of the next exchange.

    Attributes:
      epoch: of that exchange, int32 `[elements]`.
      offset: of the elements in a buffer, int32 `[elements]`.
      address: of the buffers of all devices, two words `[lanes]` each, low word first; null in
        lanes without a device.
      zero: float32 zeros `[elements]` that are ready when `epoch` is.
    """

    epoch: Array
    offset: Array
    address: tuple[Array, Array]
    zero: Array


def peer_writer(peers: PeerGroup, at: Array) -> PeerWriter:
    """Prepares to send elements, inside a kernel of four warps.

    A computation that starts from `zero` does not wait for the epoch later.

    Args:
      peers: with the reference to the pointers.
      at: `program * WIDTH + index` of each element in the exchange: neighbours, a power of two of
        them.
    """
    pointers = peers.buffer_pointers
    epoch = inline_asm(_PEEK_EPOCH, *address_of(pointers, 0, at.shape), at * 4, pack=1)
    offset = _offset(peers, epoch, at) + pointers[0].astype(jnp.int32) * _STRIDE
    # A thread for each element and device, so that no thread sends twice.
    lane = jnp.arange(max(pl.next_power_of_2(peers.size), THREADS // at.size))
    address = tuple(
        plgpu.load(pointers.at[1 + 2 * lane + word], mask=lane < peers.size, other=jnp.uint32(0))
        for word in range(2)
    )
    # Zeros unless all bits are set, which the compiler does not know.
    zero = jnp.where(epoch == -1, 1.0, 0.0).astype(jnp.float32)
    return PeerWriter(epoch, offset, address, zero)


def _send_to_all(x: Array, to: PeerWriter) -> tuple[Array, Array]:
    """Sends elements of 4 bytes to all devices.

    Returns:
      `x` for each lane, `[lanes, elements]`, which depends on the stores; and the mask of the first
      lane.
    """
    shape = to.address[0].size, x.size
    # Neighbours leave together, in one store of a warp.
    bits, offset, epoch = (
        jnp.broadcast_to(a[None, :], shape)
        for a in (lax.bitcast_convert_type(x, jnp.int32), to.offset, to.epoch)
    )
    address = (jnp.broadcast_to(word[:, None], shape) for word in to.address)
    bits = inline_asm(SEND, *address, offset, bits, epoch, pack=1)
    first = jnp.broadcast_to((jnp.arange(shape[0]) == 0)[:, None], shape)
    return lax.bitcast_convert_type(bits, x.dtype), first


def store(
    refs: Sequence[jax.Ref],
    at: Array,
    y: Array,
    mask: Array,
    to: PeerWriter | None,
    *before: Array,
) -> None:
    """Stores results `[elements]`, and sends them to all devices first, inside a kernel.

    Args:
      refs: of the results and, where they are sent, of their epochs (see `all_reduce_block`).
      at: indices in the last dimension.
      y: the results.
      mask: which results exist.
      to: where to send them; None: nowhere.
      *before: indices of the other dimensions.
    """
    if to is not None:
        plgpu.store(refs[1].at[(*before, at)], to.epoch, mask=mask)
        y, mask = _send_to_all(y, to)
        at = jnp.broadcast_to(at[None, :], y.shape)
    plgpu.store(refs[0].at[(*before, at)], y, mask=mask)


def out_shapes(
    shapes: Sequence[tuple[int, ...]], dtype: jnp.dtype, peers: PeerGroup | None
) -> list[jax.ShapeDtypeStruct]:
    """The outputs of a kernel: results, and their epochs if it sends them to peers."""
    epochs = [] if peers is None else [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return [*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), *epochs]


def _offset(peers: PeerGroup, epoch: Array, at: Array) -> Array:
    """Offset in a buffer of the elements of rank 0: behind the epochs, in the half of odd or of
    even epochs."""
    return _STRIDE // 2 + (epoch & 1) * (peers.size * _STRIDE) + 8 * at


# The result of each is an operand of the next one, which keeps them in order.
_NEXT_EPOCH = (
    "ld.relaxed.sys.global.b32 u#, [a#];",
    "add.u32 u#, u#, 1;",
    "st.relaxed.sys.global.b32 [a#], u#;",
    "mov.b32 %z, u#;",
)
_PEEK_EPOCH = ("ld.global.b32 u#, [a#];", "add.u32 %z, u#, 1;")


def _receive(senders: Sequence[int]) -> list[str]:
    """Polls the elements of all senders at once, and sums them; this device's are an operand."""
    loads = [f"ld.relaxed.sys.global.b64 r{s}_#, [a#+{s * _STRIDE}];" for s in senders]
    own = (
        ".reg .pred own;",
        "setp.eq.u32 own, %me, {sender}; selp.b32 s{sender}_#, %x, s{sender}_#, own; "
        "selp.b32 v#, %y, v#, own; setp.ne.or.u32 late, v#, %y, late;",
    )
    return _poll_and_sum(senders, loads, *own)


def _receive_sent_by_store(senders: Sequence[int]) -> list[str]:
    """As `_receive`, of elements that `store` has sent to all devices, this one too. Also stores
    the epochs, whose offsets are an operand. The elements of a thread lie side by side, so that one
    load takes two."""
    loads = [
        f"ld.relaxed.sys.global.v2.b64 {{r{s}_{k}, r{s}_{k + 1}}}, [a0+{s * _STRIDE + 8 * k}];"
        for s in senders
        for k in range(0, PER_THREAD, 2)
    ]
    epochs = ("mad.wide.u32 w#, %y, 1, base;", "st.relaxed.sys.global.b32 [w#], %x;")
    check = "setp.ne.or.u32 late, v#, %x, late;"
    return [*_poll_and_sum(senders, [*loads, *epochs], "", check), *_ASSERT_CONTIGUOUS]


def _poll_and_sum(
    senders: Sequence[int], loads: Sequence[str], names: str, check: str
) -> list[str]:
    """Polls until the elements of all senders are there, and sums them.

    Args:
      senders: ranks.
      loads: of a word `r` from each sender, payload and epoch, and other work to do meanwhile.
      names: declarations for `check`.
      check: sets `late` if `v`, the epoch of a sender's word, does not match.
    """
    lines = list(loads)
    # The last sender is checked first, by itself: else the compiler interleaves loads and checks.
    for sender in reversed(senders):
        word = f"mov.b64 {{s{sender}_#, v#}}, r{sender}_#;"
        lines += [word, check.replace("{sender}", str(sender))]
        if sender == senders[-1]:
            lines += POLL_AGAIN
    first, *others = senders
    return [
        names,
        *[f".reg .b32 s{sender}_#;\n.reg .b64 r{sender}_#;" for sender in senders],
        *spin_until_ready(lines),
        f"mov.b32 %z, s{first}_#;",
        *[f"add.rn.f32 %z, %z, s{sender}_#;" for sender in others],
    ]


_ASSERT_CONTIGUOUS = (
    ".reg .b64 apart;\n.reg .pred wrong;",
    f"sub.u64 apart, a{PER_THREAD - 1}, a0;",
    f"setp.ne.u64 wrong, apart, {8 * (PER_THREAD - 1)};",
    "@wrong trap;",
)
