"""The experts' MLPs, for tokens that have been routed."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm.api import all_gather, is_split
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.ops.activations.api import act_and_mul, as_array
from jaxsplit.ops.activations.functions import Activation, activate
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.matmul.api import (
    batched,
    expert_matmuls,
    grouped_matmuls,
    grouped_readers,
    matmul,
    max_group_rows,
)
from jaxsplit.ops.moe.groups import group_pairs
from jaxsplit.ops.moe.tiles import ExpertTiles, make_tiles, tile_rows
from jaxsplit.quant import QTensor, Weight, to_u8
from jaxsplit.sharding.axes import Axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertMatrices:
    """One projection of all experts that this device holds.

    Attributes:
      kernel: `[experts, out, in]`.
      bias: float32 `[experts, out]`, or None.
    """

    kernel: Weight
    bias: Array | None = None

    @property
    def quantized(self) -> QTensor:
        """The kernel, of quantized experts."""
        assert isinstance(self.kernel, QTensor)
        return self.kernel

    def project(self, x: Array, expert: Array) -> Array:
        """Projects `[rows, in]` with the expert at an index of the stack: float32 `[rows, out]`."""

        def select(stack: Array) -> Array:
            return lax.dynamic_index_in_dim(stack, expert, keepdims=False)

        w = jax.tree.map(select, self.kernel)
        # Without kernels: XLA fuses the slice into its own loops, but copies it for a kernel.
        with forward_context(policy=MatmulPolicy()):
            y = matmul(x, to_u8(w) if isinstance(w, QTensor) else w)
        return y if self.bias is None else y + select(self.bias)

    def add_bias(self, y: Array, experts: Array) -> Array:
        """Adds the bias of each pair's expert to `[pairs, out]`."""
        return y if self.bias is None else (y + self.bias[experts]).astype(y.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertParams:
    """Experts: MLPs of the same shape, split by expert and by hidden unit.

    Attributes:
      up, gate, down: projections; `gate` is None for MLPs that are not gated.
      activation: as in `MLPConfig`.
      axis: of experts.
      mlp: of hidden units.
      weight_on_input: router weights multiply the input of experts, not their output.
    """

    up: ExpertMatrices
    gate: ExpertMatrices | None
    down: ExpertMatrices
    activation: Activation = dataclasses.field(metadata={"static": True})
    axis: Axis = dataclasses.field(metadata={"static": True})
    mlp: Axis = dataclasses.field(metadata={"static": True})
    weight_on_input: bool = dataclasses.field(metadata={"static": True})

    @property
    def inputs(self) -> list[ExpertMatrices]:
        """The projections that read the input."""
        return [self.up] if self.gate is None else [self.up, self.gate]

    @property
    def stacks(self) -> list[Weight]:
        """The matrices of all projections."""
        return [matrices.kernel for matrices in (*self.inputs, self.down)]

    @property
    def input_stacks(self) -> list[QTensor]:
        """The matrices that read the input, of quantized experts."""
        return [layer.quantized for layer in self.inputs]

    def group_rows(self, pairs: int, dtype: jnp.dtype) -> int:
        """Most pairs of a group, for pairs of a token and an expert and activations of a dtype."""
        most = max_group_rows(self.stacks, dtype)
        return tile_rows(pairs, self.axis.units, decode=False, most=most)

    @property
    def gathers(self) -> bool:
        """Whether `down` needs the hidden units of all devices."""
        return is_split(self.mlp) and not is_split(self.mlp.columns)

    def hidden(self, x: Array, expert: Array) -> Array:
        """The hidden units of one expert, for `[rows, embed]`."""
        gate = None if self.gate is None else self.gate.project(x, expert)
        return activate(self.activation, self.up.project(x, expert), gate).astype(x.dtype)

    def gather(self, hidden: Array) -> Array:
        """The hidden units that `down` reads: with an all-gather where they are split."""
        return all_gather(hidden, self.mlp) if self.gathers else hidden


# The implementations. All take tokens `[tokens, embed]`, and `topk_ids` and `weights` `[tokens,
# top_k]`, and return float32 `[parts, tokens, out]`. A pair is a token with one of its experts.


def by_gemv(x: Activations, topk_ids: Array, weights: Array, p: ExpertParams) -> Array:
    """All pairs with the GEMV kernel, which reads experts in place."""
    experts = topk_ids.reshape(-1)

    def project(x: Activations, layers: list[ExpertMatrices], dtype: jnp.dtype) -> list[Array]:
        ys = expert_matmuls(x, [layer.quantized for layer in layers], experts, dtype)
        return [layer.add_bias(y, experts) for layer, y in zip(layers, ys, strict=True)]

    up, gate = [*project(x, p.inputs, x.dtype), None][:2]
    # Router weights scale whole rows, which leaves their int8 codes unchanged.
    readers = XLA_ONLY if p.gathers else Readers((Int8Layout(),), xla=False)
    h = act_and_mul(up, gate, p.activation, readers, row_scale=weights.reshape(-1, 1))
    if p.gathers:
        h = Activations(p.gather(h.array))
    [y] = project(h, [p.down], jnp.float32)
    return jnp.moveaxis(y.reshape(*topk_ids.shape, -1), 1, 0)


def by_grouped_gemm(x: Activations, topk_ids: Array, weights: Array, p: ExpertParams) -> Array:
    """All pairs, in groups of one expert, with kernels that read experts in place."""
    pairs, dtype = topk_ids.size, x.dtype
    rows = p.group_rows(pairs, dtype)
    groups = group_pairs(topk_ids, p.axis, rows)
    ys = grouped_matmuls(x, p.input_stacks, groups.of_tokens, pairs, dtype)
    ys = [layer.add_bias(y, groups.expert) for layer, y in zip(p.inputs, ys, strict=True)]
    up, gate = [*ys, None][:2]
    down = [p.down.quantized]
    readers = XLA_ONLY if p.gathers else grouped_readers(down, dtype, rows)
    # The rows of pairs whose expert another device holds are not written, and not read below.
    hidden = act_and_mul(up, gate, p.activation, readers)
    if p.gathers:
        hidden = Activations(p.gather(hidden.array))
    [y] = grouped_matmuls(hidden, down, groups.of_pairs, pairs, dtype)
    y = y.at[groups.place].get(mode="fill", fill_value=0).reshape(*topk_ids.shape, -1)
    return (y * weights[..., None]).sum(1)[None]


def by_vmap(x: Activations, topk_ids: Array, weights: Array, p: ExpertParams) -> Array:
    """All pairs at once with XLA: one-row matmuls fused without a loop around them."""
    experts, weights = topk_ids.reshape(-1), weights.reshape(-1, 1)
    rows = jnp.repeat(as_array(x), topk_ids.shape[1], axis=0)
    if p.weight_on_input:
        rows = (rows * weights).astype(x.dtype)
    hidden = p.gather(batched(p.hidden)(rows[:, None], experts)[:, 0])
    y = batched(p.down.project)(hidden[:, None], experts)[:, 0]
    if not p.weight_on_input:
        y = y * weights
    return y.reshape(*topk_ids.shape, -1).sum(1)[None]


def by_tiles(
    x: Activations, topk_ids: Array, weights: Array, p: ExpertParams, *, decode: bool
) -> Array:
    """Tiles of one expert in a loop, so that only one expert is dequantized at a time; `decode`: as
    in `tile_rows`."""
    tokens, rows = as_array(x), tile_rows(topk_ids.size, p.axis.units, decode=decode)
    tiles = make_tiles(topk_ids, weights, p.axis, rows)
    return _loop_over_tiles(tokens, tiles, p)[None]


def _loop_over_tiles(x: Array, tiles: ExpertTiles, p: ExpertParams) -> Array:
    """Loops over all tiles twice, before and after the all-gather of hidden units, which cannot be
    inside a loop: devices have different numbers of tiles."""

    def apply_weights(values: Array, tile: Array) -> Array:
        return values * tiles.take(tiles.weight, tile)[:, None]

    def expand(tile: Array, hidden: Array) -> Array:
        rows = x[tiles.take(tiles.token, tile)]
        if p.weight_on_input:
            rows = apply_weights(rows, tile).astype(x.dtype)
        return tiles.put(hidden, tile, p.hidden(rows, tiles.expert[tile]))

    def reduce(tile: Array, total: Array) -> Array:
        y = p.down.project(tiles.take(hidden, tile), tiles.expert[tile])
        y = jnp.where(tiles.own(tile), y if p.weight_on_input else apply_weights(y, tile), 0)
        return total.at[tiles.take(tiles.token, tile)].add(y)

    hidden = jnp.zeros((len(tiles.token), p.up.kernel.shape[1]), x.dtype)
    hidden = p.gather(lax.fori_loop(0, tiles.count, expand, hidden))
    total = jnp.zeros((len(x), p.down.kernel.shape[1]), jnp.float32)
    return lax.fori_loop(0, tiles.count, reduce, total)
