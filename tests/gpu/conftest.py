"""Tests on GPUs, which are left out unless `-m gpu` asks for them (docs/testing.md).

With JAXSPLIT_GPU_LANE_ON_CPU=1 they run on CPUs, kernels interpreted: a check of the tests.
"""

import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The processes that run recipes need some of the memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import pytest
from gpu import internals
from gpu import recipe_errors as recipe_process

HERE = Path(__file__).parent
ON_CPU = "JAXSPLIT_GPU_LANE_ON_CPU" in os.environ
SEED = int(os.environ.get("JAXSPLIT_TEST_SEED", secrets.randbits(32)))


def _here(item: pytest.Item) -> bool:
    return HERE in item.path.parents


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests in this folder, and skips them where kernels do not run. Those of the
    peer-to-peer protocols come first, since others have processes that share the GPUs with them."""
    items.sort(key=lambda item: _here(item) and item.path.stem != "test_p2p")
    here = [item for item in items if _here(item)]
    wanted = config.getoption("markexpr") == "gpu"
    reason = _unable() if wanted and here else None
    for item in here:
        item.add_marker("gpu")
        if reason:
            item.add_marker(pytest.mark.skip(reason))


def _unable() -> str | None:
    """Why no kernels run here."""
    if ON_CPU or internals.kernels_run(jax.devices()[0]):
        return None
    found = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    return f"the GPU tests need a GPU that runs Triton kernels; JAX finds: {found}"


@pytest.fixture(scope="session")
def recipe_errors(request: pytest.FixtureRequest):
    """The errors of each recipe that is asked for, all of them under way at once."""
    items = (item for item in request.session.items if item.path.stem == "test_recipes")
    names = [item.callspec.params["name"] for item in items if hasattr(item, "callspec")]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield recipe_process.start(threads, names)


@pytest.fixture(autouse=True, scope="module")
def _recipes_meanwhile(request: pytest.FixtureRequest) -> None:
    """Recipes are measured while other tests run, but for those that need the GPUs alone."""
    if request.path.stem != "test_p2p":
        request.getfixturevalue("recipe_errors")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that are others in each run; JAXSPLIT_TEST_SEED repeats them."""
    print(f"JAXSPLIT_TEST_SEED={SEED}")
    return np.random.default_rng([SEED, *request.node.name.encode()])


@pytest.fixture
def bounded(request: pytest.FixtureRequest):
    """`bounded(what, mode, error, bound)`: notes an error for the table at the end; whether it is
    within its bound. `provisional`: the bound is not from a measurement."""

    def note(
        what: str, mode: str, error: float, bound: float, *, provisional: bool = False
    ) -> bool:
        row = {"what": what, "mode": mode, "error": float(error), "bound": bound}
        row["provisional"] = provisional
        request.node.user_properties.append(("bounded", row))
        return bool(error <= bound)  # not a number is not

    return note


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """The table of errors, also as JSON in the file JAXSPLIT_GPU_REPORT."""
    skipped = {
        report.longrepr[2]
        for report in terminalreporter.stats.get("skipped", ())
        if isinstance(report.longrepr, tuple) and "GPU" in report.longrepr[2]
    }
    for reason in sorted(skipped):
        terminalreporter.write_line(reason)
    rows = [
        row
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, row in report.user_properties
        if name == "bounded"
    ]
    if not rows:
        return
    devices = [device.device_kind for device in jax.devices()]
    found = {"jax": jax.__version__, "devices": devices, "seed": SEED, "rows": rows}
    terminalreporter.section(f"jax {jax.__version__}, {len(devices)} x {devices[0]}, seed {SEED}")
    # A table for what has the same modes; a cell is NMSE/bound.
    tables: dict[tuple[str, ...], dict[str, list[dict]]] = {}
    by_what: dict[str, list[dict]] = {}
    for row in rows:
        by_what.setdefault(row["what"], []).append(row)
    for what, of_what in by_what.items():
        tables.setdefault(tuple(row["mode"] for row in of_what), {})[what] = of_what
    for modes, of_modes in tables.items():
        width = max(map(len, of_modes))
        head = "".join(f"{mode:>18}" for mode in modes)
        terminalreporter.write_line(f"{'NMSE/bound':{width}}{head}")
        for what, of_what in of_modes.items():
            cells = "".join(
                f"{row['error']:9.1e}/{row['bound']:.1e}{'?' if row['provisional'] else ' '}"
                for row in of_what
            )
            bad = not all(row["error"] <= row["bound"] for row in of_what)
            terminalreporter.write_line(f"{what:{width}}{cells}", red=bad)
    new: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["provisional"]:
            new.setdefault(row["what"], {})[row["mode"]] = float(f"{2 * row['error']:.1e}")
    if new:
        terminalreporter.write_line("?: not measured before. For bounds.json, twice the errors:")
        for what, modes in new.items():
            terminalreporter.write_line(f"{json.dumps(what)}: {json.dumps(modes)}")
    if path := os.environ.get("JAXSPLIT_GPU_REPORT"):
        Path(path).write_text(json.dumps(found, indent=1))
