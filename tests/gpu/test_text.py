"""A text of the demo model, if it is installed."""

import json

import jax
import pytest
from gpu import internals
from helpers import DATA

import jaxsplit
from jaxsplit.errors import JaxsplitError


@pytest.fixture(scope="module")
def demo():
    try:
        return jaxsplit.demo_model()
    except JaxsplitError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("mode", ["none", "graph"])
def test_the_demo_model_continues_like_the_reference(demo, mode):
    """In float32, where the likeliest token is that of llama.cpp."""
    devices = 2 if internals.INTERPRET else len(jax.devices())
    lm = jaxsplit.load(
        demo, split_mode=mode, devices=1 if mode == "none" else devices, dtype="float32"
    )
    for case in json.loads((DATA / "smollm2" / "greedy.json").read_text()):
        text = lm.generate(case["prompt"], len(case["token_ids"]), temperature=0)
        assert text == case["text"]


@pytest.mark.parametrize("mode", ["none", "graph"])
def test_the_demo_model_speaks_in_bfloat16(demo, mode):
    """With kernels, rounded activations and the loop on the device: tokens differ at last where two
    are nearly as likely, but the text begins like the reference."""
    devices = 2 if internals.INTERPRET else len(jax.devices())
    lm = jaxsplit.load(
        demo,
        split_mode=mode,
        devices=1 if mode == "none" else devices,
        dtype="bfloat16",
        kernels="interpret" if internals.INTERPRET else "triton",
        ctx_size=256,
    )
    for case in json.loads((DATA / "smollm2" / "greedy.json").read_text()):
        text = lm.generate(case["prompt"], len(case["token_ids"]), temperature=0)
        print(repr(text), repr(case["text"]))
        assert text[:8] == case["text"][:8]
