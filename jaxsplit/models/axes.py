"""Logical axes: the names that parameters give to their dimensions, and how devices meet there.

The model runs as one program per device over that device's shards (`jax.shard_map`). A table from
logical axis to mesh axis, active while the program is traced, says along which axes it has to
communicate. Without a table nothing is split and every function here is the identity, so that the
modules work as they are on plain arrays.

`embed`      the residual stream; whole on every device
`heads`      query heads times their width
`kv_heads`   key and value heads times their width
`mlp`        hidden units of the MLP
`vocab`      rows of the embedding and of the output head
`heads_in`   heads, as columns of the matrix that reads them
`mlp_in`     hidden units, as columns of the matrix that reads them
`embed_out`  rows of the matrices that write to the residual stream
`slots`      sequences in the cache

What is split along columns is added up (`heads_in`, `mlp_in`); what is split along rows only, or
read whole though its parts lie on several devices, is gathered (`embed_out`, `heads`, `mlp`).
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


def gather_over(x: Array, axis: str, size: int | None = None) -> Array:
    """Joins the last dimension of all shards of a logical axis: `[..., n]` to `[..., all]`.

    Args:
      x: this device's shard.
      axis: the logical axis.
      size: elements that are no padding, which comes last; None keeps the padding.
    """
    mesh_axis = _rules.get().table.get(axis)
    if mesh_axis is None:
        return x
    return lax.all_gather(x, mesh_axis, axis=x.ndim - 1, tiled=True)[..., :size]


def any_over(x: Array, axis: str) -> Array:
    """Whether a boolean is true on any shard of a logical axis."""
    mesh_axis = _rules.get().table.get(axis)
    return x if mesh_axis is None else lax.psum(x.astype(jnp.int32), mesh_axis) > 0


def is_split(axis: str) -> bool:
    """Whether a logical axis is split."""
    return axis in _rules.get().table


def shard_of(axis: str) -> Array | int:
    """Which shard of a logical axis this device holds: an int32 scalar, 0 if it is not split."""
    mesh_axis = _rules.get().table.get(axis)
    return 0 if mesh_axis is None else lax.axis_index(mesh_axis)
