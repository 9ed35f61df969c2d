"""Sums and gathers inside kernels: devices write to one another's memory.

Each device has a mailbox that the others can write to (`jaxsplit.parallel.mailboxes`). Of a few
numbers, each travels together with a count that tells which exchange it belongs to, in one access
of 8 bytes, and the reader looks until the count is there: no other signal is needed, and an
exchange costs the time of one write over the link. (The protocol that NCCL calls LL.) Many numbers
are written first, and the count after them, so that little else than numbers crosses the link; each
device adds up a part of them and sends the others its sums, as in a ring but without going around.

Two exchanges in turn use different halves of a mailbox. A device begins the one after those only
when it has the numbers of all others for the second, which they write when they have read all of
the first: so nothing is overwritten before it was read.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

WIDTH = 512
"""Numbers that a program exchanges."""

PROGRAMS = 128
"""Programs for which a mailbox has room."""

PATIENCE = 2**26
"""Looks for a number before a kernel gives up with an error: half a minute or more."""

_STRIDE = 8 * PROGRAMS * WIDTH
"""Bytes of a mailbox from a sender's numbers to those of the next."""

_WARPS = 4
_THREADS = 32 * _WARPS
_PACK = WIDTH // _THREADS  # numbers of a thread, whose accesses are under way together
_WORDS = 16  # of a thread where there are many numbers, two in each
_TILE = 2 * _WORDS * _THREADS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices that exchange numbers.

    Attributes:
      table: this device's place among them, then the addresses of the mailboxes of this device and
        of those after it, in turn, two words each with the lower first: uint32 `[1 + 2 * devices]`.
      axes: the mesh axes along which they lie.
      most: numbers of 2 bytes for which mailboxes have room.
    """

    table: Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    most: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def count(self) -> int:
        """How many there are."""
        return self.table.shape[-1] // 2


def _few_bytes(devices: int) -> int:
    """A count for each number, and two places of 8 bytes for those of each device."""
    return PROGRAMS * WIDTH * (4 + 2 * 8 * devices)


def mailbox_bytes(devices: int, most: int) -> int:
    """Of one device: room for a few numbers, then for many.

    Args:
      devices: that exchange numbers.
      most: numbers of 2 bytes.
    """
    threads = _tiles(most, devices) * _THREADS
    return _few_bytes(devices) + 4 * threads * (1 + 2 * devices * (1 + _WORDS))


def _tiles(size: int, devices: int) -> int:
    """Those of the part of so many numbers that each device adds up."""
    return pl.cdiv(size, devices * _TILE)


def supports(size: int) -> bool:
    """Whether so few numbers can be exchanged."""
    return pl.cdiv(size, WIDTH) <= PROGRAMS


def supports_many(size: int, dtype: jnp.dtype, peers: Peers) -> bool:
    """Whether the sum of so many numbers can be exchanged."""
    return jnp.dtype(dtype).itemsize == 2 and size <= peers.most


def gather(x: Array, peers: Peers, *, interpret: bool = False) -> Array:
    """The numbers of all devices: `[devices, *x.shape]`.

    Args:
      x: of at most 4 bytes each.
      peers: the devices.
      interpret: run it without GPUs, to test it.
    """
    wide = x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
    y = _exchange(wide, peers, (peers.count, x.size), interpret)
    return y.astype(x.dtype).reshape(peers.count, *x.shape)


def total(x: Array, peers: Peers, *, sent: bool = False, interpret: bool = False) -> Array:
    """The sum over the devices, added up in float32 in the same order by all: the shape and dtype
    of `x`. Arguments are those of `gather`; `sent`: all have called `send` with their numbers."""
    y = _exchange(x.astype(jnp.float32), peers, (x.size,), interpret, sent)
    return y.astype(x.dtype).reshape(x.shape)


def total_of_many(x: Array, peers: Peers, *, interpret: bool = False) -> Array:
    """As `total`, of a number of bfloat16 or float16 that is supported."""
    y = pl.pallas_call(
        partial(_many_kernel, axes=peers.axes, most=peers.most, interpret=interpret),
        grid=(_tiles(x.size, peers.count),),
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="exchange_many",
    )(x.reshape(-1), peers.table)
    return y.reshape(x.shape)


def _exchange(
    x: Array, peers: Peers, shape: tuple[int, ...], interpret: bool, sent: bool = False
) -> Array:
    return pl.pallas_call(
        partial(_kernel, axes=peers.axes, interpret=interpret, sent=sent),
        grid=(pl.cdiv(x.size, WIDTH),),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="exchange",
    )(x.reshape(-1), peers.table)


def _kernel(
    x_ref: jax.Ref,
    table: jax.Ref,
    out_ref: jax.Ref,
    *,
    axes: tuple[str, ...],
    interpret: bool,
    sent: bool,
) -> None:
    """Some of the numbers."""
    program, place = pl.program_id(0), jnp.arange(WIDTH)
    at = program * WIDTH + place
    inside = at < x_ref.shape[0]
    x = plgpu.load(x_ref.at[at], mask=inside, other=jnp.zeros((), x_ref.dtype))
    peers = Peers(table, axes)
    if len(out_ref.shape) == 1:
        y = add_up(x, peers, program, place, sent=sent, interpret=interpret)
        plgpu.store(out_ref.at[at], y, mask=inside)
    else:
        for device, part in enumerate(_all(x, peers, program, place, interpret)):
            plgpu.store(out_ref.at[device, at], part, mask=inside)


def add_up(
    x: Array,
    peers: Peers,
    program: Array,
    place: Array,
    *,
    sent: bool = False,
    interpret: bool = False,
) -> Array:
    """Inside a kernel of four warps: the sum over the devices, in their order.

    All devices run the same exchanges in the same order.

    Args:
      x: `WIDTH` float32 numbers, in any shape.
      peers: with the reference to the table.
      program: which of at most `PROGRAMS`.
      place: of each number in `x`, from 0 to `WIDTH - 1`.
      sent: a kernel before has called `send` with these numbers.
      interpret: run it without GPUs, to test it.
    """
    if interpret:
        first, *others = lax.all_gather(x, peers.axes)
        return sum(others, first)
    operands = _begin(x, peers, program, place, sent=sent)
    return lax.bitcast_convert_type(_packed(_received(range(peers.count)), *operands), x.dtype)


def _all(x: Array, peers: Peers, program: Array, place: Array, interpret: bool) -> list[Array]:
    """What all devices have, in their order; arguments are those of `add_up`."""
    if interpret:
        return list(lax.all_gather(x, peers.axes))
    operands = _begin(x, peers, program, place)
    parts = [_packed(_received([device]), *operands) for device in range(peers.count)]
    return [lax.bitcast_convert_type(part, x.dtype) for part in parts]


def _begin(
    x: Array, peers: Peers, program: Array, place: Array, *, sent: bool = False
) -> list[Array]:
    """Sends numbers, if they are not sent yet: the operands with which others are received."""
    at = program * WIDTH + place
    mine = _address(peers.table, 0, at.shape)
    me = jnp.full(at.shape, peers.table[0].astype(jnp.int32))
    count = _packed(_TICK, *mine, at * 4)
    first, bits = _offset(peers, count, at), lax.bitcast_convert_type(x, jnp.int32)
    if not sent:
        for step in range(1, peers.count):
            address = _address(peers.table, step, at.shape)
            bits = _packed(_SEND, *address, first + me * _STRIDE, bits, count)
    return [*mine, first, bits, count, me]


class Outbox(NamedTuple):
    """Where a kernel is to send numbers, ahead of the exchange that comes next.

    Attributes:
      count: of that exchange.
      offset: of the numbers in a mailbox.
      addresses: of the mailboxes, two words each.
      zero: float32 zeros, which are there when the others are.
    """

    count: Array
    offset: Array
    addresses: list[list[Array]]
    zero: Array


def outbox(peers: Peers, at: Array) -> Outbox:
    """Inside a kernel: what `send` needs. What begins with its zeros does not wait for it later.

    Args:
      peers: with the reference to the table.
      at: of each number its place among all, `program * WIDTH + place` in the exchange.
    """
    count = _packed(_LOOK, *_address(peers.table, 0, at.shape), at * 4, pack=1)
    offset = _offset(peers, count, at) + peers.table[0].astype(jnp.int32) * _STRIDE
    addresses = [_address(peers.table, step, at.shape) for step in range(1, peers.count)]
    words = [offset, count, *itertools.chain(*addresses)]
    # Zeros unless all words are -1, which the compiler does not know.
    every = [f"and.b32 $0, $0, ${i + 1};" for i in range(1, len(words))]
    [zero] = plgpu.elementwise_inline_asm(
        "\n".join(["mov.b32 $0, $1;", *every, "set.eq.u32.u32 $0, $0, -1;"]),
        args=words,
        constraints=",".join(["=&r", *["r"] * len(words)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(at.shape, jnp.int32)],
    )
    return Outbox(count, offset, addresses, lax.bitcast_convert_type(zero, jnp.float32))


def send(x: Array, to: Outbox) -> Array:
    """Inside a kernel: sends numbers of 4 bytes to the other devices, ahead of an exchange.

    Returns:
      `x`, which keeps what reads it behind the sending.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    for address in to.addresses:
        bits = _packed(_SEND, *address, to.offset, bits, to.count, pack=1)
    return lax.bitcast_convert_type(bits, x.dtype)


