"""Which experts tokens are given to, from the router's logits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.context import KernelLaunch
from jaxsplit.models.config import MoEConfig
from jaxsplit.ops.activations.deferred import RootMeanSquare
from jaxsplit.pallas import pl, plgpu

_LEAST_SUM = 2.0**-14  # llama.cpp's bound of what weights are divided by


def choose(
    logits: Array, config: MoEConfig, bias: Array | None = None, scale: Array | None = None
) -> tuple[Array, Array]:
    """Which experts tokens are given to, and with what weights.

    Groups of experts: DeepSeek-AI 2024, arXiv:2412.19437, scored as in llama.cpp.

    Args:
      logits: float32 `[..., experts]`.
      config: of the mixture.
      bias: of each expert, which decides about the choice only: float32 `[experts]`, or None.
      scale: likewise, which multiplies its weight.

    Returns:
      int32 and float32 `[..., used]`.
    """
    c = config
    scores = _scores(logits, c)
    order = scores if bias is None else scores + bias
    if c.groups > 1:
        grouped = order.reshape(*order.shape[:-1], c.groups, -1)
        best = lax.top_k(lax.top_k(grouped, 2)[0].sum(-1), c.used_groups)[1]
        kept = jax.nn.one_hot(best, c.groups, dtype=bool).any(-2)
        order = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(order.shape)
    chosen = lax.top_k(order, c.used)[1]
    weights = _weights(jnp.take_along_axis(scores, chosen, axis=-1), c)
    if scale is not None:
        weights = weights * scale[chosen]
    return chosen, weights * c.scale


def choose_in_kernel(
    logits: Array,
    config: MoEConfig,
    bias: Array | None = None,
    scale: Array | None = None,
    *,
    mean: RootMeanSquare | None = None,
    launch: KernelLaunch,
) -> tuple[Array, Array]:
    """`choose` among experts of one group, in a kernel for GPUs: one launch instead of six.

    Args:
      logits, config, bias, scale: as there.
      mean: by the root of which logits are to be divided first; None: they are not.
      launch: of the kernel.
    """
    tokens, shape = logits.reshape(-1, config.experts), (*logits.shape[:-1], config.used)
    inputs, structure = jax.tree.flatten((tokens, bias, scale, mean))
    chosen, weights = pl.pallas_call(
        partial(_kernel, structure=structure, config=config),
        grid=(len(tokens),),
        out_shape=[
            jax.ShapeDtypeStruct((len(tokens), config.used), dtype)
            for dtype in (jnp.int32, jnp.float32)
        ],
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=launch.interpret,
        name="choose_experts",
    )(*inputs)
    return chosen.reshape(shape), weights.reshape(shape)


def _scores(logits: Array, config: MoEConfig) -> Array:
    """What weights are made of: `[..., experts]`."""
    if config.routing == "softmax":
        return jax.nn.softmax(logits)
    return jax.nn.sigmoid(logits) if config.routing == "sigmoid" else logits


def _weights(scores: Array, config: MoEConfig) -> Array:
    """The weights of those that were chosen: `[..., used]`; -inf where there is none."""
    if config.routing == "chosen_softmax":
        scores = jax.nn.softmax(scores)
    else:
        scores = jnp.where(scores == -jnp.inf, 0.0, scores)
    if config.normalize:
        return scores / jnp.maximum(scores.sum(-1, keepdims=True), _LEAST_SUM)
    return scores


def _kernel(*refs: jax.Ref, structure: jax.tree_util.PyTreeDef, config: MoEConfig) -> None:
    """The experts of one token.

    Args:
      *refs: the inputs; experts and weights.
      structure: of the inputs.
      config: of the mixture.
    """
    logits, bias, scale, mean = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    chosen_ref, weights_ref = refs[structure.num_leaves :]
    token, expert = pl.program_id(0), jnp.arange(pl.next_power_of_2(config.experts))
    exists = expert < config.experts
    x = plgpu.load(logits.at[token, expert], mask=exists, other=-jnp.inf)
    if mean is not None:
        x *= mean.inverse_of(token)
    scores = _scores(x, config)
    order = scores
    if bias is not None:
        order = order + plgpu.load(bias.at[expert], mask=exists, other=0.0)
    order = jnp.where(exists, order, -jnp.inf)
    place = jnp.arange(pl.next_power_of_2(config.used))

    def next_best(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        order, chosen, of_chosen = carry
        best = jnp.argmax(order).astype(jnp.int32)
        is_best = expert == best
        score = jnp.sum(jnp.where(is_best, scores, 0.0))
        chosen = jnp.where(place == i, best, chosen)
        of_chosen = jnp.where(place == i, score, of_chosen)
        return jnp.where(is_best, -jnp.inf, order), chosen, of_chosen

    nothing = jnp.zeros(place.size, jnp.int32), jnp.full(place.size, -jnp.inf)
    _, chosen, of_chosen = lax.fori_loop(0, config.used, next_best, (order, *nothing))
    weights, exists = _weights(of_chosen, config), place < config.used
    if scale is not None:
        weights = weights * plgpu.load(scale.at[chosen], mask=exists, other=0.0)
    plgpu.store(chosen_ref.at[token, place], chosen, mask=exists)
    plgpu.store(weights_ref.at[token, place], weights * config.scale, mask=exists)
