"""Every architecture: bfloat16 with kernels against float32 without, the same quantized weights.

JAXSPLIT_WRITE_BOUNDS=FILE writes twice what is measured, as the new bounds. JAXSPLIT_REFERENCE=DIR
takes recipes from there, and also checks models in float32 against its logits of llama.cpp.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import DATA

HERE = Path(__file__).parent
ON_CPU = "JAXSPLIT_GPU_LANE_ON_CPU" in os.environ
REFERENCE = os.environ.get("JAXSPLIT_REFERENCE")
RECIPES = Path(REFERENCE) if REFERENCE else DATA / "arch"
NAMES = sorted(path.stem for path in RECIPES.glob("*.json"))
FEW = ["gemma2", "llama", "qwen3moe"]
"""Recipes of the check on CPUs, where interpreted kernels take long to compile."""
TIMEOUT = 300
"""Seconds of a recipe, of which compilation takes nearly all."""
BOUNDS = json.loads((HERE / "bounds.json").read_text())
LARGEST = {"llama.cpp": 1e-6, "prompt": 2e-2, "one by one": 5e-2}
"""What no bound may exceed, and the bound of recipes that have none, by how the mode's name ends."""


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest):
    """The results of each recipe that is asked for, all of them under way at once."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    workers = int(os.environ.get("JAXSPLIT_GPU_WORKERS", os.cpu_count()))
    with ThreadPoolExecutor(workers) as threads:
        yield {name: threads.submit(_run, name) for name in names}


def _run(name: str) -> dict:
    """The errors of a recipe."""
    arguments = [str(RECIPES / f"{name}.json")]
    if REFERENCE:
        arguments.append(str(RECIPES / f"{name}.npy"))
    paths = [str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    # Small matrices gain nothing from tuning, which compiles each of them many times.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    done = subprocess.run(
        [sys.executable, str(HERE / "recipe_errors.py"), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    if done.returncode:
        raise AssertionError(f"recipe_errors.py {' '.join(arguments)}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])["errors"]


@pytest.fixture(scope="module")
def new_bounds():
    """What is measured, twice, written at the end if the file is asked for."""
    bounds = {name: dict(modes) for name, modes in BOUNDS.items()}
    yield bounds
    if path := os.environ.get("JAXSPLIT_WRITE_BOUNDS"):
        Path(path).write_text(json.dumps(bounds, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize("name", FEW if ON_CPU else NAMES)
def test_kernels_compute_what_xla_does(
    name: str, measured: dict[str, Future], new_bounds: dict, bounded
):
    errors = measured[name].result()
    ok = []
    for mode, error in errors.items():
        largest = next(value for end, value in LARGEST.items() if mode.endswith(end))
        bound = min(largest, BOUNDS.get(name, {}).get(mode, largest))
        ok.append(bounded(name, mode, error, bound))
        new_bounds.setdefault(name, {})[mode] = float(f"{2 * error:.1e}")
    assert all(ok), errors


def test_bounds_are_of_recipes_that_exist():
    assert set(BOUNDS) <= {path.stem for path in (DATA / "arch").glob("*.json")}