def _offset(peers: Peers, count: Array, at: Array) -> Array:
    """Where in a mailbox the numbers of the first device are: of odd and even exchanges, after the
    counts."""
    return _STRIDE // 2 + (count & 1) * (peers.count * _STRIDE) + 8 * at


def _address(table: jax.Ref, step: int, shape: Sequence[int]) -> list[Array]:
    """Of the mailbox of the device so many places after this one, for each number: the lower and
    the upper word."""
    return [jnp.full(shape, table[1 + 2 * step + word]) for word in range(2)]


def _packed(lines: Sequence[str], *operands: Array, pack: int = _PACK) -> Array:
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
_SEND = (
    "mov.b64 w#, {%x, %y};",
    "st.relaxed.sys.global.b64 [a#], w#;",
    "mov.b32 %z, %x;",
)


def _received(senders: Sequence[int]) -> list[str]:
    """Looks until the numbers of some devices are there, all at once, and adds them up."""
    lines = [
        ".reg .pred late, never, own;",
        ".reg .b32 looks;",
        *[f".reg .b32 s{sender}_#;\n.reg .b64 r{sender}_#;" for sender in senders],
        "mov.b32 looks, 0;",
        "again:",
        "add.u32 looks, looks, 1;",
        f"setp.gt.u32 never, looks, {PATIENCE};",
        "@never trap;",
        *[f"ld.relaxed.sys.global.b64 r{s}_#, [a#+{s * _STRIDE}];" for s in senders],
        "setp.ne.u32 late, looks, looks;",
    ]
    for sender in senders:
        lines += [
            f"mov.b64 {{s{sender}_#, v#}}, r{sender}_#;",
            f"setp.eq.u32 own, %me, {sender}; selp.b32 s{sender}_#, %x, s{sender}_#, own; "
            "selp.b32 v#, %y, v#, own; setp.ne.or.u32 late, v#, %y, late;",
        ]
    first, *others = senders
    lines += ["@late bra again;", f"mov.b32 %z, s{first}_#;"]
    return lines + [f"add.rn.f32 %z, %z, s{sender}_#;" for sender in others]


