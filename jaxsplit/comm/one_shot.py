"""Sums and gathers of a few numbers inside kernels: devices write to one another's memory.

Each device has a mailbox that the others can write to (`jaxsplit.comm.symmetric_memory`). A number
travels together with a count that tells which exchange it belongs to, in one access of 8 bytes, and
the reader looks until the count is there: no other signal is needed, and an exchange costs the time
of one write over the link. (The protocol that NCCL calls LL.) Many numbers: `two_shot`.

Two exchanges in turn use different halves of a mailbox. A device begins the one after those only
when it has the numbers of all others for the second, which they write when they have read all of
the first: so nothing is overwritten before it was read.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.pallas import pl, plgpu

WIDTH = 512
"""Numbers that a program exchanges."""

PROGRAMS = 128
"""Programs for which a mailbox has room."""

PATIENCE = 2**26
"""Looks for a number before a kernel gives up with an error: half a minute or more."""

WARPS = 4
"""Of kernels that exchange numbers."""

THREADS = 32 * WARPS

_STRIDE = 8 * PROGRAMS * WIDTH  # bytes of a mailbox from a sender's numbers to those of the next
_PACK = WIDTH // THREADS  # numbers of a thread, whose accesses are under way together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices that exchange numbers.

    Attributes:
      table: this device's place among them, then the addresses of the mailboxes of this device and
        of those after it, in turn, two words each with the lower first: uint32 `[1 + 2 * devices]`.
      axes: the mesh axes along which they lie.
      most: numbers of 2 bytes for which mailboxes have room, after those of an exchange.
    """

    table: Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    most: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def count(self) -> int:
        """How many there are."""
        return self.table.shape[-1] // 2


def mailbox_bytes(devices: int) -> int:
    """Of one device of so many: a count for each number, and two places of 8 bytes for those of
    each device."""
    return PROGRAMS * WIDTH * (4 + 2 * 8 * devices)


def supports(size: int) -> bool:
    """Whether so few numbers can be exchanged."""
    return size <= PROGRAMS * WIDTH


