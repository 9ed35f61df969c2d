"""`/v1/completions`, and log-probabilities in its form."""

import secrets
import time
from collections.abc import Iterator, Sequence

from msgspec import UNSET

from jaxsplit.engine.request import TokenLogprob
from jaxsplit.engine.stream import Event, Generation
from jaxsplit.server.chat import finish_reason
from jaxsplit.server.errors import ApiError
from jaxsplit.server.grammars import of_fields
from jaxsplit.server.running import Running
from jaxsplit.server.schemas import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from jaxsplit.server.service import FINGERPRINT, Service
from jaxsplit.server.streaming import Stream


async def completions(service: Service, request: CompletionRequest) -> Completion | Stream:
    """Continues texts."""
    _ = service.lm  # ready
    if request.suffix:
        raise ApiError(400, "suffix is not supported; leave it out", param="suffix")
    n, best_of = request.n or 1, request.best_of or 1
    if request.best_of is not None and best_of < n:
        raise ApiError(400, f"best_of={best_of} is less than n={n}", param="best_of")
    if best_of > n and request.stream:
        raise ApiError(400, "best_of cannot be streamed", param="best_of")
    prompts = await service.prompts(request.prompt)
    wanted = request.logprobs
    running = service.begin(
        prompts,
        request,
        n_predict=request.max_tokens if request.max_tokens is not None else request.n_predict,
        copies=max(n, best_of),
        logprobs=0 if wanted is None and best_of > n else wanted,
        prompt_logprobs=bool(request.echo) and wanted is not None,
        grammar=await service.compiled(of_fields(request)),
    )
    maker = _Choices(service, request)
    if request.stream:
        usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return Stream(service, running, _Chunks(service, running, maker, usage=usage))
    try:
        await running.finished()
        choices: list[CompletionChoice] = []
        for at in range(0, len(running.generations), running.copies):
            own = range(at, at + running.copies)
            if best_of > n:
                own = sorted(own, key=lambda i: -_score(running.logprobs[i]))[:n]
            for i in own:
                choices.append(
                    maker.choice(len(choices), running.generations[i], running.logprobs[i])
                )
        return Completion(
            id=maker.id,
            created=int(time.time()),
            model=service.name,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=service.usage(running),
            timings=service.timings(running),
        )
    finally:
        service.end(running)


def _score(logprobs: Sequence[TokenLogprob]) -> float:
    """Mean log-probability of an answer's tokens, by which `best_of` chooses."""
    return sum(x.logprob for x in logprobs) / max(len(logprobs), 1)


class _Choices:
    """Makes the choices of a response."""

    def __init__(self, service: Service, request: CompletionRequest):
        self._service, self._request = service, request
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.echo, self.wanted = bool(request.echo), request.logprobs
        self.timings_per_token = bool(request.timings_per_token)

    def choice(
        self, index: int, generation: Generation, logprobs: Sequence[TokenLogprob]
    ) -> CompletionChoice:
        """A finished answer."""
        echoed = self.echoed(generation) if self.echo else ""
        found = None
        if self.wanted is not None:
            found = self.logprobs(logprobs, generation if self.echo else None, 0)
        return CompletionChoice(
            index=index,
            text=echoed + generation.text,
            logprobs=found,
            finish_reason=finish_reason(generation.finish_reason, 0),
        )

    def echoed(self, generation: Generation) -> str:
        """The prompt's text."""
        ids = generation.request.spec.prompt
        return self._service.lm.tokenizer.decode(ids, show_special="none", continuation=True)

    def logprobs(
        self, found: Sequence[TokenLogprob], echo: Generation | None, offset: int
    ) -> CompletionLogprobs:
        """OpenAI's object of log-probabilities.

        Args:
          found: of the tokens.
          echo: the generation whose prompt comes first; None: none.
          offset: characters of the text before.
        """
        tokens: list[str] = []
        values: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []

        def add(token: int, logprob: float | None, best: Sequence[tuple[int, float]]) -> None:
            nonlocal offset
            tokens.append(self._service.token_text(token))
            values.append(logprob)
            alternatives: dict[str, float] = {}
            for id, value in best:  # likeliest first: of equal texts, that one counts
                alternatives.setdefault(self._service.token_text(id), value)
            top.append(alternatives if logprob is not None else None)
            offsets.append(offset)
            offset += len(tokens[-1])

        if echo is not None:
            first = echo.request.spec.prompt[0]
            add(first, None, ())
            for one in echo.request.prompt_logprobs:
                add(one.token, one.logprob, one.top)
        for one in found:
            add(one.token, one.logprob, one.top)
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=values,
            top_logprobs=top if self.wanted else None,
            text_offset=offsets,
        )


class _Chunks:
    """The chunks of streamed answers."""

    done = b"data: [DONE]\n\n"

    def __init__(self, service: Service, running: Running, maker: _Choices, *, usage: bool):
        self._service, self._running, self._maker = service, running, maker
        self._usage = usage
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._offsets = [0] * len(running.generations)

    def start(self) -> Iterator[Completion]:
        return iter(())

    def event(self, index: int, event: Event) -> Iterator[Completion]:
        generation, text = self._running.generations[index], event.text
        echo = None
        if index not in self._begun and self._maker.echo:
            echo = generation
            text = self._maker.echoed(generation) + text
        self._begun.add(index)
        logprobs = None
        if self._maker.wanted is not None:
            logprobs = self._maker.logprobs(event.logprobs, echo, self._offsets[index])
            self._offsets[index] += sum(map(len, logprobs.tokens))
        if not (text or event.finish_reason or (logprobs and logprobs.tokens)):
            return
        reason = event.finish_reason and finish_reason(event.finish_reason, 0)
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
        chunk = self._chunk([choice])
        if reason or self._maker.timings_per_token:
            chunk.timings = self._service.timings(self._running, index)
        yield chunk

    def end(self) -> Iterator[Completion]:
        if self._usage:
            last = self._chunk([])
            last.usage = self._service.usage(self._running)
            last.timings = self._service.timings(self._running)
            yield last

    def _chunk(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._maker.id,
            created=self._created,
            model=self._service.name,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=None if self._usage else UNSET,
        )
