"""Pages and states of the cache on the host, as devices hold them and as no mesh changes them.

A copy is as the devices of a data replica hold it, so that nothing has to be sorted when it is made
or comes back: for each stage a few vectors for each device. What several devices hold alike (a
latent, a KV head with copies) is kept once.

The other form is for other meshes: each array whole, without padding, by a name.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxsplit.cache.host import HostCopy
from jaxsplit.cache.layers import CacheArray
from jaxsplit.engine.runner import StageRunner
from jaxsplit.sharding import Stage

STAGED_PAGES, STAGED_STATES = 8, 1
"""That are on the devices besides the cache, at most, before they are written to it."""


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the cache.

    Attributes:
      name: by layer and field.
      index: in the stage's cache, flattened.
      shape, dtype: of one page or state, unpadded.
      axis: the dimension that devices share; None: each has all of it.
      elements: what each device of a replica holds along `axis`, -1 for padding: int
        `[devices, elements]`; without `axis`, `[devices, 0]`.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int | None
    elements: np.ndarray

    @classmethod
    def of(cls, name: str, index: int, array: CacheArray, stage: Stage) -> "_Array":
        shape, axes = array.shape, array.axes
        layouts = [stage.layout(axis, size) for axis, size in zip(axes, shape, strict=True)]
        split = [i for i, layout in enumerate(layouts) if layout is not None]
        devices = math.prod(stage.mesh.shape[name] for name in ("expert", "tensor"))
        dtype = np.dtype(array.dtype)
        if not split:
            return cls(name, index, shape, dtype, None, np.zeros((devices, 0), np.int64))
        [axis] = split
        layout, logical = layouts[axis], axes[axis]
        assert layout is not None
        assert logical is not None
        elements = layout.elements()
        elements = np.where(elements < shape[axis], elements, -1)
        elements = elements.reshape(stage.shards(logical), -1)
        ranks = np.zeros(stage.ranks.shape[1:], np.int64)
        places: dict[str, Any] = {}
        places["expert"], places["tensor"] = np.indices(ranks.shape)
        for mesh_axis in stage.table.get(logical.name, ()):
            ranks = ranks * stage.mesh.shape[mesh_axis] + places[mesh_axis]
        return cls(name, index, shape, dtype, axis, elements[ranks.ravel()])

    @property
    def alike(self) -> tuple[int, ...]:
        """For each device, the first that holds the same."""
        held = [row.tobytes() for row in self.elements]
        return tuple(map(held.index, held))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of what a device holds."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.axis], self.elements.shape[1], *self.shape[self.axis + 1 :])

    def taken(self, whole: np.ndarray, device: int) -> np.ndarray:
        """What a device holds of the whole."""
        if self.axis is None:
            return whole
        elements = self.elements[device]
        found = np.take(whole, np.maximum(elements, 0), self.axis)
        found[(slice(None),) * self.axis + (elements < 0,)] = 0
        return found

    def put(self, whole: np.ndarray, part: np.ndarray, device: int) -> None:
        """Puts what a device holds into the whole."""
        if self.axis is None:
            whole[...] = part
            return
        elements, before = self.elements[device], (slice(None),) * self.axis
        whole[(*before, elements[elements >= 0])] = part[(*before, elements >= 0)]


class _StagePages:
    """The arrays of a stage that are in pages, or the others, in groups that devices hold alike."""

    def __init__(self, runner: StageRunner, *, paged: bool):
        self.runner, self.paged = runner, paged
        first = runner.stage.layers.start
        leaves, _ = jax.tree_util.tree_flatten_with_path(runner.cache_arrays)
        groups: dict[tuple, list[_Array]] = {}
        for index, ((layer, *rest), array) in enumerate(leaves):
            if array.paged == paged:
                name = f"{layer.idx + first}{jax.tree_util.keystr(tuple(rest))}"
                one = _Array.of(name, index, array, runner.stage)
                groups.setdefault((one.alike, one.dtype), []).append(one)
        self.groups = [*groups.values()]
        self.alike = [alike for alike, _ in groups]
        self.indices = [[one.index for one in group] for group in self.groups]

    @property
    def arrays(self) -> list[_Array]:
        return [one for group in self.groups for one in group]

    def gather(self, cache: Any, replica: int, index: int) -> list[list[Any]]:
        """The vectors of each group."""
        if not self.groups:
            return []
        data = self.runner.stage.ranks.shape[0]
        indices = np.zeros(data, np.int32)
        indices[replica] = index
        found = self.runner.gather(self.indices, paged=self.paged)(cache, indices)
        devices = self.runner.stage.device_mesh.devices[replica].ravel()
        vectors = []
        for vector, alike in zip(found, self.alike, strict=True):
            held = {shard.device: shard.data for shard in vector.addressable_shards}
            vectors.append([held[devices[i]] for i in sorted(set(alike))])
        return vectors

    def on_devices(self, vectors: Sequence[Sequence[Any]]) -> list[jax.Array]:
        """Vectors on all devices that hold them, of all replicas."""
        stage = self.runner.stage
        data, devices = stage.ranks.shape[0], stage.device_mesh.devices
        sharding = NamedSharding(stage.device_mesh, self.runner.device_spec)
        targets = [SingleDeviceSharding(x, memory_kind="device") for x in devices.flat]
        found = []
        for group, alike in zip(vectors, self.alike, strict=True):
            first = sorted(set(alike))
            own = [group[first.index(i)] for i in alike] * data
            shards = jax.device_put(own, targets)
            shape = (*devices.shape, own[0].shape[-1])
            found.append(jax.make_array_from_single_device_arrays(shape, sharding, shards))
        return found

    def scatter(
        self, cache: Any, vectors: Sequence[jax.Array], replica: int, index: int
    ) -> tuple[Any, jax.Array]:
        """The cache with what `on_devices` has put there, and what is there once it has."""
        size = self.runner.size
        nowhere = size.pages if self.paged else size.states
        indices = np.full(self.runner.stage.ranks.shape[0], nowhere, np.int32)
        indices[replica] = index
        return self.runner.scatter(self.indices, paged=self.paged)(cache, vectors, indices)

    def whole(self, vectors: Sequence[Sequence[Any]]) -> dict[str, np.ndarray]:
        """The arrays by name, without padding."""
        found = {one.name: np.empty(one.shape, one.dtype) for one in self.arrays}
        for group, alike, several in zip(self.groups, self.alike, vectors, strict=True):
            ends = np.cumsum([math.prod(one.local_shape) for one in group])[:-1]
            for device, vector in zip(sorted(set(alike)), several, strict=True):
                parts = np.split(np.asarray(vector).reshape(-1), ends)
                for one, part in zip(group, parts, strict=True):
                    one.put(found[one.name], part.reshape(one.local_shape), device)
        return found

    def vectors(self, arrays: Mapping[str, np.ndarray]) -> list[list[np.ndarray]]:
        """The inverse of `whole`."""
        return [
            [
                np.concatenate([one.taken(arrays[one.name], i).reshape(-1) for one in group])[
                    None, None, None
                ]
                for i in sorted(set(alike))
            ]
            for group, alike in zip(self.groups, self.alike, strict=True)
        ]


class HostPages:
    """Copies pages, or states, between the caches of an engine and the host. In one process.

    Args:
      runners: of the stages.
      paged: pages; else states.

    Attributes:
      shapes: shape and dtype of each array, without padding.
      nbytes: of a copy.
    """

    def __init__(self, runners: Sequence[StageRunner], *, paged: bool):
        self._most = STAGED_PAGES if paged else STAGED_STATES
        self._staged: collections.deque[list[jax.Array]] = collections.deque()
        self._stages = [_StagePages(runner, paged=paged) for runner in runners]
        self.shapes = {x.name: (x.shape, x.dtype) for one in self._stages for x in one.arrays}
        self.nbytes = sum(
            len(set(one.alike)) * math.prod(one.local_shape) * one.dtype.itemsize
            for stage in self._stages
            for one in stage.arrays
        )

    def clear(self) -> None:
        """Waits for nothing that was on its way to the devices before: they have failed."""
        self._staged.clear()

    def save(self, caches: Sequence[Any], replica: int, index: int) -> HostCopy:
        """Begins to copy a page or a state of a data replica to the host."""
        pairs = zip(self._stages, caches, strict=True)
        return HostCopy([stage.gather(cache, replica, index) for stage, cache in pairs])

    def on_devices(self, copy: HostCopy) -> list[list[jax.Array]]:
        """Begins to copy a page or a state to the devices, for `restore`. Waits while there are as
        many as may be."""
        while len(self._staged) >= self._most:
            jax.block_until_ready(self._staged.popleft())
        pairs = zip(self._stages, copy.vectors, strict=True)
        return [stage.on_devices(vectors) if vectors else [] for stage, vectors in pairs]

    def restore(
        self, caches: Sequence[Any], held: Sequence[Sequence[jax.Array]], replica: int, index: int
    ) -> list[Any]:
        """The caches with a page or a state of a data replica replaced; they are donated."""
        found, done = [], []
        for stage, cache, vectors in zip(self._stages, caches, held, strict=True):
            if vectors:
                cache, one = stage.scatter(cache, vectors, replica, index)
                done.append(one)
            found.append(cache)
        self._staged.append(done)
        return found

    def whole(self, copy: HostCopy) -> dict[str, np.ndarray]:
        """The arrays by name, without padding; waits for them."""
        found: dict[str, np.ndarray] = {}
        for stage, vectors in zip(self._stages, copy.vectors, strict=True):
            found |= stage.whole(vectors)
        return found

    def copy_of(self, arrays: Mapping[str, np.ndarray]) -> HostCopy:
        """The inverse of `whole`."""
        return HostCopy([stage.vectors(arrays) for stage in self._stages])
