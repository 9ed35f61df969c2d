"""The engine: compiled prefill and decode over a sharded cache, sampling on the devices."""

from jaxsplit.config import SamplingConfig
from jaxsplit.engine.compile_timer import compile_seconds
from jaxsplit.engine.engine import Engine
from jaxsplit.engine.request import EngineThread, Request
from jaxsplit.engine.runner import compiler_options
from jaxsplit.engine.stream import Stream

__all__ = [
    "Engine",
    "EngineThread",
    "Request",
    "SamplingConfig",
    "Stream",
    "compile_seconds",
    "compiler_options",
]
