"""How long this process has spent compiling."""

from jax import monitoring

_seconds = 0.0


def _listen(event: str, seconds: float, **_: object) -> None:
    global _seconds
    if event.startswith("/jax/core/compile/"):
        _seconds += seconds


monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds spent on tracing, lowering and compiling so far."""
    return _seconds
