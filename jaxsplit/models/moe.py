"""Mixtures of experts: each token is given to a few of many MLPs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxsplit.comm.api import gather_over, is_split, local_units
from jaxsplit.context import MatmulPolicy, current_context, forward_context
from jaxsplit.models.config import DenseMoEConfig, MLPConfig, MoEConfig
from jaxsplit.models.layers import Linear, Norm, Partial, Partials, meet, param
from jaxsplit.models.mlp import MLP, activate
from jaxsplit.models.router import choose, choose_in_kernel
from jaxsplit.ops.activations.deferred import Pending, RootMeanSquare, as_late
from jaxsplit.ops.matmul.api import (
    Rows,
    Terms,
    computed,
    expert_products,
    grouped_products,
    has_kernel,
    has_tiles,
    matmul,
    prepare,
    rounds,
)
from jaxsplit.ops.matmul.triton_small_m_gemm import Groups
from jaxsplit.quant import QTensor, Weight, with_bytes
from jaxsplit.sharding.axes import EMBED, Axis

ROUTER = Axis("router")
_AT_ONCE = 64  # pairs whose products with quantized experts need little memory
_LEAST_TILE, _LARGEST_TILE = 8, 128
_LARGEST_GROUP = 64  # rows that the kernel multiplies at once
_FEW_TOKENS = 64  # for which a kernel chooses experts


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Pairs of a token and an expert that it chose, sorted by expert and cut into tiles.

    The pairs of a tile belong to one expert. Its rows after `stop` belong to others: their results
    are to be overwritten by the next tile, or to be left out.

    Attributes:
      rows: pairs in a tile.
      count: int32: tiles of the experts that this device holds.
      expert: int32 `[tiles]`: the place of the expert in this device's stack.
      start, stop: int32 `[tiles]`: its first pair, and the one after the expert's last.
      order: int32 `[pairs + rows - 1]`: the pairs as sorted, padded.
      token: likewise: of each pair.
      weight: float32, likewise.
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


def make_tiles(chosen: Array, weights: Array, axis: Axis, rows: int) -> Tiles:
    """Sorts what tokens chose by expert.

    Args:
      chosen: int32 `[tokens, used]`: experts.
      weights: float32 `[tokens, used]`.
      axis: of the experts, of which this device may hold some.
      rows: pairs in a tile.
    """
    pairs, used = chosen.size, chosen.shape[1]
    units = local_units(axis)
    held = len(units)
    # Where each expert is in this device's stack; those that it does not hold come last.
    units = jnp.where(units < 0, axis.units, units)
    place = jnp.full(axis.units, held).at[units].set(jnp.arange(held), mode="drop")
    place = place[chosen.reshape(-1)]
    order = jnp.pad(jnp.argsort(place), (0, rows - 1))
    counts = (place[:, None] == jnp.arange(held)).sum(0, dtype=jnp.int32)
    stops = jnp.cumsum(counts)
    tiles = -(-counts // rows)
    last = jnp.cumsum(tiles)
    tile = jnp.arange(min(pairs, pairs // rows + held))
    expert = jnp.minimum((tile[:, None] >= last).sum(1), held - 1)
    return Tiles(
        rows=rows,
        # A number that is known beforehand makes a faster loop.
        count=pairs if rows == 1 and not is_split(axis) else last[-1],
        expert=expert,
        start=(stops - counts)[expert] + (tile - (last - tiles)[expert]) * rows,
        stop=stops[expert],
        order=order,
        token=order // used,
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


class ExpertLinear(nnx.Module):
    """One projection of every expert: a stack of matrices."""

    def __init__(
        self, axes: tuple[Axis, ...], shape: tuple[int, ...], *, bias: bool, rngs: nnx.Rngs
    ):
        self.kernel = param(rngs, axes, shape)
        zeros = jnp.zeros(shape[:-1], jnp.float32)
        self.bias = nnx.Param(zeros, axes=axes[:-1]) if bias else None

    def __call__(self, x: Array, expert: Array) -> Array:
        """`[rows, in]` to float32 `[rows, out]` by the expert at this place."""

        def of_expert(stack: Array) -> Array:
            return lax.dynamic_index_in_dim(stack, expert, keepdims=False)

        w = jax.tree.map(of_expert, self.kernel.get_value())
        with forward_context(
            policy=MatmulPolicy()
        ):  # a kernel would not read the expert where it lies
            y = matmul(x, with_bytes(w) if isinstance(w, QTensor) else w)
        return y if self.bias is None else y + of_expert(self.bias.get_value())

    def biased(self, y: Array, experts: Array) -> Array:
        """`[pairs, out]` with the bias of each pair's expert."""
        return y if self.bias is None else (y + self.bias.get_value()[experts]).astype(y.dtype)


