"""Pallas and its Triton backend, imported when a kernel is first traced.

JAX has deprecated the backend and will remove it; without it, XLA does the work of all kernels.
"""

import importlib
import importlib.util
from typing import Any

import jax


class _Lazy:
    """A module that is imported when something of it is first used."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


pl, plgpu = _Lazy("jax.experimental.pallas"), _Lazy("jax.experimental.pallas.triton")

ArrayRef = jax.Ref | jax.Array
"""A reference in a kernel. Dataclasses of arrays, which declare arrays, hold references there."""


def has_triton() -> bool:
    """Whether this JAX has Pallas with Triton."""
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return False
    return True
