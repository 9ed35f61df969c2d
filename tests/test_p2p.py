"""Point-to-point messages between stages. Whole models: `test_engine`, `test_slots`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fresh_rng

from jaxsplit.comm import p2p
from jaxsplit.comm.p2p import Ring
from jaxsplit.engine import steps


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("slots", [1, 3])
def test_arrays_survive_packing_into_words(dtype, slots):
    rng = fresh_rng()
    x = jnp.asarray(rng.normal(size=(slots, 1, 33)), dtype)
    inputs = jnp.asarray(rng.integers(-1, 2**31, (slots, 2)), jnp.int32)
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, inputs)]
    words = steps._to_words([x, inputs])
    assert words.shape == (steps.word_count(like),)
    assert words.dtype == jnp.uint32
    for found, sent in zip(steps._from_words(words, like), (x, inputs), strict=True):
        assert found.dtype == sent.dtype
        assert np.array_equal(found, sent)


def test_a_message_reaches_the_next_device_in_its_epoch(monkeypatch):
    pointers = p2p.host_buffer_pointers(3, (1,))
    message = jnp.asarray(fresh_rng().integers(0, 2**32, 5), jnp.uint32)
    sender, receiver, other = (
        Ring(jnp.asarray(pointers[stage, 0]), jnp.ones(1, jnp.int32), interpret=True)
        for stage in (2, 0, 1)
    )
    sender = sender.send(message, 1).send(message + 1, 0)
    for channel, sent in ((0, message + 1), (1, message)):
        words, receiver = receiver.receive(5, channel)
        assert np.array_equal(words, sent)
    sender.send(message + 2, 0, ahead=1)
    words, receiver = receiver.next_round().receive(5, 0)
    assert np.array_equal(words, message + 2)
    # A message that was not sent, or was overwritten, does not arrive.
    monkeypatch.setattr(p2p, "_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(Exception, match="no message 2"):
        jax.block_until_ready(receiver.receive(5, 1))
    other.send(message, 0, wanted=False)
    sender.send(message + 3, 0, ahead=2)
    with pytest.raises(Exception, match="no message 2"):
        jax.block_until_ready(receiver.receive(5, 0))


def test_channels_are_adjacent_in_the_buffer(monkeypatch):
    """For the sender and for the receiver."""
    begins = {}
    for name in ("_send", "_receive"):

        def noted(*_, first, name=name, **__):
            begins.setdefault(name, []).append(first)

        monkeypatch.setattr(p2p, name, noted)
    one = Ring(jnp.zeros(5, jnp.uint32), jnp.ones(1, jnp.int32))
    for channel in range(3):
        words = jax.ShapeDtypeStruct((700,), jnp.uint32)
        jax.eval_shape(lambda w, c=channel: one.send(w, c).epoch, words)
        jax.eval_shape(lambda c=channel: one.receive(700, c)[0])
    assert begins["_send"] == begins["_receive"] == [0, 1024, 2048]
    assert p2p.buffer_bytes(3, 700) == 3 * 1024 * 8