class Experts(nnx.Module):
    """MLPs of the same shape, split by experts and by their hidden units."""

    def __init__(self, count: int, config: MLPConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.axis, self.mlp = Axis("experts", count), Axis("expert_mlp", c.hidden)
        self.rows = Axis("expert_out", embed)

        def projection() -> ExpertLinear:
            axes, shape = (self.axis, self.mlp, EMBED), (count, c.hidden, embed)
            return ExpertLinear(axes, shape, bias=c.bias, rngs=rngs)

        self.gate = projection() if c.gated else None
        self.up = projection()
        axes, shape = (self.axis, self.rows, self.mlp.columns), (count, embed, c.hidden)
        self.down = ExpertLinear(axes, shape, bias=False, rngs=rngs)
        # Whole on every device, which all know the weights of all experts.
        zeros = jnp.zeros((count, embed), jnp.float32)
        self.down_bias = nnx.Param(zeros, axes=(ROUTER, EMBED)) if c.bias else None
        self.activation = c.activation

    def __call__(
        self, x: Rows, chosen: Array, weights: Array, *, weigh_input: bool = False
    ) -> Partial:
        """The weighted sum of what the chosen experts make of each token.

        Args:
          x: `[..., time, embed]`.
          chosen: int32 `[..., time, used]`: experts, no two alike.
          weights: float32, likewise.
          weigh_input: weights multiply the experts' input, not their output.

        Returns:
          a part of `[..., time, embed]`.
        """
        pairs = [a.reshape(-1, a.shape[-1]) for a in (chosen, weights)]
        used = chosen.shape[-1]
        at_once = self._is_at_once(x, used)
        total: Array | Terms
        if self.reads_rounded(x, used, weigh_input=weigh_input):
            total = self._by_kernels(x, *pairs)
        else:
            tokens = computed(x).reshape(-1, x.shape[-1])
            tiled = not weigh_input and self.up.bias is None
            tiled &= all(has_tiles(stack, x.dtype) for stack in self._stacks())
            if tiled and not (at_once and rounds(len(tokens))):
                total = self._by_groups(tokens, *pairs)
            elif at_once:
                total = self._at_once(tokens, *pairs, weigh_input)
            else:
                rows = tile_rows(chosen.size, self.axis.units, step=x.shape[-2] == 1)
                tiles = make_tiles(*pairs, self.axis, rows)
                total = self._by_tiles(tokens, tiles, weigh_input)
            total = total.reshape(*x.shape[:-1], -1)
        bias = None
        if self.down_bias is not None:
            bias = self.down_bias.get_value()[chosen]
            bias = (bias if weigh_input else bias * weights[..., None]).sum(-2)
        return Partial(total, (self.axis, self.mlp.columns), self.rows, bias)

    def _stacks(self) -> list[Weight]:
        """The matrices of all experts."""
        return [s.kernel.get_value() for s in (self.up, self.gate, self.down) if s is not None]

    def _is_at_once(self, x: Rows, used: int) -> bool:
        """Whether all pairs of a decode step are few enough to be multiplied in one go."""
        few = math.prod(x.shape[:-1]) * used <= _AT_ONCE and x.shape[-2] == 1
        quantized = all(isinstance(stack, QTensor) for stack in self._stacks())
        return few and quantized and not is_split(self.axis)

    def reads_rounded(self, x: Rows, used: int, *, weigh_input: bool) -> bool:
        """Whether kernels round tokens that are given to so many experts, and multiply them."""
        few = self._is_at_once(x, used) and rounds(math.prod(x.shape[:-1]))
        return few and not weigh_input and all(map(has_kernel, self._stacks()))

    def _at_once(self, x: Array, chosen: Array, weights: Array, weigh_input: bool) -> Array:
        """All pairs in one go, without a loop around the fused products of single rows."""
        experts, weights = chosen.reshape(-1), weights.reshape(-1, 1)
        read = jnp.repeat(x, chosen.shape[1], axis=0)
        if weigh_input:
            read = (read * weights).astype(x.dtype)
        hidden = jax.vmap(self._hidden)(read[:, None], experts)[:, 0]
        y = jax.vmap(self.down)(self._whole(hidden)[:, None], experts)[:, 0]
        if not weigh_input:
            y = y * weights
        return y.reshape(*chosen.shape, -1).sum(1)

    def _by_kernels(self, x: Rows, chosen: Array, weights: Array) -> Terms:
        """All pairs by kernels that read experts as they are stored: `[..., out]`."""
        experts = chosen.reshape(-1)

        def project(x: Rows, layers: list[ExpertLinear], dtype: jnp.dtype) -> list[Array]:
            stacks = [layer.kernel.get_value() for layer in layers]
            results = expert_products(x, stacks, experts, dtype)
            return [layer.biased(y, experts) for layer, y in zip(layers, results, strict=True)]

        def weighted(*operands: Array) -> Array:
            # What multiplies all of a row is not rounded.
            *hidden, weight = operands
            return activate(self.activation, *hidden) * weight

        layers = [self.up] if self.gate is None else [self.up, self.gate]
        operands = (*project(x, layers, x.dtype), weights.reshape(-1, 1))
        hidden: Rows = Pending(weighted, operands, x.dtype)
        if is_split(self.mlp) and not is_split(self.mlp.columns):
            hidden = self._whole(computed(hidden))
        [y] = project(hidden, [self.down], jnp.float32)
        y = jnp.moveaxis(y.reshape(*chosen.shape, -1), 1, 0)
        return Terms(y.reshape(len(y), *x.shape[:-1], -1))

    def _by_groups(self, x: Array, chosen: Array, weights: Array) -> Array:
        """All tiles in one go, by a kernel that reads experts as they are stored."""
        pairs = chosen.size
        rows = min(_LARGEST_GROUP, tile_rows(pairs, self.axis.units, step=False))
        tiles = make_tiles(chosen, weights, self.axis, rows)
        pair = tiles.start[:, None] + jnp.arange(rows)
        groups = Groups(
            matrix=tiles.expert,
            first=tiles.start,
            stop=tiles.stop,
            read=tiles.token[pair],
            count=jnp.asarray(tiles.count, jnp.int32),
        )
        layers = [self.up] if self.gate is None else [self.up, self.gate]
        stacks = [layer.kernel.get_value() for layer in layers]
        hidden = activate(
            self.activation, *grouped_products(x, stacks, groups, pairs, x.dtype)
        ).astype(x.dtype)
        # Of pairs whose expert this device does not hold, nothing was written.
        own = (jnp.arange(pairs) < jnp.max(tiles.stop))[:, None]
        hidden = self._whole(jnp.where(own, hidden, 0))
        groups = dataclasses.replace(groups, read=jnp.minimum(pair, pairs - 1))
        [y] = grouped_products(hidden, [self.down.kernel.get_value()], groups, pairs)
        y = jnp.where(own, y, 0)[jnp.argsort(tiles.order[:pairs])]
        return (y.reshape(*chosen.shape, -1) * weights[..., None]).sum(1)

    def _by_tiles(self, x: Array, tiles: Tiles, weigh_input: bool) -> Array:
        """Tiles one after the other, so that one expert at a time is read and dequantized.

        The devices meet between two loops and not inside, since their numbers of tiles differ.
        """

        def weighted(values: Array, tile: Array) -> Array:
            return values * tiles.take(tiles.weight, tile)[:, None]

        def expand(tile: Array, hidden: Array) -> Array:
            read = x[tiles.take(tiles.token, tile)]
            if weigh_input:
                read = weighted(read, tile).astype(x.dtype)
            return tiles.put(hidden, tile, self._hidden(read, tiles.expert[tile]))

        def reduce(tile: Array, total: Array) -> Array:
            y = self.down(tiles.take(hidden, tile), tiles.expert[tile])
            y = jnp.where(tiles.own(tile), y if weigh_input else weighted(y, tile), 0)
            return total.at[tiles.take(tiles.token, tile)].add(y)

        hidden = jnp.zeros((len(tiles.token), self.up.kernel.shape[1]), x.dtype)
        hidden = self._whole(lax.fori_loop(0, tiles.count, expand, hidden))
        total = jnp.zeros((len(x), self.down.kernel.shape[1]), jnp.float32)
        return lax.fori_loop(0, tiles.count, reduce, total)

    def _hidden(self, x: Array, expert: Array) -> Array:
        """`[rows, embed]` to the hidden units of one expert."""
        gate = None if self.gate is None else self.gate(x, expert)
        return activate(self.activation, self.up(x, expert), gate).astype(x.dtype)

    def _whole(self, hidden: Array) -> Array:
        """The hidden units that `down` reads: those of all devices where its columns are whole."""
        return hidden if is_split(self.mlp.columns) else gather_over(hidden, self.mlp)


class MoE(nnx.Module):
    """Experts, the router that chooses among them, and an MLP that all tokens go through."""

    def __init__(self, config: MoEConfig, embed: int, *, rngs: nnx.Rngs):
        c = config

        def vector(has: bool) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(c.experts, jnp.float32), axes=(ROUTER,)) if has else None

        self.router = Linear(EMBED, embed, ROUTER, c.experts, bias=c.router_bias, rngs=rngs)
        self.selection_bias = vector(c.selection_bias)
        self.expert_scale = vector(c.expert_scale)
        self.experts = Experts(c.experts, c.expert, embed, rngs=rngs)
        self.shared = None if c.shared is None else MLP(c.shared, embed, rngs=rngs)
        self.shared_gate = param(None, (EMBED,), (embed,)) if c.shared_gate else None
        self.config = config

    def __call__(self, x: Rows, routed_by: Array | None = None) -> Partials:
        """`[..., embed]` to parts of the same; the router reads `routed_by`, if given."""
        c, mean = self.config, None
        if self.experts.reads_rounded(x, c.used, weigh_input=c.weigh_input):
            x = as_late(x)
            mean = prepare(x)
        if routed_by is None and mean is not None and not c.router_bias and c.groups == 1:
            chosen, weights = self.route(x.undivided, mean)
        else:
            chosen, weights = self.route(computed(x) if routed_by is None else routed_by)
        routed = self.experts(x, chosen, weights, weigh_input=c.weigh_input)
        if self.shared is None:
            return (routed,)
        (shared,) = self.shared(x)
        if self.shared_gate is not None:
            gate = computed(x).astype(jnp.float32) * self.shared_gate.get_value()
            gate = jax.nn.sigmoid(gate.sum(-1, keepdims=True))
            shared = dataclasses.replace(shared, product=shared.value * gate)
        return routed, shared

    def route(self, x: Array, mean: RootMeanSquare | None = None) -> tuple[Array, Array]:
        """Which experts tokens are given to, and with what weights: as `choose`.

        Args:
          x: `[..., embed]`.
          mean: by the root of which a few tokens are to be divided first; None: they are not.
        """
        bias, scale = (
            None if vector is None else vector.get_value()
            for vector in (self.selection_bias, self.expert_scale)
        )
        logits, active = self.router(x.astype(jnp.float32)), current_context().policy
        few = math.prod(x.shape[:-1]) <= _FEW_TOKENS
        if active.kernels and self.config.groups == 1 and few:
            options = {"mean": mean, "launch": active.launch}
            return choose_in_kernel(logits, self.config, bias, scale, **options)
        return choose(logits, self.config, bias, scale)


class DenseMoE(nnx.Module):
    """An MLP and a mixture of experts, both of the stream as it is."""

    def __init__(self, config: DenseMoEConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.dense_norm = Norm(c.norm, embed)
        self.dense = MLP(c.dense, embed, rngs=rngs)
        self.dense_post_norm = Norm(c.norm, embed)
        self.moe_norm = Norm(c.norm, embed)
        self.moe = MoE(c.moe, embed, rngs=rngs)
        self.moe_post_norm = Norm(c.norm, embed)
        self.router_norm = Norm(c.norm, embed)
        self.router_scale = c.router_scale

    def __call__(self, x: Array) -> Partials:
        """`[..., embed]` to the same, as a single part."""
        dense = self.dense_post_norm(meet(self.dense(self.dense_norm(x)), x.dtype))
        routed_by = self.router_norm(x) * self.router_scale
        routed = meet(self.moe(self.moe_norm(x), routed_by), x.dtype)
        y = dense + self.moe_post_norm(routed)
        return (Partial(y.astype(jnp.float32), (), EMBED),)
