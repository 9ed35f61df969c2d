"""Keys of headers: what changes the computation of llama.cpp changes it here or is refused by name.

`tests/data/keys.json` holds keys with values (lists are repeated for all layers) and, for each
recipe, those whose values change the logits of llama.cpp (build 11434) when they are added to it
or take the place of its own, by an NMSE of more than 1e-6.
"""

import dataclasses
import itertools
import json
import math

import pytest
from helpers import DATA, recipe, recipe_file

from jaxsplit.architectures import ARCHITECTURES, model_config
from jaxsplit.architectures.harmless import HARMLESS
from jaxsplit.errors import JaxsplitError
from jaxsplit.weights import parameter_sources

KEYS = json.loads((DATA / "keys.json").read_text())
RECIPES = sorted(KEYS["changed"])
SAMPLE = 8
"""The normal run takes one case in this many, different ones for each recipe."""


def config(name, changes=()):
    """The config of a recipe with other values, and the file's context of 256 tokens."""
    arch = recipe(name)["arch"]
    changes = {f"{arch}.{key}": value for key, value in dict(changes).items()}
    return model_config(recipe_file(recipe(name), changes), 256)


def refusal(name, changes):
    """The message that refuses a recipe with other values, and that nothing is built."""
    arch = recipe(name)["arch"]
    file = recipe_file(recipe(name), {f"{arch}.{key}": value for key, value in changes.items()})
    with pytest.raises(JaxsplitError) as error:
        parameter_sources(file, model_config(file))
    assert "\n" not in str(error.value)
    return str(error.value)


def case(name, index):
    layers = config(name).layers
    return {
        key: [*itertools.islice(itertools.cycle(value), layers)]
        if isinstance(value, list) and key != "rope.dimension_sections"
        else value
        for key, value in KEYS["cases"][index].items()
    }


def check_cases(name, indices):
    usual, changed = config(name), set(KEYS["changed"][name])
    for index in indices:
        changes = case(name, index)
        try:
            found = config(name, changes)
        except JaxsplitError as error:
            assert f"{recipe(name)['arch']}." in str(error), (name, changes, str(error))
        else:
            assert found != usual or index not in changed, (name, changes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_key_that_changes_llama_cpp_changes_the_config_or_is_refused(name):
    check_cases(name, range(RECIPES.index(name) % SAMPLE, len(KEYS["cases"]), SAMPLE))


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_all_keys(name):
    check_cases(name, range(len(KEYS["cases"])))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_unknown_key_is_refused_by_name(arch):
    name = next((name for name in RECIPES if recipe(name)["arch"] == arch), arch)
    assert f"{arch}.attention.unheard_of may change" in refusal(name, {"attention.unheard_of": 1})


def test_many_unknown_keys_are_one_line():
    message = refusal("llama", {f"unheard.{i}": "x" * 1000 for i in range(100)})
    assert "llama.unheard.0, " in message and "(and 95 more)" in message and len(message) < 300


def test_harmless_keys_have_a_reason_and_change_nothing():
    usual = config("llama")
    for pattern, reason in HARMLESS.items():
        assert reason
        assert config("llama", {pattern.replace("*", "x"): 2}) == usual


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        # Written by converters, without effect on text.
        ("phi3", "attention.sliding_window", 2047),
        ("qwen2", "attention.sliding_window", 131072),
        ("qwen3vl", "n_deepstack_layers", 3),
        ("granite", "deepstack_mapping", [-1, 0]),
        ("qwen3", "pooling_type", 3),
        ("olmo2", "rope.freq_base_swa", 500000.0),
        ("stablelm", "use_parallel_residual", True),
        ("qwen3next", "full_attention_interval", 4),
        ("gpt2", "rope.freq_base", 10000.0),
        ("granite", "expert_count", 0),
        ("llama", "attention.layer_norm_epsilon", 1e-5),
        ("nemotron", "attention.layer_norm_rms_epsilon", 0.25),
        ("deepseek2", "attention.temperature_length", 8192),
    ],
)
def test_keys_of_real_files_without_effect(name, key, value):
    assert config(name, {key: value}) == config(name)


