"""The rope_cache_update kernels, interpreted or on the CPU, against its XLA implementation."""

import cuda_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import nmse, quick_jit
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.models import AttentionConfig, NormConfig, RopeConfig
from jaxsplit.models.attention import Attention
from jaxsplit.ops.attention import cuda_rope_cache_update, triton_rope_cache_update, xla

pytestmark = pytest.mark.usefixtures("quick_compilation", "interpreter")

HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, LENGTH = 12, 6, 24, 20, 50
CHOICES = {
    "plain": {"rope": RopeConfig(24)},
    "interleaved, in part": {"rope": RopeConfig(16, interleaved=True)},
    "in part": {"rope": RopeConfig(8), "window": LENGTH},
    "norms": {
        "rope": RopeConfig(24),
        "query_norm": NormConfig(),
        "key_norm": NormConfig(scale=False),
    },
}


def triton(heads_per_program):
    """Heads and caches by the kernel in Triton with some heads per program."""

    def run(monkeypatch, arrays, batch, cache, **options):
        if heads_per_program > 1:
            monkeypatch.setattr(triton_rope_cache_update, "_FEW_TOKENS", 0)
            monkeypatch.setattr(triton_rope_cache_update, "_MAX_ELEMENTS", 32 * heads_per_program)

        @quick_jit
        def kernel(arrays, cache):
            return triton_rope_cache_update.rope_cache_update(*arrays, batch, cache, **options)

        return kernel(arrays, cache)

    return run


def cuda(_, arrays, batch, cache, **options):
    queries, *leaves = cuda_host.run(
        cuda_rope_cache_update.launch_of(*arrays, batch, cache, **options)
    )
    leaves = [jnp.asarray(x) for x in leaves]
    found = jax.tree.unflatten(jax.tree.structure(cache), leaves)
    return jnp.asarray(queries).reshape(3, -1, HEADS, WIDTH), found


BACKENDS = {"a head per program": triton(1), "4 heads per program": triton(4), "CUDA C++": cuda}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time", [1, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CHOICES)
def test_heads_are_rotated_and_cached(name, dtype, time, backend, monkeypatch):
    if backend == "CUDA C++" and cuda_host.COMPILER is None:
        pytest.skip("needs g++")
    rng, ring = fresh_rng(), "window" in CHOICES[name]
    config = AttentionConfig(HEADS, KV_HEADS, WIDTH, VALUE_WIDTH, **CHOICES[name])
    module = Attention(config, 32, rngs=nnx.Rngs(0))
    for norm in (module.query_norm, module.key_norm):
        if norm is not None and norm.scale is not None:
            norm.scale.set_value(jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32))

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

    # One sequence wraps around a ring buffer, one is padding, another ends with padding.
    positions = np.array([[7], [LENGTH + 3 if ring else 40], [-1]]) + np.arange(time)
    positions[2] = -1
    positions[0, 3:] = -1
    slots = None if time == 1 else jnp.asarray([2, 0, 4])
    batch = Batch(jnp.asarray(positions), slots)
    query, key = (normal(3, time, WIDTH * n) for n in (HEADS, KV_HEADS))
    value = normal(3, time, VALUE_WIDTH * KV_HEADS)
    cache = AttentionCache.of(
        *(normal(5, LENGTH, KV_HEADS, width) for width in (WIDTH, VALUE_WIDTH)), dtype
    )
    if ring and time > 1:
        assert not triton_rope_cache_update.supports(config, batch, cache, jnp.bfloat16)
        return
    assert triton_rope_cache_update.supports(config, batch, cache, jnp.bfloat16)
    options = {"config": config, "params": module.params}
    arrays = query, key, value
    queries, found = BACKENDS[backend](monkeypatch, arrays, batch, cache, **options)
    projections = [x.astype(jnp.float32) for x in (query, key, value)]
    expected, kv, _ = xla.rope_cache_update(*projections, batch, None, **options)
    assert queries.dtype == jnp.bfloat16
    assert nmse(queries, expected) <= 1e-5
    sequence, token = np.nonzero(positions >= 0)
    rows = np.asarray(batch.rows)[sequence]
    index = positions[sequence, token] % LENGTH
    for part in ("key", "value"):
        before, after = (getattr(x, part + "s") for x in (cache, found))
        scale = getattr(found, part + "_scale")
        cached = after[rows, :, index].astype(jnp.float32)
        if scale is not None:
            cached *= scale[rows, :, index][..., None]
        exact = getattr(kv.memory, part + "s")[sequence, :, token]
        assert nmse(cached, exact) <= (1e-4 if dtype == "int8" else 1e-5)
        untouched = np.array(jnp.abs(after.astype(jnp.float32) - before.astype(jnp.float32)))
        untouched[rows, :, index] = 0
        assert not untouched.any()
