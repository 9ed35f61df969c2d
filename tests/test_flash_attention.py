"""The attention kernels, run without a GPU, against plain attention in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import nmse, quick_jit
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache
from jaxsplit.models import AttentionConfig
from jaxsplit.ops.activations import int8
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.attention import triton_flash, triton_softmax
from jaxsplit.ops.attention.kv import KV
from jaxsplit.ops.attention.xla import attend

pytestmark = pytest.mark.usefixtures("quick_compilation", "interpreter")

KV_HEADS, GROUP, KEYS = 2, 3, 600


def inputs(rng, batch, time, head_dim, value_dim, dtype="bfloat16"):
    """Queries and a memory of keys and values; every other sequence begins later."""

    def normal(*shape):
        return rng.normal(size=shape).astype(jnp.bfloat16)

    queries = normal(batch, time, KV_HEADS, GROUP, head_dim)
    keys, values = (normal(batch, KEYS, KV_HEADS, width) for width in (head_dim, value_dim))
    first = 40 + 300 * (np.arange(batch) % 2)
    memory = quick_jit(lambda keys, values: AttentionCache.of(keys, values, dtype))(keys, values)
    return queries, memory, first[:, None] + np.arange(time)


def check(queries, memory, positions, key_positions, config, sinks=None):
    assert triton_flash.supports(queries, memory, config)

    @quick_jit
    def attended(queries, memory, positions, key_positions, sinks):
        """What the kernel computes, what it stores in 8 bits and what that should be, and what is
        exact."""
        options = {"config": config, "key_positions": key_positions, "sinks": sinks}
        inputs = queries, memory, positions
        found = triton_flash.flash_attention(*inputs, **options).array
        layouts = (Int8Layout(),)
        stored = triton_flash.flash_attention(*inputs, **options, layouts=layouts)
        pairs = []
        if stored.layouts:
            [rounded] = stored.stored
            rows = found.astype(jnp.float32).reshape(len(rounded.scale), -1)
            pairs = [rounded.dequantized(), int8.quantize_rows(rows).dequantized()]
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), (queries, memory))
        kv = KV(exact[1], key_positions)
        return found, pairs, attend(exact[0], kv, positions, config=config, sinks=sinks)

    found, pairs, expected = attended(queries, memory, positions, key_positions, sinks)
    if pairs:
        # Rounded before it is put into 16 bits: halves of a step may fall to either side.
        assert nmse(*pairs) <= 2e-4
    assert found.dtype == jnp.bfloat16
    assert nmse(found, expected) <= 2e-5


@pytest.mark.parametrize("time", [1, 15, 70])
@pytest.mark.parametrize(
    "choices",
    [{}, {"softcap": 2.0, "scale": 0.3}, {"window": 130}, {"sinks": True}],
    ids=lambda choices: "-".join(choices) or "plain",
)
def test_kernels_attend(time, choices):
    rng = fresh_rng()
    config = AttentionConfig(KV_HEADS * GROUP, KV_HEADS, 24, 40, **choices)
    sinks = jnp.asarray(rng.normal(size=6), jnp.float32) if "sinks" in choices else None
    check(*inputs(rng, 2, time, 24, 40), None, config, sinks)


@pytest.mark.parametrize("time", [1, 70])
@pytest.mark.parametrize("widths", [(32, 32), (24, 40), (18, 33)])
def test_keys_of_8_bits(widths, time):
    config = AttentionConfig(KV_HEADS * GROUP, KV_HEADS, *widths)
    check(*inputs(fresh_rng(), 1, time, *widths, "int8"), None, config)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bytes_of_pairs(dtype):
    pairs = jnp.arange(-(2**15), 2**15).astype(jnp.int16)
    found = triton_softmax.unpack_int8(pairs, jnp.dtype(dtype))
    expected = np.asarray(pairs).view(np.int8).reshape(-1, 2)
    assert all(x.dtype == dtype for x in found)
    np.testing.assert_array_equal(np.stack(found, axis=1).astype(np.float32), expected)


@pytest.mark.parametrize("time", [1, 70])
def test_keys_in_any_order(time):
    """Places that hold no key, and a row of positions for each sequence."""
    rng = fresh_rng()
    queries, memory, positions = inputs(rng, 2, time, 16, 16)
    key_positions = np.stack([rng.permutation(KEYS) for _ in range(2)])
    key_positions[rng.random(key_positions.shape) < 0.2] = -1
    config = AttentionConfig(KV_HEADS * GROUP, KV_HEADS, 16, 16, window=300)
    check(queries, memory, positions, jnp.asarray(key_positions), config)


def test_padding_is_no_number_that_spreads():
    queries, memory, positions = inputs(fresh_rng(), 1, 70, 16, 16)
    positions = np.where(np.arange(70) < 50, positions, -1)
    config = AttentionConfig(KV_HEADS * GROUP, KV_HEADS, 16, 16)
    attended = quick_jit(lambda *inputs: triton_flash.flash_attention(*inputs, config=config).array)
    found = np.asarray(attended(queries, memory, positions), np.float32)
    assert np.isfinite(found).all()
    expected = attended(queries[:, :50], memory, positions[:, :50])
    assert nmse(found[:, :50], expected) <= 1e-10


@pytest.mark.parametrize("time", [1, 70])
def test_sequences_in_any_slots(time):
    queries, memory, positions = inputs(fresh_rng(), 3, time, 16, 16)
    config, slots = AttentionConfig(KV_HEADS * GROUP, KV_HEADS, 16, 16), jnp.asarray([2, 0])
    few = queries[:2], memory, positions[:2]
    options = {"config": config, "pages": slots[:, None]}
    found = quick_jit(lambda *few: triton_flash.flash_attention(*few, **options).array)(*few)
    queries, memory = jax.tree.map(lambda x: x.astype(jnp.float32), few[:2])

    def expected(slots):
        return attend(queries, KV(memory, pages=slots[:, None]), few[2], config=config)

    assert nmse(found, expected(slots)) <= 2e-5
    assert nmse(found, expected(slots[::-1])) > 1e-2
