"""Top-k routing with XLA: selects the experts of each token from the router's logits."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.ops.moe.spec import MoEConfig

_MIN_SUM = 2.0**-14  # llama.cpp's lower bound of the sum that divides the weights


def topk_experts(
    logits: Array, config: MoEConfig, bias: Array | None = None, scale: Array | None = None
) -> tuple[Array, Array]:
    """As `jaxsplit.ops.moe.api.topk_experts`, without a deferred normalization."""
    c = config
    scores = scores_of(logits, c)
    order = scores if bias is None else scores + bias
    if c.groups > 1:
        grouped = order.reshape(*order.shape[:-1], c.groups, -1)
        best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), c.used_groups)[1]
        in_use = jax.nn.one_hot(best, c.groups, dtype=bool).any(-2)
        order = jnp.where(in_use[..., None], grouped, -jnp.inf).reshape(order.shape)
    topk_ids = lax.top_k(order, c.top_k)[1]
    weights = weights_of(jnp.take_along_axis(scores, topk_ids, axis=-1), c)
    if scale is not None:
        weights = weights * scale[topk_ids]
    return topk_ids, weights * c.scale


def weigh_experts(logits: Array, topk_ids: Array, config: MoEConfig) -> Array:
    """The router weights of experts that are chosen already.

    Args:
      logits: float32 `[..., experts]`.
      topk_ids: int32 `[..., top_k]`.
      config: of the mixture.

    Returns:
      float32 `[..., top_k]`.
    """
    scores = jnp.take_along_axis(scores_of(logits, config), topk_ids, axis=-1)
    return weights_of(scores, config) * config.scale


def scores_of(logits: Array, config: MoEConfig) -> Array:
    """The scores of experts, `[..., experts]`, from which router weights are computed."""
    if config.routing == "softmax":
        return jax.nn.softmax(logits)
    if config.routing == "sqrt_softplus":
        return jnp.sqrt(jax.nn.softplus(logits))
    return jax.nn.sigmoid(logits) if config.routing == "sigmoid" else logits


def weights_of(scores: Array, config: MoEConfig) -> Array:
    """The router weights of top-k scores `[..., top_k]`; a score of -inf is padding."""
    if config.routing == "softmax_after_topk":
        scores = jax.nn.softmax(scores)
    else:
        scores = jnp.where(scores == -jnp.inf, 0.0, scores)
    if config.normalize:
        return scores / jnp.maximum(scores.sum(-1, keepdims=True), _MIN_SUM)
    return scores
