"""A model split over devices computes what one device computes, with the promised collectives."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import DATA, make_recipe, nmse

import jaxsplit
from jaxsplit.engine import SamplingConfig
from jaxsplit.engine.sampling import SamplingValues

DEVICES = (1, 2, 3, 4, 5, 8)
SHAPES = {
    f"{h}-{kv}": make_recipe(f"heads-{h}-{kv}", heads=h, kv_heads=kv)
    for h, kv in ((9, 3), (8, 2), (6, 1), (14, 2))
}
TOKENS = np.random.default_rng().integers(0, 160, 37).tolist()


def greedy(lm, tokens, count=12):
    """Ids that the engine chooses after a prompt of ids."""
    lm.engine.start(tokens, SamplingConfig(temperature=0.0))
    first = int(lm.engine.state.token[0])
    return [first, *lm.engine.loop(count, count)[0].tolist()]


@pytest.fixture(params=SHAPES)
def path(request, recipe_gguf):
    quantize = {"attn_norm.weight": "F32", "ffn_norm.weight": "F32", "output_norm.weight": "F32"}
    return recipe_gguf(SHAPES[request.param], quantize | {".weight": "Q8_0"})


@pytest.mark.parametrize("devices", DEVICES)
def test_graph_equals_none(load, path, devices):
    one = load(path, split_mode="none")
    split = load(path, split_mode="graph", devices=devices)
    expected = one.logits(TOKENS)
    assert nmse(split.logits(TOKENS), expected) <= 1e-9
    assert nmse(split.logits(TOKENS[:9], one_by_one=True), expected[:9]) <= 1e-9
    assert greedy(split, TOKENS) == greedy(one, TOKENS)


@pytest.mark.parametrize("devices", DEVICES)
def test_k_quants_are_cut_inside_their_blocks(load, devices):
    """Heads of 64 weights in blocks of 256, and 2 blocks of hidden units."""
    path = DATA / "quant" / "quant-mix-Q4_K_M.gguf"
    expected = load(path, split_mode="none").logits(TOKENS)
    split = load(path, split_mode="graph", devices=devices)
    assert nmse(split.logits(TOKENS), expected) <= 1e-9
    assert nmse(split.logits(TOKENS[:9], one_by_one=True), expected[:9]) <= 1e-9


@pytest.mark.parametrize("name", ["llama-bias", "llama-tied-ropefreqs"])
@pytest.mark.parametrize("devices", [3, 8])
def test_biases_and_tied_heads_are_split(load, recipe_gguf, name, devices):
    expected = load(recipe_gguf(name), split_mode="none").logits(TOKENS)
    split = load(recipe_gguf(name), split_mode="graph", devices=devices)
    assert nmse(split.logits(TOKENS), expected) <= 1e-9


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_dequantized_weights_are_split_alike(load, path, weights):
    one = load(path, split_mode="none", weights=weights)
    split = load(path, split_mode="graph", devices=4, weights=weights)
    assert nmse(split.logits(TOKENS), one.logits(TOKENS)) <= 1e-9


def test_same_seed_same_text_on_any_mesh(load, recipe_gguf):
    path = recipe_gguf(SHAPES["9-3"])
    texts = []
    for devices in (1, 2, 3, 8):
        lm = load(path, split_mode="graph", devices=devices)
        sampling = SamplingConfig(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=1234)
        lm.engine.start(TOKENS, sampling)
        texts.append(lm.engine.loop(24, 24)[0].tolist())
    assert texts[1:] == texts[:1] * 3


def collectives(lm) -> Counter:
    """Collective operations in the compiled decode step, by name."""
    engine, sampling = lm.engine, SamplingConfig(temperature=0.0)
    program = engine.decode_program(sampling.plan)
    state, values = engine._empty_state(1), SamplingValues.of([sampling])
    text = (
        program.lower(engine.params, engine.cache, state, engine.ends, values).compile().as_text()
    )
    names = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    )
    return Counter(re.findall(rf"= \S+ ({names})(?:-start)?\(", text))


def test_none_has_no_collectives(load, path):
    assert not collectives(load(path, split_mode="none"))


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_graph_has_two_all_reduces_per_layer(load, path, devices):
    """And one for the embedding; the head exchanges the best candidate: its value and its id."""
    lm = load(path, split_mode="graph", devices=devices)
    expected = {"all-reduce": 2 * lm.config.layers + 1, "all-gather": 2}
    assert collectives(lm) == expected


def test_each_device_holds_its_share(load, recipe_gguf):
    recipe = make_recipe("even", heads=8, kv_heads=8, mlp=256)
    one = load(recipe_gguf(recipe), split_mode="none")
    four = load(recipe_gguf(recipe), split_mode="graph", devices=4)
    assert four.cache_bytes == one.cache_bytes / 4
    assert four.weight_bytes < one.weight_bytes / 4 * 1.05  # norms are on every device
    assert len(four.mesh.devices.flat) == 4
    kernel = four.model.blocks[0].mlp.up.kernel.get_value()
    assert kernel.addressable_shards[3].data.shape == (64, 128)


def test_reduce_dtype_is_used_between_devices(load, path):
    exact = load(path, split_mode="graph", devices=2)
    rough = load(path, split_mode="graph", devices=2, reduce_dtype="bfloat16")
    error = nmse(rough.logits(TOKENS), exact.logits(TOKENS))
    assert 1e-8 < error < 1e-3


def test_the_module_works_on_sharded_parameters(load, path):
    """`lm.model` called directly: the compiler finds the collectives itself."""
    lm = load(path, split_mode="graph", devices=4)
    logits, _ = jax.jit(lambda tokens: lm.model(tokens))(np.asarray([TOKENS]))
    vocab = lm.config.vocab
    assert nmse(np.asarray(logits)[0, :, :vocab], lm.logits(TOKENS)) <= 1e-9


def test_devices_can_be_given_as_a_list(recipe_gguf):
    chosen = jax.devices()[3:5]
    lm = jaxsplit.load(recipe_gguf("llama"), devices=chosen)
    assert lm.mesh.devices.flatten().tolist() == chosen
    lm = jaxsplit.load(recipe_gguf("llama"), split_mode="none", main_device=2)
    assert lm.mesh.devices.flatten().tolist() == [jax.devices()[2]]
