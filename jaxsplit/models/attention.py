"""Softmax attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsplit.cache.contiguous import AttentionCache, Batch
from jaxsplit.comm.api import local_units
from jaxsplit.context import current_context
from jaxsplit.models.layers import Linear, Norm, Partials, project, project_in_terms
from jaxsplit.ops.attention import triton_decode, triton_flash, triton_rope_cache_update
from jaxsplit.ops.attention.rope import rope
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.matmul.api import Rows, computed
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import EMBED, HEAD_DIM, Axis

SCORES = 2**21
"""Of each head at a time: more would take too much memory."""


class Attention(nnx.Module):
    """Causal attention with grouped key and value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: AttentionConfig, embed: int, *, rngs: nnx.Rngs):
        c, (heads, kv_heads) = config, config.axes

        def project(axis: Axis, count: int, width: int) -> Linear:
            return Linear(EMBED, embed, axis, count * width, bias=c.qkv_bias, rngs=rngs)

        def norm(norm: NormConfig | None, axis: Axis, count: int, width: int) -> Norm | None:
            if norm is None:
                return None
            if c.norm_over == "head":
                return Norm(norm, width, HEAD_DIM)
            return Norm(norm, count * width, axis, group=width if c.norm_over == "each" else None)

        own = c.borrows is None
        self.query = project(heads, c.heads, c.head_dim)
        self.key = project(kv_heads, c.kv_heads, c.head_dim) if own else None
        self.value = (
            project(kv_heads, c.kv_heads, c.value_dim) if own and not c.value_is_key else None
        )
        self.gate = (
            Linear(EMBED, embed, heads, c.heads * c.value_dim, rngs=rngs) if c.gate else None
        )
        self.query_norm = norm(c.query_norm, heads, c.heads, c.head_dim)
        self.key_norm = norm(c.key_norm, kv_heads, c.kv_heads, c.head_dim) if own else None
        self.value_norm = norm(c.value_norm, kv_heads, c.kv_heads, c.value_dim) if own else None
        self.sinks = nnx.Param(jnp.zeros(c.heads, jnp.float32), axes=(heads,)) if c.sinks else None
        self.out = Linear(heads, c.heads * c.value_dim, EMBED, embed, bias=c.out_bias, rngs=rngs)
        self.config = config

    def __call__(
        self, x: Rows, batch: Batch, cache: AttentionCache | None
    ) -> tuple[Partials, AttentionCache | None]:
        """What the tokens read from one another.

        Args:
          x: `[batch, time, embed]`.
          batch: where the tokens belong.
          cache: keys and values of earlier tokens; None: there are none.

        Returns:
          parts of `[batch, time, embed]`, and the cache with these tokens added.
        """
        c = self.config
        linears = self.query, self.key, self.value, self.gate
        sinks = None if self.sinks is None else self.sinks.get_value()
        like = jax.ShapeDtypeStruct((*x.shape[:-1], self.query.local_size), x.dtype)
        if current_context().policy.kernels and triton_decode.supports(c, batch, cache, like):
            query, key, value, gate = project_in_terms(x, *linears)
            y, cache = triton_decode.attend(
                query,
                key,
                key if value is None else value,
                batch,
                cache,
                c,
                self.norm_scales,
                sinks,
                dtype=x.dtype,
                reader=None if gate is not None else self.out.reader(like),
                launch=current_context().launch,
            )
            gate = None if gate is None else jnp.sum(gate, axis=0).astype(x.dtype)
        else:
            query, key, value, gate = project(x, *linears)
            value = key if value is None else value
            y, cache = self._attend(query, key, value, batch, cache, sinks)
        if gate is not None:
            y = computed(y) * jax.nn.sigmoid(gate)
        return (self.out.partial(y),), cache

    def _attend(
        self,
        query: Array,
        key: Array | None,
        value: Array | None,
        batch: Batch,
        cache: AttentionCache | None,
        sinks: Array | None,
    ) -> tuple[Rows, AttentionCache | None]:
        """What tokens read, from their projections `[batch, time, heads * width]`."""
        c, positions, active, slots = self.config, batch.positions, current_context().policy, None
        if active.kernels and triton_rope_cache_update.supports(c, batch, cache, query.dtype):
            queries, cache = triton_rope_cache_update.place(
                query,
                key,
                value,
                batch,
                cache,
                c,
                self.norm_scales,
                interpret=active.launch.interpret,
            )
            lent = c.lends is not None
            memory, slots = (cache.read(batch), None) if lent else (cache, batch.slots)
            key_positions = None if c.window is None else cache.positions(positions[:, 0])
        else:
            queries = self._queries(query, batch)
            if key is not None:
                keys = self._heads(key, c.head_dim, self.key_norm, batch)
                values = self._heads(value, c.value_dim, self.value_norm)
                memory, key_positions, cache = recall(keys, values, batch, cache, c.window)
            else:
                memory, key_positions = batch.lent[c.borrows]
        if c.lends is not None:
            batch.lent[c.lends] = memory, key_positions
        kv_heads = memory.keys.shape[1]
        queries = queries.reshape(*positions.shape, kv_heads, -1, c.head_dim)
        return attend(queries, memory, positions, key_positions, c, sinks, slots), cache

    @property
    def norm_scales(self) -> tuple[Array | None, Array | None]:
        """Of the norms of queries and of keys."""
        query, key = (
            None if norm is None or norm.scale is None else norm.scale.get_value()
            for norm in (self.query_norm, self.key_norm)
        )
        return query, key

    def _queries(self, x: Array, batch: Batch) -> Array:
        """`[batch, time, heads * head_dim]` to `[batch, time, heads, head_dim]`."""
        queries = self._heads(x, self.config.head_dim, self.query_norm, batch)
        return heated(queries, batch.positions, self.config.temperature)

    def _heads(self, x: Array, width: int, norm: Norm | None, batch: Batch | None = None) -> Array:
        """`[batch, time, heads * width]` to `[batch, time, heads, width]`, clamped, normalized and,
        with a batch, turned."""
        c = self.config

        def normalize(x: Array) -> Array:
            if norm is None:
                return x
            if c.norm_over == "head":
                return norm(x)
            return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

        if c.clamp is not None:
            x = jnp.clip(x, -c.clamp, c.clamp)
        x = x.reshape(*x.shape[:-1], -1, width)
        if c.norm_first:
            x = normalize(x)
        if c.rope is not None and batch is not None:
            x = rope(x, batch.positions, c.rope, batch.rope_factors.get(c.rope.factors))
        return x if c.norm_first else normalize(x)


