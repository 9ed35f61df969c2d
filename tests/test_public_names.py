"""What the packages export, and when they import it."""

import importlib
import subprocess
import sys

import pytest


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
