"""Softmax attention computed by XLA: the reference of the kernels, and their fallback."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.comm.api import local_units
from jaxsplit.ops.attention.kv import KV, over_filled
from jaxsplit.ops.attention.rope import rope
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.norm.spec import NormParams
from jaxsplit.ops.norm.xla import normalize

MAX_SCORES = 2**21
"""Scores of a head that are computed at a time: more would take too much memory."""
MAX_GATHERED = 2**23
"""Elements of keys and values that are gathered at a time: more would take too much memory."""
MOVE_COST = 32.0
"""How many heads could attend to a key in the time that it takes to move it; see `gathers`.
Measured on a CPU: 20 to 30; by the bandwidth and arithmetic of an H200: about 80."""


def rope_cache_update(
    query: Array,
    key: Array,
    value: Array,
    batch: Batch,
    cache: AttentionCache | None,
    *,
    config: AttentionConfig,
    params: AttentionParams,
) -> tuple[Array, KV, AttentionCache | None]:
    """Normalizes and rotates queries and keys, and writes keys and values to the cache.

    Args:
      query, key, value: projections, `[batch, time, heads * width]`.
      batch: where the tokens belong.
      cache: of earlier tokens; None: there are none.
      config, params: of the attention.

    Returns:
      queries `[batch, time, heads, head_dim]`, then as `update_cache`.
    """
    queries = rotate_queries(query, batch, config=config, params=params)
    keys = _heads(key, config.head_dim, params.key_norm, config, batch)
    values = _heads(value, config.value_dim, params.value_norm, config)
    return queries, *update_cache(keys, values, batch, cache, config.window)


def rotate_queries(
    query: Array, batch: Batch, *, config: AttentionConfig, params: AttentionParams
) -> Array:
    """`[batch, time, heads * head_dim]` to `[batch, time, heads, head_dim]`, normalized, rotated
    and scaled by temperature."""
    queries = _heads(query, config.head_dim, params.query_norm, config, batch)
    if params.query_scale is not None:
        queries = (queries * params.query_scale[:, None]).astype(queries.dtype)
    return apply_temperature(queries, batch.positions, config.attn_temperature)


def _heads(
    x: Array,
    width: int,
    norm: NormParams | None,
    config: AttentionConfig,
    batch: Batch | None = None,
) -> Array:
    """`[batch, time, heads * width]` to `[batch, time, heads, width]`, clipped, normalized and,
    with a batch, rotated."""
    c = config

    def normalized(x: Array) -> Array:
        if norm is None:
            return x
        if c.norm_over == "head":
            return normalize(x, norm)
        return normalize(x.reshape(*x.shape[:-2], -1), norm).reshape(x.shape)

    if c.clip_qkv is not None:
        x = jnp.clip(x, -c.clip_qkv, c.clip_qkv)
    x = x.reshape(*x.shape[:-1], -1, width)
    if c.norm_first:
        x = normalized(x)
    if c.rope is not None and batch is not None:
        x = rope(x, batch.positions, c.rope, c.rope.divisors(batch.freq_factors))
    return x if c.norm_first else normalized(x)


def apply_temperature(
    queries: Array, positions: Array, temperature: tuple[float, int, int] | None
) -> Array:
    """Queries `[batch, time, heads, width]` times the temperature of their positions, int32
    `[batch, time]`; as in `AttentionConfig`."""
    if temperature is None:
        return queries
    scale, floor, offset = temperature
    steps = jnp.floor((positions + offset).astype(jnp.float32) / floor)
    factor = 1 + scale * jnp.log1p(steps)
    return (queries * factor[..., None, None]).astype(queries.dtype)


def update_cache(
    keys: Array,
    values: Array | None,
    batch: Batch,
    cache: AttentionCache | None,
    window: int | None,
) -> tuple[KV, AttentionCache | None]:
    """Writes new tokens to the cache, and returns what they attend to: earlier ones and themselves.

    Args:
      keys, values: of the new tokens, `[batch, time, kv_heads, width]`; without values they are
        parts of the keys.
      batch: where the tokens belong.
      cache: of earlier tokens; None: there are none.
      window: how many positions the cache keeps; None: all.

    Returns:
      keys and values, and the cache with the new tokens.
    """
    if cache is None:
        return KV(AttentionCache.of(keys, values, keys.dtype), batch.positions), None
    new = AttentionCache.of(keys, values, cache.keys.dtype)
    if window is None:
        cache = cache.write(new, batch)
        return KV(cache, pages=batch.pages_of(ring=False)), cache
    pages = batch.pages_of(ring=True)
    if keys.shape[1] == 1:
        cache = cache.write(new, batch, ring=True)
        return KV(cache, cache.positions(batch.positions[:, 0]), pages), cache
    # The last of many tokens take the places of keys that the first still look at.
    kv = cache.read(pages, batch.positions[:, 0]).followed_by(new)
    earlier = cache.positions(batch.positions[:, 0] - 1)
    positions = jnp.concatenate([earlier, batch.positions], axis=1)
    return KV(kv, positions), cache.write(new, batch, ring=True)


def window_of(batch: Batch, cache: AttentionCache | None, window: int) -> Array:
    """The keys of a sliding window, among those that `update_cache` returns.

    Args:
      batch: where the tokens belong.
      cache: as it was before the update; None: there was none.
      window: how many positions, that of the query included.

    Returns:
      int32 `[batch, time, window]`: their indices, negative before the sequence's start, and for
      padding.
    """
    positions = batch.positions[..., None]
    wanted = jnp.where(positions < 0, -1, positions - jnp.arange(window))
    first = positions[:, :1]
    if cache is None:
        index = wanted - first
    elif positions.shape[1] == 1:
        index = wanted % cache.length
    else:
        earlier = wanted < first
        index = jnp.where(earlier, wanted % cache.length, cache.length + wanted - first)
    return jnp.where(wanted >= 0, index, -1)


def alibi_slopes(heads: int, largest: float) -> np.ndarray:
    """How much each head's scores fall with distance: float32 `[heads]`.

    Press et al. 2021, arXiv:2108.12409, with the slopes for head counts that are no power of two.
    """
    power = 2 ** math.floor(math.log2(heads))
    even = 2.0 ** (-largest / power * np.arange(1, power + 1))
    odd = 2.0 ** (-largest / (2 * power) * np.arange(1, 2 * power, 2))
    return np.concatenate([even, odd])[:heads].astype(np.float32)


def attend(
    queries: Array,
    kv: KV,
    positions: Array,
    *,
    config: AttentionConfig,
    sinks: Array | None = None,
) -> Array:
    """As `jaxsplit.ops.attention.api.attend`; the result is an array."""

    def run(kv: KV) -> Array:
        memory = kv.read(positions)
        return _attend(queries, memory, positions, kv.positions, config=config, sinks=sinks)

    return over_filled(run, kv, positions)


def _attend(
    queries: Array,
    kv: AttentionCache,
    positions: Array,
    key_positions: Array | None,
    *,
    config: AttentionConfig,
    sinks: Array | None = None,
    visible: Array | None = None,
) -> Array:
    """As `attend`, to one long page of each sequence; `visible`, bool `[batch, kv_heads or 1, time,
    keys]`: the keys that a query sees, of those that it may see by its position."""
    if key_positions is None:
        key_positions = jnp.arange(kv.length)[None]
    at_once = max(1, MAX_SCORES // kv.length)
    if queries.shape[1] > at_once:

        def attend_one(query: tuple[Array, Array, Array | None]) -> Array:
            one, position, seen = query
            return _attend(
                one[:, None],
                kv,
                position[:, None],
                key_positions,
                config=config,
                sinks=sinks,
                visible=None if seen is None else seen[:, :, None],
            )[:, 0]

        seen = None if visible is None else visible.swapaxes(1, 2)
        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (queries, positions, seen))
        return jnp.moveaxis(lax.map(attend_one, by_time, batch_size=at_once), 0, 1)
    scores = _scores(queries, kv, positions, key_positions, config)
    if visible is not None:
        scores = jnp.where(visible[:, :, None], scores, -1e30)
    weights = _softmax(scores, sinks)
    values, value_scale = kv.values, kv.value_scale
    if values is None:
        values, value_scale = kv.keys[..., : config.value_dim], kv.key_scale
    if value_scale is not None:
        weights = weights * value_scale[:, :, None, None]
    y = _einsum("bkgts,bksd->btkgd", weights.astype(queries.dtype), values.astype(queries.dtype))
    return y.astype(queries.dtype).reshape(*y.shape[:2], -1)


def gathers(keys: int, selected: int, queries: int, heads: int, cost: float = 1.0) -> bool:
    """Whether it is faster to gather the keys that each query sees than to mask the others.

    Masked keys are moved once for all queries, gathered ones for each query; but all heads of a
    query attend to every masked key. So a single query always gathers, and many do if they see few
    of the keys, or have many heads.

    Args:
      keys: how many there are.
      selected: how many a query sees.
      queries: how many there are of a sequence.
      heads: of queries that share a key.
      cost: of attention to a gathered key, relative to a masked one, if it is computed in another
        form.
    """
    gathered = selected * (heads * cost + MOVE_COST)
    return gathered <= keys * (heads + MOVE_COST / queries)


def attend_masked(
    queries: Array,
    kv: KV,
    positions: Array,
    *,
    config: AttentionConfig,
    sinks: Array | None = None,
) -> Array:
    """As `attend`, to the selected keys. The scores of the others are computed, too, and masked."""
    selected = kv.selected
    assert selected is not None

    def run(kv: KV) -> Array:
        memory = kv.read(positions)
        batch, heads, time = (jnp.arange(size) for size in selected.shape[:3])
        visible = jnp.zeros((*selected.shape[:3], memory.length), bool)
        place = batch[:, None, None, None], heads[:, None, None], time[:, None]
        visible = visible.at[*place, jnp.where(selected < 0, memory.length, selected)].set(
            True, mode="drop"
        )
        options = {"config": config, "sinks": sinks, "visible": visible}
        nowhere = jnp.zeros((1, memory.length), jnp.int32)  # Only the mask tells what is seen.
        return _attend(queries, memory, positions, nowhere, **options)

    return over_filled(run, kv, positions)


def attend_gathered(
    queries: Array,
    kv: KV,
    positions: Array,
    *,
    config: AttentionConfig,
    sinks: Array | None = None,
) -> Array:
    """As `attend_masked`, but the keys of each query are gathered, for some queries at a time."""
    assert kv.selected is not None

    def attend_one(arguments: tuple[Array, Array, Array]) -> Array:
        query, position, index = arguments
        memory = kv.memory.at(index, kv.pages)
        nowhere = jnp.zeros((1, memory.length), jnp.int32)
        options = {"config": config, "sinks": sinks, "visible": (index >= 0)[:, :, None]}
        return _attend(query[:, None], memory, position[:, None], nowhere, **options)[:, 0]

    arrays = queries, positions, kv.selected.swapaxes(1, 2)
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), arrays)
    stored = kv.memory.keys, kv.memory.values
    per_key = sum(x.shape[1] * x.shape[3] for x in stored if x is not None)
    per_query = queries.shape[0] * kv.selected.shape[-1] * per_key
    at_once = max(1, MAX_GATHERED // per_query)
    few = queries.shape[1] <= at_once
    y = jax.vmap(attend_one)(by_time) if few else lax.map(attend_one, by_time, batch_size=at_once)
    return jnp.moveaxis(y, 0, 1)


def _einsum(subscripts: str, *operands: Array) -> Array:
    """Accumulated in float32."""
    precision = lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
    return jnp.einsum(
        subscripts, *operands, precision=precision, preferred_element_type=jnp.float32
    )


def _scores(
    queries: Array,
    kv: AttentionCache,
    positions: Array,
    key_positions: Array,
    config: AttentionConfig,
) -> Array:
    """Masked scores, float32 `[batch, kv_heads, group, time, keys]`."""
    c = config
    scores = _einsum("btkgd,bksd->bkgts", queries, kv.keys.astype(queries.dtype))
    if kv.key_scale is not None:
        scores = scores * kv.key_scale[:, :, None, None]
    scores = scores * (queries.shape[-1] ** -0.5 if c.scale is None else c.scale)
    if c.softcap is not None:
        scores = c.softcap * jnp.tanh(scores / c.softcap)
    distance = positions[:, :, None] - key_positions[:, None, :]
    if c.alibi is not None:
        slopes = jnp.asarray(alibi_slopes(c.heads, c.alibi))[local_units(c.axes[0])]
        slopes = slopes.reshape(*queries.shape[2:4], 1, 1)
        scores = scores - slopes * distance[:, None, None]
    seen = (distance >= 0) & (key_positions[:, None, :] >= 0)
    if c.window is not None:
        reach = positions[:, :, None] % c.window + 1 if c.chunked else c.window
        seen &= distance < reach
    return jnp.where(seen[:, None, None], scores, -1e30)


def _softmax(scores: Array, sinks: Array | None) -> Array:
    """Over the keys, and over each head's sink, which has no value."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.reshape(*scores.shape[1:3], 1, 1)
    largest = jnp.maximum(scores.max(axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - largest)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest))
