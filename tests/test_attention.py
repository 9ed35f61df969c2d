"""Attention through the cache: however a sequence is cut into calls, the logits are the same."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import DATA, nmse, quick_jit, recipe
from tiny import fresh_rng

import jaxsplit
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
from jaxsplit.ops.attention.kv import KV
from jaxsplit.ops.attention.xla import attend, attend_gathered, attend_masked, gathers

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


@partial(quick_jit, static_argnums=0)
def _call(graph, state, *arguments):
    return nnx.merge(graph, state)(*arguments)


def call(model, *arguments):
    return _call(*nnx.split(model), *arguments)


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
        fresh = quick_jit(lambda *arguments: model(*arguments)[0])
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
            queries, KV(AttentionCache(keys, keys), places), positions, config=config
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(2**15) <= 1.5 * temporaries(2**12) + 2**23


@pytest.mark.parametrize("time", [1, 3])
def test_any_number_of_pages_may_be_filled(time):
    """The first pages of 23, in any order, the rest not finite; some sequences are shorter."""
    rng, config = fresh_rng(), attention(rope=None)
    queries = rng.normal(size=(2, time, 2, 2, 8)).astype(np.float32)
    keys, values = rng.normal(size=(2, 2, 2, 23 * 4, 8)).astype(np.float32)
    table = rng.permutation(46).reshape(2, 23)
    run = jax.jit(partial(attend, config=config))
    for filled in (1, 4, 5, 7, 8, 9, 24, 25, 91, 92):
        first = np.array([[filled - time], [max(0, filled // 2 - time)]])
        positions = first + np.arange(time)
        exists = np.arange(92) <= positions.max(axis=1, keepdims=True)

        def in_pages(x, exists=exists):
            found = np.full((46, 2, 4, 8), np.nan, np.float32)
            known = np.where(exists[:, None, :, None], x, np.nan)
            found[table] = np.moveaxis(known.reshape(2, 2, 23, 4, 8), 2, 1)
            return jnp.asarray(found)

        paged = KV(AttentionCache(in_pages(keys), in_pages(values)), pages=jnp.asarray(table))
        whole = KV(AttentionCache(jnp.asarray(keys), jnp.asarray(values)))
        real = positions >= 0
        found, expected = (np.asarray(run(queries, kv, positions))[real] for kv in (paged, whole))
        assert nmse(found, expected) <= 1e-12, filled


# --- Sparse attention: keys are gathered, or the others masked

SPARSE = ("selected keys", "selected blocks", "compressed")


def attention_to_selected(queries, keys, values, selected, sinks, scale) -> np.ndarray:
    """In float64, query by query: `[batch, time, kv_heads * group * value_dim]`."""
    batch, time, kv_heads, group, _ = queries.shape
    out = np.zeros((batch, time, kv_heads, group, values.shape[-1]))
    for b, t, h in itertools.product(range(batch), range(time), range(kv_heads)):
        index = selected[b, min(h, selected.shape[1] - 1), t]
        index = index[index >= 0]
        scores = queries[b, t, h] @ keys[b, h, index].T * scale
        weights = np.exp(scores) / (np.exp(scores).sum(-1) + np.exp(sinks[h]))[:, None]
        out[b, t, h] = weights @ values[b, h, index]
    return out.reshape(batch, time, -1)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("kv_heads", "selected_heads"), [(1, 1), (2, 1), (2, 2)])
def test_gathered_keys_give_what_masked_ones_give(
    monkeypatch, at_once, paged, kv_heads, selected_heads
):
    """Both forms, and a plain one. The last queries are padding; some keys are none."""
    rng, (batch, time, keys, n, width) = fresh_rng(), (2, 7, 24, 5, 8)
    queries = rng.standard_normal((batch, time, kv_heads, 3, width))
    memory = rng.standard_normal((batch, kv_heads, keys, width))
    values = rng.standard_normal((batch, kv_heads, keys, width)) if kv_heads > 1 else None
    positions = np.arange(17, 17 + time) + np.zeros((batch, 1), int)
    positions[1, 5:] = -1
    order = rng.permuted(np.tile(np.arange(17), (batch, selected_heads, time, 1)), axis=-1)
    selected = np.where(rng.random((batch, selected_heads, time, n)) < 0.2, -1, order[..., :n])
    selected[..., 0] = order[..., 0]
    selected[np.broadcast_to(positions[:, None, :, None] < 0, selected.shape)] = -1
    sinks = rng.standard_normal((kv_heads, 3))
    value_dim = width if kv_heads > 1 else 6
    config = AttentionConfig(kv_heads * 3, kv_heads, width, value_dim, scale=0.3)
    cache, pages = (
        AttentionCache(*(x if x is None else np.float32(x) for x in (memory, values))),
        None,
    )
    if paged:  # Pages of 8, in any order; what no sequence has is not finite.
        pages = rng.permutation(9)[: batch * 3].reshape(batch, 3)

        def in_pages(x: np.ndarray) -> np.ndarray:
            found = np.full((9, kv_heads, 8, width), np.nan, np.float32)
            found[pages] = np.moveaxis(x.reshape(batch, kv_heads, 3, 8, width), 2, 1)
            return found

        cache = jax.tree.map(in_pages, cache)
    monkeypatch.setattr(attention_ops, "MAX_GATHERED", at_once * batch * n * kv_heads * width * 2)
    options = {"config": config, "sinks": np.float32(sinks).reshape(-1)}
    kv = jax.tree.map(jnp.asarray, KV(cache, pages=pages, selected=selected))
    arrays = np.float32(queries), kv, jnp.asarray(positions)
    masked, found = (
        np.asarray(quick_jit(partial(run, **options))(*arrays))
        for run in (attend_masked, attend_gathered)
    )
    values = memory[..., :value_dim] if values is None else values
    expected = attention_to_selected(queries, memory, values, selected, sinks, 0.3)
    real = positions >= 0
    assert np.isfinite(found).all()
    assert nmse(found[real], masked[real]) <= 1e-12
    assert nmse(found[real], expected[real]) <= 1e-12


@pytest.mark.parametrize("name", SPARSE)
def test_prompts_gather_what_they_select(monkeypatch, name):
    """A whole prompt, and its parts after cached tokens, give in both forms the same logits."""
    model, tokens = model_with(MIXERS[name]), fresh_rng().integers(0, 50, (2, LENGTH))
    slots, gathered = jnp.asarray([2, 0]), []
    run = attention_ops.attend_gathered
    monkeypatch.setattr(
        attention_ops, "attend_gathered", lambda *a, **k: gathered.append(0) or run(*a, **k)
    )

    def logits() -> list[np.ndarray]:
        fresh = quick_jit(lambda *arguments: model(*arguments))
        cache = init_cache(model.config.cache(CONTEXT, jnp.float32), slots=3)
        found = [fresh(tokens)[0]]
        for start, stop in ((0, LENGTH // 2), (LENGTH // 2, LENGTH)):
            positions = np.tile(np.arange(start, stop), (2, 1))
            positions[1] = np.where(positions[1] < LENGTH - 5, positions[1], -1)
            part, cache = fresh(tokens[:, start:stop], positions, cache, slots)
            found += [part[:1], part[1:, : LENGTH - 5 - start]]
        return [np.asarray(part) for part in found]

    found = {}
    for cost in (1e9, -1e9):
        monkeypatch.setattr(attention_ops, "MOVE_COST", cost)
        jax.clear_caches()
        gathered.clear()
        found[cost] = logits()
        assert bool(gathered) == (cost < 0)
    for gathers_, masks in zip(found[-1e9], found[1e9], strict=True):
        assert nmse(gathers_, masks) <= 1e-12


@pytest.mark.parametrize(
    ("name", "devices"), [("glm5-next", 2), ("deepseek4", 3), ("minimax-m3", 3)]
)
def test_split_models_gather_what_they_select(monkeypatch, recipe_gguf, name, devices):
    monkeypatch.setattr(attention_ops, "MOVE_COST", -1e9)
    jax.clear_caches()
    options = {"split_mode": "graph", "devices": devices, "dtype": "float32", "ctx_size": 256}
    lm = jaxsplit.load(recipe_gguf(name), **options)
    reference = np.load(DATA / "arch" / f"{name}.npy")
    assert nmse(lm.logits(recipe(name)["tokens"]), reference) <= 1e-9


def test_gathered_keys_take_memory_for_some_queries_only():
    """Temporaries are a multiple of `MAX_GATHERED`, for any number of keys and queries; a mask has
    an element for each pair."""
    config = AttentionConfig(4, 1, 64, 64)

    def temporaries(run, queries: int, keys: int) -> int:
        shapes = ((1, queries, 1, 4, 64), (1, 1, keys, 64), (1, queries), (1, 1, queries, 256))
        q, k, positions, selected = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(shapes, ("float32", "float32", "int32", "int32"), strict=True)
        )
        kv = KV(AttentionCache(k, None), selected=selected)
        program = jax.jit(run, static_argnames="config").lower(q, kv, positions, config=config)
        return program.compile().memory_analysis().temp_size_in_bytes

    inputs = 2**14 * 4 * 64 * 4  # queries in another order
    for keys in (2**12, 2**14):
        bound = 6 * 4 * attention_ops.MAX_GATHERED + 3 * inputs
        assert temporaries(attend_gathered, 2**14, keys) <= bound
    assert temporaries(attend_masked, 2**14, 2**14) >= 2**28


def test_when_keys_are_gathered():
    assert all(gathers(keys, 2048, 1, heads) for keys in (2048, 4096) for heads in (1, 128))
    # DeepSeek 3.2: prompts longer than a multiple of what each query sees; fewer heads, longer.
    absorbed, expanded = 2 * 512 + 64, 128 + 128 + 64
    shortest = {
        heads: next(
            keys
            for keys in range(2048, 2**17, 1024)
            if gathers(keys, 2048, 512, heads, absorbed / expanded)
        )
        for heads in (128, 16)
    }
    assert 2 * 2048 < shortest[128] < shortest[16] < 2**14


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
