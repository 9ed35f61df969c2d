"""Runs one tiny model on the devices that JAX finds, with kernels and without.

  python tests/gpu/recipe_errors.py tests/data/arch/llama.json

prints, as the last line, a JSON object: `errors`, the NMSE of each mode, and `devices`.
`test_recipes.py` starts it once for each recipe, so that many compile at the same time and none
sees the errors of another.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from helpers import nmse, write_recipe

import jaxsplit

LONG = 100
"""Tokens of the long prompt: more rows than the kernels for tens of rows multiply."""


def quantizable(recipe: dict) -> dict[str, str]:
    """The matrices whose rows are whole blocks of Q8_0, as `write_recipe` takes them. Converters
    keep norms, routers and convolutions in float32."""
    kept = ("norm.weight", "inp.weight", "inp_shexp.weight", "conv1d.weight")
    return {
        spec["name"]: "Q8_0"
        for spec in recipe["tensors"]
        if spec["name"].endswith(".weight")
        and not spec["name"].endswith(kept)
        and len(spec["shape"]) > 1
        and spec["shape"][0] % 32 == 0
    }


def error(actual: np.ndarray, expected: np.ndarray, *, routed: bool) -> float:
    """NMSE of logits `[time, vocab]`; where experts are chosen, the median over the tokens: an
    undecided router may choose another expert, which changes a token and those after it."""
    if routed:
        return float(np.median([nmse(*of) for of in zip(actual, expected, strict=True)]))
    return nmse(actual, expected)


def errors(recipe: dict, reference: Path | None) -> dict[str, float]:
    """NMSE by mode: bfloat16 with kernels against float32 without, weights in Q8_0.

    Args:
      recipe: of the model.
      reference: logits of llama.cpp for the weights in float32, which adds a mode without kernels.
    """
    tokens = recipe["tokens"]
    long = (tokens * LONG)[:LONG]
    routed = any(key.endswith(".expert_count") and n for key, _, n in recipe["metadata"])
    on_cpu = jax.default_backend() == "cpu"
    devices = 2 if on_cpu else len(jax.devices())
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def load(quantize: dict[str, str], **options) -> jaxsplit.LM:
            path = Path(folder) / f"{len(quantize)}.gguf"
            if not path.exists():
                write_recipe(recipe, path, quantize)
            return jaxsplit.load(path, ctx_size=256, **options)

        plain = {"split_mode": "none", "dtype": "float32", "kernels": "xla"}
        if reference is not None:
            logits = load({}, **plain).logits(tokens)
            found["none llama.cpp"] = nmse(logits, np.load(reference))
        quantize = quantizable(recipe)
        expected = load(quantize, **plain).logits(long)
        kernels = {"dtype": "bfloat16", "kernels": "interpret" if on_cpu else "triton"}
        for mode in ("none", "graph") if devices > 1 else ("none",):
            count = devices if mode == "graph" else 1
            lm = load(quantize, split_mode=mode, devices=count, **kernels)
            for way, fed, one_by_one in (
                ("prompt", tokens, False),
                ("long prompt", long, False),
                ("one by one", tokens[:12], True),
            ):
                logits = lm.logits(fed, one_by_one=one_by_one)
                found[f"{mode} {way}"] = error(logits, expected[: len(fed)], routed=routed)
    return found


def main(path: str, reference: str | None = None) -> None:
    """Prints the errors of the recipe in a file."""
    recipe = json.loads(Path(path).read_text())
    devices = [device.device_kind for device in jax.devices()]
    found = errors(recipe, Path(reference) if reference else None)
    print(json.dumps({"errors": found, "devices": devices}))


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    main(*sys.argv[1:])