def padded(columns: int) -> int:
    """Numbers of a row, with those that fill its last program."""
    return -(-columns // WIDTH) * WIDTH


def gather(x: Array, peers: Peers) -> Array:
    """The numbers of all devices: `[devices, *x.shape]`.

    Args:
      x: of at most 4 bytes each.
      peers: the devices.
    """
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    y = _exchange(wide, peers, (peers.count, x.size))
    return y.astype(x.dtype).reshape(peers.count, *x.shape)


def total(x: Array, peers: Peers, *, counts: Array | None = None) -> Array:
    """The sum over the devices, added up in float32 in the same order by all: the shape and dtype
    of `x`. Arguments are those of `gather`; `counts`: as in `add_up`, like `x`."""
    y = _exchange(x.astype(jnp.float32), peers, (x.size,), counts)
    return y.astype(x.dtype).reshape(x.shape)


def _exchange(
    x: Array,
    peers: Peers,
    shape: tuple[int, ...],
    counts: Array | None = None,
) -> Array:
    counts = [] if counts is None else [counts.reshape(-1)]
    return pl.pallas_call(
        partial(_kernel, axes=peers.axes),
        grid=(pl.cdiv(x.size, WIDTH),),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="one_shot_all_reduce",
    )(x.reshape(-1), peers.table, *counts)


def _kernel(
    x_ref: jax.Ref,
    table: jax.Ref,
    *refs: jax.Ref,
    axes: tuple[str, ...],
) -> None:
    """Some of the numbers; the last reference is that of the result."""
    *counts, out_ref = refs
    program, place = pl.program_id(0), jnp.arange(WIDTH)
    at = program * WIDTH + place
    inside = at < x_ref.shape[0]
    x = plgpu.load(x_ref.at[at], mask=inside, other=jnp.zeros((), x_ref.dtype))
    peers = Peers(table, axes)
    if len(out_ref.shape) == 1:
        counts = [plgpu.load(ref.at[at], mask=inside, other=0) for ref in counts]
        y = add_up(x, peers, program, place, *counts)
        plgpu.store(out_ref.at[at], y, mask=inside)
    else:
        for device, part in enumerate(_all(x, peers, program, place)):
            plgpu.store(out_ref.at[device, at], part, mask=inside)


def add_up(
    x: Array,
    peers: Peers,
    program: Array,
    place: Array,
    counts: Array | None = None,
) -> Array:
    """Inside a kernel of four warps: the sum over the devices, in their order.

    All devices run the same exchanges in the same order.

    Args:
      x: `WIDTH` float32 numbers, in any shape; those that are sent are not looked at.
      peers: with the reference to the table.
      program: which of at most `PROGRAMS`.
      place: of each number in `x`, from 0 to `WIDTH - 1`.
      counts: of the exchange, int32, like `x`: a kernel before has called `send` with these numbers
        and has left them; None: they are not sent yet.
    """
    if interpreted():
        first, *others = lax.all_gather(x, peers.axes)
        return sum(others, first)
    devices = range(peers.count)
    if counts is None:
        y = packed(_received(devices), *_begin(x, peers, program, place))
    else:
        at = program * WIDTH + place
        mine = address_of(peers.table, 0, at.shape)
        operands = *mine, _offset(peers, counts, at), counts, at * 4
        y = packed(_received_as_sent(devices), *operands)
    return lax.bitcast_convert_type(y, x.dtype)


def _all(x: Array, peers: Peers, program: Array, place: Array) -> list[Array]:
    """What all devices have, in their order; arguments are those of `add_up`."""
    if interpreted():
        return list(lax.all_gather(x, peers.axes))
    operands = _begin(x, peers, program, place)
    devices = range(peers.count)
    parts = [packed(_received([device]), *operands) for device in devices]
    return [lax.bitcast_convert_type(part, x.dtype) for part in parts]


def _begin(x: Array, peers: Peers, program: Array, place: Array) -> list[Array]:
    """Sends numbers to the others: the operands with which theirs are received."""
    at = program * WIDTH + side_by_side(place)
    mine = address_of(peers.table, 0, at.shape)
    me = jnp.full(at.shape, peers.table[0].astype(jnp.int32))
    count = packed(_TICK, *mine, at * 4)
    first, bits = _offset(peers, count, at), lax.bitcast_convert_type(x, jnp.int32)
    for step in range(1, peers.count):
        address = address_of(peers.table, step, at.shape)
        bits = packed(SEND, *address, first + me * _STRIDE, bits, count)
    return [*mine, first, bits, count, me]


def side_by_side(place: Array) -> Array:
    """Where in a mailbox numbers go, given their places in a program: threads have some neighbours
    each, and those of neighbouring threads are written side by side."""
    return place % _PACK * THREADS + place // _PACK


class Outbox(NamedTuple):
    """Where a kernel is to send numbers, ahead of the exchange that comes next.

    Attributes:
      count: of that exchange, `[numbers]`.
      offset: of the numbers in a mailbox, likewise.
      address: of the mailboxes of all devices, two words `[lanes]`, the lower first; 0: none.
      zero: float32 zeros `[numbers]`, which are there when `count` is.
    """

    count: Array
    offset: Array
    address: tuple[Array, Array]
    zero: Array


def outbox(peers: Peers, at: Array) -> Outbox:
    """Inside a kernel of four warps: what `send` needs.

    What begins with its zeros does not wait for it later.

    Args:
      peers: with the reference to the table.
      at: of each number its place among all, `program * WIDTH + place` in the exchange: neighbours,
        a power of two of them.
    """
    count = packed(_LOOK, *address_of(peers.table, 0, at.shape), at * 4, pack=1)
    offset = _offset(peers, count, at) + peers.table[0].astype(jnp.int32) * _STRIDE
    # A thread for each number and device, so that none of them sends twice.
    lane = jnp.arange(max(pl.next_power_of_2(peers.count), THREADS // at.size))
    address = tuple(
        plgpu.load(
            peers.table.at[1 + 2 * lane + word], mask=lane < peers.count, other=jnp.uint32(0)
        )
        for word in range(2)
    )
    # Zeros unless all bits are set, which the compiler does not know.
    zero = jnp.where(count == -1, 1.0, 0.0).astype(jnp.float32)
    return Outbox(count, offset, address, zero)


def send(x: Array, to: Outbox) -> tuple[Array, Array]:
    """Inside a kernel: sends numbers of 4 bytes to all devices, ahead of an exchange.

    Returns:
      `x` for each lane, `[lanes, numbers]`, which keeps what reads it behind the sending, and which
      lane is the first.
    """
    lanes, numbers = to.address[0].size, x.size
    shape = (lanes, numbers)
    # Neighbours leave together, in one access of a warp.
    bits, offset, count = (
        jnp.broadcast_to(a[None, :], shape)
        for a in (lax.bitcast_convert_type(x, jnp.int32), to.offset, to.count)
    )
    address = (jnp.broadcast_to(word[:, None], shape) for word in to.address)
    bits = packed(SEND, *address, offset, bits, count, pack=1)
    first = jnp.broadcast_to((jnp.arange(lanes) == 0)[:, None], shape)
    return lax.bitcast_convert_type(bits, x.dtype), first


def store(
    refs: Sequence[jax.Ref], at: Array, y: Array, inside: Array, to: Outbox | None, *before: Array
) -> None:
    """Inside a kernel: stores results `[numbers]`, and sends them to all devices first.

    Args:
      refs: of all results and, where they are sent, of the counts with which `add_up` looks for
        them.
      at: where they are in the last dimension.
      y: the results.
      inside: which of them there are.
      to: where they are sent, all of them; None: nowhere.
      *before: indices of the other dimensions.
    """
    if to is not None:
        plgpu.store(refs[1].at[(*before, at)], to.count, mask=inside)
        y, inside = send(y, to)
        at = jnp.broadcast_to(at[None, :], y.shape)
    plgpu.store(refs[0].at[(*before, at)], y, mask=inside)


def results(
    shapes: Sequence[tuple[int, ...]], dtype: jnp.dtype, peers: Peers | None
) -> list[jax.ShapeDtypeStruct]:
    """Of a kernel: results, and counts as in `store` where there are devices to send them to."""
    counts = [] if peers is None else [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return [*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes), *counts]


def _offset(peers: Peers, count: Array, at: Array) -> Array:
    """Where in a mailbox the numbers of the first device are: of odd and even exchanges, after the
    counts."""
    return _STRIDE // 2 + (count & 1) * (peers.count * _STRIDE) + 8 * at


def address_of(table: jax.Ref, step: int, shape: Sequence[int]) -> list[Array]:
    """Of the mailbox of the device so many places after this one, for each number: the lower and
    the upper word."""
    return [jnp.full(shape, table[1 + 2 * step + word]) for word in range(2)]


def packed(lines: Sequence[str], *operands: Array, pack: int = _PACK) -> Array:
    """Instructions for each number, those of a thread's numbers interleaved: int32.

    `lines` may use `base` (the address of two first operands), `a` (with the offset, the third
    operand), the operands `x`, `y` and `me` after them, and the result `z`; names that end in # are
    of each number.
    """
    names = ["z", "lo", "hi", "offset", "x", "y", "me"][: 1 + len(operands)]
    registers = {
        f"{name}#{k}": f"${i * pack + k}" for i, name in enumerate(names) for k in range(pack)
    }

    def line(text: str, k: int) -> str:
        for name in names:
            text = text.replace(f"%{name}", registers[f"{name}#{k}"])
        return text.replace("#", str(k))

    text = ["{", ".reg .b64 base;"]
    text += [f".reg .b64 a{k}, w{k};\n.reg .b32 u{k}, v{k};" for k in range(pack)]
    text += ["mov.b64 base, {" + f"{registers['lo#0']}, {registers['hi#0']}" + "};"]
    for part in ("mad.wide.u32 a#, %offset, 1, base;", *lines):
        every = "#" in part or "%" in part
        text += [line(part, k) for k in (range(pack) if every else range(1))]
    text += ["}"]
    [y] = plgpu.elementwise_inline_asm(
        "\n".join(text),
        args=operands,
        constraints=",".join(["=r"] * pack + ["r"] * pack * len(operands)),
        pack=pack,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.int32)],
    )
    return y


# The result of each is an operand of the next, which keeps them in order.
_TICK = (
    "ld.relaxed.sys.global.b32 u#, [a#];",
    "add.u32 u#, u#, 1;",
    "st.relaxed.sys.global.b32 [a#], u#;",
    "mov.b32 %z, u#;",
)
_LOOK = ("ld.global.b32 u#, [a#];", "add.u32 %z, u#, 1;")
SEND = (  # unless the address is 0
    ".reg .pred some;",
    "setp.ne.u64 some, base, 0;",
    "mov.b64 w#, {%x, %y};",
    "@some st.relaxed.sys.global.b64 [a#], w#;",
    "mov.b32 %z, %x;",
)


def _received(senders: Sequence[int]) -> list[str]:
    """Looks until the numbers of some devices are there, all at once, and adds them up; those of
    this device are an operand."""
    loads = [f"ld.relaxed.sys.global.b64 r{s}_#, [a#+{s * _STRIDE}];" for s in senders]
    mine = (
        ".reg .pred own;",
        "setp.eq.u32 own, %me, {sender}; selp.b32 s{sender}_#, %x, s{sender}_#, own; "
        "selp.b32 v#, %y, v#, own; setp.ne.or.u32 late, v#, %y, late;",
    )
    return _added_up(senders, loads, *mine)


def _received_as_sent(senders: Sequence[int]) -> list[str]:
    """Likewise of numbers that `send` has sent, those of this device too; keeps their counts, of
    which the places are an operand. The numbers of a thread lie next to one another, where half as
    many loads do."""
    loads = [
        f"ld.relaxed.sys.global.v2.b64 {{r{s}_{k}, r{s}_{k + 1}}}, [a0+{s * _STRIDE + 8 * k}];"
        for s in senders
        for k in range(0, _PACK, 2)
    ]
    kept = ("mad.wide.u32 w#, %y, 1, base;", "st.relaxed.sys.global.b32 [w#], %x;")
    check = "setp.ne.or.u32 late, v#, %x, late;"
    return [*_added_up(senders, [*loads, *kept], "", check), *_NEIGHBOURS]


def _added_up(senders: Sequence[int], loads: Sequence[str], names: str, check: str) -> list[str]:
    """What both have in common.

    Args:
      senders: the devices.
      loads: of words `r` of each, number and count, and what may be done until they are there.
      names: what `check` declares.
      check: finds whether `v`, the count of a sender's word, is `late`.
    """
    lines = list(loads)
    # The last by itself, and first: else the compiler reads some, looks at them, and reads more.
    for sender in reversed(senders):
        word = f"mov.b64 {{s{sender}_#, v#}}, r{sender}_#;"
        lines += [word, check.replace("{sender}", str(sender))]
        if sender == senders[-1]:
            lines += _AGAIN
    first, *others = senders
    return [
        names,
        *[f".reg .b32 s{sender}_#;\n.reg .b64 r{sender}_#;" for sender in senders],
        *until_found(lines),
        f"mov.b32 %z, s{first}_#;",
        *[f"add.rn.f32 %z, %z, s{sender}_#;" for sender in others],
    ]


# Makes sure that the numbers of a thread, of 8 bytes with their counts, lie next to one another.
_NEIGHBOURS = (
    ".reg .b64 apart;\n.reg .pred wrong;",
    f"sub.u64 apart, a{_PACK - 1}, a0;",
    f"setp.ne.u64 wrong, apart, {8 * (_PACK - 1)};",
    "@wrong trap;",
)

_AGAIN = ("vote.sync.any.pred late, late, 0xffffffff;", "@late bra again;")


def until_found(lines: Sequence[str]) -> list[str]:
    """Instructions, run again by all threads of a warp, which come here together, until none of
    them has found that a number is `late`."""
    return [
        ".reg .pred late, never;",
        ".reg .b32 looks;",
        "mov.b32 looks, 0;",
        "again:",
        "add.u32 looks, looks, 1;",
        f"setp.gt.u32 never, looks, {PATIENCE};",
        "@never trap;",
        "setp.ne.u32 late, looks, looks;",
        *lines,
        *_AGAIN,
    ]
