"""Attention through the cache: however a sequence is cut into calls, the logits are the same."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import nmse
from tiny import fresh_rng

from jaxsplit.cache.layers import AttentionCache, init_cache
from jaxsplit.models import (
    AttentionConfig,
    BlockConfig,
    BlockIndexerConfig,
    BlockSparseConfig,
    CompressedAttentionConfig,
    Decoder,
    GateConfig,
    IndexerConfig,
    LatentAttentionConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    PoolConfig,
    RopeConfig,
)
from jaxsplit.ops.attention import spec
from jaxsplit.ops.attention import xla as attention_ops
from jaxsplit.ops.attention.xla import attend

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT, LENGTH = 64, 40
ROPE = RopeConfig(8)


def attention(**choices) -> AttentionConfig:
    return AttentionConfig(4, 2, 8, 8, **({"rope": ROPE} | choices))


def latent(**choices) -> LatentAttentionConfig:
    """So narrow that 16 tokens or fewer are read absorbed, more with keys and values."""
    choices = {"q_lora_rank": 0, "rope": ROPE} | choices
    return LatentAttentionConfig(4, 8, 8, 16, scale=16**-0.5, **choices)


LAYER_NORM = NormConfig("layer", bias=True)
INDEXER = IndexerConfig(3, 8, 5, ROPE, LAYER_NORM)
POOLED = IndexerConfig(3, 8, 8, None, LAYER_NORM, pool=PoolConfig(4, 8))
OF_ENTRIES = IndexerConfig(3, 8, 3, ROPE, NormConfig(), pool=PoolConfig(2, 8, overlap=True))
BLOCKS = BlockIndexerConfig(8, 4, 3, 1, ROPE, NormConfig())
COMPRESSED = {
    **{"heads": 4, "head_dim": 16, "q_lora_rank": 12, "groups": 2, "out_rank": 6},
    **{"window": 5, "rope": ROPE, "norm": NormConfig()},
}
MIXERS = {
    "all": [attention()],
    "window": [attention(window=5), attention()],
    "window of the context": [attention(window=CONTEXT), attention(window=CONTEXT + 1)],
    "chunks": [attention(window=6, chunked=True), attention(rope=None)],
    "sinks, soft-cap, biases": [
        attention(window=7, sinks=True, softcap=2.0),
        attention(rope=None, alibi=8.0),
    ],
    "norms, gate, temperature": [
        attention(query_norm=NormConfig(), key_norm=NormConfig("layer"), norm_over="each"),
        attention(
            gate=GateConfig(),
            attn_temperature=(0.3, 4, 1),
            value_is_key=True,
            value_norm=NormConfig(),
        ),
    ],
    "lent": [
        attention(window=5, kv_donor="local"),
        attention(kv_donor="global"),
        attention(window=5, kv_source="local"),
        attention(kv_source="global"),
    ],
    "latent": [latent(), latent(k_up_transposed=True)],
    "latent, window, gate": [latent(window=5, sinks=True, gate=GateConfig(per_head=True))],
    "selected keys": [
        latent(q_lora_rank=12, sparse=True, indexer=INDEXER),
        latent(q_lora_rank=12, sparse=True),
        latent(rope=None, unrotated_dim=8, q_lora_rank=12, sparse=True, indexer=POOLED),
    ],
    "selected blocks": [BlockSparseConfig(attention(), BLOCKS)],
    "compressed": [
        CompressedAttentionConfig(pool=PoolConfig(3, 16), **COMPRESSED),
        CompressedAttentionConfig(
            pool=PoolConfig(2, 16, overlap=True), indexer=OF_ENTRIES, **COMPRESSED
        ),
    ],
}


call = nnx.jit(lambda model, *arguments: model(*arguments))


def model_with(mixers) -> Decoder:
    blocks = tuple(BlockConfig(mixer, MLPConfig(24)) for mixer in mixers)
    config = ModelConfig("test", vocab=50, embed=32, context=CONTEXT, blocks=blocks)
    return Decoder(config, rngs=nnx.Rngs(int(fresh_rng().integers(2**31))))


@pytest.mark.parametrize("cuts", [(1,) * LENGTH, (17, 1, 1, 9, 12)], ids=len)
@pytest.mark.parametrize("name", MIXERS)
def test_calls_of_any_length_give_the_same_logits(name, cuts):
    model, slots = model_with(MIXERS[name]), jnp.asarray([2, 0])
    tokens = fresh_rng().integers(0, 50, (2, LENGTH))
    whole, _ = call(model, tokens)
    cache = init_cache(model.config.cache(CONTEXT, jnp.float32), slots=3)
    # Other numbers were in these slots before.
    cache = jax.tree.map(lambda x: x + 7, cache)
    found = []
    for start, stop in itertools.pairwise((0, *itertools.accumulate(cuts))):
        # The second sequence is shorter: its last tokens are padding.
        positions = np.stack([np.arange(start, stop), np.arange(start, stop)])
        positions[1] = np.where(positions[1] < LENGTH - 5, positions[1], -1)
        logits, cache = call(model, tokens[:, start:stop], positions, cache, slots)
        found.append(np.asarray(logits))
    found = np.concatenate(found, axis=1)
    assert nmse(found[0], np.asarray(whole)[0]) <= 1e-10
    assert nmse(found[1, : LENGTH - 5], np.asarray(whole)[1, : LENGTH - 5]) <= 1e-10


@pytest.mark.parametrize("name", MIXERS)
def test_queries_that_are_read_in_parts_give_the_same_logits(monkeypatch, name):
    """13 of them at a time, of 40; the cache beside the new tokens makes it less."""
    model, tokens = model_with(MIXERS[name]), fresh_rng().integers(0, 50, (2, LENGTH))
    cache = init_cache(model.config.cache(CONTEXT, jnp.float32), slots=2)
    positions = np.broadcast_to(np.arange(LENGTH), tokens.shape)

    def run() -> list[np.ndarray]:
        fresh = nnx.jit(lambda *arguments: model(*arguments)[0])
        return [np.asarray(fresh(tokens)), np.asarray(fresh(tokens, positions, cache))]

    expected = run()
    monkeypatch.setattr(attention_ops, "MAX_SCORES", 13 * LENGTH)
    jax.clear_caches()
    for found, whole in zip(run(), expected, strict=True):
        assert nmse(found, whole) <= 1e-12


def test_a_long_context_takes_no_more_memory():
    """Of temporaries, while a prompt is read: a multiple of `MAX_SCORES`, not of the context."""
    config = attention(rope=None)

    def temporaries(context: int) -> int:
        keys, positions = jnp.zeros((1, 2, context, 8)), jnp.arange(512)[None]
        queries, places = jnp.zeros((1, 512, 2, 2, 8)), jnp.arange(context)[None]
        program = jax.jit(attend, static_argnames="config").lower(
            queries, AttentionCache(keys, keys), positions, config=config, key_positions=places
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2**15) <= 1.5 * temporaries(2**12) + 2**23


def test_a_window_is_all_that_is_kept():
    window, every = (attention(window=w).cache(CONTEXT, jnp.float32) for w in (5, None))
    assert window.keys.shape == window.values.shape == (2, 5, 8)
    assert every.keys.shape == (2, CONTEXT, 8)
    assert attention(window=500).cache(CONTEXT, jnp.float32).keys.shape == (2, CONTEXT, 8)
    assert attention(kv_source="global").cache(CONTEXT, jnp.float32) is None
    kept, _ = latent().cache(CONTEXT, jnp.float32)
    assert (kept.keys.shape, kept.values) == ((1, CONTEXT, 24), None)


@pytest.mark.parametrize("name", ["window", "latent"])
def test_a_cache_of_8_bits_loses_little(name):
    model, tokens = model_with(MIXERS[name]), fresh_rng().integers(0, 50, (1, LENGTH))
    whole, _ = call(model, tokens)
    cache = init_cache(model.config.cache(CONTEXT, jnp.int8), slots=1)
    found = []
    for start, stop in ((0, 30), (30, 39), (39, 40)):
        positions = jnp.arange(start, stop)[None]
        logits, cache = call(model, tokens[:, start:stop], positions, cache)
        found.append(logits)
    assert 1e-9 < nmse(np.concatenate(found, axis=1), whole) < 1e-3
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {
        np.dtype("int8"),
        np.dtype("float32"),
    }


def test_kernels_refuse_what_they_do_not_know():
    """Each field of the config is sorted by what it changes; a new one is refused until it is."""
    sorted_ = (*spec.SHAPE_FIELDS, *spec.HEAD_FIELDS, *spec.SCORE_FIELDS)
    assert sorted(sorted_) == sorted(f.name for f in dataclasses.fields(AttentionConfig))
    plain = attention()
    assert plain.uses_only(*spec.SHAPE_FIELDS, "rope")
    assert not plain.uses_only(*spec.SHAPE_FIELDS)
    assert not dataclasses.replace(plain, softcap=1.0).uses_only(*spec.SHAPE_FIELDS, "rope")
