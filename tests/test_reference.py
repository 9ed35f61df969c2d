"""Logits and texts against llama.cpp on the weights dequantized to float32."""

import json

import jax
import numpy as np
import pytest
from helpers import DATA, nmse

import jaxsplit

TEXTS = ("english", "python", "multilingual")


@pytest.fixture(scope="module")
def texts():
    return np.load(DATA / "smollm2" / "text.npz")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_smollm2_has_the_reference_logits(smollm2_path, texts, dtype, tolerance):
    lm = jaxsplit.load(smollm2_path, devices=2, dtype=dtype, ctx_size=256)
    for name in TEXTS:
        tokens = texts[f"{name}_tokens"].tolist()
        logits = lm.logits(tokens)
        assert nmse(logits[-2:], texts[f"{name}_logits_last2"]) <= tolerance, name
        logprobs = np.asarray(jax.nn.log_softmax(logits[:-1]))[
            np.arange(len(tokens) - 1), tokens[1:]
        ]
        assert nmse(logprobs, texts[f"{name}_logprobs"]) <= tolerance, name


@pytest.mark.parametrize(("devices", "block"), [(1, 1), (3, 16)], ids=["streamed", "looped"])
def test_smollm2_continues_like_the_reference(smollm2_path, devices, block):
    smollm2 = jaxsplit.load(smollm2_path, devices=devices, dtype="float32", ctx_size=128)
    for case in json.loads((DATA / "smollm2" / "greedy.json").read_text()):
        assert smollm2.tokenizer.encode(case["prompt"]) == case["prompt_token_ids"]
        stream = smollm2.stream(case["prompt"], len(case["token_ids"]), temperature=0, block=block)
        assert "".join(stream) == case["text"]
        assert stream.tokens == case["token_ids"]
        assert stream.stop_reason == {"eos": "end of text", "limit": "n_predict"}[case["stop"]]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "devices"),
    [
        *((path.stem, 1) for path in sorted((DATA / "quant").glob("*.gguf"))),
        *((f"quant-{name}", 3) for name in ("IQ3_S", "MXFP4", "mix-Q4_K_M", "moe-Q4_K_M")),
    ],
)
def test_quantized_models_have_the_reference_logits(load, name, devices):
    path = DATA / "quant" / f"{name}.gguf"
    reference = np.load(path.with_suffix(".npz"))
    lm = load(path, devices=devices)
    tokens = reference["tokens"].tolist()
    assert nmse(lm.logits(tokens), reference["logits"]) <= 1e-6
    one_by_one = lm.logits(tokens[:10], one_by_one=True)
    assert nmse(one_by_one, reference["logits"][:10]) <= 1e-6
