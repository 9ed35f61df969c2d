"""The thread that runs the engine, for callers on any thread."""

import atexit
import functools
import itertools
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from jaxsplit.engine.engine import Engine
from jaxsplit.engine.request import Request, RequestSpec
from jaxsplit.engine.scheduler import Scheduler, Statistics

Command = Callable[[Scheduler], None]

_threads: "weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue]" = (
    weakref.WeakKeyDictionary()
)


@atexit.register
def _end_threads() -> None:
    """JAX must not run on a thread while the interpreter shuts down."""
    for thread, commands in [*_threads.items()]:
        commands.put(None)
        thread.join()


def _serve(scheduler: Scheduler, commands: "queue.SimpleQueue[Command | None]") -> None:
    """Runs a scheduler until there is the command None."""
    while True:
        given = _taken(commands, wait=scheduler.idle)
        for command in given:
            if command is None:
                return
            command(scheduler)
        del given  # frees what it refers to while this waits for the next
        scheduler.step()


def _taken(commands: queue.SimpleQueue, *, wait: bool) -> list[Command | None]:
    """All commands that are there; with `wait`, at least one."""
    taken = [commands.get()] if wait else []
    while True:
        try:
            taken.append(commands.get_nowait())
        except queue.Empty:
            return taken


class SchedulerThread:
    """Runs a scheduler on a thread of its own.

    An exception that a signal raises in a caller, such as `KeyboardInterrupt`, never interrupts the
    engine.

    Args:
      engine: that does the work.
      **options: of the `Scheduler`.
    """

    def __init__(self, engine: Engine, **options: Any):
        self._scheduler = Scheduler(engine, **options)
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        name, arguments = "jaxsplit-engine", (self._scheduler, self._commands)
        thread = threading.Thread(target=_serve, args=arguments, name=name, daemon=True)
        thread.start()
        weakref.finalize(self, self._commands.put, None).atexit = False
        _threads[thread] = self._commands

    def submit(self, spec: RequestSpec) -> Request:
        """Queues a request.

        Raises:
          JaxsplitError: it could never run.
        """
        with self._lock:
            request = Request(spec, next(self._numbers), functools.partial(_cancel, self._commands))
            self._scheduler.check(request)
            self._commands.put(lambda scheduler: scheduler.add(request))
        return request

    @property
    def statistics(self) -> Statistics:
        """What has been done and is being done."""
        return self._scheduler.statistics

    def run(self, function: Callable[[Scheduler], Any]) -> Any:
        """Runs a function on the engine's thread, between two units of work."""
        reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def command(scheduler: Scheduler) -> None:
            try:
                reply.put((function(scheduler), None))
            except BaseException as error:
                reply.put((None, error))

        self._commands.put(command)
        value, error = reply.get()
        if error is None:
            return value
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame


def _cancel(commands: queue.SimpleQueue, request: Request) -> None:
    commands.put(lambda scheduler: scheduler.cancel(request))
