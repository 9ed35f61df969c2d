"""Split modes: which mesh axes split which logical axis, and the devices of a mesh.

The mesh axes:

`data`    replicas of the model, each with its own sequences
`stage`   pipeline stages: runs of layers
`expert`  whole experts of a mixture; for all else the same as `tensor`
`tensor`  shards of every layer
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import jax

from jaxsplit.errors import JaxsplitError

MESH_AXES = ("data", "stage", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class SplitMode:
    """One way to split a model.

    Attributes:
      summary: one line for users.
      axis: the mesh axis of all devices if no mesh is given; None: a single device.
      table: logical axis to mesh axes. The `stage` axis splits layers in every mode.
    """

    summary: str
    axis: str | None
    table: Mapping[str, tuple[str, ...]]


_SHARDS = ("expert", "tensor")
_UNITS = {
    "slots": ("data",),
    **dict.fromkeys(("heads", "kv_heads", "mlp", "vocab"), _SHARDS),
    "experts": ("expert",),
    "expert_mlp": ("tensor",),
}
_ROW = {**_UNITS, "embed_out": _SHARDS, "expert_out": ("tensor",)}
_GRAPH = {**_UNITS, "heads_in": _SHARDS, "mlp_in": _SHARDS, "expert_mlp_in": ("tensor",)}

SPLIT_MODES: Mapping[str, SplitMode] = MappingProxyType(
    {
        "none": SplitMode("one device runs the whole model", None, {}),
        "layer": SplitMode("each device runs some of the layers, in turn", "stage", _GRAPH),
        "row": SplitMode("matrices are split by rows; outputs are gathered", "tensor", _ROW),
        "graph": SplitMode(
            "each device runs a shard of each layer; partial sums are all-reduced", "tensor", _GRAPH
        ),
    }
)


def split_mode(name: str) -> SplitMode:
    """The entry of a split mode.

    Raises:
      JaxsplitError: the mode is unknown; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in SPLIT_MODES:
        raise JaxsplitError(
            f"split_mode={name} is not supported; supported are {', '.join(SPLIT_MODES)}"
        )
    return SPLIT_MODES[name]


def parse_mesh(text: str) -> dict[str, int]:
    """Parses `tensor:4` (or several axes, separated by commas) to axis sizes.

    Raises:
      JaxsplitError: malformed, or an unknown axis.
    """
    if not isinstance(text, str) or not text:
        raise JaxsplitError(f"mesh={text!r} is not a shape such as tensor:4 or stage:2,tensor:2")
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if not size.isdecimal() or len(size) > 9 or int(size) < 1:
            raise JaxsplitError(
                f"mesh={text}: {part.strip()!r} is not of the form axis:size, such as tensor:4 "
                "or stage:2,tensor:2"
            )
        if name not in MESH_AXES:
            raise JaxsplitError(
                f"mesh={text}: unknown axis {name!r}; supported are {', '.join(MESH_AXES)}"
            )
        if name in shape:
            raise JaxsplitError(f"mesh={text}: axis {name!r} is given twice")
        shape[name] = int(size)
    return shape


def parse_shares(text: str | Sequence[float]) -> list[float]:
    """Parses `3,1`, or a sequence of numbers, to shares.

    Raises:
      JaxsplitError: not numbers, or none above 0.
    """
    try:
        parts = text.split(",") if isinstance(text, str) else list(text)
        shares = [float(part) for part in parts]
    except (TypeError, ValueError):
        shares = []
    if not shares or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise JaxsplitError(
            f"tensor_split={text} is not a list of shares such as 3,1 (at least one above 0)"
        )
    if min(filter(None, shares)) < max(shares) / 1e6:
        raise JaxsplitError(f"tensor_split={text}: one share is over a million times another")
    return shares


def choose_devices(
    mode: str,
    devices: Sequence[jax.Device] | int | None = None,
    mesh: str | None = None,
    main_device: int = 0,
) -> tuple[dict[str, int], list[jax.Device]]:
    """Chooses the mesh shape and the devices.

    Args:
      mode: a name in `SPLIT_MODES`.
      devices: the devices, or how many of the first; None: all, or as many as `mesh` needs.
      mesh: axis sizes, such as `stage:2,tensor:2`, the last varying fastest over the devices; None:
        all devices on the mode's axis.
      main_device: index of the device for modes that use a single one.

    Raises:
      JaxsplitError: the mode or mesh is unknown, they do not fit together, or there are too few
        devices.
    """
    chosen = split_mode(mode)
    present = list(jax.devices())
    described = f"{len(present)} {present[0].platform} device" + "s" * (len(present) != 1)
    hint = (
        "; set JAX_NUM_CPU_DEVICES to simulate more on the CPU"
        if present[0].platform == "cpu"
        else ""
    )
    shape = None if mesh is None else parse_mesh(mesh)
    if shape and chosen.axis is None and math.prod(shape.values()) > 1:
        raise JaxsplitError(
            f"mesh={mesh} has {math.prod(shape.values())} devices, but split_mode={mode} uses "
            f"one; leave one of the two flags out"
        )
    if isinstance(devices, int) and not isinstance(devices, bool):
        if not 1 <= devices <= len(present):
            raise JaxsplitError(f"devices={devices}: there are {described}{hint}")
        devices = present[:devices]
    elif devices is not None:
        given = list(devices) if isinstance(devices, Iterable) else [devices]
        if not given:
            raise JaxsplitError("the list of devices is empty")
        if not all(isinstance(device, jax.Device) for device in given):
            raise JaxsplitError(
                f"devices={devices!r} is neither a number of devices nor a list of JAX devices"
            )
        devices = given
    available = present if devices is None else devices
    if chosen.axis is None:
        if not 0 <= main_device < len(available):
            raise JaxsplitError(
                f"main_device={main_device}: there are {len(available)} devices, numbered from 0"
            )
        return {"tensor": 1}, _with_all_processes([available[main_device]])
    if shape is None:
        shape = {chosen.axis: len(available)}
    needed = math.prod(shape.values())
    if needed > len(available) or (devices is not None and needed != len(available)):
        found = described if devices is None else f"{len(available)} devices given"
        raise JaxsplitError(f"mesh={mesh} needs {needed} devices, there are {found}{hint}")
    return shape, _with_all_processes(available[:needed])


def _with_all_processes(devices: list[jax.Device]) -> list[jax.Device]:
    present = {device.process_index for device in devices}
    if left_out := sorted(set(range(jax.process_count())) - present):
        raise JaxsplitError(
            f"no device of process {left_out[0]} is in the mesh of {len(devices)}; every process "
            f"needs one: use all {len(jax.devices())} devices, or start fewer processes"
        )
    return devices
