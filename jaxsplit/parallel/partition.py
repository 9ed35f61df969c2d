"""A model on a mesh: which layers each stage holds, and how axes lie on its devices."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import TensorInfo
from jaxsplit.models.axes import AxisRules
from jaxsplit.models.config import ModelConfig
from jaxsplit.parallel.layout import AxisLayout, even, grouped_heads
from jaxsplit.parallel.modes import MESH_AXES, split_mode


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

    def padded(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the padded array, given that of the tensor's."""
        return (*shape[:-3], len(self.rows), len(self.columns), shape[-1])


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of layers on some of the devices.

    Attributes:
      layers: which; the embedding goes with the first layer of the model, the head with the last.
      places: where its devices are among those of the whole mesh: int `[data, tensor]`.
      mesh: its devices, axes `data` and `tensor`.
      rules: logical axis to mesh axis.
      layouts: how each split logical axis lies on the devices.
    """

    layers: range
    places: np.ndarray
    mesh: Mesh | AbstractMesh
    rules: AxisRules
    layouts: Mapping[str, AxisLayout]

    @property
    def is_local(self) -> bool:
        """Whether a device of this process takes part; so it is where there are none at all."""
        return not isinstance(self.mesh, Mesh) or bool(self.mesh.local_devices)

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


@dataclasses.dataclass(frozen=True)
class Partition:
    """A split mode applied to one model and one set of devices.

    Attributes:
      mode: the split mode's name.
      mesh: all devices.
      stages: the runs of layers, in order. Their devices differ, or, for uneven shares of one
        layer, each has the devices of the one before and more.
    """

    mode: str
    mesh: Mesh | AbstractMesh
    stages: tuple[Stage, ...]

    @property
    def data(self) -> int:
        """Copies of the model."""
        return self.mesh.shape.get("data", 1)

    @property
    def everyone(self) -> Mesh:
        """All devices as axes `data` and `tensor`."""
        places = np.arange(self.mesh.size).reshape(tuple(self.mesh.shape.values()))
        rows = _grid(places, self.mesh.axis_names).reshape(self.data, -1)
        return _mesh(rows, self.mesh.devices.reshape(-1))


def make_partition(
    config: ModelConfig,
    mode: str,
    shape: Mapping[str, int],
    devices: Sequence[jax.Device] | None,
    *,
    shares: Sequence[float] | None = None,
    layer_costs: Sequence[float] | None = None,
    mlp_unit: int = 1,
    kv_cost: float = 1.0,
    reduce_dtype: jnp.dtype = jnp.float32,
) -> Partition:
    """Lays a model out on devices.

    Shares of stages are runs of layers. Shares of a `tensor` axis are met as far as equal shards
    allow: some layers run on the devices with the largest shares only, the others on more of them,
    so that each device holds its share of the whole.

    Args:
      config: the model.
      mode: a name in `SPLIT_MODES`.
      shape: mesh axis sizes, the last varying fastest over the devices.
      devices: as many as the mesh has places; None for a mesh that is only thought of.
      shares: of the stages, or of the devices of the `tensor` axis; None: by the free memory of the
        stages' devices, and alike on the `tensor` axis.
      layer_costs: of each layer, with embedding and head; None: all alike.
      mlp_unit: hidden units of the MLP that cannot be taken apart: the weights in a block.
      kv_cost: as in `grouped_heads`.
      reduce_dtype: dtype in which partial sums are exchanged.

    Raises:
      JaxsplitError: the shares do not fit the mesh.
    """
    places = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    grid = _grid(places, tuple(shape))
    stages, tensor = grid.shape[1:]
    if shares is not None and len(shares) != (wanted := stages if stages > 1 else tensor):
        axis = "stage" if stages > 1 else "tensor"
        raise JaxsplitError(
            f"--tensor_split has {len(shares)} shares, but the mesh has {wanted} "
            f"{axis} place{'s' * (wanted != 1)}; give one share for each"
        )
    grids = [grid[:, i] for i in range(stages)]
    if stages > 1:
        memory = free_memory(devices) if shares is None and devices is not None else None
        if shares is None:
            shares = stage_memory(shape, memory or [1.0] * grid.size)
    elif shares is not None:
        order = np.argsort(-np.asarray(shares), kind="stable")
        ranked = [*np.asarray(shares)[order], 0.0]
        grids = [grid[:, 0, np.sort(order[: k + 1])] for k in range(tensor)]
        shares = [(k + 1) * (ranked[k] - ranked[k + 1]) for k in range(tensor)]
    else:
        shares = [1.0]
    runs = share_layers(layer_costs or [1.0] * config.layers, shares)
    table = split_mode(mode).table
    return Partition(
        mode,
        _mesh(places, devices, tuple(shape)),
        tuple(
            _stage(config, run, grid, _mesh(grid, devices), table, mlp_unit, kv_cost, reduce_dtype)
            for run, grid in zip(runs, grids, strict=True)
            if run
        ),
    )


def _stage(
    config: ModelConfig,
    layers: range,
    places: np.ndarray,
    mesh: Mesh | AbstractMesh,
    table: Mapping[str, str],
    mlp_unit: int,
    kv_cost: float,
    reduce_dtype: jnp.dtype,
) -> Stage:
    table = {logical: axis for logical, axis in table.items() if mesh.shape[axis] > 1}
    shards = mesh.shape["tensor"] if "heads" in table else 1
    sizes = (config.heads, config.kv_heads, config.head_dim)
    heads, kv_heads = grouped_heads(*sizes, shards, kv_cost)
    mlp = even(math.ceil(config.mlp / mlp_unit), mlp_unit, shards)
    layouts = {
        "heads": heads,
        "heads_in": heads,
        "kv_heads": kv_heads,
        "mlp": mlp,
        "mlp_in": mlp,
        "vocab": even(config.vocab, 1, shards),
        "embed_out": even(config.embed, 1, shards if "embed_out" in table else 1),
    }
    return Stage(layers, places, mesh, AxisRules(table, reduce_dtype), layouts)


def _grid(places: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    """Places by `[data, stage, tensor]`."""
    present = [axis for axis in MESH_AXES if axis in axes]
    ordered = places.transpose([axes.index(axis) for axis in present])
    sizes = dict(zip(present, ordered.shape, strict=True))
    return ordered.reshape([sizes.get(axis, 1) for axis in MESH_AXES])


def _mesh(
    places: np.ndarray,
    devices: Sequence[jax.Device] | None,
    axes: tuple[str, ...] = ("data", "tensor"),
) -> Mesh | AbstractMesh:
    types = (AxisType.Auto,) * len(axes)
    if devices is None:
        return AbstractMesh(places.shape, axes, axis_types=types)
    present = np.asarray(devices, dtype=object)
    return Mesh(present[places], axes, axis_types=types)


def free_memory(devices: Sequence[jax.Device]) -> list[float] | None:
    """Bytes that are free on each device; None where they do not say.

    Nor do the devices of other processes, and all processes have to agree.
    """
    if jax.process_count() > 1:
        return None
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        return None
    return [float(s["bytes_limit"] - s["bytes_in_use"]) for s in stats]


def stage_memory(shape: Mapping[str, int], memory: Sequence[float]) -> list[float]:
    """What the stages of a mesh can hold, given each device's bytes: shares for `make_partition`.

    Parts of a layer are equal, so that the smallest device of a stage counts for each.
    """
    grid = _grid(np.asarray(memory).reshape(tuple(shape.values())), tuple(shape))
    return [float(stage.min()) * stage.size for stage in grid.swapaxes(0, 1)]


def share_layers(costs: Sequence[float], shares: Sequence[float]) -> list[range]:
    """Runs of layers whose costs are as near to the shares as whole layers allow.

    The sum over runs of cost squared by share is least; without the limit to whole layers this
    would be where costs are proportional to shares.

    Args:
      costs: of each layer.
      shares: of each run, at least one above 0; runs without a share are empty.

    Returns:
      as many runs as shares, in order.
    """
    before = np.concatenate([[0.0], np.cumsum(costs)])
    layers = len(costs)
    best = np.full(layers + 1, math.inf)
    best[0] = 0.0
    starts = []
    for share in shares:
        # price[i, j]: of the run of layers i ... j - 1
        run = before[None, :] - before[:, None]
        price = run**2 / share if share > 0 else np.where(run > 0, math.inf, 0.0)
        price = np.where(run >= 0, price, math.inf)
        total = best[:, None] + price
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    runs, stop = [], layers
    for start in reversed(starts):
        runs.append(range(int(start[stop]), stop))
        stop = int(start[stop])
    return runs[::-1]
