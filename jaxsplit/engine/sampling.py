"""Choosing the next token on the devices, from logits that are split by vocabulary.

The order of the steps and their defaults are those of llama.cpp: penalties, top-k, top-p, min-p,
temperature. Devices exchange their best candidates, never all logits, unless top-k is off.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.comm.api import all_gather, shard_index
from jaxsplit.config import SamplingConfig
from jaxsplit.sharding.axes import Axis

_VOCAB = Axis("vocab")

NOT_FINITE = -2
"""The token of a slot whose logits have a NaN or infinity."""


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The static part of sampling: a program is compiled for each.

    Attributes:
      candidates: how many tokens are considered; 0: the whole vocabulary.
      window: how many of the last tokens are penalized; 0: none.
    """

    candidates: int
    window: int

    @classmethod
    def of(cls, config: SamplingConfig, context: int) -> "SamplingPlan":
        """What a config needs where no sequence is longer than `context`."""
        penalties = (config.repeat_penalty, config.frequency_penalty, config.presence_penalty)
        last = context if config.repeat_last_n < 0 else min(config.repeat_last_n, context)
        return cls(
            candidates=1 if config.temperature == 0 else config.top_k,
            window=last if penalties != (1.0, 0.0, 0.0) else 0,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingValues:
    """The dynamic part of sampling, float32 `[slots]` each (`seed`: uint32)."""

    temperature: Array
    top_p: Array
    min_p: Array
    repeat_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array
    seed: Array

    @classmethod
    def of(cls, configs: list[SamplingConfig]) -> "SamplingValues":
        """The values of each slot's config."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "seed"]
        values = {n: np.asarray([getattr(c, n) for c in configs], np.float32) for n in names}
        return cls(**values, seed=np.asarray([c.seed % 2**32 for c in configs], np.uint32))


def penalize(logits: Array, recent: Array, values: SamplingValues, offset: Array | int) -> Array:
    """Lowers the logits of recent tokens.

    Args:
      logits: float32 `[slots, vocab]`, of this device's rows.
      recent: int32 `[slots, window]`, negative where empty.
      values: the penalties.
      offset: the first row's token.
    """
    vocab = logits.shape[-1]
    local = recent - offset
    local = jnp.where((recent >= 0) & (local >= 0) & (local < vocab), local, vocab)
    rows = jnp.arange(logits.shape[0])[:, None]
    counts = jnp.zeros(logits.shape, jnp.float32).at[rows, local].add(1, mode="drop")
    seen = counts > 0
    repeat = values.repeat_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repeat, logits * repeat), logits)
    return (
        logits
        - counts * values.frequency_penalty[:, None]
        - jnp.where(seen, values.presence_penalty[:, None], 0)
    )


def sample(
    logits: Array,
    positions: Array,
    recent: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
) -> Array:
    """The next token of each slot, `NOT_FINITE` if a logit is NaN or the largest is infinite.

    Args:
      logits: float32 `[slots, vocab / devices]`: this device's rows, the last ones padding.
      positions: int32 `[slots]`: the new token's position; it seeds the random choice, so that
        the text does not depend on how the work is split into calls.
      recent: int32 `[slots, window]`: the last tokens, negative where there are none.
      values: temperature, thresholds, penalties, seed.
      plan: what to compile.
      vocab: how many rows are tokens that may be chosen.

    Returns:
      int32 `[slots]`, the same on all devices.
    """
    rows = logits.shape[-1]
    offset = shard_index(_VOCAB) * rows
    # A NaN becomes the largest logit, which is looked at below: no other pass over them is needed.
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
    logits = jnp.where(jnp.arange(rows) + offset < vocab, logits, -jnp.inf)
    if plan.window:
        logits = penalize(logits, recent, values, offset)
    if plan.candidates == 1:
        index = jnp.argmax(logits, axis=-1, keepdims=True)
        best = jnp.take_along_axis(logits, index, axis=-1)
    elif 0 < plan.candidates < rows:
        best, index = lax.top_k(logits, plan.candidates)
    else:
        best, index = logits, jnp.broadcast_to(jnp.arange(rows), logits.shape)
    # Both at once: what a collective costs here is its latency.
    pairs = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), index + offset], axis=1)
    pairs = all_gather(pairs, _VOCAB)
    best, tokens = lax.bitcast_convert_type(pairs[:, 0], jnp.float32), pairs[:, 1]
    if plan.candidates == 1:
        winner = jnp.argmax(best, axis=-1, keepdims=True)
        token = jnp.take_along_axis(tokens, winner, axis=-1)[:, 0]
        return jnp.where(jnp.isfinite(jnp.max(best, axis=-1)), token, NOT_FINITE)
    # Likeliest first, equal ones by their number: the same order however the rows are split.
    best, tokens = lax.sort((-best, tokens), dimension=-1, num_keys=2)
    count = min(plan.candidates or vocab, vocab)
    best, tokens = -best[:, :count], tokens[:, :count]
    probability = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = values.top_p[:, None]  # 1 keeps all, whatever the sum rounds to
    keep = (before < top_p) | (top_p >= 1) | (jnp.arange(best.shape[-1]) == 0)
    keep &= probability >= values.min_p[:, None] * probability[:, :1]
    scaled = jnp.where(keep, best / values.temperature[:, None], -jnp.inf)

    def choose(seed: Array, position: Array, scaled: Array, tokens: Array) -> Array:
        """As `jax.random.categorical`; a token has its noise wherever rounding puts it in order."""
        key = jax.random.fold_in(jax.random.key(seed), position)
        keys = jax.vmap(partial(jax.random.fold_in, key))(tokens)
        return jnp.argmax(scaled + jax.vmap(jax.random.gumbel)(keys))

    choice = jax.vmap(choose)(values.seed, positions, scaled, tokens)
    token = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(best[:, 0]), token, NOT_FINITE)
