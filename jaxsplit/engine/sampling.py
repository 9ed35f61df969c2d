"""Sampling on the devices, from logits sharded over the vocabulary.

Order and defaults follow llama.cpp: penalties, top-k, top-p, min-p, temperature. Each device
gathers the top candidates of the others, never all logits, unless top-k is off.
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
class SamplerSpec:
    """The static half of the sampler: each spec compiles its own program.

    Attributes:
      candidates: tokens kept by top-k; 1: greedy; 0: the whole vocabulary.
      window: how many of the last tokens are penalized; 0: none.
    """

    candidates: int
    window: int

    @classmethod
    def of(cls, config: SamplingConfig, context: int) -> "SamplerSpec":
        """The spec of a config for sequences of at most `context` tokens."""
        penalties = (config.repeat_penalty, config.frequency_penalty, config.presence_penalty)
        last = context if config.repeat_last_n < 0 else min(config.repeat_last_n, context)
        return cls(
            candidates=1 if config.temperature == 0 else config.top_k,
            window=last if penalties != (1.0, 0.0, 0.0) else 0,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerParams:
    """The dynamic half of the sampler, float32 `[slots]` each (`seed`: uint32)."""

    temperature: Array
    top_p: Array
    min_p: Array
    repeat_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array
    seed: Array

    @classmethod
    def of(cls, configs: list[SamplingConfig]) -> "SamplerParams":
        """Stacks the parameters of each slot's config."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "seed"]
        params = {n: np.asarray([getattr(c, n) for c in configs], np.float32) for n in names}
        return cls(**params, seed=np.asarray([c.seed % 2**32 for c in configs], np.uint32))


def penalize(logits: Array, recent: Array, params: SamplerParams, offset: Array | int) -> Array:
    """Lowers the logits of recent tokens.

    Args:
      logits: float32 `[slots, vocab]`: this device's shard.
      recent: int32 `[slots, window]`: the last tokens, padded with negative ids.
      params: the penalties.
      offset: token id of the shard's first row.
    """
    vocab = logits.shape[-1]
    local = recent - offset
    local = jnp.where((recent >= 0) & (local >= 0) & (local < vocab), local, vocab)
    rows = jnp.arange(logits.shape[0])[:, None]
    counts = jnp.zeros(logits.shape, jnp.float32).at[rows, local].add(1, mode="drop")
    seen = counts > 0
    repeat = params.repeat_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repeat, logits * repeat), logits)
    return (
        logits
        - counts * params.frequency_penalty[:, None]
        - jnp.where(seen, params.presence_penalty[:, None], 0)
    )


def sample(
    logits: Array,
    positions: Array,
    recent: Array,
    params: SamplerParams,
    spec: SamplerSpec,
    *,
    vocab: int,
) -> Array:
    """Samples the next token of each slot: `NOT_FINITE` if a logit is NaN or the largest infinite.

    Args:
      logits: float32 `[slots, vocab / devices]`: this device's shard, padding last.
      positions: int32 `[slots]`: the new token's position; it is folded into the random key, so
        that the text does not depend on how decoding is split into calls.
      recent: int32 `[slots, window]`: the last tokens, padded with negative ids.
      params: dynamic parameters.
      spec: static parameters.
      vocab: rows of the head that are tokens.

    Returns:
      int32 `[slots]`, the same on all devices.
    """
    rows = logits.shape[-1]
    offset = shard_index(_VOCAB) * rows
    # A NaN becomes the largest logit, which is checked below: no extra pass over the logits.
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
    logits = jnp.where(jnp.arange(rows) + offset < vocab, logits, -jnp.inf)
    if spec.window:
        logits = penalize(logits, recent, params, offset)
    if spec.candidates == 1:
        index = jnp.argmax(logits, axis=-1, keepdims=True)
        best = jnp.take_along_axis(logits, index, axis=-1)
    elif 0 < spec.candidates < rows:
        best, index = lax.top_k(logits, spec.candidates)
    else:
        best, index = logits, jnp.broadcast_to(jnp.arange(rows), logits.shape)
    # One collective for both: its cost is latency.
    pairs = jnp.stack([lax.bitcast_convert_type(best, jnp.int32), index + offset], axis=1)
    pairs = all_gather(pairs, _VOCAB)
    best, tokens = lax.bitcast_convert_type(pairs[:, 0], jnp.float32), pairs[:, 1]
    if spec.candidates == 1:
        winner = jnp.argmax(best, axis=-1, keepdims=True)
        token = jnp.take_along_axis(tokens, winner, axis=-1)[:, 0]
        return jnp.where(jnp.isfinite(jnp.max(best, axis=-1)), token, NOT_FINITE)
    # Most likely first, ties by token id: the same order for any sharding.
    best, tokens = lax.sort((-best, tokens), dimension=-1, num_keys=2)
    count = min(spec.candidates or vocab, vocab)
    best, tokens = -best[:, :count], tokens[:, :count]
    probability = jax.nn.softmax(best, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = params.top_p[:, None]  # 1 keeps all, whatever the sum rounds to
    keep = (before < top_p) | (top_p >= 1) | (jnp.arange(best.shape[-1]) == 0)
    keep &= probability >= params.min_p[:, None] * probability[:, :1]
    scaled = jnp.where(keep, best / params.temperature[:, None], -jnp.inf)

    def choose(seed: Array, position: Array, scaled: Array, tokens: Array) -> Array:
        """As `jax.random.categorical`, with noise keyed by token id rather than by its rank."""
        key = jax.random.fold_in(jax.random.key(seed), position)
        keys = jax.vmap(partial(jax.random.fold_in, key))(tokens)
        return jnp.argmax(scaled + jax.vmap(jax.random.gumbel)(keys))

    choice = jax.vmap(choose)(params.seed, positions, scaled, tokens)
    token = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(best[:, 0]), token, NOT_FINITE)
