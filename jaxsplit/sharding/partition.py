"""A model on a mesh: which layers each stage holds, and how axes lie on its devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.sharding.axes import Axis, AxisRules
from jaxsplit.sharding.layout import AxisLayout, even, grouped_heads
from jaxsplit.sharding.split_modes import MESH_AXES, split_mode


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the raw blocks of a parameter go.

    Attributes:
      sharding: of the padded array `[..., rows, blocks, block_bytes]`.
      rows: for each dimension but the last, the parameter's index at each padded place, or -1.
      columns: the parameter's block at each padded block, or -1: int `[blocks]`.
      granule: weights that are kept of each block.
      part: which granule of its block it is: int32 `[blocks]`.
    """

    sharding: NamedSharding
    rows: tuple[np.ndarray, ...]
    columns: np.ndarray
    granule: int
    part: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the padded blocks, `[..., rows, blocks]`."""
        return (*map(len, self.rows), len(self.columns))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of layers on some of the devices.

    Attributes:
      layers: which; the embedding goes with the first layer of the model, the head with the last.
      places: where its devices are among those of the whole mesh: int `[data, expert, tensor]`.
      mesh: its devices, axes `data`, `expert` and `tensor`.
      table: logical axis to mesh axes.
      pieces: elements of an axis that stay together, where that is more than one: blocks of
        quantized weights.
      kv_cost: as in `grouped_heads`.
      reduce_dtype: dtype in which partial sums are exchanged, as in `AxisRules`.
    """

    layers: range
    places: np.ndarray
    mesh: Mesh | AbstractMesh
    table: Mapping[str, tuple[str, ...]]
    pieces: Mapping[Axis, int]
    kv_cost: float
    reduce_dtype: jnp.dtype | None

    @property
    def is_local(self) -> bool:
        """Whether a device of this process takes part; so it is where there are none at all."""
        return not isinstance(self.mesh, Mesh) or bool(self.mesh.local_devices)

    @functools.cached_property
    def rules(self) -> AxisRules:
        """How the devices meet."""
        return AxisRules(self.table, self.reduce_dtype, lambda axis: self.layout(axis).slots)

    def spec(self, axes: Sequence[Axis | None]) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        names = [self.table.get(axis.name, ()) if axis else () for axis in axes]
        return PartitionSpec(*(mesh_axes or None for mesh_axes in names))

    def shards(self, axis: Axis) -> int:
        """How many devices share an axis; as columns, as many as where it is written."""
        name = axis.name.removesuffix("_in")
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.table.get(name, ()))

    def layout(self, axis: Axis | None, size: int = 0) -> AxisLayout | None:
        """How an axis of so many elements lies on the devices; None: it is never cut."""
        if axis is None or not axis.units:
            return None
        width = max(size // axis.units, 1)
        base = dataclasses.replace(axis, name=axis.name.removesuffix("_in"))
        return self._layout(base, width)

    @functools.cached_property
    def _layout(self) -> Callable[[Axis, int], AxisLayout]:
        @functools.cache
        def layout(axis: Axis, width: int) -> AxisLayout:
            shards = self.shards(axis)
            options = {"kv_cost": self.kv_cost, "tiled": axis.tiled}
            if axis.name == "heads":
                return grouped_heads(axis.units, axis.partner, width, shards, **options)[0]
            if axis.name == "kv_heads":
                return grouped_heads(axis.partner, axis.units, width, shards, **options)[1]
            piece = self.pieces.get(axis, 1)
            return even(math.ceil(axis.units / piece), piece * width, shards)

        return layout

    def padded(self, shape: Sequence[int], axes: Sequence[Axis | None]) -> tuple[int, ...]:
        """The shape of an array with these logical axes on all devices together."""
        layouts = [self.layout(axis, size) for axis, size in zip(axes, shape, strict=True)]
        return tuple(
            size if layout is None else layout.size
            for layout, size in zip(layouts, shape, strict=True)
        )

    def place(self, shape: Sequence[int], axes: Sequence[Axis], block: int) -> Placement:
        """Where the blocks of a vector, a matrix or a stack of matrices go.

        A vector is a matrix with a single column.

        Args:
          shape: of the parameter.
          axes: its logical axes.
          block: weights in a block, which lie in a row.
        """
        granule, columns, part = block, np.zeros(1, np.int64), np.zeros(1, np.int64)
        if len(axes) > 1:
            layout = self.layout(axes[-1], shape[-1])
            if layout is not None:
                granule, columns, part = layout.granules(block)
            else:
                columns = np.arange(shape[-1] // block)
                part = np.zeros_like(columns)
            shape, axes, last = shape[:-1], axes[:-1], axes[-1:]
        else:
            last = (None,)
        layouts = [self.layout(axis, size) for axis, size in zip(axes, shape, strict=True)]
        rows = tuple(
            np.arange(size) if layout is None else layout.elements()
            for layout, size in zip(layouts, shape, strict=True)
        )
        spec = PartitionSpec(*self.spec((*axes, *last)), None)
        sharding = NamedSharding(self.mesh, spec)
        return Placement(sharding, rows, columns, granule, part.astype(np.int32))


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
        """All devices as axes `data`, `expert` and `tensor`."""
        places = np.arange(self.mesh.size).reshape(tuple(self.mesh.shape.values()))
        rows = _grid(places, self.mesh.axis_names).reshape(self.data, 1, -1)
        return _mesh(rows, self.mesh.devices.reshape(-1))


class Layers(Protocol):
    """What of a model decides where its layers may be cut, such as `ModelConfig`.

    Attributes:
      layers: how many there are.
      together: runs that have to be on the same devices.
    """

    layers: int
    together: Sequence[range]


def make_partition(
    model: Layers,
    mode: str,
    shape: Mapping[str, int],
    devices: Sequence[jax.Device] | None,
    *,
    shares: Sequence[float] | None = None,
    layer_costs: Sequence[float] | None = None,
    pieces: Mapping[Axis, int] | None = None,
    kv_cost: float = 1.0,
    reduce_dtype: jnp.dtype | None = None,
) -> Partition:
    """Lays a model out on devices.

    Shares of stages are runs of layers. Shares of a `tensor` axis are met as far as equal shards
    allow: some layers run on the devices with the largest shares only, the others on more of them,
    so that each device holds its share of the whole.

    Args:
      model: its layers.
      mode: a name in `SPLIT_MODES`.
      shape: mesh axis sizes, the last varying fastest over the devices.
      devices: as many as the mesh has places; None for a mesh that is only thought of.
      shares: of the stages, or of the devices of the `tensor` axis; None: by the free memory of the
        stages' devices, and alike on the `tensor` axis.
      layer_costs: of each layer, with embedding and head; None: all alike.
      pieces, kv_cost: as in `Stage`.
      reduce_dtype: dtype in which partial sums are exchanged, as in `AxisRules`.

    Raises:
      JaxsplitError: the shares do not fit the mesh.
    """
    places = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    grid = _grid(places, tuple(shape))
    stages, experts, tensor = grid.shape[1:]
    if shares is not None and len(shares) != (wanted := stages if stages > 1 else tensor):
        axis = "stage" if stages > 1 else "tensor"
        raise JaxsplitError(
            f"tensor_split has {len(shares)} shares, but the mesh has {wanted} "
            f"{axis} place{'s' * (wanted != 1)}; give one share for each"
        )
    if shares is not None and stages == 1 and experts > 1:
        raise JaxsplitError(
            "tensor_split gives shares of the stage or tensor axis; leave it out with a mesh of "
            f"expert:{experts}"
        )
    grids = [grid[:, i] for i in range(stages)]
    if stages > 1:
        memory = free_memory(devices) if shares is None and devices is not None else None
        if shares is None:
            shares = stage_memory(shape, memory or [1.0] * grid.size)
    elif shares is not None:
        order = np.argsort(-np.asarray(shares), kind="stable")
        ranked = [*np.asarray(shares)[order], 0.0]
        grids = [grid[:, 0][..., np.sort(order[: k + 1])] for k in range(tensor)]
        shares = [(k + 1) * (ranked[k] - ranked[k + 1]) for k in range(tensor)]
    else:
        shares = [1.0]
    runs = share_layers(layer_costs or [1.0] * model.layers, shares, model.together)
    table = split_mode(mode).table
    return Partition(
        mode,
        _mesh(places, devices, tuple(shape)),
        tuple(
            Stage(
                run,
                grid,
                mesh,
                {
                    logical: used
                    for logical, axes in table.items()
                    if (used := tuple(axis for axis in axes if mesh.shape[axis] > 1))
                },
                pieces or {},
                kv_cost,
                reduce_dtype,
            )
            for run, grid, mesh in zip(
                runs, grids, (_mesh(grid, devices) for grid in grids), strict=True
            )
            if run
        ),
    )


def _grid(places: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    """Places by `[data, stage, expert, tensor]`."""
    present = [axis for axis in MESH_AXES if axis in axes]
    ordered = places.transpose([axes.index(axis) for axis in present])
    sizes = dict(zip(present, ordered.shape, strict=True))
    return ordered.reshape([sizes.get(axis, 1) for axis in MESH_AXES])


def _mesh(
    places: np.ndarray,
    devices: Sequence[jax.Device] | None,
    axes: tuple[str, ...] = ("data", "expert", "tensor"),
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


def share_layers(
    costs: Sequence[float], shares: Sequence[float], together: Sequence[range] = ()
) -> list[range]:
    """Runs of layers whose costs are as near to the shares as whole layers allow.

    The sum over runs of cost squared by share is least; without the limit to whole layers this
    would be where costs are proportional to shares.

    Args:
      costs: of each layer.
      shares: of each run, at least one above 0; runs without a share are empty.
      together: layers that must be in one run.

    Returns:
      as many runs as shares, in order.
    """
    before = np.concatenate([[0.0], np.cumsum(costs)])
    layers = len(costs)
    best = np.full(layers + 1, math.inf)
    best[0] = 0.0
    inside = [i for run in together for i in run[1:]]
    starts = []
    for share in shares:
        # price[i, j]: of the run of layers i ... j - 1
        run = before[None, :] - before[:, None]
        price = run**2 / share if share > 0 else np.where(run > 0, math.inf, 0.0)
        price = np.where(run >= 0, price, math.inf)
        price[:, inside] = math.inf
        total = best[:, None] + price
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    runs, stop = [], layers
    for start in reversed(starts):
        runs.append(range(int(start[stop]), stop))
        stop = int(start[stop])
    return runs[::-1]