def heated(queries: Array, positions: Array, temperature: tuple[float, int, int] | None) -> Array:
    """Queries `[batch, time, heads, width]` times the temperature of their positions, int32
    `[batch, time]`; as in `AttentionConfig`."""
    if temperature is None:
        return queries
    scale, floor, offset = temperature
    steps = jnp.floor((positions + offset).astype(jnp.float32) / floor)
    factor = 1 + scale * jnp.log1p(steps)
    return (queries * factor[..., None, None]).astype(queries.dtype)


def recall(
    keys: Array,
    values: Array | None,
    batch: Batch,
    cache: AttentionCache | None,
    window: int | None,
) -> tuple[AttentionCache, Array | None, AttentionCache | None]:
    """What new tokens can look at: earlier tokens and themselves.

    Args:
      keys, values: of the new tokens, `[batch, time, kv_heads, width]`; without values they are
        parts of the keys.
      batch: where the tokens belong.
      cache: of earlier tokens; None: there are none.
      window: how many positions the cache keeps; None: all.

    Returns:
      keys and values, `[batch, kv_heads, keys, width]` each; the keys' positions, int32
      `[batch, keys]`, negative where there is none, or None: each is at its place; and the cache
      with the new tokens.
    """
    if cache is None:
        return AttentionCache.of(keys, values, keys.dtype), batch.positions, None
    new = AttentionCache.of(keys, values, cache.keys.dtype)
    if window is None:
        cache = cache.write(new, batch)
        return cache.read(batch), None, cache
    if keys.shape[1] == 1:
        cache = cache.write(new, batch)
        return cache.read(batch), cache.positions(batch.positions[:, 0]), cache
    # The last of many tokens take the places of keys that the first still look at.
    memory = cache.read(batch).followed_by(new)
    earlier = cache.positions(batch.positions[:, 0] - 1)
    positions = jnp.concatenate([earlier, batch.positions], axis=1)
    return memory, positions, cache.write(new, batch)


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
    memory: AttentionCache,
    positions: Array,
    key_positions: Array | None,
    config: AttentionConfig,
    sinks: Array | None = None,
    slots: Array | None = None,
) -> Rows:
    """Softmax attention over the keys at and before each query's position.

    Args:
      queries: `[batch, time, kv_heads, group, head_dim]`.
      memory: keys and values, `[batch, kv_heads, keys, width]`. Scales of 8-bit ones multiply the
        scores and the weights, so that keys and values are used as they are stored.
      positions: int32 `[batch, time]`.
      key_positions: int32 `[batch or 1, keys]`, negative where there is no key; None: a key's
        position is its place.
      config: scale, window, soft-cap and biases of the scores.
      sinks: float32 `[kv_heads * group]`, or None.
      slots: int32 `[batch]`: which of the memory's sequences each is; None: all in order.

    Returns:
      `[batch, time, kv_heads * group * value_dim]` in the dtype of `queries`, perhaps not computed
      yet; scores and softmax are float32.
    """
    active = current_context().policy
    if active.kernels and triton_flash.supports(queries, memory, config):
        return triton_flash.attend(
            queries, memory, positions, key_positions, config, sinks, slots, launch=active.launch
        )
    if slots is not None:
        memory = jax.tree.map(lambda x: x[slots], memory)
    if key_positions is None:
        key_positions = jnp.arange(memory.length)[None]
    at_once = max(1, SCORES // memory.length)
    if queries.shape[1] > at_once:

        def attend_one(query: tuple[Array, Array]) -> Array:
            one, position = (x[:, None] for x in query)
            return attend(one, memory, position, key_positions, config, sinks)[:, 0]

        by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (queries, positions))
        return jnp.moveaxis(lax.map(attend_one, by_time, batch_size=at_once), 0, 1)
    c, dtype = config, queries.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    values, value_scale = memory.values, memory.value_scale
    if values is None:
        values, value_scale = memory.keys[..., : c.value_dim], memory.key_scale
    scores = jnp.einsum(
        "btkgd,bksd->bkgts",
        queries,
        memory.keys.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if memory.key_scale is not None:
        scores = scores * memory.key_scale[:, :, None, None]
    scores = scores * (queries.shape[-1] ** -0.5 if c.scale is None else c.scale)
    if c.softcap is not None:
        scores = c.softcap * jnp.tanh(scores / c.softcap)
    distance = positions[:, :, None] - key_positions[:, None, :]
    per_head = (*queries.shape[2:4], 1, 1)
    if c.alibi is not None:
        slopes = jnp.asarray(alibi_slopes(c.heads, c.alibi))[local_units(c.axes[0])]
        scores = scores - slopes.reshape(per_head) * distance[:, None, None]
    seen = (distance >= 0) & (key_positions[:, None, :] >= 0)
    if c.window is not None:
        reach = positions[:, :, None] % c.window + 1 if c.chunked else c.window
        seen &= distance < reach
    scores = jnp.where(seen[:, None, None], scores, -1e30)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks.reshape(per_head)
        largest = jnp.maximum(scores.max(axis=-1, keepdims=True), sinks)
        weights = jnp.exp(scores - largest)
        weights /= weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - largest)
    if value_scale is not None:
        weights = weights * value_scale[:, :, None, None]
    y = jnp.einsum(
        "bkgts,bksd->btkgd",
        weights.astype(dtype),
        values.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return y.astype(dtype).reshape(*y.shape[:2], -1)
