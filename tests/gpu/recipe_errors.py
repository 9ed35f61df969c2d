"""The errors of a tiny model on the devices that JAX finds, in a process of its own.

  python tests/gpu/recipe_errors.py tests/data/arch/llama.json

prints, as the last line, a JSON object: `errors`, the NMSE of each mode, and `devices`.
`start` does so for many recipes at a time, since compilation takes nearly all of it, and what stops
one process does not stop the others.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from helpers import DATA, nmse, write_recipe

import jaxsplit

REFERENCE = os.environ.get("JAXSPLIT_REFERENCE")
RECIPES = Path(REFERENCE) if REFERENCE else DATA / "arch"

_TIMEOUT = 600  # seconds

LONG = 100
"""Tokens of the long prompt, at least: more rows than the kernels for tens of rows multiply."""


def types(recipe: dict) -> dict[str, str]:
    """The GGML type of each tensor, as `write_recipe` takes it: Q8_0 for matrices whose rows are
    whole blocks of it. Norms, routers and convolutions are in float32 in all files."""
    kept = ("norm.weight", "inp.weight", "inp_shexp.weight", "conv1d.weight")

    def fits(spec: dict) -> bool:
        weight = spec["name"].endswith(".weight") and not spec["name"].endswith(kept)
        return weight and len(spec["shape"]) > 1 and spec["shape"][0] % 32 == 0

    found = {spec["name"]: "Q8_0" if fits(spec) else "F32" for spec in recipe["tensors"]}
    # A whole name, before others that end like it.
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def error(actual: np.ndarray, expected: np.ndarray, *, routed: bool) -> float:
    """NMSE of logits `[time, vocab]`; where experts are chosen, the median over the tokens: an
    undecided router may choose another expert, which changes a token and those after it."""
    if routed:
        return float(np.median([nmse(*of) for of in zip(actual, expected, strict=True)]))
    return nmse(actual, expected)


def errors(recipe: dict, reference: Path | None) -> dict[str, float]:
    """NMSE by mode: bfloat16 with kernels against float32 without, weights in Q8_0. On a GPU, all
    kernels in CUDA C++ are a mode, too.

    Args:
      recipe: of the model.
      reference: logits of llama.cpp for the weights in float32, which adds a mode without kernels.
    """
    tokens = recipe["tokens"]
    long = (tokens * LONG)[: max(LONG, len(tokens))]
    routed = any(key.endswith(".expert_count") and n for key, _, n in recipe["metadata"])
    on_cpu = jax.default_backend() == "cpu"
    devices = 2 if on_cpu else len(jax.devices())
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path, exact = Path(folder) / "quantized.gguf", Path(folder) / "exact.gguf"
        write_recipe(recipe, path, types(recipe))
        # Other processes need memory, too; and one sequence needs few programs.
        small = {"ctx_size": 256, "cache_tokens": 512, "slots": 1}
        plain = {"split_mode": "none", "dtype": "float32", "kernels": "xla", **small}
        if reference is not None:
            write_recipe(recipe, exact)
            logits = jaxsplit.load(exact, **plain).logits(tokens)
            found["none llama.cpp"] = nmse(logits, np.load(reference))
        expected = jaxsplit.load(path, **plain).logits(long)
        usual = "interpret" if on_cpu else "auto"
        modes = [("none", "none", 1, usual), ("graph", "graph", devices, usual)]
        modes = modes[: min(devices, 2)] + [("cuda", "none", 1, "cuda")] * (not on_cpu)
        for mode, split, count, kernels in modes:
            given = {"split_mode": split, "devices": count, "kernels": kernels}
            lm = jaxsplit.load(path, dtype="bfloat16", **given, **small)
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


def start(threads: ThreadPoolExecutor, names: Iterable[str]) -> dict[str, Future]:
    """Begins to measure recipes: the future result of `errors` for each."""
    return {name: threads.submit(_run, name) for name in names}


def _run(name: str) -> dict[str, float]:
    arguments = [str(RECIPES / f"{name}.json")]
    if REFERENCE:
        arguments.append(str(RECIPES / f"{name}.npy"))
    tests = Path(__file__).parent.parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    # Small matrices gain nothing from tuning, which compiles each of them many times.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    if done.returncode:
        raise AssertionError(f"recipe_errors.py {' '.join(arguments)}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])["errors"]


if __name__ == "__main__":
    main(*sys.argv[1:])
