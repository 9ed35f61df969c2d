"""The LL protocol: devices of one host write to one another's memory, inside kernels.

Each device has a buffer that the others can write to (`jaxsplit.comm.symmetric_memory`). An 8-byte
store carries a 4-byte payload and a 4-byte epoch. The receiver polls until the epoch matches, so no
separate flag or fence is needed, and a message costs the latency of one store over the link. (NCCL
calls this protocol LL.)
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.pallas import plgpu

WIDTH = 512
"""Elements of a program."""

WARPS = 4
"""Of a program."""

THREADS = 32 * WARPS

PER_THREAD = WIDTH // THREADS
"""Elements of a thread, whose loads and stores are in flight together."""

SPIN_LIMIT = 2**26
"""Polls before a kernel gives up with an error: half a minute or more."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PeerGroup:
    """Devices that exchange data in kernels.

    Attributes:
      buffer_pointers: this device's rank, then the addresses of its own buffer and of those of the
        next ranks in turn, each as two words, low word first: uint32 `[1 + 2 * ranks]`; inside a
        kernel, the reference to it.
      axes: the mesh axes along which the devices lie.
      max_elements: largest two-shot all-reduce that the buffers have room for, in elements of 2
        bytes.
    """

    buffer_pointers: Array | jax.Ref
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    max_elements: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def size(self) -> int:
        """The number of devices."""
        return self.buffer_pointers.shape[-1] // 2


def padded(elements: int) -> int:
    """A number of elements, rounded up to whole programs."""
    return -(-elements // WIDTH) * WIDTH


def interleaved(index: Array) -> Array:
    """Offsets in a buffer of the elements of a program, given their indices: a thread has some
    neighbouring elements, and the stores of neighbouring threads go side by side."""
    return index % PER_THREAD * THREADS + index // PER_THREAD


def address_of(pointers: Array | jax.Ref, step: int, shape: Sequence[int]) -> list[Array]:
    """The address of the buffer of the rank `step` after this one, for each element: its low and
    its high word."""
    return [jnp.full(shape, pointers[1 + 2 * step + word]) for word in range(2)]


def inline_asm(lines: Sequence[str], *operands: Array, pack: int = PER_THREAD) -> Array:
    """Runs PTX instructions for each element, those of a thread's elements interleaved.

    Args:
      lines: may use `base` (the address in the first two operands), `a` (the address with the
        offset, which is the third operand), the operands `%x`, `%y` and `%me` after them, and the
        result `%z`. Names that end in # belong to one element.
      *operands: of 4 bytes, of one shape.
      pack: elements of a thread.

    Returns:
      int32 of the same shape.
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


# A null pointer disables the store. Returns the payload: the data dependency orders what follows.
SEND = (
    ".reg .pred some;",
    "setp.ne.u64 some, base, 0;",
    "mov.b64 w#, {%x, %y};",
    "@some st.relaxed.sys.global.b64 [a#], w#;",
    "mov.b32 %z, %x;",
)

POLL_AGAIN = ("vote.sync.any.pred late, late, 0xffffffff;", "@late bra again;")
"""Jumps back if any thread of the warp has found that an element is `late`."""


def spin_until_ready(lines: Sequence[str]) -> list[str]:
    """Instructions that all threads of a warp repeat until none has set `late`."""
    return [
        ".reg .pred late, never;",
        ".reg .b32 polls;",
        "mov.b32 polls, 0;",
        "again:",
        "add.u32 polls, polls, 1;",
        f"setp.gt.u32 never, polls, {SPIN_LIMIT};",
        "@never trap;",
        "setp.ne.u32 late, polls, polls;",
        *lines,
        *POLL_AGAIN,
    ]
