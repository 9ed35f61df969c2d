"""Tokens sorted by expert, for matmuls with one expert at a time."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm.api import is_split, local_units
from jaxsplit.sharding.axes import Axis

_LEAST_TILE, _LARGEST_TILE = 8, 128


@dataclasses.dataclass(frozen=True)
class ExpertTiles:
    """Pairs of a token and one of its experts, sorted by expert and cut into tiles.

    The pairs of a tile belong to one expert. Its rows at or past `stop` are padding: their results
    are overwritten by the next tile or masked.

    Attributes:
      rows: pairs in a tile.
      count: int32: tiles of the experts that this device holds.
      expert: int32 `[tiles]`: index of the expert in this device's stack.
      start, stop: int32 `[tiles]`: the tile's first pair, and the end of the expert's pairs.
      order: int32 `[pairs + rows - 1]`: the pairs as sorted, padded.
      token: int32 `[pairs + rows - 1]`: of each pair.
      weight: float32 `[pairs + rows - 1]`: of each pair.
    """

    rows: int
    count: Array | int
    expert: Array
    start: Array
    stop: Array
    order: Array
    token: Array
    weight: Array

    def take(self, pairs: Array, tile: Array) -> Array:
        """The rows of a tile: `[pairs + rows - 1, ...]` to `[rows, ...]`."""
        return lax.dynamic_slice_in_dim(pairs, self.start[tile], self.rows)

    def put(self, pairs: Array, tile: Array, values: Array) -> Array:
        """The inverse of `take`; tiles have to be put in order."""
        return lax.dynamic_update_slice_in_dim(pairs, values, self.start[tile], 0)

    def own(self, tile: Array) -> Array:
        """Which rows of a tile belong to its expert: bool `[rows, 1]`."""
        return (self.start[tile] + jnp.arange(self.rows) < self.stop[tile])[:, None]


def make_tiles(topk_ids: Array, weights: Array, axis: Axis, rows: int) -> ExpertTiles:
    """Sorts what tokens chose by expert.

    Args:
      topk_ids: int32 `[tokens, used]`: experts.
      weights: float32 `[tokens, used]`.
      axis: of the experts, of which this device may hold some.
      rows: pairs in a tile.
    """
    pairs, top_k = topk_ids.size, topk_ids.shape[1]
    units = local_units(axis)
    held = len(units)
    # Index of each expert in this device's stack; experts of other devices come last.
    units = jnp.where(units < 0, axis.units, units)
    index = jnp.full(axis.units, held).at[units].set(jnp.arange(held), mode="drop")
    index = index[topk_ids.reshape(-1)]
    order = jnp.pad(jnp.argsort(index), (0, rows - 1))
    counts = (index[:, None] == jnp.arange(held)).sum(0, dtype=jnp.int32)
    stops = jnp.cumsum(counts)
    tiles = -(-counts // rows)
    last = jnp.cumsum(tiles)
    tile = jnp.arange(min(pairs, pairs // rows + held))
    expert = jnp.minimum((tile[:, None] >= last).sum(1), held - 1)
    return ExpertTiles(
        rows=rows,
        # A constant trip count makes a faster loop.
        count=pairs if rows == 1 and not is_split(axis) else last[-1],
        expert=expert,
        start=(stops - counts)[expert] + (tile - (last - tiles)[expert]) * rows,
        stop=stops[expert],
        order=order,
        token=order // top_k,
        weight=weights.reshape(-1)[order],
    )


def tile_rows(pairs: int, experts: int, *, step: bool) -> int:
    """How many pairs to multiply with an expert at a time.

    In a decode step single rows read an expert's weights as they are stored, until tokens share
    experts. Else an expert is dequantized for every tile, about once if pairs are spread evenly.
    """
    mean = pairs / experts
    if step and mean <= 2:
        return 1
    return min(_LARGEST_TILE, max(_LEAST_TILE, 1 << (math.ceil(2 * mean) - 1).bit_length()))
