"""The MLPs of a mixture, for the experts that tokens were routed to."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm.api import all_gather, is_split
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.ops.activations.api import act_and_mul, as_array
from jaxsplit.ops.activations.functions import activate
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.matmul.api import GroupedGemmInfo, expert_matmuls, grouped_matmuls, matmul
from jaxsplit.ops.moe.tiles import ExpertTiles, make_tiles, tile_rows
from jaxsplit.quant import QTensor, Weight, to_u8
from jaxsplit.sharding.axes import Axis

_LARGEST_GROUP = 64  # rows that the grouped kernel multiplies at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertMatrices:
    """One projection of every expert that this device holds.

    Attributes:
      kernel: `[experts, out, in]`.
      bias: float32 `[experts, out]`, or None.
    """

    kernel: Weight
    bias: Array | None = None

    def of_expert(self, x: Array, expert: Array) -> Array:
        """`[rows, in]` to float32 `[rows, out]` by the expert at an index."""

        def chosen(stack: Array) -> Array:
            return lax.dynamic_index_in_dim(stack, expert, keepdims=False)

        w = jax.tree.map(chosen, self.kernel)
        with forward_context(policy=MatmulPolicy()):  # kernels cannot read it inside the stack
            y = matmul(x, to_u8(w) if isinstance(w, QTensor) else w)
        return y if self.bias is None else y + chosen(self.bias)

    def add_bias(self, y: Array, experts: Array) -> Array:
        """`[pairs, out]` with the bias of each pair's expert."""
        return y if self.bias is None else (y + self.bias[experts]).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertParams:
    """Experts: MLPs of the same shape, split by experts and by their hidden units.

    Attributes:
      up, gate, down: projections; no gate: plain MLPs.
      activation: as in `MLPConfig`.
      axis, mlp: of experts, and of hidden units.
      weight_on_input: router weights multiply the input of experts, not their output.
    """

    up: ExpertMatrices
    gate: ExpertMatrices | None
    down: ExpertMatrices
    activation: str = dataclasses.field(metadata={"static": True})
    axis: Axis = dataclasses.field(metadata={"static": True})
    mlp: Axis = dataclasses.field(metadata={"static": True})
    weight_on_input: bool = dataclasses.field(metadata={"static": True})

    @property
    def inputs(self) -> list[ExpertMatrices]:
        """The projections of the input."""
        return [self.up] if self.gate is None else [self.up, self.gate]

    @property
    def stacks(self) -> list[Weight]:
        """The matrices of all projections."""
        return [matrices.kernel for matrices in (*self.inputs, self.down)]

    @property
    def gathers(self) -> bool:
        """Whether `down` reads the hidden units of all devices."""
        return is_split(self.mlp) and not is_split(self.mlp.columns)

    def hidden(self, x: Array, expert: Array) -> Array:
        """`[rows, embed]` to the hidden units of one expert."""
        gate = None if self.gate is None else self.gate.of_expert(x, expert)
        return activate(self.activation, self.up.of_expert(x, expert), gate).astype(x.dtype)

    def gathered(self, hidden: Array) -> Array:
        """The hidden units that `down` reads."""
        return all_gather(hidden, self.mlp) if self.gathers else hidden


# The implementations: of tokens `[tokens, embed]`, int32 and float32 `[tokens, top_k]`, to float32
# `[parts, tokens, out]`.


def by_gemv(x: Activations, topk_ids: Array, weights: Array, p: ExpertParams) -> Array:
    """All pairs by a kernel that reads experts where they are stored."""
    experts = topk_ids.reshape(-1)

    def project(x: Activations, layers: list[ExpertMatrices], dtype: jnp.dtype) -> list[Array]:
        ys = expert_matmuls(x, [layer.kernel for layer in layers], experts, dtype)
        return [layer.add_bias(y, experts) for layer, y in zip(layers, ys, strict=True)]

    up, gate = [*project(x, p.inputs, x.dtype), None][:2]
    # The weights scale whole rows, which does not change how these are quantized.
    readers = XLA_ONLY if p.gathers else Readers((Int8Layout(),), xla=False)
    h = act_and_mul(up, gate, p.activation, readers, row_scale=weights.reshape(-1, 1))
    if p.gathers:
        h = Activations(p.gathered(h.array))
    [y] = project(h, [p.down], jnp.float32)
    return jnp.moveaxis(y.reshape(*topk_ids.shape, -1), 1, 0)


