"""The thread that runs the engine, for callers on any thread.

Of several processes, process 0 decides: before each turn of its scheduler it publishes the commands
of its callers, and the others' schedulers, given the same commands, decide the same. Callers of the
other processes are to call the same in the same order.
"""

import functools
import itertools
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxsplit.engine.engine import Engine
from jaxsplit.engine.request import CANCELLED, DEADLINE, Request, RequestSpec
from jaxsplit.engine.scheduler import Scheduler, Statistics
from jaxsplit.engine.workers import start_worker
from jaxsplit.sharding.distributed import Bulletin


class _Submit(NamedTuple):
    request: Request


class _Cancel(NamedTuple):
    number: int
    reason: str


class _Run(NamedTuple):
    function: Callable[[], None]


_Command = _Submit | _Cancel | _Run | None
"""None ends the thread."""


class SchedulerThread:
    """Runs a scheduler on a thread of its own.

    An exception that a signal raises in a caller, such as `KeyboardInterrupt`, never interrupts the
    engine.

    Args:
      engine: that does the work.
      **options: of the `Scheduler`.
    """

    def __init__(self, engine: Engine, **options: Any):
        several = jax.process_count() > 1
        self._scheduler = Scheduler(engine, measures=not several, **options)
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._requests = _Requests(self._commands)
        serve, arguments = _serve, (self._scheduler, self._commands, None)
        if several:
            bulletin = Bulletin()
            arguments = (self._scheduler, self._commands, bulletin)
            if jax.process_index():
                serve, arguments = _follow, (*arguments, self._requests)
        self._thread = start_worker(
            "jaxsplit-engine", serve, *arguments, tasks=self._commands, owner=self
        )

    def follow(self) -> None:
        """Waits until process 0 has ended; in the others."""
        self._thread.join()

    def submit(self, spec: RequestSpec) -> Request:
        """Queues a request.

        Raises:
          JaxsplitError: it could never run.
        """
        self._scheduler.check(spec)
        with self._lock:
            request = self._requests.claim(next(self._numbers), spec)
            self._commands.put(_Submit(request))
        return request

    @property
    def statistics(self) -> Statistics:
        """What has been done and is being done."""
        return self._scheduler.statistics

    def run(self, function: Callable[[Scheduler], Any]) -> Any:
        """Runs a function on the engine's thread, between two units of work; in a single process
        only."""
        reply: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def command() -> None:
            try:
                reply.put((function(self._scheduler), None))
            except BaseException as error:
                reply.put((None, error))

        self._commands.put(_Run(command))
        value, error = reply.get()
        if error is None:
            return value
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame


class _Requests:
    """The requests of a process by their numbers, until both its caller and the commands of process
    0 have mentioned them."""

    _MOST_UNCLAIMED = 256

    def __init__(self, commands: queue.SimpleQueue):
        self._commands, self._lock = commands, threading.Lock()
        self._once: dict[int, Request] = {}

    def claim(self, number: int, spec: RequestSpec) -> Request:
        """The request, mentioned once more."""
        with self._lock:
            if (found := self._once.pop(number, None)) is not None:
                return found
            request = Request(spec, number, functools.partial(_cancel, self._commands))
            if jax.process_index():  # process 0 has no need to be reminded
                self._once[number] = request
            while len(self._once) > self._MOST_UNCLAIMED:
                del self._once[next(iter(self._once))]
            return request


def _cancel(commands: queue.SimpleQueue, request: Request) -> None:
    commands.put(_Cancel(request.id, CANCELLED))


def _taken(commands: queue.SimpleQueue, *, wait: bool) -> list[_Command]:
    """All commands that are there; with `wait`, at least one."""
    taken = [commands.get()] if wait else []
    while True:
        try:
            taken.append(commands.get_nowait())
        except queue.Empty:
            return taken


def _serve(
    scheduler: Scheduler, commands: "queue.SimpleQueue[_Command]", bulletin: Bulletin | None
) -> None:
    """Runs a scheduler until there is the command None; tells the other processes."""
    while True:
        given = _taken(commands, wait=scheduler.idle)
        given += [_Cancel(number, DEADLINE) for number in scheduler.late()]
        if bulletin is not None:
            bulletin.publish([_encoded(c) for c in given if not isinstance(c, _Run)])
        for command in given:
            if command is None:
                _close(scheduler)
                return
            _obey(scheduler, command)
            del command
        del given  # frees what it refers to while this waits for the next
        _step(scheduler)


def _follow(
    scheduler: Scheduler,
    commands: "queue.SimpleQueue[_Command]",
    bulletin: Bulletin,
    requests: _Requests,
) -> None:
    """Runs a scheduler by the commands of process 0."""
    while True:
        published = bulletin.read(lambda: None in _taken(commands, wait=False))
        if published is None:
            return
        for one in published:
            if one is None:
                return
            if "cancel" in one:
                _obey(scheduler, _Cancel(one["cancel"], one["reason"]))
            else:
                request = requests.claim(one["submit"], RequestSpec.from_json(one["spec"]))
                _obey(scheduler, _Submit(request))
        _step(scheduler)


def _step(scheduler: Scheduler) -> None:
    """A turn of the scheduler. No error may end the thread: callers would wait for ever."""
    try:
        scheduler.step()
    except Exception as error:
        scheduler.abandon(error)


def _close(scheduler: Scheduler) -> None:
    try:
        scheduler.close()
    except Exception as error:
        logging.getLogger(__name__).warning("prefixes could not be saved: %s", error)


def _obey(scheduler: Scheduler, command: _Submit | _Cancel | _Run) -> None:
    if isinstance(command, _Submit):
        scheduler.add(command.request)
    elif isinstance(command, _Cancel):
        scheduler.cancel(command.number, command.reason)
    else:
        command.function()


def _encoded(command: _Command) -> Any:
    """A command as JSON holds it."""
    if isinstance(command, _Submit):
        return {"submit": command.request.id, "spec": command.request.spec.to_json()}
    if isinstance(command, _Cancel):
        return {"cancel": command.number, "reason": command.reason}
    return None
