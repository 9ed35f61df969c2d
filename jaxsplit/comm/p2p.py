"""Point-to-point messages between pipeline stages, inside kernels: from each stage to the next, and
from the last to the first.

The protocol is that of `peers`. A channel buffers one message: a device sends the next one only
after the answer to this one, which went around the ring, has arrived.
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

from jaxsplit.comm.peers import (
    SEND,
    WARPS,
    WIDTH,
    address_of,
    inline_asm,
    interleaved,
    padded,
    spin_until_ready,
)
from jaxsplit.pallas import pl, plgpu


def buffer_bytes(channels: int, words: int) -> int:
    """Bytes of a device's receive buffer for messages of `words` 4-byte words."""
    return 8 * channels * padded(words)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ring:
    """A device's links to the previous and the next device of a ring.

    Each method returns the ring's new state; passing it on keeps messages in order.

    Attributes:
      buffer_pointers: the device's rank, then the addresses of its own receive buffer and of those
        of the next devices in ring order, each as two words, low word first: uint32
        `[1 + 2 * devices]`.
      epoch: of the next message of every channel, int32 `[1]`, from 1; empty buffers hold 0.
      interpret: send messages through the host, for tests without GPUs.
    """

    buffer_pointers: Array
    epoch: Array
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    def send(
        self, words: Array, channel: int, *, ahead: int = 0, wanted: Array | bool = True
    ) -> "Ring":
        """Sends uint32 `[words]` to the next device.

        Args:
          words: the message.
          channel: channel index; all messages of a channel have the same size.
          ahead: messages of this channel that the receiver reads before this one.
          wanted: bool: whether to send at all.
        """
        wanted = jnp.asarray(wanted, jnp.int32).reshape(1)
        if self.interpret:
            post = partial(_host_send, channel=channel, ahead=ahead)
            shape = jax.ShapeDtypeStruct((1,), jnp.int32)
            epoch = io_callback(post, shape, self.buffer_pointers, self.epoch, wanted, words)
        else:
            epoch = pl.pallas_call(
                partial(_send, first=channel * padded(words.size), ahead=ahead),
                grid=(pl.cdiv(words.size, WIDTH),),
                out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
                compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
                name="send_to_next",
            )(self.buffer_pointers, self.epoch, wanted, words)
        return dataclasses.replace(self, epoch=epoch)

    def receive(self, size: int, channel: int) -> tuple[Array, "Ring"]:
        """Waits for the next message of a channel: uint32 `[size]`."""
        epoch = jax.ShapeDtypeStruct((1,), jnp.int32)
        words = jax.ShapeDtypeStruct((size,), jnp.uint32)
        if self.interpret:
            wait = partial(_host_receive, size=size, channel=channel)
            words, epoch = io_callback(wait, (words, epoch), self.buffer_pointers, self.epoch)
        else:
            words, epoch = pl.pallas_call(
                partial(_receive, first=channel * padded(size)),
                grid=(pl.cdiv(size, WIDTH),),
                out_shape=(words, epoch),
                compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
                name="receive",
            )(self.buffer_pointers, self.epoch)
        return words, dataclasses.replace(self, epoch=epoch)

    def next_round(self) -> "Ring":
        """The ring after a message of every channel has been received."""
        return dataclasses.replace(self, epoch=self.epoch + 1)


def _offsets() -> tuple[Array, Array]:
    """Offsets of this program's words: in the message, and in the channel's buffer."""
    lane, first = jnp.arange(WIDTH), pl.program_id(0) * WIDTH
    return first + lane, first + interleaved(lane)


def _send(
    pointers: jax.Ref,
    epoch_ref: jax.Ref,
    wanted_ref: jax.Ref,
    words_ref: jax.Ref,
    out_ref: jax.Ref,
    *,
    first: int,
    ahead: int,
) -> None:
    at, offset = _offsets()
    words = plgpu.load(words_ref.at[at], mask=at < words_ref.shape[0], other=jnp.uint32(0))
    epoch = epoch_ref[0]
    wanted = wanted_ref[0].astype(jnp.uint32)
    # A null pointer disables the store.
    address = [word * wanted for word in address_of(pointers, 1, at.shape)]
    sent = inline_asm(
        _SEND, *address, 8 * (first + offset), words, jnp.full(at.shape, epoch + ahead)
    )
    out_ref[0] = jnp.max(sent) - ahead  # all are equal


def _receive(
    pointers: jax.Ref, epoch_ref: jax.Ref, words_ref: jax.Ref, out_ref: jax.Ref, *, first: int
) -> None:
    at, offset = _offsets()
    epoch = epoch_ref[0]
    own = address_of(pointers, 0, at.shape)
    words = inline_asm(_POLL, *own, 8 * (first + offset), jnp.full(at.shape, epoch))
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)
    plgpu.store(words_ref.at[at], words, mask=at < words_ref.shape[0])
    out_ref[0] = epoch


# Returns the epoch: the data dependency orders later reads after the stores.
_SEND = (*SEND[:-1], "mov.b32 %z, %y;")
_POLL = (
    ".reg .b64 r#;",
    ".reg .b32 s#, c#;",
    *spin_until_ready(
        [
            "ld.relaxed.sys.global.b64 r#, [a#];",
            "mov.b64 {s#, c#}, r#;",
            "setp.ne.or.u32 late, c#, %x, late;",
        ]
    ),
    "mov.b32 %z, s#;",
)


# `interpret`: buffers in host memory, for programs that run at the same time in one process.

_TIMEOUT_SECONDS = 60.0
_arrival = threading.Condition()
_buffers: dict[tuple[int, ...], tuple[int, np.ndarray]] = {}  # channel to epoch and words
_rings = itertools.count()


def host_buffer_pointers(stages: int, shape: tuple[int, ...]) -> np.ndarray:
    """Buffer pointers of a new ring for `interpret`.

    Args:
      stages: number of stages.
      shape: mesh shape of each stage.

    Returns:
      the ring's id, the stage, the number of stages and the device's rank in its stage: uint32
      `[stages, *shape, 4]`.
    """
    stage, *index = np.indices((stages, *shape))
    rank = np.ravel_multi_index(tuple(index), shape)
    ring = np.full_like(stage, next(_rings))
    return np.stack([ring, stage, np.full_like(stage, stages), rank], -1).astype(np.uint32)


def _host_send(pointers, epoch, wanted, words, *, channel: int, ahead: int) -> np.ndarray:
    ring, stage, stages, rank = map(int, pointers)
    if wanted[0]:
        with _arrival:
            target = (ring, (stage + 1) % stages, rank, channel)
            _buffers[target] = int(epoch[0]) + ahead, np.array(words)
            _arrival.notify_all()
    return np.array(epoch)


def _host_receive(pointers, epoch, *, size: int, channel: int) -> tuple[np.ndarray, np.ndarray]:
    ring, stage, _, rank = map(int, pointers)
    own, empty = (ring, stage, rank, channel), (0, np.zeros(size, np.uint32))
    with _arrival:
        received = partial(_buffers.get, own, empty)
        if not _arrival.wait_for(lambda: received()[0] == epoch[0], _TIMEOUT_SECONDS):
            raise TimeoutError(f"no message {epoch[0]} to {own}")
        return received()[1], np.array(epoch)