def _many_kernel(
    x_ref: jax.Ref,
    table: jax.Ref,
    out_ref: jax.Ref,
    *,
    axes: tuple[str, ...],
    most: int,
    interpret: bool,
) -> None:
    """The sums of a tile of this device's part, and those of the others' parts."""
    peers = Peers(table, axes, most)
    me = lax.axis_index(axes) if interpret else table[0].astype(jnp.int32)
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
        if not interpret:
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
    """`swap` in `_many_kernel`.

    A thread writes its words to all others, then a count behind them, and looks for the others'
    counts. After the room for a few numbers, mailboxes have, for each thread of the grid: a count
    of swaps; the counts of odd and even ones by sender; and their words, likewise.
    """
    devices, (size, dtype) = peers.count, (tiles[0].shape, tiles[0].dtype)
    threads = _tiles(peers.most, devices) * _THREADS
    counts = _few_bytes(devices)
    flags = counts + 4 * threads
    words = flags + 4 * threads * 2 * devices
    mine = _address(peers.table, 0, size)
    me = jnp.full(size, peers.table[0].astype(jnp.int32))
    theirs = [_address(peers.table, step, size) for step in range(1, devices)]

    def quarters(base: str) -> list[str]:
        return [f"[{base}+{words + 16 * _THREADS * k}]" for k in range(_WORDS // 4)]

    def four(first: int, k: int) -> str:
        return "{" + ", ".join(f"${first + 4 * k + i}" for i in range(4)) + "}"

    def slot(mailbox: str, sender: str) -> list[str]:
        """`a` of the count and `b` of the words of a sender in the mailbox of a device."""
        return [
            f"mad.lo.u32 place, half, {devices}, {sender};",
            f"mad.lo.u32 place, place, {threads // _THREADS}, tile;",
            f"mad.lo.u32 index, place, {_THREADS}, thread;",
            f"mad.wide.u32 a, index, 4, {mailbox};",
            f"mad.lo.u32 index, place, {_THREADS * _WORDS // 4}, thread;",
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
        ".reg .pred late, never, round;",
        ".reg .b64 mailbox, a, b;",
        ".reg .b32 tile, thread, count, half, place, index, found, looks, sender, me;",
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
        f"mad.lo.u32 index, tile, {_THREADS}, thread;",
        "mad.wide.u32 a, index, 4, mailbox;",
        f"ld.relaxed.sys.global.b32 count, [a+{counts}];",
        "add.u32 count, count, 1;",
        f"st.relaxed.sys.global.b32 [a+{counts}], count;",
        "and.b32 half, count, 1;",
    ]
    for i in range(devices - 1):
        lines += [mailbox(3 + 2 * i, given), *slot("mailbox", "me")]
        first = _WORDS * (1 + i % given)
        lines += [f"st.global.v4.b32 {at}, {four(first, k)};" for k, at in enumerate(quarters("b"))]
    lines += ["fence.acq_rel.sys;"]
    for i in range(devices - 1):
        lines += [mailbox(3 + 2 * i, given), *slot("mailbox", "me")]
        lines += [f"st.relaxed.sys.global.b32 [a+{flags}], count;"]
    lines += [
        mailbox(1, given),
        "mov.b32 looks, 0;",
        "again:",
        "add.u32 looks, looks, 1;",
        f"setp.gt.u32 never, looks, {PATIENCE};",
        "@never trap;",
        "setp.ne.u32 late, looks, looks;",
    ]
    lines += [f".reg .b32 found{step};" for step in range(1, devices)]
    for step in range(1, devices):
        lines += [*before(step), *slot("mailbox", "sender")]
        lines += [f"ld.relaxed.sys.global.b32 found{step}, [a+{flags}];"]
    lines += [f"setp.ne.or.u32 late, found{step}, count, late;" for step in range(1, devices)]
    lines += ["@late bra again;", "fence.acq_rel.sys;"]
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
            *[
                f"ld.relaxed.sys.global.v4.b32 {four(0, k)}, {at};"
                for k, at in enumerate(quarters("b"))
            ],
        ]
        received.append(run(lines, [half], [me, *mine]))
    return received
