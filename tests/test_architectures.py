"""Every architecture computes what llama.cpp computes, and the same in every split mode.

The references are logits of llama.cpp in float32 for tiny models of each architecture and of its
variants (tests/data/arch).
"""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, nmse, recipe

import jaxsplit
from jaxsplit.architectures import ARCHITECTURES
from jaxsplit.cache.layers import init_cache
from jaxsplit.errors import JaxsplitError

VARIANTS = sorted(path.stem for path in (DATA / "arch").glob("*.json"))
DEEP = (
    *("baichuan", "baichuan-13b", "command-r-plus", "deepseek2-lite", "exaone4-32b"),
    *("gemma2-27b", "gemma3-27b", "gemma3n"),
)
MODES = ("graph", "row", "layer")
DEVICES = (2, 3, 4)


def reference(name):
    return np.load(DATA / "arch" / f"{name}.npy")


def load(path, mode, devices=1):
    return jaxsplit.load(path, split_mode=mode, devices=devices, dtype="float32", ctx_size=256)


def check_split(path, mode, devices, tokens, expected, *, one_by_one):
    """Single tokens, a few of them, take another way through the cache than many."""
    if one_by_one:
        tokens, expected = tokens[:9], expected[:9]
    logits = load(path, mode, devices).logits(tokens, one_by_one=one_by_one)
    assert nmse(logits, expected) <= 1e-9, (mode, devices, one_by_one)


def first_of_its_architecture(name):
    arch = recipe(name)["arch"]
    return name == next(other for other in VARIANTS if recipe(other)["arch"] == arch)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in DEEP])
def test_logits_are_those_of_llama_cpp(recipe_gguf, name):
    """A whole prompt, and single tokens. For one variant of each architecture, one device computes
    either of them and a split the other; `test_one_device_has_both` and `test_every_mode_and_count`
    have the rest."""
    path, tokens = recipe_gguf(name), recipe(name)["tokens"]
    one, expected = load(path, "none"), reference(name)
    split = one
    index = VARIANTS.index(name)
    if first_of_its_architecture(name):
        splits = [*itertools.product(MODES, DEVICES)]
        split = load(path, *splits[index % len(splits)])
    in_turn = [one, split] if index % 2 else [split, one]
    whole, single = (
        lm.logits(tokens, one_by_one=one_by_one)
        for lm, one_by_one in zip(in_turn, (False, True), strict=True)
    )
    assert nmse(whole, expected) <= 1e-6
    assert nmse(single, expected) <= 1e-6
    if split is not one:
        assert nmse(whole, single) <= 1e-9, split.describe()


@pytest.mark.full
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", [name for name in VARIANTS if first_of_its_architecture(name)])
def test_one_device_has_both(recipe_gguf, name):
    """Where `test_logits_are_those_of_llama_cpp` has either of them."""
    one, tokens = load(recipe_gguf(name), "none"), recipe(name)["tokens"]
    for one_by_one in (False, True):
        assert nmse(one.logits(tokens, one_by_one=one_by_one), reference(name)) <= 1e-6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", DEEP)
def test_logits_of_deep_models(recipe_gguf, name):
    """Which differ from others in numbers only. The module is called as it is, so that layers that
    are alike are compiled once: a program of so many takes long to compile."""
    model, tokens = load(recipe_gguf(name), "none").model, np.asarray([recipe(name)["tokens"]])
    assert nmse(model(tokens)[0][0], reference(name)) <= 1e-6
    cache = init_cache(model.config.cache(tokens.shape[1], np.dtype("float32")), slots=1)
    for step in range(tokens.shape[1]):
        logits, cache = model(tokens[:, [step]], np.asarray([[step]]), cache)
        assert nmse(logits[0], reference(name)[[step]]) <= 1e-6


@pytest.mark.full
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_mode_and_count(recipe_gguf, name):
    path, tokens = recipe_gguf(name), recipe(name)["tokens"]
    logits = load(path, "none").logits(tokens)
    for *split, one_by_one in itertools.product(MODES, DEVICES, (False, True)):
        check_split(path, *split, tokens, logits, one_by_one=one_by_one)


def test_every_architecture_has_a_reference():
    covered = {json.loads((DATA / "arch" / f"{n}.json").read_text())["arch"] for n in VARIANTS}
    assert covered == set(ARCHITECTURES)


def test_the_table_in_the_docs_is_up_to_date():
    folder = Path(__file__).parent.parent / "docs"
    made = runpy.run_path(str(folder / "architectures.py"))["table"]()
    assert (folder / "architectures.md").read_text() == made


def test_an_unknown_architecture_is_refused_with_those_that_are_known(recipe_gguf):
    unknown = recipe("llama") | {"name": "unknown", "arch": "unheard"}
    with pytest.raises(JaxsplitError, match=r"architecture 'unheard' is not supported.*qwen3moe"):
        load(recipe_gguf(unknown), "none")
