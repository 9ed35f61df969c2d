"""Configs: which model the metadata of a GGUF file describe, and its rotary frequencies."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import changed_recipe, recipe, write_recipe
from tiny import fresh_rng

from jaxsplit.architectures import model_config
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import open_gguf
from jaxsplit.models import (
    AttentionConfig,
    BlockConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from jaxsplit.ops.attention.rope import rope

RECIPES = ("llama", "llama-bias", "llama-linear", "llama-yarn", "llama-tied-ropefreqs")


@pytest.fixture
def rng():
    return fresh_rng()


EXPECTED = {
    "llama": {"head_dim": 64, "rope": {"dim": 64, "base": 500000.0}},
    "llama-bias": {"kv_heads": 4, "bias": True, "rope": {"dim": 32}},
    "llama-linear": {"kv_heads": 1, "rope": {"dim": 32, "scaling": "linear", "factor": 4.0}},
    "llama-yarn": {"rope": {"dim": 32, "scaling": "yarn", "factor": 4.0, "original_context": 1024}},
    "llama-tied-ropefreqs": {
        "heads": 8,
        "tied": True,
        "rope": {"dim": 32, "base": 500000.0, "freq_factors": "freqs"},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_is_that_of_the_metadata(recipe_gguf, name):
    usual = {"heads": 4, "kv_heads": 2, "head_dim": 32, "tied": False, "bias": False}
    expected = usual | EXPECTED[name]
    heads, kv_heads, head_dim, tied, bias = (expected[key] for key in usual)
    norm = NormConfig("rms", float(np.float32(0.001)))
    # Without a factor there is no scaling, whatever it is called.
    rope = {"interleaved": True, "original_context": 256, "scaling": "linear"} | expected["rope"]
    mixer = AttentionConfig(
        heads,
        kv_heads,
        head_dim,
        head_dim,
        rope=RopeConfig(**rope),
        qkv_bias=bias,
        out_bias=bias,
    )
    block = BlockConfig(mixer, MLPConfig(192, bias=bias), mixer_norm=norm, mlp_norm=norm)
    assert model_config(open_gguf(recipe_gguf(name))) == ModelConfig(
        "llama", vocab=160, embed=128, context=256, blocks=(block, block), norm=norm, tied=tied
    )


def test_defaults_of_absent_keys_are_those_of_llama_cpp(tmp_path):
    keys = ("rope.freq_base", "rope.dimension_count", "attention.head_count_kv")
    path = changed_recipe(
        tmp_path / "a.gguf", {f"llama.{key}": None for key in keys}, name="llama-bias"
    )
    attention = model_config(open_gguf(path)).attention
    assert (attention.rope.base, attention.rope.dim, attention.kv_heads) == (10000.0, 32, 4)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("attention.head_count_kv", [2, 4], None),
        (
            "attention.head_count_kv",
            [2],
            r"is \[2\], expected one value, or one for each of 2 layers",
        ),
        ("attention.key_length", [64, 64], None),
        ("attention.key_length", [64, 32], "differs from layer to layer"),
    ],
)
def test_a_value_for_each_layer(tmp_path, key, values, message):
    changed = recipe("llama")
    key = f"llama.{key}"
    changed["metadata"] = [m for m in changed["metadata"] if m[0] != key]
    changed["metadata"].append((key, ["ARRAY", "INT32"], values))
    write_recipe(changed, tmp_path / "a.gguf")
    if message is None:
        blocks = model_config(open_gguf(tmp_path / "a.gguf")).blocks
        field = "kv_heads" if "head_count_kv" in key else "head_dim"
        assert [getattr(block.mixer, field) for block in blocks] == values
    else:
        with pytest.raises(JaxsplitError, match=f"{key} {message}"):
            model_config(open_gguf(tmp_path / "a.gguf"))


# Rotary frequencies, in float64 and one pair at a time, from ggml's `rope_yarn`.


def reference_frequency(pair, dim, base, scaling, factor, original_context, fast=32, slow=1):
    """Radians per position of one pair of dimensions."""
    extrapolated = base ** (-2 * pair / dim)
    if scaling == "none":
        return extrapolated
    interpolated = extrapolated / factor
    if scaling == "linear":
        return interpolated

    def correction(turns):
        return dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(correction(fast)))
    high = min(dim - 1, math.ceil(correction(slow)))
    ramp = 1 - min(1, max(0, (pair - low) / max(0.001, high - low)))
    return interpolated * (1 - ramp) + extrapolated * ramp


def check_frequencies(c):
    frequencies, magnitude = c.frequencies()
    expected = [
        reference_frequency(i, c.dim, c.base, c.scaling, c.factor, c.original_context)
        for i in range(c.dim // 2)
    ]
    # 2e-7: a rounding to float32.
    np.testing.assert_allclose(np.float64(frequencies), expected, rtol=2e-7)
    stretched = 1 + 0.1 * math.log(c.factor) if c.scaling == "yarn" else 1
    assert magnitude == pytest.approx(c.attention_factor * stretched, rel=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_rotary_frequencies_of_the_recipes(recipe_gguf, name):
    config = model_config(open_gguf(recipe_gguf(name))).attention.rope
    check_frequencies(config)
    assert (config.factor == 1) == np.array_equal(
        config.frequencies()[0], RopeConfig(config.dim, config.base).frequencies()[0]
    )


def test_rotary_frequencies_of_random_models(rng):
    for _ in range(200):
        check_frequencies(
            RopeConfig(
                dim=int(2 * rng.integers(1, 129)),
                base=float(rng.choice([1e4, 5e5, 1e6, rng.uniform(2, 1e5)])),
                scaling=str(rng.choice(["none", "linear", "yarn"])),
                factor=float(rng.choice([1, 4, 32, rng.uniform(1, 64)])),
                original_context=int(2 ** rng.integers(5, 18)),
                attention_factor=float(rng.uniform(0.5, 2)),
            )
        )


def rope_config(path, metadata, name="llama"):
    return model_config(open_gguf(changed_recipe(path, metadata, name=name))).attention.rope


def test_the_old_key_of_linear_scaling_is_read(tmp_path):
    config = rope_config(tmp_path / "a.gguf", {"llama.rope.scale_linear": ("FLOAT32", 8.0)})
    np.testing.assert_allclose(config.frequencies()[0][0], 1 / 8)


def test_a_factor_without_a_type_is_linear_scaling(tmp_path):
    """As in llama.cpp, where `linear` is the default of rope.scaling.type."""
    config = rope_config(tmp_path / "a.gguf", {"llama.rope.scaling.factor": ("FLOAT32", 8.0)})
    np.testing.assert_allclose(config.frequencies()[0][0], 1 / 8)


def test_the_type_none_ignores_the_factor(tmp_path):
    metadata = {
        "llama.rope.scaling.factor": ("FLOAT32", 8.0),
        "llama.rope.scaling.type": ("STRING", "none"),
    }
    assert rope_config(tmp_path / "a.gguf", metadata).frequencies()[0][0] == 1


def test_the_attention_factor_multiplies_the_rotation(tmp_path):
    metadata = {"llama.rope.scaling.attn_factor": ("FLOAT32", 1.5)}
    config = rope_config(tmp_path / "a.gguf", metadata, name="llama-yarn")
    assert config.attention_factor == 1.5
    check_frequencies(config)


def test_rotation_by_an_angle_of_float64(rng):
    """`rope` itself: interleaved pairs turn by position times frequency, the rest stays."""
    config = RopeConfig(dim=16, base=100.0, interleaved=True, scaling="linear", factor=2.0)
    x = rng.normal(size=(2, 5, 3, 24)).astype(np.float32)
    positions = rng.integers(0, 100, (2, 5))
    factors = rng.uniform(0.5, 4, 8).astype(np.float32)
    turned = np.asarray(rope(jnp.asarray(x), jnp.asarray(positions), config, jnp.asarray(factors)))
    for pair in range(8):
        frequency = reference_frequency(pair, 16, 100.0, "linear", 2.0, 0) / factors[pair]
        z = x[..., 2 * pair] + 1j * x[..., 2 * pair + 1].astype(np.float64)
        z = z * np.exp(1j * positions[..., None] * frequency)
        # 3e-5: the angle, up to 100, is rounded to float32.
        np.testing.assert_allclose(turned[..., 2 * pair], z.real, atol=3e-5)
        np.testing.assert_allclose(turned[..., 2 * pair + 1], z.imag, atol=3e-5)
    assert np.array_equal(turned[..., 16:], x[..., 16:])
