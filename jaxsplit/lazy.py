"""Packages whose public names are imported when they are first used.

JAX takes a second to import, which `--help`, a mistake in a flag or Ctrl-C need not wait for.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def importer(package: str, **modules: list[str]) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of a package.

    Args:
      package: its `__name__`.
      **modules: the public names that each of its modules has.
    """
    homes = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        elif not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}"):
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return get
