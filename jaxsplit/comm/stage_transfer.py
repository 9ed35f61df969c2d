"""Transfer of arrays from the devices of one stage to those of another."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_BY_DATA = PartitionSpec("data")


def transfer(tree: Any, like: Any, source: Mesh, target: Mesh) -> Any:
    """Copies arrays, sharded over `data` and replicated over `tensor`, to another mesh.

    Within one process, each target device gets its copy from a source device, asynchronously.
    Between processes, the devices of both meshes run an all-reduce.

    Args:
      tree: arrays on `source`; None for each in a process without a device there.
      like: their global shapes and dtypes.
      source, target: meshes of axes `data` and `tensor`, with equal sizes of `data`.

    Returns:
      the arrays on `target`; None for each in a process without a device there.
    """
    process = jax.process_index()
    devices = {*source.devices.flat, *target.devices.flat}
    present = {device.process_index for device in devices}
    if source == target or process not in present:
        return tree
    if len(present) > 1 and not set(target.devices.flat) <= set(source.devices.flat):
        leaves, structure = jax.tree.flatten(like)
        arrays = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
        moved = [_all_reduce(x, y, source, target) for x, y in zip(arrays, leaves, strict=True)]
        return jax.tree.unflatten(structure, moved)
    if not target.local_devices:
        return jax.tree.map(lambda _: None, like)
    return jax.tree.map(lambda x: _copy(x, source, target), tree)


def _replicas(mesh: Mesh) -> list[list[jax.Device]]:
    """The devices of each data replica."""
    return mesh.devices.reshape(mesh.devices.shape[0], -1).tolist()


def _copy(x: jax.Array, source: Mesh, target: Mesh) -> jax.Array:
    held = {shard.device: shard.data for shard in x.addressable_shards}
    local = target.local_devices
    shards = [
        held[device] if device in held else held[senders[rank % len(senders)]]
        for senders, receivers in zip(_replicas(source), _replicas(target), strict=True)
        for rank, device in enumerate(receivers)
        if device in local
    ]
    copies = jax.device_put(shards, local)
    sharding = NamedSharding(target, _BY_DATA)
    return jax.make_array_from_single_device_arrays(x.shape, sharding, copies)


def _all_reduce(
    x: jax.Array | None, like: jax.ShapeDtypeStruct, source: Mesh, target: Mesh
) -> jax.Array | None:
    """An all-reduce over both meshes in which only `tensor` rank 0 of the source contributes."""
    union = np.asarray(
        [
            [*senders, *(device for device in receivers if device not in senders)]
            for senders, receivers in zip(_replicas(source), _replicas(target), strict=True)
        ]
    )
    mesh = Mesh(union, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    local = NamedSharding(mesh, _BY_DATA).shard_shape(like.shape)
    held = {} if x is None else {shard.device: shard.data for shard in x.addressable_shards}
    shards = [
        held[device] if device in held else _zeros(local, like.dtype, device)
        for device in mesh.local_devices
    ]
    joined = jax.make_array_from_single_device_arrays(
        like.shape, NamedSharding(mesh, _BY_DATA), shards
    )
    total = _sum_of_rank_0(mesh)(joined)
    if mesh.devices.flat[0].platform == "cpu":
        # CPU devices share a thread pool: a collective that waits for its peers would hold a thread
        # that an earlier program may need.
        total.block_until_ready()
    summed = {shard.device: shard.data for shard in total.addressable_shards}
    if not target.local_devices:
        return None
    return jax.make_array_from_single_device_arrays(
        like.shape,
        NamedSharding(target, _BY_DATA),
        [summed[device] for device in target.local_devices],
    )


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, device: jax.Device) -> jax.Array:
    return jax.device_put(np.zeros(shape, dtype), device)


@functools.cache
def _sum_of_rank_0(mesh: Mesh) -> Any:
    def local(x: jax.Array) -> jax.Array:
        contributes = lax.axis_index("tensor") == 0
        return lax.psum(jnp.where(contributes, x, jnp.zeros_like(x)), "tensor")

    return jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=_BY_DATA, out_specs=_BY_DATA, check_vma=False)
    )


def fetch(x: jax.Array | None, like: jax.ShapeDtypeStruct, source: Mesh, global_mesh: Mesh) -> Any:
    """An array on `source` as one that every process can read with `numpy.asarray`.

    Args:
      x: on `source`, with any sharding; None in a process without a device there.
      like: its global shape and dtype.
      source: mesh of axes `data`, `expert` and `tensor`.
      global_mesh: the mesh of all devices.
    """
    if all(device.process_index == jax.process_index() for device in global_mesh.devices.flat):
        return x
    whole = None if x is None else _replicate(source)(x)
    one_replica, target = (
        Mesh(mesh.devices.reshape(1, 1, -1), mesh.axis_names) for mesh in (source, global_mesh)
    )
    return transfer(whole, like, one_replica, target)


@functools.cache
def _replicate(mesh: Mesh) -> Any:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))
