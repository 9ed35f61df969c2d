"""Groups of tokens with the same expert, for kernels that multiply each with its matrix."""

import dataclasses

import jax.numpy as jnp
from jax import Array

from jaxsplit.comm.api import local_units
from jaxsplit.ops.matmul.groups import GroupedGemmInfo
from jaxsplit.ops.moe import cuda_groups
from jaxsplit.ops.moe.tiles import held_index, make_tiles
from jaxsplit.sharding.axes import Axis


@dataclasses.dataclass(frozen=True)
class PairGroups:
    """Pairs of a token and one of its experts, sorted by expert and cut into groups.

    Attributes:
      of_tokens: multiplies tokens; its results are the sorted pairs.
      of_pairs: multiplies the sorted pairs.
      place: of each pair among the sorted ones, int32 `[pairs]`; the number of pairs, where another
        device has the expert.
      expert: of each sorted pair that has a place, as an index into this device's stack, int32
        `[pairs]`.
    """

    of_tokens: GroupedGemmInfo
    of_pairs: GroupedGemmInfo
    place: Array
    expert: Array


def group_pairs(topk_ids: Array, axis: Axis, rows: int) -> PairGroups:
    """Sorts pairs by expert and cuts them into groups.

    Args:
      topk_ids: experts of each token, int32 `[tokens, top_k]`.
      axis: of the experts, which may be split over devices.
      rows: pairs of a group.
    """
    units, pairs = local_units(axis), topk_ids.size
    if cuda_groups.supports(len(units)):
        most = min(pairs, pairs // rows + len(units))
        index = held_index(axis)
        matrix, start, stop, tokens, of_pairs, count, place, expert = cuda_groups.group_pairs(
            topk_ids, index, len(units), rows, most
        )
        common = {"matrix": matrix, "start": start, "stop": stop, "count": count.reshape(())}
        return PairGroups(
            GroupedGemmInfo(x_row=tokens, **common),
            GroupedGemmInfo(x_row=of_pairs, **common),
            place,
            expert,
        )
    tiles = make_tiles(topk_ids, jnp.zeros(topk_ids.shape), axis, rows)
    pair = tiles.start[:, None] + jnp.arange(rows)
    count = jnp.asarray(tiles.count, jnp.int32)
    common = {"matrix": tiles.expert, "start": tiles.start, "stop": tiles.stop, "count": count}
    order = tiles.order[:pairs]
    place, own = jnp.argsort(order), jnp.max(tiles.stop)
    return PairGroups(
        GroupedGemmInfo(x_row=tiles.token[pair], **common),
        GroupedGemmInfo(x_row=jnp.minimum(pair, pairs - 1), **common),
        jnp.where(place < own, place, pairs),
        held_index(axis)[topk_ids.reshape(-1)][order],
    )
