"""Wall-clock time that this process has spent compiling."""

import threading
import time

from jax import monitoring

_lock = threading.Lock()
_spans: list[tuple[float, float]] = []  # disjoint, in order
_seconds = 0.0


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    """Records an event, merged with the ones it overlaps: threads compile in parallel, and events
    nest."""
    global _seconds
    if not event.startswith("/jax/core/compile/"):
        return
    with _lock:
        end = time.perf_counter()
        start = end - duration_secs
        while _spans and _spans[-1][1] >= start:
            first, last = _spans.pop()
            _seconds -= last - first
            start = min(start, first)
        _spans.append((start, end))
        _seconds += end - start


monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds so far in which any thread was tracing, lowering or compiling."""
    return _seconds
