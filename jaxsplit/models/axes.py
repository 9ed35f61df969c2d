"""Logical axes: the names that parameters give to their dimensions, and sums along them.

The model runs as one program per device over that device's shards (`jax.shard_map`). A table from
logical axis to mesh axis, active while the program is traced, says along which axes it has to
communicate. Without a table nothing is split and every function here is the identity, so that the
modules work as they are on plain arrays.

`embed`      the residual stream
`heads`      query heads times their width
`kv_heads`   key and value heads times their width
`mlp`        hidden units of the MLP
`vocab`      rows of the embedding and of the output head
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
from jax import Array, lax


@dataclasses.dataclass(frozen=True)
class AxisRules:
    """Which mesh axis splits which logical axis.

    Attributes:
      table: logical axis to mesh axis; a logical axis that is not in it is not split.
      reduce_dtype: partial sums are exchanged in this dtype.
    """

    table: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reduce_dtype: jnp.dtype = jnp.float32


_NOTHING_SPLIT = AxisRules()
_rules: contextvars.ContextVar[AxisRules] = contextvars.ContextVar(
    "axis_rules", default=_NOTHING_SPLIT
)


@contextlib.contextmanager
def axis_rules(rules: AxisRules) -> Iterator[None]:
    """Makes a table active for the code that is traced inside the block."""
    token = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(token)


def sum_over(x: Array, axis: str) -> Array:
    """Adds up the partial sums that the shards of a logical axis hold: same shape and dtype."""
    rules = _rules.get()
    mesh_axis = rules.table.get(axis)
    if mesh_axis is None:
        return x
    return lax.psum(x.astype(rules.reduce_dtype), mesh_axis).astype(x.dtype)


def gather_over(x: Array, axis: str) -> Array:
    """Joins the last dimension of all shards of a logical axis: `[..., n]` to `[..., all]`."""
    mesh_axis = _rules.get().table.get(axis)
    if mesh_axis is None:
        return x
    return lax.all_gather(x, mesh_axis, axis=x.ndim - 1, tiled=True)


def shard_of(axis: str) -> Array | int:
    """Which shard of a logical axis this device holds: an int32 scalar, 0 if it is not split."""
    mesh_axis = _rules.get().table.get(axis)
    return 0 if mesh_axis is None else lax.axis_index(mesh_axis)
