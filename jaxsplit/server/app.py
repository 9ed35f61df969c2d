"""The HTTP application: its endpoints, and what all of them have in common."""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Awaitable
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxsplit.server import chat, completions, llama, models, page, responses, schemas
from jaxsplit.server.errors import ApiError, of_exception, of_validation
from jaxsplit.server.guard import Guard
from jaxsplit.server.openapi import Endpoint, document
from jaxsplit.server.service import Service
from jaxsplit.server.streaming import Stream

_LOG = logging.getLogger(__name__)

_BODY_SECONDS = 60
"""In which a body has to arrive."""


async def _metrics(service: Service) -> bytes:
    """Counters, gauges and histograms, in Prometheus' format."""
    if not service.config.metrics:
        raise ApiError(404, "/metrics is off; --metrics switches it on")
    return service.metrics.text()


async def _slots(service: Service) -> list[schemas.Slot]:
    """What runs, without texts."""
    if not service.config.slots_endpoint:
        raise ApiError(404, "/slots is off; --slots_endpoint switches it on")
    return await llama.slots(service)


async def _openapi(service: Service) -> bytes:
    """This document."""
    return _document()


@functools.cache
def _document() -> bytes:
    return msgspec.json.encode(document(ENDPOINTS))


ENDPOINTS = (
    Endpoint("GET", "/", page.index, sent="text/html; charset=utf-8"),
    Endpoint("GET", "/page/{name}.css", page.style, sent="text/css; charset=utf-8"),
    Endpoint("GET", "/page/{name}.js", page.script, sent="text/javascript; charset=utf-8"),
    Endpoint("GET", "/health", models.health, sent=schemas.Health, others=("/v1/health",)),
    Endpoint(
        "POST",
        "/v1/chat/completions",
        chat.chat_completions,
        received=schemas.ChatRequest,
        sent=schemas.ChatCompletion,
        chunks=schemas.ChatChunk,
        others=("/chat/completions",),
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        completions.completions,
        received=schemas.CompletionRequest,
        sent=schemas.Completion,
        chunks=schemas.Completion,
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses.create,
        received=responses.ResponsesRequest,
        sent=responses.ResponseObject,
        chunks=responses.StreamEvent,
        others=("/responses",),
    ),
    Endpoint(
        "POST",
        "/v1/responses/input_tokens",
        responses.input_tokens,
        received=responses.ResponsesRequest,
        sent=schemas.InputTokens,
        others=("/responses/input_tokens",),
    ),
    Endpoint(
        "POST",
        "/v1/chat/completions/input_tokens",
        chat.input_tokens,
        received=schemas.ChatRequest,
        sent=schemas.InputTokens,
        others=("/chat/completions/input_tokens",),
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        models.embeddings,
        received=schemas.EmbeddingRequest,
        sent=schemas.Embeddings,
        others=("/embeddings",),
    ),
    Endpoint("GET", "/v1/models", models.models, sent=schemas.Models, others=("/models",)),
    Endpoint("GET", "/v1/models/{name:path}", models.model, sent=schemas.Model),
    Endpoint(
        "POST",
        "/completion",
        llama.completion,
        received=schemas.LlamaRequest,
        sent=schemas.LlamaCompletion | list[schemas.LlamaCompletion],
        chunks=schemas.LlamaChunk,
        others=("/completions",),
    ),
    Endpoint(
        "POST",
        "/tokenize",
        llama.tokenize,
        received=schemas.TokenizeRequest,
        sent=schemas.Tokens,
    ),
    Endpoint(
        "POST",
        "/detokenize",
        llama.detokenize,
        received=schemas.DetokenizeRequest,
        sent=schemas.Text,
    ),
    Endpoint("GET", "/tokenizer_info", llama.tokenizer_info, sent=schemas.TokenizerInfo),
    Endpoint(
        "POST",
        "/apply-template",
        chat.apply_template,
        received=schemas.ApplyTemplateRequest,
        sent=schemas.Prompt,
    ),
    Endpoint("GET", "/props", llama.props, sent=schemas.Props),
    Endpoint("GET", "/slots", _slots, sent=list[schemas.Slot]),
    Endpoint("GET", "/lora-adapters", models.lora_adapters, sent=list[schemas.LoraAdapter]),
    Endpoint(
        "POST",
        "/lora-adapters",
        models.set_lora_adapters,
        received=list[schemas.LoraScale],
        sent=schemas.Success,
    ),
    Endpoint("GET", "/metrics", _metrics, sent="text/plain; version=0.0.4; charset=utf-8"),
    Endpoint("GET", "/openapi.json", _openapi, sent="application/json"),
)


