"""Several processes, on one host or many, that run the same program (`jax.distributed`)."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxsplit.errors import JaxsplitError

HEARTBEAT_SECONDS = 20
"""A process without a heartbeat for this long counts as lost, which ends all others."""

# Launchers, and the environment variables by which they are recognized, the process count first.
_LAUNCHERS: Mapping[str, tuple[str, ...]] = {
    "Slurm": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"),
}


def detected_launcher() -> str | None:
    """The launcher that has started several processes, or None."""
    for name, (count, *others) in _LAUNCHERS.items():
        started = all(variable in os.environ for variable in (count, *others))
        if started and (name == "Kubernetes" or int(os.environ[count]) > 1):
            return name
    return None


def start_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> bool:
    """Initializes `jax.distributed`, before any other use of JAX.

    Args:
      coordinator: host and port of process 0, such as `10.0.0.1:1234`.
      count: number of processes.
      index: this process's index. Without all three, the launcher is detected; a process that none
        has started runs alone.

    Returns:
      whether there are several processes.

    Raises:
      JaxsplitError: the processes do not find one another, or only some of the three are given.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [flag for flag, value in given.items() if value is None]
    if coordinator is None or count is None or index is None:
        if len(missing) < len(given):
            raise JaxsplitError(
                f"{' and '.join(missing)} must be given too: all of {', '.join(given)}, or none"
            )
        if (found := detected_launcher()) is None:
            return False
    else:
        found = "the flags"
        if not 0 <= index < count:
            raise JaxsplitError(f"process_id={index} must lie between 0 and {count - 1}")
        if ":" not in coordinator:
            raise JaxsplitError(f"coordinator={coordinator} is not of the form host:port")
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise JaxsplitError(
            f"the processes started by {found} did not find one another: {reason}; check that "
            "process 0 runs and can be reached, or give --coordinator, --num_processes and "
            "--process_id"
        ) from error
    return True


def broadcast_from_process_0(value: Any) -> Any:
    """Broadcasts process 0's value, anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(padded), np.uint8).tobytes())


class Bulletin:
    """What process 0 publishes and the others read, in order, beside the devices.

    All processes make it at the same time. It uses the key-value store of `jax.distributed`.
    """

    _KEPT = 64
    """Messages that stay there: no process is farther behind than units of work are in flight."""

    def __init__(self) -> None:
        from jax._src import distributed  # there is no public way to the store

        self._client: Any = distributed.global_state.client
        self._name = f"jaxsplit/{broadcast_from_process_0(secrets.token_hex(8))}"
        self._count = 0

    def publish(self, message: Any) -> None:
        """Publishes anything that JSON can hold; in process 0."""
        self._client.key_value_set(f"{self._name}/{self._count}", json.dumps(message))
        if self._count >= self._KEPT:
            self._client.key_value_delete(f"{self._name}/{self._count - self._KEPT}")
        self._count += 1

    def read(self, given_up: Callable[[], bool]) -> Any:
        """Waits for the next message; None: the caller has given up.

        Raises:
          RuntimeError: process 0 has ended.
        """
        while not given_up():
            with contextlib.suppress(_DeadlineExceeded):
                found = _get(self._client, f"{self._name}/{self._count}")
                self._count += 1
                return json.loads(found)
        return None


class _DeadlineExceeded(Exception):
    """Nothing has been published for a second."""


def _get(client: Any, key: str) -> str:
    try:
        return client.blocking_key_value_get(key, 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            raise _DeadlineExceeded from None
        raise
