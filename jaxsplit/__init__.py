"""GGUF language models over all the accelerators that a person has.

>>> import jaxsplit
>>> lm = jaxsplit.load("model.gguf", split_mode="graph")
>>> lm.generate("Once upon a time", n_predict=64, temperature=0.0)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxsplit.engine import SamplingConfig
    from jaxsplit.errors import JaxsplitError
    from jaxsplit.lm import LM, load
    from jaxsplit.models import Decoder, ModelConfig
    from jaxsplit.stream import Stream

__version__ = "0.1.0"

__all__ = ["LM", "Decoder", "JaxsplitError", "ModelConfig", "SamplingConfig", "Stream", "load"]

_MODULES = {
    "LM": "lm",
    "Decoder": "models",
    "JaxsplitError": "errors",
    "ModelConfig": "models",
    "SamplingConfig": "engine",
    "Stream": "stream",
    "load": "lm",
}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used: JAX takes a second, which --help need not wait for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
