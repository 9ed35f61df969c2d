"""Communication over logical axes.

Without a table in the context (`AxisRules`), nothing is split and every function here is the
identity, so that the modules work as they are on plain arrays.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.comm import one_shot, two_shot
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.context import current_context
from jaxsplit.sharding.axes import Axis


def one_shot_peers(size: int, *axes: Axis) -> PeerGroup | None:
    """The peers whose kernels can all-reduce `size` elements over logical axes; None: there are
    none, or they are not the devices that split these axes."""
    peers = _peers_of(*axes)
    return peers if one_shot.supports(size) else None


def _peers_of(*axes: Axis) -> PeerGroup | None:
    peers = current_context().peers
    return peers if peers is not None and mesh_axes(*axes) == peers.axes else None


def mesh_axes(*axes: Axis) -> tuple[str, ...]:
    """The mesh axes that split any of some logical axes."""
    return current_context().rules.mesh_axes(*axes)


def all_reduce(x: Array, *axes: Axis, residual_dtype: jnp.dtype = jnp.float32) -> Array:
    """Sums `x` over the shards of logical axes: same shape and dtype.

    Args:
      x: partial sums.
      *axes: logical axes, split or not.
      residual_dtype: dtype of the stream that the sum is added to. Large sums for a bfloat16 stream
        are exchanged in bfloat16, unless the rules name a dtype.
    """
    rules = current_context().rules
    mesh_axes = rules.mesh_axes(*axes)
    if not mesh_axes:
        return x
    if (peers := one_shot_peers(x.size, *axes)) is not None:
        return one_shot.all_reduce(x, peers)
    large = not one_shot.supports(x.size)
    automatic = jnp.bfloat16 if large and residual_dtype == jnp.bfloat16 else jnp.float32
    sent = x.astype(rules.reduce_dtype or automatic)
    peers = _peers_of(*axes)
    if peers is not None and two_shot.supports(sent.size, sent.dtype, peers):
        return two_shot.all_reduce(sent, peers).astype(x.dtype)
    return lax.psum(sent, mesh_axes).astype(x.dtype)


def all_reduce_unique_units(x: Array, axis: Axis) -> Array:
    """Sums float32 over the shards of an axis, where a unit that several devices hold counts once.
    Each unit must be held by the same number of devices."""
    rules = current_context().rules
    mesh_axes = rules.mesh_axes(axis)
    if not mesh_axes:
        return x
    return lax.psum(x, mesh_axes) / np.float32((rules.units(axis) == 0).sum())


def all_gather(x: Array, axis: Axis, size: int | None = None) -> Array:
    """Concatenates the shards of a logical axis along the last dimension: `[..., local]` to
    `[..., size]`.

    Args:
      x: this device's shard.
      axis: the logical axis.
      size: elements without the padding, which comes last; None keeps the padding.
    """
    mesh_axes = current_context().rules.mesh_axes(axis)
    if not mesh_axes:
        return x
    if (peers := one_shot_peers(x.size, axis)) is not None:
        shards = one_shot.all_gather(x, peers)
        return jnp.concatenate(list(shards), axis=-1)[..., :size]
    return lax.all_gather(x, mesh_axes, axis=x.ndim - 1, tiled=True)[..., :size]


def is_split(axis: Axis) -> bool:
    """Whether a logical axis is split."""
    return bool(mesh_axes(axis))


def shard_index(axis: Axis) -> Array | int:
    """Which shard of a logical axis this device holds: an int32 scalar, 0 if it is not split."""
    names = mesh_axes(axis)
    return lax.axis_index(names) if names else 0


def local_units(axis: Axis) -> Array:
    """The units of an axis that this device holds, -1 for padding: int32 `[local units]`."""
    units = jnp.asarray(current_context().rules.units(axis), jnp.int32)
    if not is_split(axis):
        return units
    shards = lax.axis_size(mesh_axes(axis))
    return units.reshape(shards, -1)[shard_index(axis)]
