"""Adapters in a model's file, which tokens of the text switch on."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.models.layers import Linear, SwitchedLoRA
from jaxsplit.models.residual_config import SwitchConfig


def attach(modules: tuple[Any, ...], config: SwitchConfig, rngs: Any) -> None:
    """Gives every projection of some modules its adapters."""
    for module in modules:
        for linear in vars(module).values():
            if isinstance(linear, Linear):
                axes, shape = (linear.rows, linear.columns), linear.kernel.shape
                count, rank = config.adapters, config.rank
                linear.switched = SwitchedLoRA(axes, shape, count, rank, rngs=rngs)


def token_adapters(
    config: SwitchConfig, batch: Batch, cache: RecurrentCache | None
) -> tuple[Array, RecurrentCache | None]:
    """The adapter of each token: that of the last token before that switches one on.

    It is the attention of a head whose keys are large for tokens that switch, and whose values are
    the adapters' numbers: of several such tokens, the rounded mean.

    Args:
      config: which tokens switch.
      batch: positions and ids of the tokens.
      cache: sums over earlier tokens; None: there are none.

    Returns:
      float32 `[batch, time, adapters]`, one 1 for each token, and the updated cache.
    """
    tokens, exists = batch.side_inputs.tokens, batch.positions >= 0
    assert tokens is not None
    number = jnp.zeros_like(tokens)
    for i, token in enumerate(config.tokens):
        number = jnp.where((tokens == token) & exists, i + 1, number)
    sums = jnp.stack([number, number > 0, (number == 0) & exists], axis=-1)
    sums = jnp.cumsum(sums.astype(jnp.float32), axis=1)
    if cache is not None:
        sums = sums + cache.read(batch).inputs[0]
        cache = cache.write(RecurrentCache((sums[:, -1:],)), batch)
    numbers, switching, others = (sums[..., i] for i in range(3))
    weight = switching + others * jnp.exp(-2.0 * config.gain)
    chosen = jnp.round(numbers / jnp.maximum(weight, 1e-30)).astype(jnp.int32)
    return jax.nn.one_hot(chosen, config.adapters), cache
