"""Sampling on the devices, from logits sharded over the vocabulary.

Order and defaults follow llama.cpp: biases, penalties, top-k, top-p, min-p, temperature. Each
device gathers the top candidates of the others, never all logits, unless top-k is off.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.comm.api import all_gather, shard_index
from jaxsplit.config import MAX_LOGIT_BIAS, SamplingConfig
from jaxsplit.sharding.axes import Axis

_VOCAB = Axis("vocab")

NOT_FINITE = -2
"""The token of a slot whose logits have a NaN or infinity."""


MAX_TOP_LOGPROBS = 20
"""Alternatives whose log-probabilities are computed, where any are wanted."""

_CANDIDATES = (1, 64, 0)
"""Tokens that a program keeps at most; 0: all. Few, since each compiles its own program."""

_WINDOWS = (0, 64, 1024)
"""Recent tokens that a program penalizes at most, shorter than the context."""


@dataclasses.dataclass(frozen=True)
class SamplerSpec:
    """The static half of the sampler: each spec compiles its own program.

    Attributes:
      candidates: most tokens that a slot keeps by top-k; 1: all slots are greedy; 0: some keep the
        whole vocabulary.
      window: most of the last tokens that a slot penalizes; 0: none.
      bias: logits have biases.
      logprobs: log-probabilities are wanted.
      mask: a mask says which tokens may follow.
    """

    candidates: int
    window: int
    bias: bool = False
    logprobs: bool = False
    mask: bool = False

    @classmethod
    def of(cls, config: SamplingConfig, context: int) -> "SamplerSpec":
        """The spec of a config for sequences of at most `context` tokens."""
        top_k, last = _top_k(config), _last_n(config, context)
        return cls(
            candidates=next(n for n in _CANDIDATES if not n or 0 < top_k <= n),
            window=next((n for n in _WINDOWS if last <= n < context), context),
            bias=bool(config.logit_bias),
            logprobs=config.logprobs is not None,
        )

    @classmethod
    def join(cls, specs: Iterable["SamplerSpec"]) -> "SamplerSpec":
        """The spec of slots that are decoded together."""
        specs = list(specs) or [cls(1, 0)]
        return cls(
            candidates=max((s.candidates for s in specs), key=_CANDIDATES.index),
            window=max(s.window for s in specs),
            bias=any(s.bias for s in specs),
            logprobs=any(s.logprobs for s in specs),
            mask=any(s.mask for s in specs),
        )


def _top_k(config: SamplingConfig) -> int:
    return 1 if config.temperature == 0 else config.top_k


def _last_n(config: SamplingConfig, context: int) -> int:
    """How many of the last tokens are penalized."""
    penalties = (config.repeat_penalty, config.frequency_penalty, config.presence_penalty)
    last = context if config.repeat_last_n < 0 else min(config.repeat_last_n, context)
    return last if penalties != (1.0, 0.0, 0.0) else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerParams:
    """The dynamic half of the sampler, float32 `[slots]` unless noted.

    Attributes:
      seed: uint32.
      top_k: int32; 0: all tokens.
      repeat_last_n: int32.
      bias_ids: int32 `[slots, MAX_LOGIT_BIAS]`: tokens whose logits have a bias, padded with -1.
      bias: float32, shaped as `bias_ids`.
    """

    temperature: Array
    top_p: Array
    min_p: Array
    repeat_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array
    seed: Array
    top_k: Array
    repeat_last_n: Array
    bias_ids: Array
    bias: Array

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig], context: int = 2**30) -> "SamplerParams":
        """Stacks the parameters of each slot's config."""

        def column(values: Iterable[float], dtype: type) -> Any:
            return np.asarray([*values], dtype)

        names = [f.name for f in dataclasses.fields(cls)][:6]
        params = {n: column((getattr(c, n) for c in configs), np.float32) for n in names}
        ids: Any = np.full((len(configs), MAX_LOGIT_BIAS), -1, np.int32)
        bias: Any = np.zeros(ids.shape, np.float32)
        for i, config in enumerate(configs):
            pairs: Iterable[tuple[int, float]] = config.logit_bias or ()
            for j, (token, value) in enumerate(pairs):
                ids[i, j], bias[i, j] = token, value
        return cls(
            **params,
            seed=column(((c.seed or 0) % 2**32 for c in configs), np.uint32),
            top_k=column((min(_top_k(c), 2**30) for c in configs), np.int32),
            repeat_last_n=column((_last_n(c, context) for c in configs), np.int32),
            bias_ids=ids,
            bias=bias,
        )


def penalize(logits: Array, recent: Array, params: SamplerParams, offset: Array | int) -> Array:
    """Lowers the logits of recent tokens.

    Args:
      logits: float32 `[slots, vocab]`: this device's shard.
      recent: int32 `[slots, window]`: the last tokens, the newest last, padded with negative ids.
      params: the penalties.
      offset: token id of the shard's first row.
    """
    vocab, window = logits.shape[-1], recent.shape[-1]
    local = recent - offset
    counts = window - jnp.arange(window) <= params.repeat_last_n[:, None]
    counts &= (recent >= 0) & (local >= 0) & (local < vocab)
    local = jnp.where(counts, local, vocab)
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


