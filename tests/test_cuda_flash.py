"""FlashAttention in CUDA C++, on the CPU, against plain attention in float32."""

import itertools

import cuda_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import nmse
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache
from jaxsplit.models import AttentionConfig
from jaxsplit.ops.activations.int8 import Int8BlockLayout, Int8Layout
from jaxsplit.ops.activations.layout import Readers
from jaxsplit.ops.activations.swizzled import SwizzledLayout, SwizzledRows
from jaxsplit.ops.attention import cuda_flash
from jaxsplit.ops.attention.cuda_flash import Tiling
from jaxsplit.ops.attention.kv import KV
from jaxsplit.ops.attention.xla import attend

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++"),
]

HEADS, GROUP, KEYS = 2, 3, 160
TOLERANCE = {"bfloat16": 2e-5, "float16": 1e-6}


def inputs(rng, time, widths, dtype, cache_dtype):
    """Queries of three sequences, a memory in pages of 32 in any order, and positions: the second
    sequence begins later, the third is shorter and ends with padding."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    head_dim, value_dim = widths
    queries = normal(3, time, HEADS, GROUP, head_dim)
    memory = AttentionCache.of(
        *(normal(3 * KEYS // 32, 32, HEADS, width) for width in (head_dim, value_dim)), cache_dtype
    )
    pages = jnp.asarray(rng.permutation(3 * KEYS // 32).reshape(3, -1), jnp.int32)
    positions = np.array([[0], [KEYS - time], [5]]) + np.arange(time)
    positions[2, time - time // 3 :] = -1
    return queries, memory, jnp.asarray(positions, jnp.int32), pages


def run(queries, memory, positions, capability, sinks=None, **options):
    launch = cuda_flash.launch_of(queries, memory, positions, capability, sinks=sinks, **options)
    results = cuda_host.run(launch)
    if len(results) > 1:
        splits = [jnp.asarray(x) for x in results]
        results = cuda_host.run(cuda_flash.combine_launch_of(splits, sinks, queries.dtype))
    return results[0]


def check(queries, memory, positions, *, capability=9.0, **options):
    found = run(queries, memory, positions, capability, **options)
    exact, kv = jax.tree.map(lambda x: x.astype(jnp.float32), (queries, memory))
    if kv.key_scale is not None:
        kv = AttentionCache(
            memory.keys * memory.key_scale[..., None], memory.values * memory.value_scale[..., None]
        )
    options.pop("tiling", None)
    pages, key_positions = (options.pop(name, None) for name in ("pages", "key_positions"))
    kv = KV(kv, key_positions, pages)
    expected = np.asarray(attend(exact, kv, positions, **options)).reshape(found.shape)
    exists = np.asarray(positions) >= 0
    assert np.isfinite(found.astype(np.float32)).all()
    assert nmse(found[exists], expected[exists]) <= TOLERANCE[queries.dtype.name]
    return found


@pytest.mark.parametrize(
    ("dtype", "cache_dtype", "capability"),
    [
        ("bfloat16", "bfloat16", 9.0),
        ("bfloat16", "int8", 8.0),
        ("float16", "int8", 7.5),
        ("float16", "float16", 7.5),
        ("bfloat16", "float16", 8.0),
    ],
)
@pytest.mark.parametrize(
    ("time", "tiling"),
    [(1, None), (15, Tiling(3, 1, 32, 2)), (43, Tiling(2, 2, 32, 1))],
    ids=["one", "splits", "tiles"],
)
def test_queries_attend_to_earlier_keys(dtype, cache_dtype, capability, time, tiling):
    config = AttentionConfig(HEADS * GROUP, HEADS, 40, 24)
    *given, pages = inputs(fresh_rng(), time, (40, 24), dtype, cache_dtype)
    check(*given, capability=capability, config=config, pages=pages, tiling=tiling)


@pytest.mark.parametrize(
    "tiling", [Tiling(1, 1, 64, 3), Tiling(2, 2, 64, 1)], ids=["splits", "tiles"]
)
@pytest.mark.parametrize(
    "choices",
    [{"softcap": 2.0, "scale": 0.3}, {"sinks": True}, {"window": 50}],
    ids=lambda choices: next(iter(choices)),
)
def test_scores_have_caps_sinks_and_windows(choices, tiling):
    rng = fresh_rng()
    config = AttentionConfig(HEADS * GROUP, HEADS, 16, 16, **choices)
    sinks = jnp.asarray(rng.normal(size=HEADS * GROUP), jnp.float32) if config.sinks else None
    *given, pages = inputs(rng, 43, (16, 16), "bfloat16", "bfloat16")
    check(*given, config=config, sinks=sinks, pages=pages, tiling=tiling)


def test_rows_are_stored_in_the_layout_of_tensor_cores():
    config, layout = AttentionConfig(HEADS * GROUP, HEADS, 64, 32), SwizzledLayout(jnp.bfloat16)
    *given, pages = inputs(fresh_rng(), 43, (64, 32), "bfloat16", "bfloat16")
    options = {"config": config, "pages": pages, "tiling": Tiling(2, 2, 32, 1)}
    expected = run(*given, 9.0, **options)
    [stored] = cuda_host.run(
        cuda_flash.launch_of(*given, 9.0, **options, readers=Readers((layout,), xla=False))
    )
    found = layout.wrap([jnp.asarray(stored)], None).array()
    np.testing.assert_array_equal(found, np.float32(expected).reshape(found.shape))


@pytest.mark.parametrize(
    "layout", [SwizzledLayout(jnp.dtype("bfloat16")), Int8Layout(), Int8BlockLayout()], ids=repr
)
def test_splits_are_combined_in_the_layout_of_their_reader(layout):
    """As the same rows are stored by another kernel."""
    rng, dtype = fresh_rng(), jnp.dtype("bfloat16")
    sums, most, total = (
        jnp.asarray(rng.normal(size=(3, 2, 5, HEADS, GROUP, *width)), jnp.float32)
        for width in ((64,), (), ())
    )
    splits = sums, 3 * most, jnp.exp(total)
    [array] = cuda_host.run(cuda_flash.combine_launch_of(splits, None, dtype))
    readers = Readers((layout,), xla=False)
    launch = cuda_flash.combine_launch_of(splits, None, dtype, readers)
    stored = layout.wrap([jnp.asarray(x) for x in cuda_host.run(launch)], None)
    rows = stored.array() if isinstance(stored, SwizzledRows) else stored.dequantized()
    tolerance = 1e-6 if isinstance(stored, SwizzledRows) else 1e-4
    assert nmse(np.asarray(rows), np.float32(array).reshape(10, -1)) <= tolerance


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_keys_in_any_order(cache_dtype, each):
    """Of a single page, with places that hold no key."""
    rng = fresh_rng()
    config = AttentionConfig(HEADS * GROUP, HEADS, 16, 16, window=100)
    queries, memory, positions, _ = inputs(rng, 20, (16, 16), "bfloat16", cache_dtype)
    memory = jax.tree.map(
        lambda x: x.swapaxes(1, 2).reshape(3, KEYS, *x.shape[1:2], *x.shape[3:]).swapaxes(1, 2),
        memory,
    )
    positions = jnp.where(positions < 0, -1, jnp.minimum(positions + 40, KEYS - 1))  # all see some
    key_positions = np.stack([rng.permutation(KEYS) for _ in range(3 if each else 1)])
    key_positions[rng.random(key_positions.shape) < 0.2] = -1
    key_positions = jnp.asarray(key_positions, jnp.int32)
    check(queries, memory, positions, config=config, key_positions=key_positions)


@pytest.mark.parametrize(
    ("widths", "tiling"), [((256, 256), None), ((192, 128), Tiling(2, 1, 16, 2))]
)
def test_wide_heads(widths, tiling):
    config = AttentionConfig(HEADS * GROUP, HEADS, *widths)
    *given, pages = inputs(fresh_rng(), 24, widths, "bfloat16", "bfloat16")
    check(*given, capability=8.6, config=config, pages=pages, tiling=tiling)


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_what_has_not_been_written_is_not_read(cache_dtype):
    rng = fresh_rng()
    config = AttentionConfig(HEADS * GROUP, HEADS, 16, 16)
    queries, memory, positions, pages = inputs(rng, 15, (16, 16), "bfloat16", cache_dtype)
    options = {"config": config, "pages": pages}
    expected = check(queries, memory, positions, **options)
    # The third sequence ends within its first page.
    last = int(positions[2].max())
    spoilt = jax.tree.map(
        lambda x: x if x.dtype == jnp.int8 else x.at[pages[2, 0], :, last + 1 :].set(jnp.nan),
        memory,
    )
    found = run(queries, spoilt, positions, 9.0, **options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("capability", [7.5, 8.0, 8.6, 9.0, 12.0])
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_tilings_fit_the_shared_memory_of_each_gpu(capability, widths):
    for rows, converted in itertools.product((1, 16, 40, 64, 65, 4096), (False, True)):
        tiling = Tiling.of(rows, 4096, widths, 8, capability, converted=converted)
        assert tiling.shared_bytes(*widths) <= 1024 * (cuda_flash.shared_kib(capability) - 1)
        assert tiling.rows >= min(rows, 64)
        assert 1 <= tiling.splits <= 8
