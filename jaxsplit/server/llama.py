"""llama.cpp's own endpoints: `/completion`, `/tokenize`, `/detokenize`, `/props`, `/slots`; of the
tokenizer also vLLM's, through which lm-eval reads tokens."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec
from msgspec import UNSET

from jaxsplit.engine.request import TokenLogprob
from jaxsplit.engine.stream import Event, Generation
from jaxsplit.server import schemas
from jaxsplit.server.errors import ApiError
from jaxsplit.server.grammars import of_fields
from jaxsplit.server.running import Running
from jaxsplit.server.schemas import (
    Candidate,
    LlamaChunk,
    LlamaCompletion,
    LlamaRequest,
    Probability,
)
from jaxsplit.server.service import FINGERPRINT, Service
from jaxsplit.server.streaming import Stream

_STOP_TYPES: dict[str | None, Literal["eos", "limit"]] = {
    "stop": "eos",
    "length": "limit",
    "context": "limit",
    "deadline": "limit",
}


async def completion(
    service: Service, request: LlamaRequest
) -> LlamaCompletion | list[LlamaCompletion] | Stream:
    """Continues a text, or several."""
    _ = service.lm  # ready
    prompts = await service.prompts(request.prompt)
    running = service.begin(
        prompts,
        request,
        n_predict=request.n_predict if request.n_predict is not None else request.max_tokens,
        logprobs=request.n_probs or None,
        grammar=await service.compiled(of_fields(request)),
    )
    if request.stream:
        return Stream(service, running, _Chunks(service, running, request))
    try:
        await running.finished()
        found = [
            _finished(service, request, running, index, generation)
            for index, generation in enumerate(running.generations)
        ]
        return found[0] if len(found) == 1 else found
    finally:
        service.end(running)


def _finished(
    service: Service, request: LlamaRequest, running: Running, index: int, generation: Generation
) -> LlamaCompletion:
    own, tokenizer = generation.request, service.lm.tokenizer
    word = generation.stop_string
    return LlamaCompletion(
        index=index,
        content=generation.text,
        tokens=own.tokens if request.return_tokens else [],
        id_slot=own.id,
        stop=True,
        model=service.name,
        tokens_predicted=len(own.tokens),
        tokens_evaluated=len(own.spec.prompt),
        generation_settings=settings(service, running, index),
        prompt=tokenizer.decode(own.spec.prompt, show_special="all", continuation=True),
        has_new_line="\n" in generation.text,
        truncated=generation.finish_reason == "context",
        stop_type="word" if word else _STOP_TYPES.get(generation.finish_reason, "none"),
        stopping_word=word or "",
        tokens_cached=len(own.spec.prompt) + len(own.tokens),
        timings=service.timings(running, index),
        completion_probabilities=(
            _probabilities(service, running.logprobs[index]) if request.n_probs else UNSET
        ),
    )


def settings(service: Service, running: Running, index: int) -> dict[str, Any]:
    """How a request chooses tokens, by llama.cpp's names."""
    spec = running.generations[index].request.spec
    found = dataclasses.asdict(spec.sampling)
    found["logit_bias"] = [
        {"token": token, "bias": bias} for token, bias in spec.sampling.logit_bias or ()
    ]
    found["n_predict"] = -1 if spec.max_tokens == float("inf") else int(spec.max_tokens)
    found["n_probs"] = found.pop("logprobs") or 0
    return found


def _probabilities(service: Service, found: Sequence[TokenLogprob]) -> list[Probability]:
    def one(token: int, logprob: float) -> dict[str, Any]:
        data = service.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"id": token, "token": text, "bytes": list(data), "logprob": logprob}

    return [
        Probability(
            **one(x.token, x.logprob), top_logprobs=[Candidate(**one(*other)) for other in x.top]
        )
        for x in found
    ]