def test_models_that_are_not_causal_are_refused():
    assert "lfm2.attention.causal is False" in refusal("lfm2", {"attention.causal": False})
    assert config("lfm2", {"attention.causal": True}) == config("lfm2")


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gemma3", {"attention.sliding_window_pattern": 1}, [False] * 7),
        ("gemma3", {"attention.sliding_window_pattern": 0}, [True] * 7),
        ("gemma3", {"attention.sliding_window": 0}, [False] * 7),
        ("gemma3", {"attention.sliding_window": None}, [False] * 7),
        ("gemma2", {"attention.sliding_window_pattern": [0, 0, 1, 1]}, [False, False, True, True]),
        ("gpt-oss", {"attention.sliding_window_pattern": 3}, [True, True, False, True]),
        ("cohere2", {"attention.sliding_window_pattern": 2}, [True, False] * 2 + [True]),
        ("olmo3", {"attention.sliding_window_pattern": None}, [True, True, True, False, True]),
        ("llama4", {"attention.sliding_window_pattern": 2}, [True, False] * 2),
        ("lfm2", {"attention.sliding_window": 5}, [None, True, None, True]),
    ],
)
def test_which_layers_have_a_window(name, changes, expected):
    blocks = config(name, changes).blocks
    windows = [getattr(block.mixer, "window", 0) for block in blocks]
    assert [None if window == 0 else window is not None for window in windows] == expected


def flash(layers, vocab, **metadata):
    """A recipe like the first GLM-4.7-Flash, which does not say how experts are weighed."""
    tiny = recipe("deepseek2-nomla")
    changed = {"deepseek2.block_count": layers, "deepseek2.leading_dense_block_count": 1}
    tensors = [t for t in tiny["tensors"] if not t["name"].startswith("blk.1.")]
    tensors += [
        t | {"name": t["name"].replace("blk.1.", f"blk.{layer}.")}
        for layer in range(1, layers)
        for t in tiny["tensors"]
        if t["name"].startswith("blk.1.")
    ]
    tensors = [
        t | {"shape": [t["shape"][0], vocab]} if t["name"] == "token_embd.weight" else t
        for t in tensors
    ]
    return recipe_file(tiny | {"tensors": tensors}, changed | metadata)


@pytest.mark.parametrize(
    ("layers", "vocab", "stated", "routing"),
    [
        (47, 154880, None, "sigmoid"),
        (48, 154880, None, "sigmoid"),
        (46, 154880, None, "softmax"),
        (47, 154881, None, "softmax"),
        (47, 154880, 1, "softmax"),
        (61, 129280, 2, "sigmoid"),
    ],
)
def test_the_first_glm_flash_weighs_experts_by_sigmoid(layers, vocab, stated, routing):
    found = model_config(flash(layers, vocab, **{"deepseek2.expert_gating_func": stated}))
    assert {b.mlp.routing for b in found.blocks if hasattr(b.mlp, "routing")} == {routing}


@pytest.mark.parametrize("name", ["bailingmoe2", "dots1", "lfm2moe", "minimax-m2"])
def test_files_that_must_say_how_experts_are_weighed(name):
    assert "expert_gating_func is 0" in refusal(name, {"expert_gating_func": None})


@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        ("ernie4_5-moe", {"interleave_moe_layer_step": 2}, "experts where their tensors are"),
        ("deepseek2", {"leading_dense_block_count": 2}, "leading_dense_block_count"),
        ("llama", {"expert_count": 8}, "expert_count is 8"),
        ("gemma4-dense", {"attention.shared_kv_layers": 1}, "shared_kv_layers"),
        ("gemma4", {"attention.shared_kv_layers": 9}, "shared_kv_layers"),
        ("gemma4", {"attention.shared_kv_layers": 99}, "shared_kv_layers"),
        ("bailingmoe2", {"expert_group_count": 3}, "expert_group_count"),
        ("bailingmoe2", {"expert_group_used_count": 0}, "expert_group_used_count"),
        ("bailingmoe2", {"expert_group_used_count": 5}, "expert_group_used_count"),
        ("minicpm", {"nextn_predict_layers": 2}, "nextn_predict_layers"),
        ("qwen2vl", {"rope.dimension_sections": [4, 4, 4, 4]}, "rope.dimension_sections"),
        ("llama-yarn", {"rope.freq_base": 1.0}, "rope.freq_base is 1.0, expected a number above 1"),
        ("llama-yarn", {"rope.scaling.yarn_beta_fast": 0.0}, "yarn_beta_fast"),
    ],
)
def test_keys_that_contradict_the_tensors_or_one_another(name, changes, keys):
    assert keys in refusal(name, changes)


