"""Top-k routing in a single Triton kernel, instead of six launches."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import interpreted
from jaxsplit.ops.activations.layout import RMSStatistics
from jaxsplit.ops.moe.router import scores_of, weights_of
from jaxsplit.ops.moe.spec import MoEConfig
from jaxsplit.pallas import pl, plgpu

_MAX_TOKENS = 64
"""With more tokens, XLA's operations are no slower."""


def supports(config: MoEConfig, tokens: int) -> bool:
    """Whether the kernel supports a mixture and a number of tokens."""
    return config.groups == 1 and tokens <= _MAX_TOKENS


def topk_experts(
    logits: Array,
    config: MoEConfig,
    bias: Array | None = None,
    scale: Array | None = None,
    *,
    rms: RMSStatistics | None = None,
    logit_bias: Array | None = None,
) -> tuple[Array, Array]:
    """As `jaxsplit.ops.moe.api.topk_experts`, for experts in a single group."""
    tokens, shape = logits.reshape(-1, config.experts), (*logits.shape[:-1], config.top_k)
    inputs, structure = jax.tree.flatten((tokens, bias, scale, rms, logit_bias))
    topk_ids, weights = pl.pallas_call(
        partial(_topk_experts_kernel, structure=structure, config=config),
        grid=(len(tokens),),
        out_shape=[
            jax.ShapeDtypeStruct((len(tokens), config.top_k), dtype)
            for dtype in (jnp.int32, jnp.float32)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpreted(),
        name="topk_experts",
    )(*inputs)
    return topk_ids.reshape(shape), weights.reshape(shape)


def _topk_experts_kernel(
    *refs: jax.Ref, structure: jax.tree_util.PyTreeDef, config: MoEConfig
) -> None:
    """Selects the experts of one token.

    Args:
      *refs: inputs, then experts and router weights.
      structure: of the inputs: logits, bias, scale, statistics and bias of the logits.
      config: of the mixture.
    """
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    logits, bias, scale, rms, logit_bias = inputs
    ids_ref, weights_ref = refs[structure.num_leaves :]
    token, expert = pl.program_id(0), jnp.arange(pl.next_power_of_2(config.experts))
    exists = expert < config.experts
    x = plgpu.load(logits.at[token, expert], mask=exists, other=-jnp.inf)
    if rms is not None:
        x *= rms.inverse_of(token)
    if logit_bias is not None:
        x += plgpu.load(logit_bias.at[expert], mask=exists, other=0.0)
    scores = scores_of(x, config)
    order = scores
    if bias is not None:
        order = order + plgpu.load(bias.at[expert], mask=exists, other=0.0)
    order = jnp.where(exists, order, -jnp.inf)
    rank = jnp.arange(pl.next_power_of_2(config.top_k))

    def next_best(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        order, topk_ids, topk_scores = carry
        best = jnp.argmax(order).astype(jnp.int32)
        is_best = expert == best
        score = jnp.sum(jnp.where(is_best, scores, 0.0))
        topk_ids = jnp.where(rank == i, best, topk_ids)
        topk_scores = jnp.where(rank == i, score, topk_scores)
        return jnp.where(is_best, -jnp.inf, order), topk_ids, topk_scores

    empty = jnp.zeros(rank.size, jnp.int32), jnp.full(rank.size, -jnp.inf)
    _, topk_ids, topk_scores = lax.fori_loop(0, config.top_k, next_best, (order, *empty))
    weights, exists = weights_of(topk_scores, config), rank < config.top_k
    if scale is not None:
        weights = weights * plgpu.load(scale.at[topk_ids], mask=exists, other=0.0)
    plgpu.store(ids_ref.at[token, rank], topk_ids, mask=exists)
    plgpu.store(weights_ref.at[token, rank], weights * config.scale, mask=exists)