class _Chunks:
    """The chunks of a streamed answer; the last one is what is not streamed otherwise."""

    done = b""

    def __init__(self, service: Service, running: Running, request: LlamaRequest):
        self._service, self._running, self._request = service, running, request

    def start(self) -> Iterator[Any]:
        return iter(())

    def event(self, index: int, event: Event) -> Iterator[Any]:
        generation, request = self._running.generations[index], self._request
        chunk = LlamaChunk(
            index=index,
            content=event.text,
            tokens=list(event.tokens),
            stop=False,
            id_slot=generation.request.id,
            tokens_predicted=len(generation.request.tokens),
            tokens_evaluated=len(generation.request.spec.prompt),
        )
        if request.timings_per_token:
            chunk.timings = self._service.timings(self._running, index)
        if request.n_probs:
            chunk.completion_probabilities = _probabilities(self._service, event.logprobs)
        if event.text or event.tokens:
            yield chunk
        if event.finish_reason is not None:
            last = _finished(self._service, request, self._running, index, generation)
            last.content = ""
            last.completion_probabilities = UNSET
            yield last

    def end(self) -> Iterator[Any]:
        return iter(())


async def tokenize(service: Service, request: schemas.TokenizeRequest) -> schemas.Tokens:
    """The tokens of a text."""
    text, special = request.content, request.add_special
    if text is None:
        text, special = request.prompt, request.add_special_tokens
    if text is None:
        raise ApiError(400, "content is missing", param="content")
    ids = await service.encode(text, add_special=special, parse_special=request.parse_special)
    if not request.with_pieces:
        return schemas.Tokens(tokens=list[int | schemas.TokenPiece](ids))
    pieces: list[int | schemas.TokenPiece] = []
    for id in ids:
        data = service.token_bytes(id)
        try:
            pieces.append(schemas.TokenPiece(id=id, piece=data.decode()))
        except UnicodeDecodeError:
            pieces.append(schemas.TokenPiece(id=id, piece=list(data)))
    return schemas.Tokens(tokens=pieces)


async def detokenize(service: Service, request: schemas.DetokenizeRequest) -> schemas.Text:
    """The text of tokens."""
    text = service.lm.tokenizer.decode(request.tokens, show_special="all", continuation=True)
    return schemas.Text(content=text, prompt=text)


async def tokenizer_info(service: Service) -> schemas.TokenizerInfo:
    """Special tokens and the chat template."""
    template = service.template_or_none
    return schemas.TokenizerInfo(
        bos_token=(template and template.bos_token) or None,
        eos_token=(template and template.eos_token) or None,
        chat_template=template and template.source,
    )


async def props(service: Service) -> schemas.Props:
    """The server's settings."""
    lm = service.lm
    template = service.template_or_none
    found = dataclasses.asdict(service.sampling) | {"n_predict": service.n_predict}
    if service.random_seeds:
        found["seed"] = -1
    return schemas.Props(
        default_generation_settings={"n_ctx": lm.engine.context, "params": found},
        total_slots=lm.engine.slots,
        model_alias=service.name,
        model_path=service.path,
        chat_template=template.source if template else "",
        bos_token=template.bos_token if template else "",
        eos_token=template.eos_token if template else "",
        build_info=FINGERPRINT,
        modalities={"vision": False, "audio": False},
        mesh=lm.describe(),
        devices=[
            {
                "name": device.device_kind,
                "memory": (device.memory_stats() or {}).get("bytes_limit"),
                "used": (device.memory_stats() or {}).get("bytes_in_use"),
            }
            for device in lm.mesh.devices.flat
            if device.process_index == 0
        ],
    )


async def slots(service: Service) -> list[schemas.Slot]:
    """What runs, without texts; slots that nothing runs in are idle."""
    engine, active = service.lm.engine, list(service.active)
    requests = [generation.request for one in active for generation in one.generations]
    running = [r for r in requests if r.timings.started and not r.done][: engine.slots]
    found = [
        schemas.Slot(
            id=number,
            id_task=request.id,
            n_ctx=engine.context,
            is_processing=True,
            n_prompt_tokens=len(request.spec.prompt),
            n_decoded=len(request.tokens),
        )
        for number, request in enumerate(running)
    ]
    idle = schemas.Slot(id=0, id_task=-1, n_ctx=engine.context, is_processing=False)
    return found + [
        msgspec.structs.replace(idle, id=number) for number in range(len(found), engine.slots)
    ]
