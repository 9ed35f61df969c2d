"""Requests from any thread, served one at a time on the thread that runs the engine."""

import atexit
import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxsplit.config import SamplingConfig
from jaxsplit.engine.engine import Engine, never_cancelled
from jaxsplit.engine.sampling import NOT_FINITE
from jaxsplit.errors import JaxsplitError


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and the tokens that follow it.

    Attributes:
      prompt: ids, 1 to the context's length.
      sampling: config of the sampler.
      limit: maximum number of tokens; infinity: until the context is full.
      tokens: ids decoded so far, the stop token included.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig
    limit: float
    tokens: list[int] = dataclasses.field(default_factory=list)


_MIN_TURN = 32
"""Tokens that a request decodes at least when its turn comes again."""


def _serve(calls: "queue.SimpleQueue[Callable | None]") -> None:
    """Runs calls until there is None."""
    while True:
        call = calls.get()
        if call is None:
            return
        call()
        del call  # frees what it refers to while this waits for the next


_threads: "weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue]" = (
    weakref.WeakKeyDictionary()
)


@atexit.register
def _end_threads() -> None:
    """JAX must not run on a thread while the interpreter shuts down."""
    for thread, calls in [*_threads.items()]:
        calls.put(None)
        thread.join()


class EngineThread:
    """Runs an engine on its own thread, for callers on any thread.

    Calls run one at a time. An exception that a signal raises in a caller, such as
    `KeyboardInterrupt`, never interrupts the engine: the caller stops waiting, and the engine's
    thread cancels the call before its next chunk or step.

    Attributes:
      turn: a lock; a caller holds it to make several calls without others in between.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._calls: queue.SimpleQueue[Callable | None] = queue.SimpleQueue()
        self._current: Request | None = None  # the cache holds its tokens
        self.turn = threading.RLock()
        name, arguments = "jaxsplit-engine", (self._calls,)
        thread = threading.Thread(target=_serve, args=arguments, name=name, daemon=True)
        thread.start()
        weakref.finalize(self, self._calls.put, None).atexit = False
        _threads[thread] = self._calls

    def _call(self, function: Callable, *arguments: Any) -> Any:
        """Runs a function on the engine's thread; cancels it if the caller stops waiting.

        Locks written in Python, as executors and events have, may stay locked when a signal raises
        in them. A `SimpleQueue` has none.
        """
        cancelled: list[bool] = []
        reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            self._engine.is_cancelled = lambda: bool(cancelled)
            try:
                reply.put((function(*arguments), None))
            except BaseException as error:
                reply.put((None, error))
            finally:
                self._engine.is_cancelled = never_cancelled

        with self.turn:
            try:
                self._calls.put(run)
                value, error = reply.get()
            except BaseException:
                cancelled.append(True)
                raise
        try:
            if error is not None:
                raise error
            return value
        finally:
            del error  # its traceback refers to this frame

    def logits(self, tokens: Sequence[int], *, one_by_one: bool = False) -> np.ndarray:
        """As `Engine.logits`."""
        return self._call(self._logits, tokens, one_by_one)

    def _logits(self, tokens: Sequence[int], one_by_one: bool) -> np.ndarray:
        self._current = None
        return self._engine.logits(tokens, one_by_one=one_by_one)

    def advance(self, request: Request, count: int, length: int) -> bool:
        """Decodes the next tokens of a request.

        If another call has used the cache since, the request is decoded again from its prompt,
        which gives the same tokens, and then at least `_MIN_TURN` tokens further, so that
        alternating requests do not restart for each token.

        Args:
          request: its `tokens` are extended.
          count: tokens to decode, at least 1.
          length: steps of a loop on the device.

        Returns:
          whether the request is unfinished.

        Raises:
          JaxsplitError: logits are not finite, or decoding again gave other tokens.
        """
        return self._call(self._advance, request, count, length)

    def _advance(self, request: Request, count: int, length: int) -> bool:
        engine, before = self._engine, request.tokens
        most = min(request.limit, engine.context - len(request.prompt) + 1)
        goal = len(before) + count
        tokens = [*before]
        if self._current is not request:
            goal = max(goal, len(before) + _MIN_TURN) if before else goal
            tokens = []
        self._current = None  # until all tokens are there
        goal = min(goal, most)
        while len(tokens) < goal and not (tokens and tokens[-1] in engine.stop_ids):
            if tokens:
                row = engine.loop(min(length, goal - len(tokens)), length)[0]
                new = row[row != -1].tolist()
            else:
                engine.start(request.prompt, request.sampling)
                new = [int(engine.read(engine.tokens())[0][0])]
            if NOT_FINITE in new:
                engine.reset()
                raise JaxsplitError(
                    f"the model's logits are not finite after {len(request.prompt) + len(tokens)} "
                    "tokens: try dtype=float32; if that does not help, the file's weights are "
                    "damaged"
                )
            if not new:
                break
            tokens += new
        if tokens[: len(before)] != before:
            raise JaxsplitError(
                "another call used the model between two pieces of this text, and decoding the "
                "text again gave other tokens; generate it at once, or load the model twice"
            )
        request.tokens = tokens
        self._current = request
        return len(tokens) == goal < most and tokens[-1] not in engine.stop_ids
