"""The engine: compiled programs over a sharded cache, and a scheduler of requests."""

from jaxsplit.config import SamplingConfig
from jaxsplit.engine.closed_batch import ClosedBatch
from jaxsplit.engine.compile_timer import compile_seconds
from jaxsplit.engine.engine import Engine
from jaxsplit.engine.request import Request, RequestSpec, TokenLogprob
from jaxsplit.engine.runner import compiler_options
from jaxsplit.engine.scheduler import Scheduler, Statistics
from jaxsplit.engine.stream import Event, Generation, Stream
from jaxsplit.engine.thread import SchedulerThread

__all__ = [
    "ClosedBatch",
    "Engine",
    "Event",
    "Generation",
    "Request",
    "RequestSpec",
    "SamplingConfig",
    "Scheduler",
    "SchedulerThread",
    "Statistics",
    "Stream",
    "TokenLogprob",
    "compile_seconds",
    "compiler_options",
]
