"""Sorts tokens by expert, for matmuls with one expert at a time."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm.api import is_split, local_units
from jaxsplit.sharding.axes import Axis

_MIN_TILE_ROWS, _MAX_TILE_ROWS = 8, 128


@dataclasses.dataclass(frozen=True)
class ExpertTiles:
    """Pairs of a token and one of its experts, sorted by expert and cut into tiles.

    All pairs of a tile have the same expert. Rows at or past `stop` are padding: their results are
    overwritten by the next tile or masked.

    Attributes:
      rows: pairs per tile.
      count: number of tiles of the experts that this device holds, int32.
      expert: each tile's expert, as an index into this device's stack, int32 `[tiles]`.
      start: first pair of each tile, int32 `[tiles]`.
      stop: end of the pairs of its expert, int32 `[tiles]`.
      order: indices that sort the pairs, padded, int32 `[pairs + rows - 1]`.
      token: of each sorted pair, int32 `[pairs + rows - 1]`.
      weight: router weight of each sorted pair, float32 `[pairs + rows - 1]`.
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
        """Slices the rows of a tile: `[pairs + rows - 1, ...]` to `[rows, ...]`."""
        return lax.dynamic_slice_in_dim(pairs, self.start[tile], self.rows)

    def put(self, pairs: Array, tile: Array, values: Array) -> Array:
        """Updates the rows of a tile. The padding overwrites rows of later tiles, so tiles must be
        put in order."""
        return lax.dynamic_update_slice_in_dim(pairs, values, self.start[tile], 0)

    def own(self, tile: Array) -> Array:
        """The mask of the rows of a tile that are not padding, bool `[rows, 1]`."""
        return (self.start[tile] + jnp.arange(self.rows) < self.stop[tile])[:, None]


def held_index(axis: Axis) -> Array:
    """The index of each expert in this device's stack, int32 `[experts]`; those of other devices
    have the length of the stack."""
    units = local_units(axis)
    held = jnp.arange(len(units), dtype=jnp.int32)
    if not is_split(axis):
        return held
    units = jnp.where(units < 0, axis.units, units)
    return jnp.full(axis.units, len(units), jnp.int32).at[units].set(held, mode="drop")


def make_tiles(topk_ids: Array, weights: Array, axis: Axis, rows: int) -> ExpertTiles:
    """Sorts pairs by expert and cuts them into tiles.

    Args:
      topk_ids: experts of each token, int32 `[tokens, top_k]`.
      weights: router weights, float32 `[tokens, top_k]`.
      axis: of the experts, which may be split over devices.
      rows: pairs per tile.
    """
    pairs, top_k = topk_ids.size, topk_ids.shape[1]
    held = len(local_units(axis))
    index = held_index(axis)[topk_ids.reshape(-1)]
    order = jnp.pad(jnp.argsort(index), (0, rows - 1))
    counts = (index[:, None] == jnp.arange(held)).sum(0, dtype=jnp.int32)
    stops = jnp.cumsum(counts)
    tiles = -(-counts // rows)
    last = jnp.cumsum(tiles)
    tile = jnp.arange(min(pairs, pairs // rows + held))
    expert = jnp.minimum((tile[:, None] >= last).sum(1), held - 1)
    return ExpertTiles(
        rows=rows,
        # A constant trip count makes the loop faster.
        count=pairs if rows == 1 and not is_split(axis) else last[-1],
        expert=expert,
        start=(stops - counts)[expert] + (tile - (last - tiles)[expert]) * rows,
        stop=stops[expert],
        order=order,
        token=order // top_k,
        weight=weights.reshape(-1)[order],
    )


def tile_rows(pairs: int, experts: int, *, decode: bool, most: int = _MAX_TILE_ROWS) -> int:
    """The number of pairs per tile, a power of 2 and at most `most`, which is one, too.

    In a decode step tiles of one row read the packed weights, until tokens share experts. Larger
    tiles dequantize their expert; they are so large that each expert has about one, if the pairs
    are spread evenly.
    """
    mean = pairs / experts
    if decode and mean <= 2:
        return 1
    return min(most, max(_MIN_TILE_ROWS, 1 << (math.ceil(2 * mean) - 1).bit_length()))
