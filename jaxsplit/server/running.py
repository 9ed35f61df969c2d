"""The generations of one HTTP request, waited for together on the event loop."""

import asyncio
import collections
import contextlib
from collections.abc import AsyncIterator, Sequence

from jaxsplit.engine import Generation
from jaxsplit.engine.request import TokenLogprob
from jaxsplit.engine.stream import Event


class Waker:
    """Wakes coroutines from the engine's thread. One call of the event loop's lock serves all that
    a unit of work has news for."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._ready: collections.deque[asyncio.Event] = collections.deque()
        self._scheduled = False

    def wake(self, event: asyncio.Event) -> None:
        """Sets an event; on any thread."""
        self._ready.append(event)
        if not self._scheduled:
            self._scheduled = True
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        self._scheduled = False  # before the events are taken: one that comes now is not missed
        while self._ready:
            self._ready.popleft().set()


class _Silence:
    """Says when nothing has come for some seconds. One timer serves a whole request: a timeout
    around each wait takes longer than what is waited for.

    Args:
      seconds: None: never.
      ready: is set when they are over.

    Attributes:
      due: whether they are.
    """

    def __init__(self, seconds: float | None, ready: asyncio.Event):
        self.due = False
        self._seconds, self._ready = seconds, ready
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._check)

    def broken(self) -> None:
        """Something has come."""
        self._since = self._loop.time()

    def end(self) -> None:
        """Stops the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        assert self._seconds is not None
        if (left := self._since + self._seconds - self._loop.time()) <= 0:
            self.due, left = True, self._seconds
            self._ready.set()
        self._timer = self._loop.call_later(left, self._check)


class Running:
    """Generations that began together.

    Attributes:
      generations: in the order of the choices.
      logprobs: of the tokens of each so far, if wanted.
      copies: how many of them, one after the other, answer the same prompt.
    """

    def __init__(self, generations: Sequence[Generation], waker: Waker, copies: int = 1):
        self.generations, self.copies = list(generations), copies
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in generations]
        self._ready = ready = asyncio.Event()
        for generation in generations:
            # Not a reference to this object, whose generations the request would keep alive.
            generation.request.listen(lambda: waker.wake(ready))
        ready.set()  # news may have come before

    async def events(self, ping: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """Events of all, each with the index of its generation, as they come.

        Args:
          ping: seconds without events after which there is a None; None: never.

        Raises:
          JaxsplitError: one has failed; all end.
        """
        left, silence = dict(enumerate(self.generations)), _Silence(ping, self._ready)
        try:
            while left:
                await self._ready.wait()
                self._ready.clear()
                if silence.due:
                    silence.due = False
                    yield None
                for index, generation in [*left.items()]:
                    while generation.finish_reason is None:
                        event = generation.next_now()
                        if event is None:
                            break
                        silence.broken()
                        self.logprobs[index] += event.logprobs
                        yield index, event
                    else:
                        del left[index]
        finally:
            silence.end()
            self.cancel()

    async def finished(self) -> "Running":
        """Waits until all are finished."""
        async for _ in self.events():
            pass
        return self

    def cancel(self) -> None:
        """Ends all, at once: their pages are free."""
        for generation in self.generations:
            generation.cancel()