WRONG = [True, "x", "", math.nan, math.inf, -1, -0.5, 2.5, [], [1], ["a", "b"], [[1], [2]]]
SIZES = {
    "llama": ("embedding_length", "block_count", "feed_forward_length", "attention.key_length"),
    "llama-moe": ("attention.head_count", "attention.head_count_kv", "expert_count"),
    "deepseek2": ("attention.kv_lora_rank", "attention.q_lora_rank", "attention.key_length_mla"),
    "qwen35moe": ("ssm.inner_size", "ssm.state_size", "ssm.conv_kernel", "ssm.group_count"),
    "lfm2": ("shortconv.l_cache",),
    "gemma4": ("attention.key_length_swa", "embedding_length_per_layer_input"),
    "granitehybrid": ("ssm.time_step_rank",),
    "glm4moe": ("expert_feed_forward_length", "expert_used_count", "nextn_predict_layers"),
}
SIZE_KEYS = [(name, key) for name, keys in SIZES.items() for key in keys]


@pytest.mark.parametrize(("name", "key"), SIZE_KEYS)
def test_sizes_that_cannot_be(name, key):
    arch = recipe(name)["arch"]
    for value in (*WRONG, 2**31, 2**31 - 1, 2**63, 1e18):
        assert f"{arch}.{key} " in refusal(name, {key: value}), value


@pytest.mark.parametrize(
    "key", ["rope.freq_base", "attention.layer_norm_rms_epsilon", "rope.scaling.factor"]
)
def test_numbers_that_cannot_be(key):
    for value in (True, "x", math.nan, math.inf, -1.0, [], [1.0, 2.0, 3.0], [[1.0], [2.0]]):
        assert f"llama.{key} " in refusal("llama", {key: value}), value


@pytest.mark.parametrize(("name", "key"), SIZE_KEYS)
def test_whole_floats_are_whole_numbers(name, key):
    arch = recipe(name)["arch"]
    value = recipe_file(recipe(name)).metadata[f"{arch}.{key}"]
    assert config(name, {key: float(value)}) == config(name)


def test_long_contexts_and_windows_take_nothing():
    found = config("gemma3", {"context_length": 2**31, "attention.sliding_window": 2**32 - 1})
    usual = config("gemma3")
    assert found.context == 2**31 - 1
    assert {block.mixer.window for block in found.blocks} == {None, 2**31 - 1}
    assert dataclasses.replace(found.blocks[5].mixer.rope, original_context=256) == (
        usual.blocks[5].mixer.rope
    )


@pytest.mark.full
@pytest.mark.parametrize("name", RECIPES)
def test_every_value_of_another_kind_is_refused_in_one_line_or_works(name):
    arch = recipe(name)["arch"]
    for key in recipe_file(recipe(name)).metadata:
        for value in (*WRONG, 0, 2.0, 3, 97, [2, 2], 2**31, 2**63, 1e38, 1e-38):
            file = recipe_file(recipe(name), {key: value})
            try:
                parameter_sources(file, model_config(file))
            except JaxsplitError as error:
                assert "\n" not in str(error), (key, value)
                assert not key.startswith(arch) or len(str(error)) < 1500, (key, value)


REPEATED = {  # of other converters: recipe, key, the value that it has to be, another
    "llama": ("attention.head_dim", 64, 8),
    "command-r": ("max_position_embeddings", 256, 512),
    "qwen3moe": ("norm_top_k_prob", True, False),
}


@pytest.mark.parametrize("name", REPEATED)
def test_keys_that_repeat_others_have_to_agree(name):
    key, right, wrong = REPEATED[name]
    assert config(name, {key: right}) == config(name)
    with pytest.raises(JaxsplitError, match=f"{key} is {wrong}, expected {right}"):
        config(name, {key: wrong})


def test_a_context_beyond_the_largest_position_is_cut():
    assert config("llama", {"context_length": 2**41}).context == 2**31 - 1
