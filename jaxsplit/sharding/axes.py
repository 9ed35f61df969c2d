"""Logical axes: the names of parameter and cache dimensions.

The model runs as one SPMD program over each device's shards (`jax.shard_map`). A table from logical
axis to mesh axes, part of the `ForwardContext` during tracing, tells over which mesh axes it
communicates (`jaxsplit.comm.api`).

`embed`      the residual stream; replicated
`heads`      query heads times their width
`kv_heads`   KV heads times their width
`mlp`        hidden units of the MLP
`experts`    experts of a mixture
`expert_mlp` hidden units of each expert
`vocab`      rows of the embedding and of the output head
`…_in`       the same axis as columns of the matrix that reads it
`embed_out`  rows of the matrices that write to the residual stream
`expert_out` the same for those of the experts
`slots`      sequences in the cache
`pages`      pages of keys and values in the cache

Splitting columns (`heads_in`, `mlp_in`) needs an all-reduce. Splitting rows only, or reading a
sharded axis whole (`embed_out`, `heads`, `mlp`), needs an all-gather. Experts need an all-reduce
too, since each writes for some of the tokens.
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
      units: number of indivisible units, such as heads; 0: the axis is never sharded.
      group_count: of `heads`, the number of KV heads; of `kv_heads`, the number of query heads.
      tiled: of `heads`, query head h uses KV head `h % kv_heads`; else neighboring heads share one.
    """

    name: str
    units: int = 0
    group_count: int = 0
    tiled: bool = False

    @property
    def columns(self) -> "Axis":
        """The same axis as columns of the matrix that reads it."""
        return dataclasses.replace(self, name=f"{self.name}_in") if self.units else self


EMBED = Axis("embed")
HEAD_DIM = Axis("head_dim")
LATENT = Axis("latent")
PER_LAYER = Axis("per_layer_embedding")
SLOTS = Axis("slots")
PAGES = Axis("pages")


def head_axes(heads: int, kv_heads: int, *, tiled: bool = False) -> tuple[Axis, Axis]:
    """The axes of query heads and of the KV heads that they share.

    Heads that share a KV head are adjacent on the device, whatever their order in the file.
    """
    return Axis("heads", heads, kv_heads, tiled), Axis("kv_heads", kv_heads, heads)


def _in_order(axis: Axis) -> np.ndarray:
    return np.arange(axis.units)


@dataclasses.dataclass(frozen=True, eq=False)
class AxisRules:
    """Which mesh axes split which logical axis. Compared by identity.

    Attributes:
      table: logical axis to mesh axes; other logical axes are replicated.
      reduce_dtype: dtype of all-reduces; None: float32, but bfloat16 for large ones whose result is
        added to bfloat16.
      units: the unit in each slot of an axis over all devices, -1 for padding: int array.
    """

    table: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    reduce_dtype: jnp.dtype | None = None
    units: Callable[[Axis], np.ndarray] = _in_order

    def mesh_axes(self, *axes: Axis) -> tuple[str, ...]:
        """The mesh axes that split any of some axes."""
        return tuple(dict.fromkeys(m for axis in axes for m in self.table.get(axis.name, ())))
