"""Keys and values in fewer bits: what they take, what they lose, and that meshes agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SHAPES, continuation, nmse
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache, Batch, init_cache
from jaxsplit.models import AttentionConfig

HEAD_DIM = 32

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def tokens():
    return fresh_rng().integers(0, 160, 37).tolist()


@pytest.fixture(scope="module")
def path(recipe_gguf):
    return recipe_gguf(SHAPES["9-3"])


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float16"])
def test_a_smaller_cache_loses_little(load, path, tokens, dtype):
    exact = load(path, split_mode="none").logits(tokens)
    small = load(path, split_mode="none", cache_dtype=dtype)
    assert 1e-9 < nmse(small.logits(tokens), exact) < 1e-3
    # A token at a time reads the same keys and values from the cache.
    again = small.logits(tokens[:12], one_by_one=True)
    assert 1e-9 < nmse(again, exact[:12]) < 1e-3


@pytest.mark.parametrize(
    ("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1 + 4 / HEAD_DIM)]
)
def test_bytes_of_a_cache(load, path, dtype, width):
    lm = load(path, split_mode="none", cache_dtype=dtype)
    numbers = 2 * lm.config.layers * lm.config.attention.kv_heads * lm.engine.context * HEAD_DIM
    assert lm.cache_bytes == numbers * width
    split = load(path, split_mode="graph", devices=3, cache_dtype=dtype)
    assert split.cache_bytes == numbers * width / 3


@pytest.mark.parametrize(
    ("mode", "mesh"),
    [
        *(("graph", "tensor:2"), ("graph", "tensor:8"), ("row", "tensor:3"), ("layer", "stage:3")),
        ("graph", "data:2,stage:2,tensor:2"),
    ],
)
def test_every_mode_has_the_same_8_bit_cache(load, path, tokens, mode, mesh):
    """As far as partial sums, which differ in their last bits, are rounded to the same 8 bits.

    Of some 20 000 numbers a few are not. One that is off by 1 of 127 parts counts as much as the
    rounding of a dozen others, so that their sum is far below what the 8 bits lose.
    """
    exact = load(path, split_mode="none").logits(tokens)
    one = load(path, split_mode="none", cache_dtype="int8")
    expected = one.logits(tokens)
    split = load(path, split_mode=mode, mesh=mesh, cache_dtype="int8")
    tolerance = 0.05 * nmse(expected, exact)
    assert nmse(split.logits(tokens), expected) <= tolerance
    one_by_one = split.logits(tokens[:7], one_by_one=True)
    assert nmse(one_by_one, expected[:7]) <= tolerance
    if mode == "layer":  # nothing is summed in another order
        assert np.array_equal(split.logits(tokens), expected)
        assert continuation(split.engine, tokens) == continuation(one.engine, tokens)


# One layer's cache

SLOTS, KV_HEADS, CONTEXT = 3, 2, 10


def written(keys, values, slots, positions, dtype):
    layer = AttentionConfig(KV_HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM).cache(CONTEXT, dtype)
    (cache,) = init_cache([layer], SLOTS)
    batch = Batch(jnp.asarray(positions), jnp.asarray(slots))
    return cache.write(AttentionCache.of(keys, values, dtype), batch)


def as_floats(codes, scale):
    codes = np.float64(codes)
    return codes if scale is None else codes * np.float64(scale)[..., None]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8], ids=str)
def test_tokens_are_written_where_they_belong(dtype):
    rng = fresh_rng()
    keys, values = rng.normal(size=(2, 2, 4, KV_HEADS, HEAD_DIM)).astype(np.float32)
    keys[0, 1, 1], values[0, 2] = 0, 1e-20  # no scale, and a small one
    positions = [[3, 4, 5, -1], [0, 9, -1, -1]]
    cache = written(keys, values, [2, 0], positions, dtype)
    for stored, scale, new in (
        (cache.keys, cache.key_scale, keys),
        (cache.values, cache.value_scale, values),
    ):
        assert stored.dtype == dtype
        assert (scale is None) == (dtype != jnp.int8)
        found = as_floats(stored, scale)
        expected = np.zeros((SLOTS, KV_HEADS, CONTEXT, HEAD_DIM))
        for row, slot in enumerate((2, 0)):
            for time, position in enumerate(positions[row]):
                if position >= 0:
                    expected[slot, :, position] = new[row, time]
        # Half a step of 127, and the rounding of float32.
        step = np.abs(expected).max(axis=-1, keepdims=True) / 127 if scale is not None else 0
        assert (np.abs(found - expected) <= step * 0.5001).all()
    read = cache.read(jnp.asarray([[2]]))
    for one, all_slots in zip(jax.tree.leaves(read), jax.tree.leaves(cache), strict=True):
        assert np.array_equal(one[0], all_slots[2])
    assert cache.read(None) is cache


def test_the_largest_number_of_a_head_keeps_its_value():
    keys = fresh_rng().normal(size=(1, 1, KV_HEADS, HEAD_DIM)).astype(np.float32) * 1e4
    cache = written(keys, keys, [1], [[0]], jnp.int8)
    found = as_floats(cache.keys, cache.key_scale)[1, :, 0]
    largest = np.abs(keys[0, 0]).argmax(axis=-1)[:, None]
    assert np.allclose(
        np.take_along_axis(found, largest, -1), np.take_along_axis(keys[0, 0], largest, -1), 1e-6
    )
    assert np.abs(cache.keys).max() == 127
