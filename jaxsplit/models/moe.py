"""Mixtures of experts: each token is given to a few of many MLPs."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import forward_context
from jaxsplit.models.config import DenseMoEConfig, GroveMoEConfig, MLPConfig, MoEConfig
from jaxsplit.models.layers import Linear, Norm, add_norm, norm, param
from jaxsplit.models.mlp import MLP
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.moe import api as moe_ops
from jaxsplit.ops.moe.api import ExpertMatrices, ExpertParams, topk_experts, weigh_experts
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

ROUTER = Axis("router")


class ExpertLinear(nnx.Module):
    """One projection of every expert: a stack of matrices."""

    def __init__(
        self, axes: tuple[Axis, ...], shape: tuple[int, ...], *, bias: bool, rngs: nnx.Rngs
    ):
        self.kernel = param(rngs, axes, shape)
        zeros = jnp.zeros(shape[:-1], jnp.float32)
        self.bias = nnx.Param(zeros, axes=axes[:-1]) if bias else None

    @property
    def matrices(self) -> ExpertMatrices:
        """The stack as ops take it."""
        bias = None if self.bias is None else self.bias.get_value()
        return ExpertMatrices(self.kernel.get_value(), bias)


class Experts(nnx.Module):
    """MLPs of the same shape, split by experts and by their hidden units."""

    def __init__(
        self,
        count: int,
        config: MLPConfig,
        embed: int,
        *,
        weight_on_input: bool = False,
        rngs: nnx.Rngs,
    ):
        c, size = config, config.intermediate_size
        self.axis, self.mlp = Axis("experts", count), Axis("expert_mlp", size)
        self.rows = Axis("expert_out", embed)

        def projection() -> ExpertLinear:
            axes, shape = (self.axis, self.mlp, EMBED), (count, size, embed)
            return ExpertLinear(axes, shape, bias=c.bias, rngs=rngs)

        self.gate = projection() if c.gated else None
        self.up = projection()
        axes, shape = (self.axis, self.rows, self.mlp.columns), (count, embed, size)
        self.down = ExpertLinear(axes, shape, bias=False, rngs=rngs)
        # Whole on every device, which all know the weights of all experts.
        zeros = jnp.zeros((count, embed), jnp.float32)
        self.down_bias = nnx.Param(zeros, axes=(ROUTER, EMBED)) if c.bias else None
        self.activation = c.activation
        self.weight_on_input = weight_on_input

    @property
    def params(self) -> ExpertParams:
        """The experts as ops take them."""
        return ExpertParams(
            up=self.up.matrices,
            gate=None if self.gate is None else self.gate.matrices,
            down=self.down.matrices,
            activation=self.activation,
            axis=self.axis,
            mlp=self.mlp,
            weight_on_input=self.weight_on_input,
        )

    def __call__(self, x: Activations, topk_ids: Array, weights: Array) -> Unreduced:
        """The weighted sum of the experts' outputs for each token.

        Args:
          x: `[..., time, embed]`.
          topk_ids: int32 `[..., time, top_k]`, all different.
          weights: float32 `[..., time, top_k]`.

        Returns:
          `[..., time, embed]`.
        """
        bias = None
        if self.down_bias is not None:
            bias = self.down_bias.get_value()[topk_ids]
            bias = (bias if self.weight_on_input else bias * weights[..., None]).sum(-2)
        parts = moe_ops.experts(x, topk_ids, weights, self.params)
        return Unreduced(parts, None, bias, (self.axis, self.mlp.columns), self.rows)


class MoE(nnx.Module):
    """Experts, the router that chooses among them, and an MLP for all tokens."""

    def __init__(self, config: MoEConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        rows = c.vocab * c.top_k if c.by_token else 0
        table = jnp.zeros(rows, jnp.float32)
        self.table = nnx.Param(table, axes=(Axis("table"),)) if c.by_token else None

        def vector(has: bool) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(c.experts, jnp.float32), axes=(ROUTER,)) if has else None

        self.router = Linear(EMBED, embed, ROUTER, c.experts, bias=c.router_bias, rngs=rngs)
        self.selection_bias = vector(c.selection_bias)
        self.expert_scale = vector(c.expert_scale)
        on_input, low = c.apply_router_weight_on_input, c.latent
        self.latent_down = Linear(EMBED, embed, LATENT, low, rngs=rngs) if low else None
        self.experts = Experts(
            c.experts, c.expert, low or embed, weight_on_input=on_input, rngs=rngs
        )
        self.latent_norm = Norm(c.latent_norm, low, LATENT) if low and c.latent_norm else None
        self.latent_up = Linear(LATENT, low, EMBED, embed, rngs=rngs) if low else None
        self.shared = None if c.shared is None else MLP(c.shared, embed, rngs=rngs)
        self.shared_gate = param(None, (EMBED,), (embed,)) if c.shared_gate else None
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`; XLA does, for the router."""
        if self.latent_down is not None:
            readers = XLA_ONLY
        else:
            readers = moe_ops.readers_of(x, self.config.top_k, self.experts.params) | XLA_ONLY
        return readers if self.shared is None else readers | self.shared.readers(x)

    def __call__(
        self, x: Activations, tokens: Array | None = None, *, router_input: Array | None = None
    ) -> Unreduced:
        """`[..., embed]` to the same; the router reads `router_input` if it is given, and token ids
        `[...]` if a table has their experts."""
        read = x if router_input is None else Activations(router_input)
        topk_ids, weights = self.route(read, tokens)
        if self.shared is None:
            return self._routed(x, topk_ids, weights)
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            shared = self.shared(x)
        if self.shared_gate is not None:
            gate = x.array.astype(jnp.float32) * self.shared_gate.get_value()
            gate = jax.nn.sigmoid(gate.sum(-1, keepdims=True))
            bias = None if shared.bias is None else shared.bias * gate
            shared = dataclasses.replace(shared, parts=(shared.local_sum * gate)[None], bias=bias)
        return self._routed(x, topk_ids, weights) + shared

    def _routed(self, x: Activations, topk_ids: Array, weights: Array) -> Unreduced:
        """The experts' outputs, which are summed before they are projected back."""
        if self.latent_down is None or self.latent_up is None:
            return self.experts(x, topk_ids, weights)
        y = self.experts(Activations(self.latent_down(x)), topk_ids, weights).all_reduce(x.dtype)
        return self.latent_up.unreduced(y if self.latent_norm is None else self.latent_norm(y))

    def route(self, x: Activations, tokens: Array | None = None) -> tuple[Array, Array]:
        """The experts of tokens `[..., embed]` and their weights: as `topk_experts`."""
        if self.table is not None:
            assert tokens is not None
            table = self.table.get_value().astype(jnp.int32).reshape(-1, self.config.top_k)
            topk_ids = table[tokens]
            logits = self.router(x.array.astype(jnp.float32))
            return topk_ids, weigh_experts(logits, topk_ids, self.config)
        bias, scale = (
            None if vector is None else vector.get_value()
            for vector in (self.selection_bias, self.expert_scale)
        )
        if x.unnormalized is None:
            logits = self.router(x.array.astype(jnp.float32))
            return topk_experts(logits, self.config, bias, scale)
        # Logits of rows that are not normalized yet: what chooses the experts divides them.
        y = self.router.unreduced(x.unnormalized)
        options = {"rms": x.rms, "logit_bias": y.bias}
        return topk_experts(y.local_sum, self.config, bias, scale, **options)


