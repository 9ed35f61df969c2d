"""Messages between programs of different devices, inside kernels: from each stage of a model to the
next, and from the last to the first.

As in `exchange`, a word travels with a count in one access of 8 bytes, and the reader looks until
the count is there. A channel holds one message: the next one is sent when the answer to this one,
which went around the ring, has come.
"""

import dataclasses
import itertools
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import io_callback

from jaxsplit.comm.one_shot import (
    SEND,
    WARPS,
    WIDTH,
    address_of,
    packed,
    padded,
    side_by_side,
    until_found,
)
from jaxsplit.pallas import pl, plgpu


def mailbox_bytes(channels: int, words: int) -> int:
    """Of one device, for messages of so many words."""
    return 8 * channels * padded(words)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """A device's place between the one that sends to it and the one that it sends to.

    Each of its methods returns the ring as it is then, which keeps messages in order.

    Attributes:
      table: the device's place among all, then the addresses of its own mailbox and of those of the
        devices after it, in turn, two words each with the lower first: uint32 `[1 + 2 * devices]`.
      count: of the message that comes next in every channel, int32 `[1]`, from 1: empty mailboxes
        have 0.
      interpret: messages go through the host, to test programs without GPUs.
    """

    table: Array
    count: Array
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    def send(
        self, words: Array, channel: int, *, ahead: int = 0, wanted: Array | bool = True
    ) -> "Ring":
        """Sends uint32 `[words]` to the next device.

        Args:
          words: the message.
          channel: which; all messages of a channel have as many words.
          ahead: messages of this channel that the receiver takes before this one.
          wanted: bool: else nothing is sent.
        """
        wanted = jnp.asarray(wanted, jnp.int32).reshape(1)
        if self.interpret:
            put = partial(_post, channel=channel, ahead=ahead)
            shape = jax.ShapeDtypeStruct((1,), jnp.int32)
            count = io_callback(put, shape, self.table, self.count, wanted, words)
        else:
            count = pl.pallas_call(
                partial(_send, first=channel * padded(words.size), ahead=ahead),
                grid=(pl.cdiv(words.size, WIDTH),),
                out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
                compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
                name="send_to_next",
            )(self.table, self.count, wanted, words)
        return dataclasses.replace(self, count=count)

    def receive(self, size: int, channel: int) -> tuple[Array, "Ring"]:
        """The message of so many words that comes next in a channel: uint32 `[size]`."""
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        words = jax.ShapeDtypeStruct((size,), jnp.uint32)
        if self.interpret:
            collect = partial(_collect, size=size, channel=channel)
            words, count = io_callback(collect, (words, count), self.table, self.count)
        else:
            words, count = pl.pallas_call(
                partial(_receive, first=channel * padded(size)),
                grid=(pl.cdiv(size, WIDTH),),
                out_shape=(words, count),
                compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
                name="receive",
            )(self.table, self.count)
        return words, dataclasses.replace(self, count=count)

    def next_round(self) -> "Ring":
        """The ring when a message of each channel has been received."""
        return dataclasses.replace(self, count=self.count + 1)


def _places() -> tuple[Array, Array]:
    """Of the words of a program: where they are in the message, and in the mailbox."""
    place, first = jnp.arange(WIDTH), pl.program_id(0) * WIDTH
    return first + place, first + side_by_side(place)


def _send(
    table: jax.Ref,
    count_ref: jax.Ref,
    wanted_ref: jax.Ref,
    words_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    first: int,
    ahead: int,
) -> None:
    at, place = _places()
    words = plgpu.load(words_ref.at[at], mask=at < words_ref.shape[0], other=jnp.uint32(0))
    count = count_ref[0]
    wanted = wanted_ref[0].astype(jnp.uint32)
    # To the address 0, nothing is sent.
    address = [word * wanted for word in address_of(table, 1, at.shape)]
    sent = packed(_SENT, *address, 8 * (first + place), words, jnp.full(at.shape, count + ahead))
    out_ref[0] = jnp.max(sent) - ahead  # all are the same


def _receive(
    table: jax.Ref, count_ref: jax.Ref, words_ref: jax.Ref, out_ref: jax.Ref, *, first: int
) -> None:
    at, place = _places()
    count = count_ref[0]
    mine = address_of(table, 0, at.shape)
    words = packed(_AWAIT, *mine, 8 * (first + place), jnp.full(at.shape, count))
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    plgpu.store(words_ref.at[at], words, mask=at < words_ref.shape[0])
    out_ref[0] = count


_SENT = (*SEND[:-1], "mov.b32 %z, %y;")  # the count, so that what reads it comes after
_AWAIT = (
    ".reg .b64 r#;",
    ".reg .b32 s#, c#;",
    *until_found(
        [
            "ld.relaxed.sys.global.b64 r#, [a#];",
            "mov.b64 {s#, c#}, r#;",
            "setp.ne.or.u32 late, c#, %x, late;",
        ]
    ),
    "mov.b32 %z, s#;",
)


# Without GPUs: mailboxes of programs that run at the same time in this process.

_PATIENCE = 60.0  # seconds
_arrival = threading.Condition()
_mailboxes: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}  # of each channel
_rings = itertools.count()


def host_tables(stages: int, shape: tuple[int, ...]) -> np.ndarray:
    """Tables for `interpret` of a new ring, given how the devices of a stage lie: which ring it is,
    the stage, how many there are, and the device's place in it, uint32 `[stages, *shape, 4]`."""
    stage, *place = np.indices((stages, *shape))
    place = np.ravel_multi_index(tuple(place), shape)
    ring = np.full_like(stage, next(_rings))
    return np.stack([ring, stage, np.full_like(stage, stages), place], -1).astype(np.uint32)


def _post(table, count, wanted, words, *, channel: int, ahead: int) -> np.ndarray:
    ring, stage, stages, place = map(int, table)
    if wanted[0]:
        with _arrival:
            to = (ring, (stage + 1) % stages, place, channel)
            _mailboxes[to] = int(count[0]) + ahead, np.array(words)
            _arrival.notify_all()
    return np.array(count)


def _collect(table, count, *, size: int, channel: int) -> tuple[np.ndarray, np.ndarray]:
    ring, stage, _, place = map(int, table)
    mine, empty = (ring, stage, place, channel), (0, np.zeros(size, np.uint32))
    with _arrival:
        here = partial(_mailboxes.get, mine, empty)
        if not _arrival.wait_for(lambda: here()[0] == count[0], _PATIENCE):
            raise TimeoutError(f"no message {count[0]} to {mine}")
        return here()[1], np.array(count)
