"""Generated text, from the tokens of a request."""

import asyncio
import contextlib
import dataclasses
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from jaxsplit.engine.compile_timer import compile_seconds
from jaxsplit.engine.engine import Engine
from jaxsplit.engine.request import Progress, Request, TokenLogprob
from jaxsplit.text import Tokenizer

STOP_STRING = "stop string"

_REASONS = {
    "stop": "end of text",
    "length": "n_predict",
    "context": "context full",
    "cancelled": "interrupted",
}


@dataclasses.dataclass(frozen=True)
class Event:
    """A piece of a generation.

    Attributes:
      text: what can be shown by now; a possible start of a stop string is held back.
      tokens: ids that have arrived, the stop token included.
      logprobs: of these tokens, if wanted.
      finish_reason: None while it goes on; then `stop` (a stop token or string), `length`
        (`n_predict` tokens), `context` (it is full), `cancelled` or `deadline`.
    """

    text: str
    tokens: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None


class Generation:
    """A text that is being generated: an iterator of events, for `for` and for `async for`. Made by
    `LM.submit`.

    A generation that is dropped is cancelled.

    Attributes:
      request: its tokens, log-probabilities and timings.
      text: so far.
      finish_reason: as in `Event`; `error`: it failed, which its iterator has raised.
      stop_string: the one that ended it, or None.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer | None,
        *,
        stop: tuple[str, ...] = (),
        show_special: str = "template",
    ):
        self.request = request
        self.text = ""
        self.finish_reason: str | None = None
        self.stop_string: str | None = None
        self._stop, self._held = stop, ""
        self._decoder = None
        if tokenizer is not None:
            self._decoder = tokenizer.stream(show_special=show_special, continuation=True)
        weakref.finalize(self, request.cancel).atexit = False

    def cancel(self) -> None:
        """Ends it, at once: the next event is the last one."""
        self.request.cancel()

    def __iter__(self) -> Iterator[Event]:
        while self.finish_reason is None:
            yield self._event(self._taken(self.request.next))

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(ready.set)

        self.request.listen(wake)
        while self.finish_reason is None:
            event = self.next_now()
            if event is None:
                await ready.wait()
                ready.clear()
                continue
            yield event

    def next_now(self) -> Event | None:
        """The next event, if it is there."""
        news = self._taken(self.request.next_now)
        return None if news is None else self._event(news)

    def result(self) -> "Generation":
        """Waits until it is finished."""
        for _ in self:
            pass
        return self

    def _taken(self, take: Callable[[], Any]) -> Any:
        """News; once the request has failed, none follow."""
        try:
            return take()
        except Exception:
            self.finish_reason = "error"
            raise

    def _event(self, news: Progress) -> Event:
        """The text of some tokens."""
        reason, ready, count = news.finish_reason, "", 0
        for token in news.tokens:
            count += 1
            if self._decoder is None or token in self.request.spec.stop_ids:
                continue
            more, self._held, found = _split_at_stop(
                self._held + self._decoder.push(token), self._stop
            )
            ready += more
            if found is not None:
                self.stop_string, reason = found, "stop"
                self.request.cancel()
                break
        if reason is not None and self.stop_string is None:
            rest = self._held + (self._decoder.flush() if self._decoder else "")
            more, self._held, self.stop_string = _split_at_stop(rest, self._stop)
            ready += more + self._held
            reason = reason if self.stop_string is None else "stop"
        self.text += ready
        self.finish_reason = reason
        return Event(ready, news.tokens[:count], news.logprobs[:count], reason)


class Stream(Iterator[str]):
    """An iterator over generated text. Made by `LM.stream`.

    It begins when its first piece is taken.

    Attributes:
      prompt_tokens: ids of the prompt.
      tokens: ids generated so far, the stop token included.
      stop_reason: `end of text`, `stop string`, `n_predict`, `context full`, `deadline`, or
        `interrupted` by an exception; None while unfinished.
      cached_tokens: tokens of the prompt that were in the cache and were not read again.
      first_token_seconds: from the start to the first token, with compilation.
      decode_seconds: from the first token to the last, without compilation.
      compile_seconds: spent on compiling programs missing from the compilation cache.
    """

    def __init__(self, engine: Engine, prompt_tokens: list[int], begin: Callable[[], Generation]):
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.stop_reason: str | None = None
        self.cached_tokens = 0
        self.first_token_seconds = 0.0
        self.decode_seconds = 0.0
        self.compile_seconds = 0.0
        self._prompt_seconds = 0.0
        self._engine = engine
        self._pieces = self._run(begin)

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException:
            self.stop_reason = "interrupted"
            raise

    def timings(self) -> str:
        """Times, rates and memory in one line."""
        engine, prompt, generated = self._engine, len(self.prompt_tokens), len(self.tokens)
        read = prompt - self.cached_tokens
        prompt_rate = read / self._prompt_seconds if self._prompt_seconds else 0.0
        rate = (generated - 1) / self.decode_seconds if self.decode_seconds else 0.0
        cached = f" ({self.cached_tokens} cached)" if self.cached_tokens else ""
        return (
            f"first token {self.first_token_seconds:.2f} s | "
            f"compiling, of all, {self.compile_seconds:.2f} s | "
            f"prompt {prompt} tokens{cached}, {prompt_rate:.1f} tokens/s | "
            f"generated {generated} tokens, {rate:.1f} tokens/s | per device "
            f"{engine.weight_bytes / 1e6:.1f} MB weights, {engine.cache_bytes / 1e6:.1f} MB cache"
        )

    def _run(self, begin: Callable[[], Generation]) -> Iterator[str]:
        started, compiled = time.perf_counter(), compile_seconds()
        generation = begin()
        try:
            for event in generation:
                elapsed = time.perf_counter() - started
                self.compile_seconds = min(compile_seconds() - compiled, elapsed)
                if not self.tokens:
                    self.first_token_seconds = elapsed
                    self._prompt_seconds = elapsed - self.compile_seconds
                self.decode_seconds = elapsed - self.compile_seconds - self._prompt_seconds
                self.cached_tokens = max(generation.request.cached_tokens, 0)
                self.tokens += event.tokens
                if event.finish_reason is not None:
                    reason = _REASONS.get(event.finish_reason, event.finish_reason)
                    self.stop_reason = STOP_STRING if generation.stop_string else reason
                if event.text:
                    yield event.text
        finally:
            generation.cancel()


def _split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, str | None]:
    """Splits text into the part to show and a possible start of a stop string; and which stop
    string was found."""
    found = [(text.find(stop), stop) for stop in stops if stop and stop in text]
    if found:
        at, stop = min(found)
        return text[:at], "", stop
    keep = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - keep], text[len(text) - keep :], None
