"""Logical axes: the names that parameters give to their dimensions.

The model runs as one program per device over that device's shards (`jax.shard_map`). A table from
logical axis to mesh axes, part of the `ForwardContext` while the program is traced, says over which
axes it has to communicate (`jaxsplit.comm.api`).

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

import dataclasses
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np


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
