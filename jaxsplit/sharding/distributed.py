"""Several processes, on one host or many, that run the same program (`jax.distributed`)."""

import json
import os
from collections.abc import Mapping
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
