"""Sums and gathers of a few numbers inside kernels: devices write to one another's memory.

Each device has a mailbox that the others can write to (`jaxsplit.parallel.mailboxes`). A number
travels together with a count that tells which exchange it belongs to, in one access of 8 bytes, and
the reader looks until the count is there: no other signal is needed, and an exchange costs the time
of one write over the link. (The protocol that NCCL calls LL.)

Two exchanges in turn use different halves of a mailbox. A device begins the one after those only
when it has the numbers of all others for the second, which they write when they have read all of
the first: so nothing is overwritten before it was read.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

WIDTH = 512
"""Numbers that a program exchanges."""

PROGRAMS = 128
"""Programs for which a mailbox has room."""

_WARPS = 4
_PACK = WIDTH // (32 * _WARPS)  # numbers of a thread, whose accesses are under way together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Peers:
    """The devices that exchange numbers.

    Attributes:
      table: this device's place among them, then the addresses of all their mailboxes, two words
        each with the lower first: uint32 `[1 + 2 * devices]`.
      axes: the mesh axes along which they lie.
    """

    table: Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def count(self) -> int:
        """How many there are."""
        return self.table.shape[-1] // 2


def mailbox_bytes(devices: int) -> int:
    """Of one device: a count for each number, and two places of 8 bytes from each device."""
    return PROGRAMS * WIDTH * (4 + 2 * 8 * devices)


def supports(size: int) -> bool:
    """Whether mailboxes have room for so many numbers."""
    return pl.cdiv(size, WIDTH) <= PROGRAMS


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


def total(x: Array, peers: Peers, *, interpret: bool = False) -> Array:
    """The sum over the devices, added up in float32 in the same order by all: the shape and dtype
    of `x`. Arguments are those of `gather`."""
    y = _exchange(x.astype(jnp.float32), peers, (x.size,), interpret)
    return y.astype(x.dtype).reshape(x.shape)


def _exchange(x: Array, peers: Peers, shape: tuple[int, ...], interpret: bool) -> Array:
    return pl.pallas_call(
        partial(_kernel, axes=peers.axes, interpret=interpret),
        grid=(pl.cdiv(x.size, WIDTH),),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
        name="exchange",
    )(x.reshape(-1), peers.table)


def _kernel(
    x_ref: jax.Ref, table: jax.Ref, out_ref: jax.Ref, *, axes: tuple[str, ...], interpret: bool
) -> None:
    """Some of the numbers."""
    program, place = pl.program_id(0), jnp.arange(WIDTH)
    at = program * WIDTH + place
    inside = at < x_ref.shape[0]
    x = plgpu.load(x_ref.at[at], mask=inside, other=jnp.zeros((), x_ref.dtype))
    parts = exchange(x, Peers(table, axes), program, place, interpret=interpret)
    if len(out_ref.shape) == 1:
        plgpu.store(out_ref.at[at], sum(parts[1:], parts[0]), mask=inside)
    else:
        for device, part in enumerate(parts):
            plgpu.store(out_ref.at[device, at], part, mask=inside)


def exchange(
    x: Array, peers: Peers, program: Array, place: Array, *, interpret: bool = False
) -> list[Array]:
    """Inside a kernel of four warps: what all devices have, in their order.

    All devices run the same exchanges in the same order.

    Args:
      x: `WIDTH` numbers of 4 bytes, in any shape.
      peers: with the reference to the table.
      program: which of at most `PROGRAMS`.
      place: of each number in `x`, from 0 to `WIDTH - 1`.
      interpret: run it without GPUs, to test it.
    """
    if interpret:
        return list(lax.all_gather(x, peers.axes))
    me, devices = peers.table[0].astype(jnp.int32), peers.count
    at = program * WIDTH + place
    mine = _address(peers.table, me, at.shape)
    count = _packed(_TICK, *mine, at * 4)
    # Counts come first in a mailbox, then the numbers: of odd and even exchanges, by sender.
    half = count & 1
    numbers = PROGRAMS * WIDTH

    def offset(sender: Array | int) -> Array:
        return 4 * numbers + 8 * ((half * devices + sender) * numbers + at)

    bits = lax.bitcast_convert_type(x, jnp.int32)
    for device in range(devices):
        address = _address(peers.table, device, at.shape)
        count = _packed(_SEND, *address, offset(me), bits, count)
    parts = [_packed(_RECEIVE, *mine, offset(sender), count) for sender in range(devices)]
    return [lax.bitcast_convert_type(part, x.dtype) for part in parts]


def _address(table: jax.Ref, device: Array | int, shape: Sequence[int]) -> list[Array]:
    """Of a device's mailbox, for each number: the lower and the upper word."""
    return [jnp.full(shape, table[1 + 2 * device + word]) for word in range(2)]


def _packed(lines: Sequence[str], *operands: Array) -> Array:
    """Instructions for each number, those of a thread's numbers interleaved: int32.

    `lines` may use `base` (the address of two first operands), `a` (with the offset, the third
    operand), the operands `x` and `y` after them, and the result `z`; names that end in # are of
    each number.
    """
    names = [["z", "lo", "hi", "offset", "x", "y"][i] for i in range(1 + len(operands))]
    registers = {
        f"{name}#{k}": f"${i * _PACK + k}" for i, name in enumerate(names) for k in range(_PACK)
    }

    def line(text: str, k: int) -> str:
        for name in names:
            text = text.replace(f"%{name}", registers[f"{name}#{k}"])
        return text.replace("#", str(k))

    text = ["{", ".reg .pred late;", ".reg .b64 base;"]
    text += [f".reg .b64 a{k}, w{k};\n.reg .b32 u{k}, v{k};" for k in range(_PACK)]
    text += ["mov.b64 base, {" + f"{registers['lo#0']}, {registers['hi#0']}" + "};"]
    for part in ("mad.wide.u32 a#, %offset, 1, base;", *lines):
        every = "#" in part or "%" in part
        text += [line(part, k) for k in (range(_PACK) if every else range(1))]
    text += ["}"]
    [y] = plgpu.elementwise_inline_asm(
        "\n".join(text),
        args=operands,
        constraints=",".join(["=r"] * _PACK + ["r"] * _PACK * len(operands)),
        pack=_PACK,
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
_SEND = (
    "mov.b64 w#, {%x, %y};",
    "st.relaxed.sys.global.b64 [a#], w#;",
    "mov.b32 %z, %y;",
)
_RECEIVE = (
    "again:",
    "ld.relaxed.sys.global.b64 w#, [a#];",
    "mov.b64 {u#, v#}, w#;",
    "setp.ne.u32 late, v0, v0;",
    "setp.ne.or.u32 late, v#, %x, late;",
    "@late bra again;",
    "mov.b32 %z, u#;",
)
