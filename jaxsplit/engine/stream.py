"""Streams of generated text."""

import math
import threading
import time
from collections.abc import Iterator, Sequence

import jax

from jaxsplit.engine import Engine, EngineThread, Request, SamplingConfig, compile_seconds
from jaxsplit.text import Tokenizer

MAX_BLOCK = 32
"""Tokens of a decode loop at most."""

BLOCK_SECONDS = 0.1
"""Time between two pieces of text, unless the caller chooses the block size."""


class Stream(Iterator[str]):
    """An iterator over generated text. Made by `LM.stream`.

    If other calls use the model between two pieces, the stream reads its prompt and decodes its
    tokens again, which takes time but does not change the text.

    Attributes:
      prompt_tokens: ids of the prompt.
      tokens: ids generated so far, the stop token included.
      stop_reason: `end of text`, `stop string`, `n_predict`, `context full`, or `interrupted` by an
        exception; None while unfinished.
      first_token_seconds: from the start to the first token, with compilation.
      decode_seconds: from the first token to the last, without compilation.
      compile_seconds: spent on compiling programs missing from the compilation cache.
    """

    def __init__(
        self,
        engine: Engine,
        thread: EngineThread,
        tokenizer: Tokenizer,
        prompt_tokens: list[int],
        *,
        n_predict: int,
        stop: tuple[str, ...],
        block: int | None,
        sampling: SamplingConfig,
        show_special: str,
    ):
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.stop_reason: str | None = None
        self.first_token_seconds = 0.0
        self.decode_seconds = 0.0
        self.compile_seconds = 0.0
        self._prompt_seconds = 0.0
        self._engine, self._thread, self._tokenizer = engine, thread, tokenizer
        self._show_special = show_special
        self._stop = stop
        self._limit = math.inf if n_predict < 0 else n_predict
        self._block = block
        self._pieces = self._run(Request(tuple(prompt_tokens), sampling, self._limit))
        self._lock = threading.Lock()

    def __next__(self) -> str:
        with self._lock:
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
        prompt_rate = prompt / self._prompt_seconds if self._prompt_seconds else 0.0
        rate = (generated - 1) / self.decode_seconds if self.decode_seconds else 0.0
        return (
            f"first token {self.first_token_seconds:.2f} s | "
            f"compiling, of all, {self.compile_seconds:.2f} s | "
            f"prompt {prompt} tokens, {prompt_rate:.1f} tokens/s | "
            f"generated {generated} tokens, {rate:.1f} tokens/s | per device "
            f"{engine.weight_bytes / 1e6:.1f} MB weights, {engine.cache_bytes / 1e6:.1f} MB cache"
        )

    def _run(self, request: Request) -> Iterator[str]:
        if self._limit == 0:
            self.stop_reason = "n_predict"
            return
        text = self._tokenizer.stream(show_special=self._show_special, continuation=True)
        held = ""  # possible start of a stop string
        started, compiled = time.perf_counter(), compile_seconds()
        for token in self._ids(request):
            elapsed = time.perf_counter() - started
            self.compile_seconds = min(compile_seconds() - compiled, elapsed)
            if not self.tokens:
                self.first_token_seconds = elapsed
                self._prompt_seconds = elapsed - self.compile_seconds
            self.decode_seconds = elapsed - self.compile_seconds - self._prompt_seconds
            self.tokens.append(token)
            if token in self._tokenizer.end_ids:
                self.stop_reason = "end of text"
                break
            held += text.push(token)
            ready, held, stopped = _split_at_stop(held, self._stop)
            if ready:
                yield ready
            if stopped:
                self.stop_reason = "stop string"
                return
            if len(self.tokens) >= self._limit:
                self.stop_reason = "n_predict"
                break
        else:
            self.stop_reason = "context full"
        ready, held, _ = _split_at_stop(held + text.flush(), self._stop)
        if ready + held:
            yield ready + held

    def _ids(self, request: Request) -> Iterator[int]:
        """Generated ids, until the context is full."""
        length = min(self._block or MAX_BLOCK, self._engine.context)
        taken = 0
        count, unfinished = 1, True  # prefill samples the first token
        while unfinished:
            started, compiled = time.perf_counter(), compile_seconds()
            unfinished = self._thread.advance(request, count, length)
            took = time.perf_counter() - started - (compile_seconds() - compiled)
            new = request.tokens[taken:]
            if self._block is not None:
                count = length
            elif taken == 0:
                count = 1
            elif jax.process_count() > 1:  # all must choose the same count
                count = length // 4
            else:
                count = min(max(1, int(len(new) * BLOCK_SECONDS / max(took, 1e-6))), length)
            taken += len(new)
            yield from new


def _split_at_stop(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Splits text into the part to show and a possible start of a stop string; tells whether a stop
    string was found."""
    found = [text.find(stop) for stop in stops if stop and stop in text]
    if found:
        return text[: min(found)], "", True
    keep = max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )
    return text[: len(text) - keep], text[len(text) - keep :], False
