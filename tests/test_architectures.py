"""Every architecture computes what llama.cpp computes, and the same in every split mode.

The references are logits of llama.cpp in float32 for tiny models of each architecture and of its
variants (tests/data/arch).
"""

import itertools
import json

import numpy as np
import pytest
from helpers import DATA, nmse, recipe

import jaxsplit
from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import ARCHITECTURES

VARIANTS = sorted(path.stem for path in (DATA / "arch").glob("*.json"))
MODES = ("graph", "row", "layer")
DEVICES = (2, 3, 4)


def load(path, mode, devices=1):
    return jaxsplit.load(path, split_mode=mode, devices=devices, dtype="float32", ctx_size=256)


def check_split(path, mode, devices, tokens, expected):
    """A few single tokens too: they take another way through the cache."""
    split = load(path, mode, devices)
    assert nmse(split.logits(tokens), expected) <= 1e-9, (mode, devices)
    few = split.logits(tokens[:9], one_by_one=True)
    assert nmse(few, expected[:9]) <= 1e-9, (mode, devices)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_llama_cpp_in_every_mode(recipe_gguf, name):
    """Each mode on 2, 3 or 4 devices, in turn: all of them are in `test_every_mode_and_count`."""
    path, tokens = recipe_gguf(name), recipe(name)["tokens"]
    expected = np.load(DATA / "arch" / f"{name}.npy")
    one = load(path, "none")
    logits = one.logits(tokens)
    assert nmse(logits, expected) <= 1e-6
    assert nmse(one.logits(tokens, one_by_one=True), expected) <= 1e-6
    modes = MODES if one.config.layers < 20 else MODES[:1]  # deep models take long to compile
    for i, mode in enumerate(modes):
        count = DEVICES[(VARIANTS.index(name) + i) % len(DEVICES)]
        check_split(path, mode, count, tokens, logits)


@pytest.mark.full
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_mode_and_count(recipe_gguf, name):
    path, tokens = recipe_gguf(name), recipe(name)["tokens"]
    logits = load(path, "none").logits(tokens)
    for mode, count in itertools.product(MODES, DEVICES):
        check_split(path, mode, count, tokens, logits)


def test_every_architecture_has_a_reference():
    covered = {json.loads((DATA / "arch" / f"{n}.json").read_text())["arch"] for n in VARIANTS}
    assert covered == set(ARCHITECTURES)


def test_an_unknown_architecture_is_refused_with_those_that_are_known(recipe_gguf):
    unknown = recipe("llama") | {"name": "unknown", "arch": "mamba"}
    with pytest.raises(JaxsplitError, match=r"architecture 'mamba' is not supported.*qwen3moe"):
        load(recipe_gguf(unknown), "none")