def by_grouped_gemm(x: Activations, topk_ids: Array, weights: Array, p: ExpertParams) -> Array:
    """All tiles of pairs by a kernel that reads experts where they are stored."""
    pairs = topk_ids.size
    rows = min(_LARGEST_GROUP, tile_rows(pairs, p.axis.units, step=False))
    tiles = make_tiles(topk_ids, weights, p.axis, rows)
    pair = tiles.start[:, None] + jnp.arange(rows)
    groups = GroupedGemmInfo(
        matrix=tiles.expert,
        start=tiles.start,
        stop=tiles.stop,
        x_row=tiles.token[pair],
        count=jnp.asarray(tiles.count, jnp.int32),
    )
    stacks, array = [layer.kernel for layer in p.inputs], as_array(x)
    ys = grouped_matmuls(array, stacks, groups, pairs, x.dtype)
    hidden = activate(p.activation, *ys).astype(x.dtype)
    # Nothing was written for pairs whose expert another device holds.
    own = (jnp.arange(pairs) < jnp.max(tiles.stop))[:, None]
    hidden = p.gathered(jnp.where(own, hidden, 0))
    groups = dataclasses.replace(groups, x_row=jnp.minimum(pair, pairs - 1))
    [y] = grouped_matmuls(hidden, [p.down.kernel], groups, pairs)
    y = jnp.where(own, y, 0)[jnp.argsort(tiles.order[:pairs])]
    return (y.reshape(*topk_ids.shape, -1) * weights[..., None]).sum(1)[None]


def by_vmap(x: Activations, topk_ids: Array, weights: Array, p: ExpertParams) -> Array:
    """All pairs at once by XLA: no loop around the fused matmuls of single rows."""
    experts, weights = topk_ids.reshape(-1), weights.reshape(-1, 1)
    read = jnp.repeat(as_array(x), topk_ids.shape[1], axis=0)
    if p.weight_on_input:
        read = (read * weights).astype(x.dtype)
    hidden = p.gathered(jax.vmap(p.hidden)(read[:, None], experts)[:, 0])
    y = jax.vmap(p.down.of_expert)(hidden[:, None], experts)[:, 0]
    if not p.weight_on_input:
        y = y * weights
    return y.reshape(*topk_ids.shape, -1).sum(1)[None]


def by_tiles(
    x: Activations, topk_ids: Array, weights: Array, p: ExpertParams, *, step: bool
) -> Array:
    """Tiles one after the other, so that one expert at a time is read and dequantized; `step`: x is
    that of a decode step."""
    tokens, rows = as_array(x), tile_rows(topk_ids.size, p.axis.units, step=step)
    tiles = make_tiles(topk_ids, weights, p.axis, rows)
    return _loop_over_tiles(tokens, tiles, p)[None]


def _loop_over_tiles(x: Array, tiles: ExpertTiles, p: ExpertParams) -> Array:
    """Two loops, with the gather between them: devices have different numbers of tiles."""

    def weighted(values: Array, tile: Array) -> Array:
        return values * tiles.take(tiles.weight, tile)[:, None]

    def expand(tile: Array, hidden: Array) -> Array:
        read = x[tiles.take(tiles.token, tile)]
        if p.weight_on_input:
            read = weighted(read, tile).astype(x.dtype)
        return tiles.put(hidden, tile, p.hidden(read, tiles.expert[tile]))

    def reduce(tile: Array, total: Array) -> Array:
        y = p.down.of_expert(tiles.take(hidden, tile), tiles.expert[tile])
        y = jnp.where(tiles.own(tile), y if p.weight_on_input else weighted(y, tile), 0)
        return total.at[tiles.take(tiles.token, tile)].add(y)

    hidden = jnp.zeros((len(tiles.token), p.up.kernel.shape[1]), x.dtype)
    hidden = p.gathered(lax.fori_loop(0, tiles.count, expand, hidden))
    total = jnp.zeros((len(x), p.down.kernel.shape[1]), jnp.float32)
    return lax.fori_loop(0, tiles.count, reduce, total)