def shard_columns(words: int, devices: int, rows: int) -> np.ndarray:
    """Which words of a mask each device needs: int `[devices * columns]`, for `devices` shards of
    `rows` tokens. Indices past the last word are `words`."""
    columns = -(-rows // 32) + 1
    first = np.arange(devices) * rows // 32
    return np.minimum(first[:, None] + np.arange(columns), words).reshape(-1)


def _permitted(mask: Array, rows: int) -> Array:
    """A mask of this device's words as bool `[slots, rows]`."""
    bits = mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    first = shard_index(_VOCAB) * rows % 32
    return lax.dynamic_slice_in_dim(bits.reshape(len(mask), -1), first, rows, axis=1) > 0


def sample(
    logits: Array,
    positions: Array,
    recent: Array,
    params: SamplerParams,
    spec: SamplerSpec,
    mask: Array | None = None,
    *,
    vocab: int,
) -> Array:
    """Samples the next token of each slot: `NOT_FINITE` if a logit is NaN or the largest infinite,
    or if the mask permits no token.

    Args:
      logits: float32 `[slots, vocab / devices]`: this device's shard, padding last.
      positions: int32 `[slots]`: the new token's position; it is folded into the random key, so
        that the text does not depend on how decoding is split into calls.
      recent: int32 `[slots, window]`: the last tokens, padded with negative ids.
      params: dynamic parameters.
      spec: static parameters.
      mask: uint32 `[slots, columns]`, if the spec has it: the words of `shard_columns`, a bit for
        each token that may follow.
      vocab: rows of the head that are tokens.

    Returns:
      int32 `[slots]`, the same on all devices.
    """
    rows = logits.shape[-1]
    offset = shard_index(_VOCAB) * rows
    # A NaN becomes the largest logit, which is checked below: no extra pass over the logits.
    logits = jnp.where(jnp.isnan(logits), jnp.inf, logits)
    logits = jnp.where(jnp.arange(rows) + offset < vocab, logits, -jnp.inf)
    if spec.bias:
        local = params.bias_ids - offset
        local = jnp.where((local >= 0) & (local < rows), local, rows)
        index = jnp.arange(logits.shape[0])[:, None], local
        logits = logits.at[index].add(params.bias, mode="drop")
    if spec.window:
        logits = penalize(logits, recent, params, offset)
    if spec.mask:
        assert mask is not None
        logits = jnp.where(_permitted(mask, rows), logits, -jnp.inf)
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
    rank, top_k = jnp.arange(count), params.top_k[:, None]
    in_top_k = (top_k == 0) | (rank < top_k)
    probability = jax.nn.softmax(jnp.where(in_top_k, best, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    top_p = params.top_p[:, None]  # 1 keeps all, whatever the sum rounds to
    keep = in_top_k & ((before < top_p) | (top_p >= 1) | (rank == 0))
    keep &= probability >= params.min_p[:, None] * probability[:, :1]
    greedy = params.temperature[:, None] == 0
    temperature = jnp.where(greedy, 1, params.temperature[:, None])
    scaled = jnp.where(keep & ~(greedy & (rank > 0)), best / temperature, -jnp.inf)

    def choose(seed: Array, position: Array, scaled: Array, tokens: Array) -> Array:
        """As `jax.random.categorical`, with noise keyed by token id rather than by its rank."""
        key = jax.random.fold_in(jax.random.key(seed), position)
        keys = jax.vmap(partial(jax.random.fold_in, key))(tokens)
        return jnp.argmax(scaled + jax.vmap(jax.random.gumbel)(keys))

    choice = jax.vmap(choose)(params.seed, positions, scaled, tokens)
    token = jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(best[:, 0]), token, NOT_FINITE)


def log_probabilities(logits: Array, tokens: Array, *, vocab: int) -> tuple[Array, Array, Array]:
    """Log-probabilities of tokens and of their likeliest alternatives, before any sampling option.

    Args:
      logits: float32 `[..., vocab / devices]`: this device's shard, padding last.
      tokens: int32 `[...]`; of negative ones the result has no meaning.
      vocab: rows of the head that are tokens.

    Returns:
      float32 `[...]`; then, likeliest first, the alternatives' ids, int32 `[..., alternatives]`,
      and their log-probabilities, float32. There are `MAX_TOP_LOGPROBS`, or the vocabulary.
    """
    rows, count = logits.shape[-1], min(MAX_TOP_LOGPROBS, vocab)
    offset = shard_index(_VOCAB) * rows
    logits = jnp.where(jnp.arange(rows) + offset < vocab, logits, -jnp.inf)
    best, index = lax.top_k(logits, min(count, rows))
    largest = jnp.where(jnp.isfinite(best[..., :1]), best[..., :1], 0)
    total = jnp.log(jnp.sum(jnp.exp(logits - largest), axis=-1, keepdims=True)) + largest
    local = (tokens - offset)[..., None]
    own = jnp.take_along_axis(logits, jnp.clip(local, 0, rows - 1), axis=-1)
    own = jnp.where((local >= 0) & (local < rows), own, -jnp.inf)
    # One collective for all: its cost is latency.
    floats = jnp.concatenate([own, total, best], axis=-1)
    parts = jnp.concatenate([lax.bitcast_convert_type(floats, jnp.int32), index + offset], axis=-1)
    shape = (*logits.shape[:-1], -1, parts.shape[-1])
    parts = all_gather(parts, _VOCAB).reshape(shape)
    floats, ids = jnp.split(parts, [2 + best.shape[-1]], axis=-1)
    floats = lax.bitcast_convert_type(floats, jnp.float32)
    total = jax.nn.logsumexp(floats[..., 1], axis=-1)
    flat = (*logits.shape[:-1], -1)
    best, ids = lax.sort(
        (-floats[..., 2:].reshape(flat), ids.reshape(flat)), dimension=-1, num_keys=2
    )
    own = floats[..., 0].max(axis=-1) - total
    return own, ids[..., :count], -best[..., :count] - total[..., None]
