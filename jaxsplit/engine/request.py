"""What a caller wants of the engine, and what has come of it."""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from jaxsplit.config import SamplingConfig
from jaxsplit.text.grammar import Grammar

STOP, LENGTH, CONTEXT, CANCELLED, DEADLINE = "stop", "length", "context", "cancelled", "deadline"


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, before any sampling option.

    Attributes:
      token: its id.
      logprob: natural logarithm of its probability.
      top: ids and log-probabilities of the likeliest tokens at its place, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Timings:
    """When things happened to a request: seconds of `time.perf_counter`, 0 if they did not.

    Attributes:
      submitted: it was handed in.
      started: the first chunk of its prompt was enqueued.
      first_token, last_token: these tokens arrived on the host.
    """

    submitted: float = 0.0
    started: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclasses.dataclass(frozen=True)
class RequestSpec:
    """What is wanted.

    Attributes:
      prompt: ids, 1 to the context's length.
      sampling: how tokens are chosen.
      max_tokens: most tokens to generate; infinity: until the text or the context ends.
      stop_ids: tokens that end the text.
      priority: requests of a higher one go first.
      timeout: seconds after which it ends, however far it is; None: never.
      block: tokens that are decoded before the host reads them, at most; None: as many as suit.
      prompt_logprobs: the prompt's log-probabilities are wanted.
      outputs: `tokens`; or, of each token of the prompt, `logits` or the `hidden` state.
      one_by_one: read the prompt one token at a time.
      share_prefix: use what the cache has of the prompt.
      grammar: what the text must satisfy.
      lora_scales: of each adapter; None: those that they were loaded with.
    """

    prompt: Sequence[int]
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    max_tokens: float = math.inf
    stop_ids: Collection[int] = ()
    priority: int = 0
    timeout: float | None = None
    block: int | None = None
    prompt_logprobs: bool = False
    outputs: str = "tokens"
    one_by_one: bool = False
    share_prefix: bool = True
    grammar: Grammar | None = None
    lora_scales: tuple[float, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self) | {"stop_ids": sorted(self.stop_ids)}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "RequestSpec":
        """The inverse of `to_json`."""
        grammar = given["grammar"] and Grammar(**given["grammar"])
        sampling, scales = SamplingConfig(**given["sampling"]), given["lora_scales"]
        scales = None if scales is None else tuple(scales)
        changed = {"sampling": sampling, "grammar": grammar, "lora_scales": scales}
        return cls(**given | changed)

    @property
    def wanted(self) -> str:
        """What its prompt is read for, as in `StageRunner.prefill`."""
        return self.outputs if self.reads_only else "logprobs" if self.prompt_logprobs else "last"

    @property
    def reads_only(self) -> bool:
        """Whether no tokens are wanted."""
        return self.outputs != "tokens"


@dataclasses.dataclass(frozen=True)
class Progress:
    """News of a request.

    Attributes:
      tokens: ids that have arrived, the stop token included.
      logprobs: of these, if wanted.
      finish_reason: `stop`, `length`, `context`, `cancelled` or `deadline`; None: it goes on.
      error: why it failed.
    """

    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None
    error: BaseException | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


class Request:
    """A request and what has come of it. Made by `Scheduler.submit`.

    Attributes:
      spec: what is wanted.
      id: its number.
      tokens: ids generated so far, the stop token included.
      cached_tokens: tokens of the prompt that were in the cache; -1: it has not begun.
      prompt_logprobs: of the prompt's tokens but the first, if wanted.
      outputs: logits, float32 `[time, vocab]`, or hidden states, `[time, embed]`, if wanted, once
        it is done.
      timings: when things happened.
    """

    def __init__(self, spec: RequestSpec, number: int, cancel: Callable[["Request"], None]):
        self.spec, self.id = spec, number
        self.tokens: list[int] = []
        self.cached_tokens = -1
        self.prompt_logprobs: list[TokenLogprob] = []
        self.outputs: np.ndarray | None = None
        self.timings = Timings(submitted=time.perf_counter())
        self._cancel = cancel
        self._news: queue.SimpleQueue[Progress] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._listener: Callable[[], None] | None = None
        self.done = False

    def cancel(self) -> None:
        """Ends it, at once."""
        if not self.done:
            self._cancel(self)

    def next(self) -> Progress:
        """Waits for news. Raises what it failed with.

        A `SimpleQueue` has no lock written in Python, which might stay locked if a signal raises an
        exception here.
        """
        return self._checked(self._news.get())

    def next_now(self) -> Progress | None:
        """News, if there are any."""
        return None if self._news.empty() else self._checked(self._news.get_nowait())

    @staticmethod
    def _checked(news: Progress) -> Progress:
        if news.error is None:
            return news
        try:
            raise news.error
        finally:
            del news  # its traceback refers to this frame

    def listen(self, listener: Callable[[], None]) -> None:
        """Calls a function whenever there are news, on the engine's thread."""
        self._listener = listener

    def deliver(self, news: Progress, **timings: float) -> None:
        """Hands over news, on the engine's thread."""
        self.tokens += news.tokens
        self.timings = dataclasses.replace(self.timings, **timings)
        self.done |= news.last
        self._news.put(news)
        if self._listener is not None:
            self._listener()


def token_logprobs(outputs: Any, at: tuple[int, ...], count: int) -> TokenLogprob:
    """One entry of `steps.Outputs` in NumPy, with `count` alternatives."""
    top = zip(outputs.top_ids[at][:count], outputs.top_logprobs[at][:count], strict=True)
    return TokenLogprob(
        int(outputs.tokens[at]),
        float(outputs.logprobs[at]),
        tuple((int(token), float(logprob)) for token, logprob in top),
    )
