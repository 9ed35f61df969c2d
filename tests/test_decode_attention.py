"""The decode attention kernel, interpreted, against its XLA implementation."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import nmse, quick_jit
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.models import AttentionConfig, NormConfig, RopeConfig
from jaxsplit.models.attention import Attention
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.attention import triton_decode, xla

pytestmark = pytest.mark.usefixtures("quick_compilation", "interpreter")

HEADS, KV_HEADS, WIDTH = 6, 2, 32
CHOICES = {
    "plain": {"rope": RopeConfig(32)},
    "interleaved, in part": {"rope": RopeConfig(16, interleaved=True), "softcap": 3.0},
    "window": {"rope": RopeConfig(8), "window": 40},
    "norms, sinks": {
        "rope": RopeConfig(32),
        "query_norm": NormConfig(),
        "key_norm": NormConfig(scale=False),
        "sinks": True,
    },
}
BIASED = {"window": "qkv", "norms, sinks": "qv"}
"""Projections that have biases."""


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("layouts", [(), (Int8Layout(),)], ids=["array", "int8"])
@pytest.mark.parametrize(("resident", "splits"), [(256, 4), (7, 2)], ids=["few", "many"])
def test_a_token_attends_to_earlier_tokens_and_itself(
    monkeypatch, name, cache_dtype, layouts, resident, splits
):
    monkeypatch.setattr(triton_decode, "_RESIDENT_PROGRAMS", resident)
    monkeypatch.setattr(triton_decode, "_MAX_PROGRAMS", 4 * KV_HEADS * splits)
    rng, choice = fresh_rng(), CHOICES[name]
    length = choice.get("window", 700)
    config = AttentionConfig(HEADS, KV_HEADS, WIDTH, WIDTH, **choice)
    module = Attention(config, 64, rngs=nnx.Rngs(0))
    if module.query_norm is not None:
        module.query_norm.scale.set_value(jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32))
    if config.sinks:
        module.sinks.set_value(jnp.asarray(rng.normal(size=HEADS), jnp.float32))

    def normal(*shape):
        return rng.normal(size=shape).astype(jnp.bfloat16)

    # The first token of a sequence, tokens with few and with many tokens before them, and padding.
    positions = np.array([[0], [5], [length - 1 if "window" not in choice else 3 * length], [-1]])
    batch = Batch(jnp.asarray(positions), jnp.asarray([2, 0, 4, 1]))
    query, key, value = (normal(2, 4, 1, WIDTH * n) for n in (HEADS, KV_HEADS, KV_HEADS))
    keys_values = (normal(5, length, KV_HEADS, WIDTH) for _ in range(2))
    cache = quick_jit(partial(AttentionCache.of, dtype=cache_dtype))(*keys_values)
    assert triton_decode.supports(config, batch, cache, query[0])
    options = {"config": config, "params": module.params}
    biases = [
        jnp.asarray(rng.normal(size=x.shape[-1]), jnp.float32)
        if which in BIASED.get(name, "")
        else None
        for which, x in zip("qkv", (query, key, value), strict=True)
    ]

    @quick_jit
    def kernel(query, key, value, cache):
        projections, more = (query, key, value), {"dtype": jnp.bfloat16, "layouts": layouts}
        rows, found = triton_decode.decode_attention(
            *projections, batch, cache, **options, biases=biases, **more
        )
        return rows.stored[0].dequantized() if layouts else rows.array, found

    @quick_jit
    def reference(query, key, value, cache):
        exact = [
            x.astype(jnp.float32).sum(axis=0) + (0 if bias is None else bias)
            for x, bias in zip((query, key, value), biases, strict=True)
        ]
        queries, kv, expected = xla.rope_cache_update(*exact, batch, cache, **options)
        y = xla.attend(
            queries.reshape(4, 1, KV_HEADS, -1, WIDTH),
            kv,
            batch.positions,
            config=config,
            sinks=module.params.sinks,
        )
        return y, expected

    rows, found = kernel(query, key, value, cache)
    y, expected = reference(query, key, value, cache)
    rows, y = np.float32(rows).reshape(y.shape), np.asarray(y)
    for row in range(3):
        # Quantizing normally distributed values to int8 alone costs 1e-5.
        assert nmse(rows[row], y[row]) <= 1e-4, row
    for old, new, actual in zip(
        *(x.__dict__.values() for x in (cache, expected, found)), strict=True
    ):
        if old is not None:
            assert actual.dtype == old.dtype
            assert nmse(np.float32(actual), np.float32(new)) <= 1e-5
            changed = (np.asarray(old) != np.asarray(actual)).any(axis=tuple(range(3, old.ndim)))
            assert changed.any(axis=1).sum() <= 3  # an index for each token that is not padding