class GroveMoE(nnx.Module):
    """GroveMoE (Wu et al. 2025, arXiv:2508.07785), as llama.cpp computes it: the adjugate experts
    of the chosen experts' groups read the mixture's output."""

    def __init__(self, config: GroveMoEConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.moe = MoE(c.moe, embed, rngs=rngs)
        self.groups = c.moe.experts // c.per_group
        self.chunks = Experts(self.groups, c.chunk, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`."""
        return self.moe.readers(x)

    def __call__(self, x: Activations, tokens: Array | None = None) -> Unreduced:
        """`[..., embed]` to the same."""
        c = self.config
        y = self.moe(x, tokens).all_reduce(x.dtype)
        logits = self.moe.router(x.array.astype(jnp.float32))
        groups = jax.lax.top_k(logits, c.moe.top_k)[1] // c.per_group
        # A group's weight is the probability of the expert that has its number.
        weights = jnp.take_along_axis(jax.nn.softmax(logits), groups, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True) * c.scale
        # Several chosen experts may be of one group.
        of_groups = (jax.nn.one_hot(groups, self.groups) * weights[..., None]).sum(axis=-2)
        weights, ids = jax.lax.top_k(of_groups, min(c.moe.top_k, self.groups))
        return self.chunks(Activations(y), ids, weights) + Unreduced.of(y.astype(jnp.float32))


class DenseMoE(nnx.Module):
    """An MLP and a mixture of experts side by side, perhaps each between norms of its own."""

    def __init__(self, config: DenseMoEConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.dense_norm = norm(c.norm, embed)
        self.dense = MLP(c.dense, embed, rngs=rngs)
        self.dense_post_norm = norm(c.norm, embed)
        self.moe_norm = norm(c.norm, embed)
        self.moe = MoE(c.moe, embed, rngs=rngs)
        self.moe_post_norm = norm(c.norm, embed)
        self.router_norm = norm(c.norm, embed)
        self.router_scale = c.router_scale

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`: the norms, if there are any."""
        return XLA_ONLY if self.dense_norm else self.dense.readers(x) | self.moe.readers(x)

    def __call__(self, x: Activations, tokens: Array | None = None) -> Unreduced:
        """`[..., embed]` to the same; with norms, summed already."""
        if not (self.dense_post_norm and self.router_norm and self.moe_post_norm):
            with forward_context(fuse_all_reduce=False):  # one for both, after they are added
                return self.moe(x, tokens) + self.dense(x)
        stream = x.array
        dense, _ = add_norm(None, stream, self.dense_norm, self.dense.readers(stream))
        dense = self.dense_post_norm(self.dense(dense).all_reduce(x.dtype))
        router_input = self.router_norm(stream) * self.router_scale
        routed, _ = add_norm(None, stream, self.moe_norm, self.moe.readers(stream))
        routed = self.moe(routed, tokens, router_input=router_input).all_reduce(x.dtype)
        routed = self.moe_post_norm(routed)
        return Unreduced.of((dense + routed).astype(jnp.float32))
