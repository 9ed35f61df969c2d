"""Several processes, on one host or many, that run the same program (`jax.distributed`)."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxsplit.errors import JaxsplitError

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is given up, and all others end."""

# Launchers and where they say how many processes there are, and which this one is.
_LAUNCHERS: Mapping[str, tuple[str, ...]] = {
    "Slurm": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"),
}


def launcher() -> str | None:
    """The launcher that has started several processes, if there is one."""
    for name, (count, *others) in _LAUNCHERS.items():
        started = all(variable in os.environ for variable in (count, *others))
        if started and (name == "Kubernetes" or int(os.environ[count]) > 1):
            return name
    return None


def start_processes(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> bool:
    """Joins the processes that run this program, before JAX is used for anything else.

    Args:
      coordinator: host and port at which process 0 can be reached, such as `10.0.0.1:1234`.
      count: how many processes there are.
      index: which this one is. Without all three, Slurm, Open MPI and Kubernetes are asked; a
        process that none of them has started runs alone.

    Returns:
      whether there are several.

    Raises:
      JaxsplitError: the processes do not find one another, or only some of the three are given.
    """
    given = {"--coordinator": coordinator, "--num_processes": count, "--process_id": index}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        if (found := launcher()) is None:
            return False
    elif missing:
        raise JaxsplitError(
            f"{' and '.join(missing)} must be given too: all of {', '.join(given)}, or none"
        )
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


def from_first(value: Any) -> Any:
    """What process 0 gives, in all processes; anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    text = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(np.asarray(broadcast_one_to_all(padded), np.uint8).tobytes())
