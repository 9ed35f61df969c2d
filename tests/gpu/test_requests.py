"""Requests with grammars and adapters beside others, with kernels, on one GPU and on all."""

import json
import re

import jax
import numpy as np
import pytest
from adapter_files import random_factors, shapes_of, write_adapter
from gpu import internals
from helpers import nmse
from tiny import write_tiny_model

import jaxsplit

SIZES = {"embed": 256, "heads": 4, "kv_heads": 4, "mlp": 512}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
DIGITS = "[0-9]{3,12}"


def devices(mode: str) -> int:
    everywhere = 2 if internals.INTERPRET else len(jax.devices())
    return everywhere if mode == "graph" else 1


def kernels() -> str:
    return "interpret" if internals.INTERPRET else "triton"


@pytest.mark.parametrize("mode", ["none", "graph"])
def test_texts_satisfy_their_grammars(tmp_path, mode):
    """Rows with and without grammars take their steps together."""
    pytest.importorskip("llguidance")
    path = write_tiny_model(tmp_path / "tiny.gguf", kind="Q8_0", **SIZES)
    cache = {"slots": 8, "cache_tokens": 2048}
    lm = jaxsplit.load(
        path, split_mode=mode, devices=devices(mode), dtype="bfloat16", kernels=kernels(), **cache
    )
    grammars = [
        jaxsplit.Grammar("regex", DIGITS),
        jaxsplit.Grammar("json_schema", json.dumps(SCHEMA)),
        None,
    ]
    running = [
        lm.submit("Tell the", 120, grammar=grammars[i % 3], temperature=1.0, seed=i)
        for i in range(6 if internals.INTERPRET else 24)
    ]
    for i, one in enumerate(running):
        text = one.result().text
        if i % 3 == 0:
            assert re.fullmatch(DIGITS, text), text
        if i % 3 == 1:
            found = json.loads(text)
            assert set(found) == {"name", "age"} and type(found["age"]) is int, found
            assert type(found["name"]) is str and len(found["name"]) <= 9, found


@pytest.mark.parametrize("mode", ["none", "graph"])
def test_adapters(tmp_path, bounded, mode):
    """The logits of a model with an adapter, against float32 without kernels."""
    path = write_tiny_model(tmp_path / "tiny.gguf", kind="F32", **SIZES)
    shapes = {n: s for n, s in shapes_of(path).items() if n.startswith("blk.")}
    adapter = write_adapter(tmp_path / "adapter.gguf", random_factors(shapes, 1))
    quantized = write_tiny_model(tmp_path / "quantized.gguf", kind="Q8_0", **SIZES)
    tokens = np.arange(100) % 200
    lora = {"lora": f"{adapter}:0.5", "split_mode": "none", "slots": 1, "cache_tokens": 512}
    expected = jaxsplit.load(quantized, dtype="float32", kernels="xla", **lora).logits(tokens)
    lora |= {"split_mode": mode, "devices": devices(mode)}
    lm = jaxsplit.load(quantized, dtype="bfloat16", kernels=kernels(), **lora)
    for way, found in (
        ("prompt", lm.logits(tokens)),
        ("token", lm.logits(tokens[:16], one_by_one=True)),
    ):
        assert bounded("adapter", f"{mode} {way}", nmse(found, expected[: len(found)]), 5e-4)
