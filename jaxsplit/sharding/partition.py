"""A model on a mesh: the layers of each stage, and how axes are laid out on its devices."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, cast

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
      rows: for each dimension but the last, the parameter's index at each padded index, or -1.
      columns: the parameter's block at each padded block, or -1: int `[blocks]`.
      sub_block: weights kept of each block.
      sub_block_index: which sub-block of its block is kept: int32 `[blocks]`.
    """

    sharding: NamedSharding
    rows: tuple[np.ndarray, ...]
    columns: np.ndarray
    sub_block: int
    sub_block_index: np.ndarray

    @property
    def has_padded_columns(self) -> bool:
        """Whether some blocks of each row are padding."""
        return bool((self.columns < 0).any())

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the padded blocks, `[..., rows, blocks]`."""
        return (*map(len, self.rows), len(self.columns))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A pipeline stage: a run of layers on some of the devices.

    Attributes:
      layers: its layers; the embedding belongs to the model's first layer, the head to its last.
      ranks: its devices' ranks in the whole mesh: int `[data, expert, tensor]`.
      mesh: its devices, axes `data`, `expert` and `tensor`.
      table: logical axis to mesh axes.
      block_multiple: axes sharded in multiples of more than one element, and how many: blocks of
        quantized weights.
      kv_cost: as in `grouped_heads`.
      reduce_dtype: dtype of all-reduces, as in `AxisRules`.
    """

    layers: range
    ranks: np.ndarray
    mesh: Mesh | AbstractMesh
    table: Mapping[str, tuple[str, ...]]
    block_multiple: Mapping[Axis, int]
    kv_cost: float
    reduce_dtype: jnp.dtype | None

    @property
    def is_local(self) -> bool:
        """Whether this process has a device of the stage; true for abstract meshes."""
        return not isinstance(self.mesh, Mesh) or bool(self.mesh.local_devices)

    @property
    def device_mesh(self) -> Mesh:
        """Its mesh, which is of devices."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh

    @functools.cached_property
    def rules(self) -> AxisRules:
        """Rules for communication over logical axes."""

        def units(axis: Axis) -> np.ndarray:
            layout = self.layout(axis)
            assert layout is not None  # an axis that is split has units
            return layout.units

        return AxisRules(self.table, self.reduce_dtype, units)

    def spec(self, axes: Sequence[Axis | None]) -> PartitionSpec:
        """Partition spec of an array with these logical axes."""
        names = [self.table.get(axis.name, ()) if axis else () for axis in axes]
        return PartitionSpec(*(mesh_axes or None for mesh_axes in names))

    def shards(self, axis: Axis) -> int:
        """Number of shards of an axis; the same for its `_in` form."""
        name = axis.name.removesuffix("_in")
        return math.prod(self.mesh.shape[mesh_axis] for mesh_axis in self.table.get(name, ()))

    def layout(self, axis: Axis | None, size: int = 0) -> AxisLayout | None:
        """Layout of an axis of `size` elements on the devices; None: it is never sharded."""
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
                return grouped_heads(axis.units, axis.group_count, width, shards, **options)[0]
            if axis.name == "kv_heads":
                return grouped_heads(axis.group_count, axis.units, width, shards, **options)[1]
            multiple = self.block_multiple.get(axis, 1)
            return even(math.ceil(axis.units / multiple), multiple * width, shards)

        return layout

    def padded(self, shape: Sequence[int], axes: Sequence[Axis | None]) -> tuple[int, ...]:
        """Global padded shape of an array with these logical axes."""
        layouts = [self.layout(axis, size) for axis, size in zip(axes, shape, strict=True)]
        return tuple(
            size if layout is None else layout.size
            for layout, size in zip(layouts, shape, strict=True)
        )

    def placement(self, shape: Sequence[int], axes: Sequence[Axis], block: int) -> Placement:
        """Placement of the blocks of a vector, a matrix or a stack of matrices.

        A vector is a matrix with a single column.

        Args:
          shape: of the parameter.
          axes: its logical axes.
          block: weights in a block, consecutive in a row.
        """
        sub_block, columns, index = block, np.zeros(1, np.int64), np.zeros(1, np.int64)
        if len(axes) > 1:
            layout = self.layout(axes[-1], shape[-1])
            if layout is not None:
                sub_block, columns, index = layout.sub_blocks(block)
            else:
                columns = np.arange(shape[-1] // block)
                index = np.zeros_like(columns)
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
        return Placement(sharding, rows, columns, sub_block, index.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Partition:
    """A split mode applied to one model and one set of devices.

    Attributes:
      mode: name of the split mode.
      mesh: all devices.
      stages: the stages, in layer order. Their devices are disjoint, except for uneven shares of a
        `tensor` axis, where each stage has the devices of the previous one and more.
    """

    mode: str
    mesh: Mesh | AbstractMesh
    stages: tuple[Stage, ...]

    @property
    def data(self) -> int:
        """Number of data replicas."""
        return self.mesh.shape.get("data", 1)

    @functools.cached_property
    def global_mesh(self) -> Mesh:
        """All devices as axes `data`, `expert` and `tensor`."""
        mesh = cast(Mesh, self.mesh)
        ranks = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
        ranks = _grid(ranks, mesh.axis_names).reshape(self.data, 1, -1)
        return cast(Mesh, _mesh(ranks, list(mesh.devices.flat)))


class Layers(Protocol):
    """The part of a model that decides where it may be split into stages, such as `ModelConfig`.

    Attributes:
      layers: number of layers.
      colocated_layers: runs of layers that must be in the same stage.
    """

    @property
    def layers(self) -> int: ...

    @property
    def colocated_layers(self) -> Sequence[range]: ...


def make_partition(
    model: Layers,
    mode: str,
    shape: Mapping[str, int],
    devices: Sequence[jax.Device] | None,
    *,
    shares: Sequence[float] | None = None,
    layer_costs: Sequence[float] | None = None,
    block_multiple: Mapping[Axis, int] | None = None,
    kv_cost: float = 1.0,
    reduce_dtype: jnp.dtype | None = None,
) -> Partition:
    """Lays a model out on devices.

    Shares of stages become runs of layers. Shards of a `tensor` axis are equal; unequal shares are
    approximated by layers: some run only on the devices with the largest shares, others on more of
    them, so that each device holds about its share of the whole.

    Args:
      model: its layers.
      mode: a name in `SPLIT_MODES`.
      shape: mesh axis sizes, the last varying fastest over the devices.
      devices: as many as the mesh has; None for an abstract mesh.
      shares: of the stages, or of the devices of the `tensor` axis; None: by the free memory of the
        stages' devices, and equal on the `tensor` axis.
      layer_costs: of each layer, embedding and head included; None: all equal.
      block_multiple, kv_cost: as in `Stage`.
      reduce_dtype: dtype of all-reduces, as in `AxisRules`.

    Raises:
      JaxsplitError: the shares do not fit the mesh.
    """
    ranks = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    grid = _grid(ranks, tuple(shape))
    if shares is not None:
        _check_shares(shares, *grid.shape[1:])
    grids, shares = _stage_grids(grid, shape, devices, shares)
    runs = share_layers(layer_costs or [1.0] * model.layers, shares, model.colocated_layers)
    table = split_mode(mode).table

    def stage(run: range, grid: np.ndarray) -> Stage:
        mesh = _mesh(grid, devices)
        used = {
            logical: tuple(axis for axis in axes if mesh.shape[axis] > 1)
            for logical, axes in table.items()
        }
        return Stage(
            layers=run,
            ranks=grid,
            mesh=mesh,
            table={logical: axes for logical, axes in used.items() if axes},
            block_multiple=block_multiple or {},
            kv_cost=kv_cost,
            reduce_dtype=reduce_dtype,
        )

    stages = tuple(stage(run, grid) for run, grid in zip(runs, grids, strict=True) if run)
    return Partition(mode, _mesh(ranks, devices, tuple(shape)), stages)


def _check_shares(shares: Sequence[float], stages: int, experts: int, tensor: int) -> None:
    """Checks `tensor_split` against the sizes of the mesh axes.

    Raises:
      JaxsplitError: they do not fit.
    """
    axis, wanted = ("stage", stages) if stages > 1 else ("tensor", tensor)
    if len(shares) != wanted:
        raise JaxsplitError(
            f"tensor_split has {len(shares)} shares, but the mesh has {axis}:{wanted}; give one "
            "share for each"
        )
    if stages == 1 and experts > 1:
        raise JaxsplitError(
            "tensor_split gives shares of the stage or tensor axis; leave it out with a mesh of "
            f"expert:{experts}"
        )


def _stage_grids(
    grid: np.ndarray,
    shape: Mapping[str, int],
    devices: Sequence[jax.Device] | None,
    shares: Sequence[float] | None,
) -> tuple[list[np.ndarray], Sequence[float]]:
    """The ranks of each stage's devices, `[data, expert, tensor]`, and each stage's share."""
    stages, _, tensor = grid.shape[1:]
    if stages > 1:
        if shares is None:
            memory = None if devices is None else free_memory(devices)
            shares = stage_memory(shape, memory or [1.0] * grid.size)
        return [grid[:, i] for i in range(stages)], shares
    if shares is None:
        return [grid[:, 0]], [1.0]
    # Stage k has the k + 1 devices of the largest shares: each share is a sum over its stages.
    order = np.argsort(-np.asarray(shares), kind="stable")
    ranked = [*np.asarray(shares)[order], 0.0]
    grids = [grid[:, 0][..., np.sort(order[: k + 1])] for k in range(tensor)]
    return grids, [(k + 1) * (ranked[k] - ranked[k + 1]) for k in range(tensor)]


def _grid(values: np.ndarray, axes: Sequence[str]) -> np.ndarray:
    """Values of a mesh with these axes as `[data, stage, expert, tensor]`."""
    present = [axis for axis in MESH_AXES if axis in axes]
    ordered = values.transpose([axes.index(axis) for axis in present])
    sizes = dict(zip(present, ordered.shape, strict=True))
    return ordered.reshape([sizes.get(axis, 1) for axis in MESH_AXES])


def _mesh(
    ranks: np.ndarray,
    devices: Sequence[jax.Device] | None,
    axes: tuple[str, ...] = ("data", "expert", "tensor"),
) -> Mesh | AbstractMesh:
    types = (AxisType.Auto,) * len(axes)
    if devices is None:
        return AbstractMesh(ranks.shape, axes, axis_types=types)
    present = np.asarray(devices, dtype=object)
    return Mesh(present[ranks], axes, axis_types=types)


def free_memory(devices: Sequence[jax.Device]) -> list[float] | None:
    """Free bytes on each device; None if unknown.

    With several processes they are unknown: all must agree, and none sees the others' devices.
    """
    if jax.process_count() > 1:
        return None
    stats = [device.memory_stats() for device in devices]
    if not all(stats):
        return None
    return [float(s["bytes_limit"] - s["bytes_in_use"]) for s in stats]


def stage_memory(shape: Mapping[str, int], memory: Sequence[float]) -> list[float]:
    """Capacity of each stage of a mesh, given each device's bytes: shares for `make_partition`.

    Shards are equal, so every device of a stage counts as its smallest.
    """
    grid = _grid(np.asarray(memory).reshape(tuple(shape.values())), tuple(shape))
    return [float(stage.min()) * stage.size for stage in grid.swapaxes(0, 1)]


def share_layers(
    costs: Sequence[float], shares: Sequence[float], colocated_layers: Sequence[range] = ()
) -> list[range]:
    """Splits layers into runs whose costs are as close to the shares as whole layers allow.

    Minimizes the sum of `cost**2 / share`, which for divisible layers is where costs are
    proportional to shares.

    Args:
      costs: of each layer.
      shares: of each run, at least one above 0; runs with share 0 are empty.
      colocated_layers: runs of layers that must not be split.

    Returns:
      one run for each share, in order.
    """
    before = np.concatenate([[0.0], np.cumsum(costs)])
    layers = len(costs)
    best = np.full(layers + 1, math.inf)
    best[0] = 0.0
    inside = [i for run in colocated_layers for i in run[1:]]
    starts = []
    for share in shares:
        # price[i, j]: the run of layers i ... j - 1
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
