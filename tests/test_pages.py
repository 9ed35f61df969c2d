"""Sequences whose keys and values are in pages: each op reads and writes what it does without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import quick_jit
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.models.attention import Attention
from jaxsplit.ops.attention import triton_decode, triton_flash, triton_rope_cache_update, xla
from jaxsplit.ops.attention.rope import RopeConfig
from jaxsplit.ops.attention.spec import AttentionConfig

pytestmark = pytest.mark.usefixtures("quick_compilation", "interpreter")

HEADS, KV_HEADS, WIDTH, LENGTH, SLOTS = 4, 2, 32, 640, 5
CONFIG = AttentionConfig(HEADS, KV_HEADS, WIDTH, WIDTH, rope=RopeConfig(WIDTH))
SEQUENCES = np.array([2, 0, 4])


class Pages:
    """A cache of a page for each slot, cut into shorter pages in a random order."""

    def __init__(self, rng, length):
        self.count, self.length = LENGTH // length, length
        self.order = rng.permutation(SLOTS * self.count)

    @property
    def table(self):
        """Pages of `SEQUENCES`: int32 `[sequences, pages]`."""
        return jnp.asarray(self.order.reshape(SLOTS, self.count)[SEQUENCES], jnp.int32)

    def cut(self, cache):
        def of(x):
            x = np.asarray(x).reshape(*x.shape[:2], self.count, self.length, *x.shape[3:])
            x = np.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])
            shuffled = np.empty_like(x)
            shuffled[self.order] = x
            return jnp.asarray(shuffled)

        return jax.tree.map(of, cache)

    def joined(self, cache):
        def of(x):
            x = np.asarray(x)[self.order]
            x = np.moveaxis(x.reshape(SLOTS, self.count, *x.shape[1:]), 1, 2)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        return jax.tree.map(of, cache)


@pytest.fixture(params=[32, 128, 20], ids=lambda n: f"pages of {n}")
def pages(request):
    return Pages(fresh_rng(), request.param)


def normal(*shape):
    return jnp.asarray(fresh_rng().normal(size=shape), jnp.bfloat16)


def cache_of(dtype):
    return AttentionCache.of(*(normal(SLOTS, LENGTH, KV_HEADS, WIDTH) for _ in range(2)), dtype)


def batches(positions, pages):
    """With slots, and with pages."""
    positions = jnp.asarray(positions)
    return Batch(positions, jnp.asarray(SEQUENCES)), Batch(positions, None, pages.table)


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_token(pages, dtype):
    cache = cache_of(dtype)
    params = Attention(CONFIG, 64, rngs=nnx.Rngs(0)).params
    projections = [normal(1, 3, 1, WIDTH * n) for n in (HEADS, KV_HEADS, KV_HEADS)]

    @quick_jit
    def run(batch, cache):
        options = {"config": CONFIG, "params": params, "dtype": jnp.bfloat16}
        y, cache = triton_decode.decode_attention(*projections, batch, cache, **options)
        return y.array, cache

    by_slot, by_page = batches([[0], [5 * 64], [LENGTH - 1]], pages)
    expected, expected_cache = run(by_slot, cache)
    found, found_cache = run(by_page, pages.cut(cache))
    assert_same(found, expected)
    assert_same(pages.joined(found_cache), expected_cache)


@pytest.mark.parametrize("time", [1, 70])
def test_some_tokens(pages, time):
    cache, positions = cache_of("bfloat16"), np.array([[3], [300], [LENGTH - 70]]) + np.arange(time)
    queries = normal(3, time, KV_HEADS, HEADS // KV_HEADS, WIDTH)

    @quick_jit
    def flash(cache, table):
        options = {"config": CONFIG, "pages": table}
        return triton_flash.flash_attention(queries, cache, jnp.asarray(positions), **options).array

    expected = flash(cache, jnp.asarray(SEQUENCES)[:, None])
    assert_same(flash(pages.cut(cache), pages.table), expected)


@pytest.mark.parametrize("update", [triton_rope_cache_update, xla], ids=["kernel", "xla"])
@pytest.mark.parametrize("time", [1, 70])
def test_updates(pages, time, update):
    cache, positions = cache_of("int8"), np.array([[3], [300], [LENGTH - 70]]) + np.arange(time)
    positions[0, -1:] = -1 if time > 1 else positions[0]
    params = Attention(CONFIG, 64, rngs=nnx.Rngs(0)).params
    projections = [normal(3, time, WIDTH * n) for n in (HEADS, KV_HEADS, KV_HEADS)]

    def run(batch, cache):
        options = {"config": CONFIG, "params": params}
        queries, *rest = update.rope_cache_update(*projections, batch, cache, **options)
        kept = rest[0].read(batch.positions) if update is xla else None  # what they attend to
        return queries, kept, rest[-1]

    by_slot, by_page = batches(positions, pages)
    *expected, expected_cache = run(by_slot, cache)
    *found, found_cache = run(by_page, pages.cut(cache))
    assert_same(found, expected)
    assert_same(pages.joined(found_cache), expected_cache)
