"""Threads that serve a queue until their owner is gone or the interpreter ends."""

import atexit
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

_workers: "weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue]" = (
    weakref.WeakKeyDictionary()
)


@atexit.register
def _end_all() -> None:
    """JAX must not run on a thread while the interpreter shuts down."""
    for thread, tasks in [*_workers.items()][::-1]:  # the last ones may need the first
        tasks.put(None)
        thread.join()


def start_worker(
    name: str, serve: Callable[..., None], *arguments: Any, tasks: queue.SimpleQueue, owner: object
) -> threading.Thread:
    """Starts a thread.

    Args:
      name: of the thread.
      serve: what it runs, until it finds None in the queue.
      *arguments: of `serve`.
      tasks: the queue.
      owner: when it is gone, None is put into the queue.
    """
    thread = threading.Thread(target=serve, args=arguments, name=name, daemon=True)
    thread.start()
    weakref.finalize(owner, tasks.put, None).atexit = False
    _workers[thread] = tasks
    return thread


class Background:
    """Runs tasks one after the other on a thread of its own; errors are dropped."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._keys: set[Any] = set()
        start_worker("jaxsplit-compiler", _run_tasks, self._tasks, tasks=self._tasks, owner=self)

    def __contains__(self, key: Any) -> bool:
        """Whether a task of this key has been added."""
        return key in self._keys

    def add(self, key: Any, task: Callable[[], None]) -> None:
        """Runs a task, the only one of its key."""
        self._keys.add(key)
        self._tasks.put(task)

    def wait(self) -> None:
        """Waits until all tasks so far have been run."""
        done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._tasks.put(lambda: done.put(None))
        done.get()


def _run_tasks(tasks: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    """Tasks that wait when None comes are not run."""
    while (task := tasks.get()) is not None:
        try:
            task()
        except Exception:  # what it was to prepare is done when it is needed, and fails there
            logging.getLogger(__name__).debug("a background task failed", exc_info=True)
        del task
