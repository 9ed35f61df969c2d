"""Split modes: a mesh of devices and a table that says which logical axis it splits."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import TensorInfo
from jaxsplit.models.axes import AxisRules
from jaxsplit.models.config import ModelConfig
from jaxsplit.parallel.layout import AxisLayout, even, grouped_heads

MESH_AXES = ("tensor",)


@dataclasses.dataclass(frozen=True)
class SplitMode:
    """One way to split a model.

    Attributes:
      summary: one line for people.
      axis: the mesh axis that takes all devices when no mesh is given; None: a single device.
      table: logical axis to mesh axis.
    """

    summary: str
    axis: str | None
    table: Mapping[str, str]


SPLIT_MODES: Mapping[str, SplitMode] = MappingProxyType(
    {
        "none": SplitMode("nothing is split; one device runs the whole model", None, {}),
        "graph": SplitMode(
            "heads, hidden units and vocabulary are split; all devices work at once",
            "tensor",
            {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"},
        ),
    }
)


def split_mode(name: str) -> SplitMode:
    """The entry of a split mode.

    Raises:
      JaxsplitError: there is no such mode; the message lists those that are.
    """
    if name not in SPLIT_MODES:
        raise JaxsplitError(
            f"--split_mode={name} is not supported; supported are {', '.join(SPLIT_MODES)}"
        )
    return SPLIT_MODES[name]


def parse_mesh(text: str) -> dict[str, int]:
    """`tensor:4` (or several axes, separated by commas) to axis sizes.

    Raises:
      JaxsplitError: not of this form, or an unknown axis.
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition(":")
        if not size.isdecimal() or int(size) < 1:
            raise JaxsplitError(
                f"--mesh={text}: {part.strip()!r} is not of the form axis:size, such as tensor:4"
            )
        if name not in MESH_AXES:
            raise JaxsplitError(
                f"--mesh={text}: unknown axis {name!r}; supported are {', '.join(MESH_AXES)}"
            )
        if name in shape:
            raise JaxsplitError(f"--mesh={text}: axis {name!r} is given twice")
        shape[name] = int(size)
    return shape


def choose_devices(
    mode: str,
    devices: Sequence[jax.Device] | int | None = None,
    mesh: str | None = None,
    main_device: int = 0,
) -> tuple[dict[str, int], list[jax.Device]]:
    """The mesh's shape and its devices.

    Args:
      mode: a name in `SPLIT_MODES`.
      devices: which devices, or how many of the first; None: all, or as many as `mesh` needs.
      mesh: axis sizes, such as `tensor:4`; None: all devices on the mode's axis.
      main_device: for modes on a single device: which one.

    Raises:
      JaxsplitError: the mode or mesh is unknown, they do not fit together, or there are fewer
        devices than asked for.
    """
    chosen = split_mode(mode)
    present = list(jax.devices())
    described = f"{len(present)} {present[0].platform} device" + "s" * (len(present) != 1)
    hint = (
        "; set JAX_NUM_CPU_DEVICES to simulate more on the CPU"
        if present[0].platform == "cpu"
        else ""
    )
    shape = parse_mesh(mesh) if mesh else None
    if shape and chosen.axis is None and math.prod(shape.values()) > 1:
        raise JaxsplitError(
            f"--mesh={mesh} has {math.prod(shape.values())} devices, but --split_mode={mode} uses "
            f"one; leave one of the two flags out"
        )
    if isinstance(devices, int):
        if not 1 <= devices <= len(present):
            raise JaxsplitError(f"--devices={devices}: there are {described}{hint}")
        devices = present[:devices]
    elif devices is not None:
        devices = list(devices)
        if not devices:
            raise JaxsplitError("the list of devices is empty")
    available = present if devices is None else devices
    if chosen.axis is None:
        if not 0 <= main_device < len(available):
            raise JaxsplitError(
                f"--main_device={main_device}: there are {len(available)} devices, numbered from 0"
            )
        return {"tensor": 1}, [available[main_device]]
    if shape is None:
        shape = {chosen.axis: len(available)}
    needed = math.prod(shape.values())
    if needed > len(available) or (devices is not None and needed != len(available)):
        found = described if devices is None else f"{len(available)} devices given"
        raise JaxsplitError(f"--mesh={mesh} needs {needed} devices, there are {found}{hint}")
    return shape, available[:needed]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the raw blocks of one tensor go.

    Attributes:
      sharding: of the padded array `[..., rows, blocks, block_bytes]`.
      rows: the tensor's row at each padded row, or -1: int `[rows]`.
      columns: the tensor's block at each padded block, or -1: int `[blocks]`.
      granule: weights that are kept of each block.
      part: which granule of its block it is: int32 `[blocks]`.
    """

    sharding: NamedSharding
    rows: np.ndarray
    columns: np.ndarray
    granule: int
    part: np.ndarray


@dataclasses.dataclass(frozen=True)
class Partition:
    """A split mode applied to one model and one set of devices.

    Attributes:
      mesh: the devices.
      rules: logical axis to mesh axis.
      layouts: how each split logical axis lies on the devices.
    """

    mesh: Mesh
    rules: AxisRules
    layouts: Mapping[str, AxisLayout]

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        return PartitionSpec(*(self.rules.table.get(axis) for axis in axes))

    def place(self, tensor: TensorInfo, axes: Sequence[str | None]) -> Placement:
        """Where the blocks of a vector, a matrix or a stack of matrices with these axes go.

        A vector is a matrix with a single column. Stacks are not split along their first axes.
        """
        if len(axes) == 1:
            axes = (axes[0], None)
            granule, columns, part = 1, np.zeros(1, np.int64), np.zeros(1, np.int64)
            size = tensor.shape[0]
        else:
            size = tensor.shape[-2]
            layout = self.layouts.get(axes[-1])
            if layout is not None:
                granule, columns, part = layout.granules(tensor.block_size)
            else:
                columns = np.arange(tensor.blocks_shape[-2])
                granule, part = tensor.block_size, np.zeros_like(columns)
        layout = self.layouts.get(axes[-2])
        rows = np.arange(size) if layout is None else layout.elements()
        spec = PartitionSpec(*self.spec(axes), None)
        return Placement(
            NamedSharding(self.mesh, spec), rows, columns, granule, part.astype(np.int32)
        )


def make_partition(
    config: ModelConfig,
    mode: str,
    shape: Mapping[str, int],
    devices: Sequence[jax.Device],
    *,
    mlp_unit: int = 1,
    reduce_dtype: jnp.dtype = jnp.float32,
) -> Partition:
    """Lays a model out on devices.

    Args:
      config: the model.
      mode: a name in `SPLIT_MODES`.
      shape: mesh axis sizes.
      devices: as many as the mesh has places.
      mlp_unit: hidden units of the MLP that cannot be taken apart: the weights in a block.
      reduce_dtype: dtype in which partial sums are exchanged.
    """
    types = (AxisType.Auto,) * len(shape)
    mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), types, devices=tuple(devices))
    table = {
        logical: axis
        for logical, axis in split_mode(mode).table.items()
        if mesh.shape.get(axis, 1) > 1
    }

    def shards(axis: str) -> int:
        return mesh.shape[table[axis]] if axis in table else 1

    heads, kv_heads = grouped_heads(config.heads, config.kv_heads, config.head_dim, shards("heads"))
    layouts = {
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp": even(math.ceil(config.mlp / mlp_unit), mlp_unit, shards("mlp")),
        "vocab": even(config.vocab, 1, shards("vocab")),
    }
    return Partition(mesh, AxisRules(table, reduce_dtype), layouts)
