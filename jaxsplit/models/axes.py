"""Logical axes: the names that parameters give to their dimensions, and how devices meet there.

The model runs as one program per device over that device's shards (`jax.shard_map`). A table from
logical axis to mesh axes, active while the program is traced, says along which axes it has to
communicate. Without a table nothing is split and every function here is the identity, so that the
modules work as they are on plain arrays.

`embed`      the residual stream; whole on every device
`heads`      query heads times their width
`kv_heads`   key and value heads times their width
`mlp`        hidden units of the MLP
`experts`    the experts of a mixture
`expert_mlp` hidden units of each expert
`vocab`      rows of the embedding and of the output head
`…_in`       the same as columns of the matrix that reads them
`embed_out`  rows of the matrices that write to the residual stream
`expert_out` rows of those of the experts
`slots`      sequences in the cache

What is split along columns is added up (`heads_in`, `mlp_in`); what is split along rows only, or
read whole though its parts lie on several devices, is gathered (`embed_out`, `heads`, `mlp`).
Experts are added up too, since each writes for some of the tokens.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.quant import Peers, active_arithmetic, exchange, two_shot


@dataclasses.dataclass(frozen=True)
class Axis:
    """A dimension of a parameter or a cache.

    Attributes:
      name: the logical axis.
      units: how many pieces that stay whole it consists of, such as heads; 0: it is never cut.
      partner: of `heads`, how many key and value heads they share; of `kv_heads`, how many query
        heads share them.
      tiled: of `heads`, head h shares key and value head `h % kv_heads`; else neighbours share one.
    """

    name: str
    units: int = 0
    partner: int = 0
    tiled: bool = False

    @property
    def columns(self) -> "Axis":
        """The same axis where a matrix reads it."""
        return dataclasses.replace(self, name=f"{self.name}_in") if self.units else self


EMBED = Axis("embed")
HEAD_DIM = Axis("head_dim")
LATENT = Axis("latent")
LAYER_INPUT = Axis("layer_input")
SLOTS = Axis("slots")


def head_axes(heads: int, kv_heads: int, *, tiled: bool = False) -> tuple[Axis, Axis]:
    """The axes of query heads and of the key and value heads that they share.

    Heads that share one lie beside one another on the device, whatever their order in the file.
    """
    return Axis("heads", heads, kv_heads, tiled), Axis("kv_heads", kv_heads, heads)


def _in_order(axis: Axis) -> np.ndarray:
    return np.arange(axis.units)


@dataclasses.dataclass(frozen=True, eq=False)
class AxisRules:
    """Which mesh axes split which logical axis. Each is equal to itself only.

    Attributes:
      table: logical axis to mesh axes; a logical axis that is not in it is not split.
      reduce_dtype: partial sums are exchanged in this dtype; None: in float32, but as bfloat16 if
        they are many and added to bfloat16.
      units: the unit in each place of an axis over all devices, -1 for padding: int array.
    """

    table: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reduce_dtype: jnp.dtype | None = None
    units: Callable[[Axis], np.ndarray] = _in_order

    def mesh_axes(self, *axes: Axis) -> tuple[str, ...]:
        """The mesh axes that split any of some axes."""
        return tuple(dict.fromkeys(m for axis in axes for m in self.table.get(axis.name, ())))


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


def active_rules() -> AxisRules:
    """The active table."""
    return _rules.get()


_peers: contextvars.ContextVar[Peers | None] = contextvars.ContextVar("peers", default=None)


@contextlib.contextmanager
def use_peers(peers: Peers | None) -> Iterator[None]:
    """Lets devices exchange numbers in kernels, in the code that is traced inside the block."""
    token = _peers.set(peers)
    try:
        yield
    finally:
        _peers.reset(token)


def active_peers() -> Peers | None:
    """The active ones."""
    return _peers.get()


def peers_over(size: int, *axes: Axis) -> Peers | None:
    """The peers, if it is they who split some axes and they can exchange so few numbers."""
    peers = _peers_over(*axes)
    return peers if exchange.supports(size) else None


def _peers_over(*axes: Axis) -> Peers | None:
    peers = _peers.get()
    return peers if peers is not None and mesh_axes(*axes) == peers.axes else None


def mesh_axes(*axes: Axis) -> tuple[str, ...]:
    """The mesh axes that split any of some logical axes."""
    return _rules.get().mesh_axes(*axes)


def sum_over(x: Array, *axes: Axis, addend_of: jnp.dtype = jnp.float32) -> Array:
    """Adds up the partial sums that the shards of logical axes hold: same shape and dtype.

    Args:
      x: partial sums.
      *axes: which are split.
      addend_of: the dtype of what they will be added to.
    """
    rules = _rules.get()
    mesh_axes = rules.mesh_axes(*axes)
    if not mesh_axes:
        return x
    interpret = active_arithmetic().launch.interpret
    if (peers := peers_over(x.size, *axes)) is not None:
        return exchange.total(x, peers, interpret=interpret)
    many = not exchange.supports(x.size)
    automatic = jnp.bfloat16 if many and addend_of == jnp.bfloat16 else jnp.float32
    sent = x.astype(rules.reduce_dtype or automatic)
    peers = _peers_over(*axes)
    if peers is not None and two_shot.supports(sent.size, sent.dtype, peers):
        return two_shot.total(sent, peers, interpret=interpret).astype(x.dtype)
    return lax.psum(sent, mesh_axes).astype(x.dtype)


def total_over(x: Array, axis: Axis) -> Array:
    """Adds up float32 numbers of the shards of an axis, units on several devices counted once."""
    rules = _rules.get()
    mesh_axes = rules.mesh_axes(axis)
    if not mesh_axes:
        return x
    return lax.psum(x, mesh_axes) / np.float32((rules.units(axis) == 0).sum())


def gather_over(x: Array, axis: Axis, size: int | None = None) -> Array:
    """Joins the last dimension of all shards of a logical axis: `[..., n]` to `[..., all]`.

    Args:
      x: this device's shard.
      axis: the logical axis.
      size: elements that are no padding, which comes last; None keeps the padding.
    """
    mesh_axes = _rules.get().mesh_axes(axis)
    if not mesh_axes:
        return x
    if (peers := peers_over(x.size, axis)) is not None:
        parts = exchange.gather(x, peers, interpret=active_arithmetic().launch.interpret)
        return jnp.concatenate(list(parts), axis=-1)[..., :size]
    return lax.all_gather(x, mesh_axes, axis=x.ndim - 1, tiled=True)[..., :size]


def is_split(axis: Axis) -> bool:
    """Whether a logical axis is split."""
    return bool(_rules.get().mesh_axes(axis))


def shard_of(axis: Axis) -> Array | int:
    """Which shard of a logical axis this device holds: an int32 scalar, 0 if it is not split."""
    mesh_axes = _rules.get().mesh_axes(axis)
    return lax.axis_index(mesh_axes) if mesh_axes else 0


def local_units(axis: Axis) -> Array:
    """The units of an axis that this device holds, -1 for padding: int32 `[local units]`."""
    units = jnp.asarray(_rules.get().units(axis), jnp.int32)
    if not is_split(axis):
        return units
    shards = lax.axis_size(_rules.get().mesh_axes(axis))
    return units.reshape(shards, -1)[shard_of(axis)]
