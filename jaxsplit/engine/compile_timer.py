"""How long this process has spent compiling."""

import threading
import time

from jax import monitoring

_lock = threading.Lock()
_spans: list[tuple[float, float]] = []  # one after the other, none touching the next
_seconds = 0.0


def _listen(event: str, seconds: float, **_: object) -> None:
    """Adds what has just ended: threads compile at the same time, and tracing contains tracing."""
    global _seconds
    if not event.startswith("/jax/core/compile/"):
        return
    with _lock:
        end = time.perf_counter()
        start = end - seconds
        while _spans and _spans[-1][1] >= start:
            first, last = _spans.pop()
            _seconds -= last - first
            start = min(start, first)
        _spans.append((start, end))
        _seconds += end - start


monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds in which something was traced, lowered or compiled so far."""
    return _seconds