def make_app(service: Service) -> Guard:
    """The ASGI application."""
    routes = [
        Route(path, _Handler(service, endpoint), methods=[endpoint.method])
        for endpoint in ENDPOINTS
        for path in (endpoint.path, *endpoint.others)
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: _http_error,
            ApiError: lambda _, error: error.response(),
        },  # pyright: ignore
    )
    app.router.redirect_slashes = False
    return Guard(app, service)


class _Handler:
    """An ASGI application for one endpoint."""

    def __init__(self, service: Service, endpoint: Endpoint):
        self._service, self._endpoint = service, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await self._body(request)
            arguments = (*scope["path_params"].values(), *body)
            result = await _unless_disconnected(
                self._endpoint.handler(self._service, *arguments), receive
            )
        except Exception as error:
            seen = of_exception(error)
            if seen is None:
                _LOG.exception("%s failed", self._endpoint.path)
                seen = ApiError(500, "the server failed on this request; its log says why")
            await seen.response()(scope, receive, send)
            return
        if isinstance(result, Stream):
            await _send_stream(result, receive, send)
        elif result is not None:
            await self._response(result)(scope, receive, send)

    async def _body(self, request: Request) -> list[Any]:
        """The decoded body, if there is one."""
        if self._endpoint.received is None:
            return []
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Also, a page of another origin can send anything else without asking.
            raise ApiError(415, f"Content-Type is {kind!r}; application/json is expected")
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                data = await request.body()
        except TimeoutError:
            raise ApiError(408, f"the body has not arrived in {_BODY_SECONDS} s") from None
        try:
            return [msgspec.json.decode(data, type=self._endpoint.received)]
        except msgspec.DecodeError as error:
            raise of_validation(error) from None
        except UnicodeDecodeError:
            raise ApiError(400, "the body is not UTF-8") from None
        except RecursionError:
            raise ApiError(400, "the body is nested too deeply") from None

    def _response(self, result: Any) -> Response:
        sent = self._endpoint.sent
        if isinstance(sent, str):
            return Response(result, media_type=sent)
        ready = not isinstance(result, schemas.Health) or result.status == "ok"
        data = msgspec.json.encode(result)
        return Response(data, 200 if ready else 503, media_type="application/json")


async def _unless_disconnected(work: Awaitable[Any], receive: Receive) -> Any:
    """The result of work; None if the client hangs up before, which ends it."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        await _cancelled(gone)
        await _cancelled(task)


async def _cancelled(task: asyncio.Future) -> None:
    """Cancels a task, and waits until it has cleaned up."""
    if not task.done():
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_stream(stream: Stream, receive: Receive, send: Send) -> None:
    """Sends server-sent events, until they or the client end."""
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
    headers.append((b"x-accel-buffering", b"no"))  # proxies

    async def body() -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for frame in stream:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    try:
        await _unless_disconnected(body(), receive)
    finally:
        await stream.aclose()


def _http_error(request: Request, error: HTTPException) -> Response:
    """Of paths and methods that there are not."""
    message = {
        404: f"there is no {request.url.path}; /openapi.json lists what there is",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, headers=headers).response()
