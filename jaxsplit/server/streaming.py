"""Server-sent events, from the events of generations."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from typing import Any, Protocol

import msgspec

from jaxsplit.engine.stream import Event
from jaxsplit.server.errors import ApiError, of_exception
from jaxsplit.server.running import Running
from jaxsplit.server.service import Service

_LOG = logging.getLogger(__name__)
_JSON = msgspec.json.Encoder()


class Renderer(Protocol):
    """Makes an endpoint's objects of the events of a request's generations."""

    done: bytes
    """What ends the stream."""

    def start(self) -> Iterable[Any]:
        """Objects before the first event."""
        ...

    def event(self, index: int, event: Event) -> Iterable[Any]:
        """Objects for an event of the generation with this index."""
        ...

    def end(self) -> Iterable[Any]:
        """Objects after the last event."""
        ...


class Stream(AsyncIterator[bytes]):
    """The body of a streamed response."""

    def __init__(self, service: Service, running: Running, renderer: Renderer):
        self._frames = _frames(service, running, renderer)
        self._running = running

    async def __anext__(self) -> bytes:
        return await anext(self._frames)

    async def aclose(self) -> None:
        """Ends it: the generations, too."""
        await self._frames.aclose()
        self._running.cancel()


async def _frames(
    service: Service, running: Running, renderer: Renderer
) -> AsyncGenerator[bytes, None]:
    try:
        yield b"".join(map(_frame, renderer.start()))
        async for found in running.events(service.config.sse_ping_interval):
            if found is None:
                yield b": ping\n\n"
            elif frames := b"".join(map(_frame, renderer.event(*found))):
                yield frames
        yield b"".join(map(_frame, renderer.end())) + renderer.done
    except Exception as error:
        seen = of_exception(error)
        if seen is None:
            _LOG.exception("a request failed")
            seen = ApiError(500, "the server failed on this request; its log says why")
        yield _frame(seen.body)
    finally:
        service.end(running)


def _frame(item: Any) -> bytes:
    """An object as an event; those of `/v1/responses` have their type as name, too."""
    data = b"data: " + _JSON.encode(item) + b"\n\n"
    kind = getattr(item, "type", None)
    return b"event: " + kind.encode() + b"\n" + data if isinstance(kind, str) else data
