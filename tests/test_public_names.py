"""What the packages export, and when they import it."""

import importlib
import subprocess
import sys

import pytest
from helpers import quick_environment
from tiny import write_tiny_model

import jaxsplit
from jaxsplit import context, llm
from jaxsplit.errors import JaxsplitError


@pytest.mark.parametrize("package", ["jaxsplit", "jaxsplit.plan"])
def test_all_public_names_are_there(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for name in module.__all__:
        assert name.isupper() or getattr(module, name).__module__.startswith("jaxsplit")
    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        _ = module.missing


def test_the_command_line_starts_without_jax():
    """So that mistakes in flags are told, and Ctrl-C handled, at once."""
    program = (
        "import jaxsplit.generate, jaxsplit.plan, sys\n"
        "assert not {'jax', 'jaxlib', 'flax', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("names") / "tiny.gguf", kind="Q8_0")


def test_without_kernels_no_triton_is_imported(model):
    """What Pallas imports of it takes time, and this JAX may have none."""
    program = (
        "import jaxsplit, sys\n"
        "lm = jaxsplit.load(sys.argv[1], ctx_size=64, split_mode='none')\n"
        "assert lm.generate('The', 2, temperature=0.0)\n"
        "assert not [m for m in sys.modules if 'pallas' in m and 'triton' in m]\n"
    )
    environment = quick_environment() | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program, model], check=True, env=environment)


@pytest.mark.usefixtures("quick_compilation")
def test_without_pallas_xla_does_the_work(monkeypatch, model):
    """As in a JAX that has removed it: on a GPU where kernels would run, one line says so."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.setattr(context, "compute_capability", lambda _: 9.0)
    monkeypatch.setattr(llm, "compute_capability", lambda _: 9.0)
    with pytest.raises(JaxsplitError, match="kernels=triton does not run on cpu .*kernels=auto"):
        jaxsplit.load(model, kernels="triton", split_mode="none")
    lm = jaxsplit.load(model, split_mode="none", ctx_size=64, dtype="bfloat16")
    assert lm.describe().endswith(" | XLA runs everything: this JAX has no Pallas-Triton")
    assert not lm.engine.runners[0].policy.kernels
    assert lm.generate("The", 2, temperature=0.0)
