"""GGUF language models over all the accelerators that a person has.

>>> import jaxsplit
>>> lm = jaxsplit.load("model.gguf", split_mode="graph")
>>> lm.generate("Once upon a time", n_predict=64, temperature=0.0)
"""

from typing import TYPE_CHECKING

from jaxsplit.lazy import importer

if TYPE_CHECKING:
    from jaxsplit.engine import SamplingConfig
    from jaxsplit.engine.stream import Stream
    from jaxsplit.errors import JaxsplitError
    from jaxsplit.llm import LM, load
    from jaxsplit.models import Decoder, ModelConfig
    from jaxsplit.text.grammar import Grammar

__version__ = "0.1.0"

__all__ = [
    "LM",
    "Decoder",
    "Grammar",
    "JaxsplitError",
    "ModelConfig",
    "SamplingConfig",
    "Stream",
    "load",
]

__getattr__ = importer(
    __name__,
    engine=["SamplingConfig", "Stream"],
    errors=["JaxsplitError"],
    llm=["LM", "load"],
    models=["Decoder", "ModelConfig"],
    text=["Grammar"],
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
