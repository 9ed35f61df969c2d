"""Attention to a window of tokens and to compressed blocks of all earlier ones."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch, RecurrentCache
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.compressor import BlockPool, complete_blocks
from jaxsplit.models.indexer import select
from jaxsplit.models.layers import Linear, Norm, param, readers_of
from jaxsplit.models.mixer_config import CompressedAttentionConfig, PoolConfig
from jaxsplit.models.mla import matmul_by_head
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.attention.api import KV, attend, gathers, update_cache, window_of
from jaxsplit.ops.attention.rope import RopeConfig, rope
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import EMBED, LATENT, Axis


def _rotated(x: Array, positions: Array, config: RopeConfig) -> Array:
    """Heads `[batch, time, heads, width]` whose last dimensions are rotated; they come first."""
    return rope(jnp.roll(x, config.dim, axis=-1), positions, config)


class Compressor(nnx.Module):
    """Compressed entries of blocks of tokens: pooled projections, normalized and rotated."""

    def __init__(self, config: PoolConfig, norm: NormConfig, embed: int, *, rngs: nnx.Rngs):
        self.rows = Linear(EMBED, embed, LATENT, config.row_width, rngs=rngs)
        self.pool = BlockPool(config, embed, rngs=rngs)
        self.norm = Norm(norm, config.width, LATENT)

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None, config: RopeConfig
    ) -> tuple[Array, RecurrentCache | None]:
        """Entries `[batch, blocks, width]`, and the updated cache; as `BlockPool`."""

        def finish(entries: Array, positions: Array) -> Array:
            return _rotated(self.norm(entries)[:, :, None], positions, config)[:, :, 0]

        return self.pool(x, self.rows(x), batch, cache, finish)


class BlockSelector(nnx.Module):
    """An indexer of compressed entries, with entries of its own."""

    def __init__(self, config: CompressedAttentionConfig, embed: int, low: int, *, rngs: nnx.Rngs):
        c = config.indexer
        assert c is not None and c.pool is not None
        self.query = Linear(LATENT, low, LATENT, c.heads * c.head_dim, rngs=rngs)
        self.weight = Linear(EMBED, embed, LATENT, c.heads, rngs=rngs)
        self.keys = Compressor(c.pool, c.norm, embed, rngs=rngs)
        self.config = c

    def __call__(
        self,
        x: Activations,
        low: Array,
        batch: Batch,
        cache: RecurrentCache | None,
        config: RopeConfig,
    ) -> tuple[Array | None, RecurrentCache | None]:
        """The selected entries, int32 `[batch, 1, time, n]`, negative for none; None: all that
        exist. And the updated cache; as `Indexer`."""
        c, positions = self.config, batch.positions
        assert c.pool is not None
        keys, cache = self.keys(x, batch, cache, config)
        if keys.shape[1] <= c.top_k:
            return None, cache
        queries = self.query(low).reshape(*positions.shape, c.heads, c.head_dim)
        queries = _rotated(queries, positions, config).astype(jnp.float32)
        weights = self.weight(x).astype(jnp.float32) * (c.heads * c.head_dim) ** -0.5
        last = complete_blocks(positions, c.pool.block) - 1
        return select(queries, keys, weights, last, c.top_k), cache


class CompressedAttention(nnx.Module):
    """Compressed sparse attention and heavily compressed attention (DeepSeek-AI 2026, DeepSeek-V4):
    all heads share one key, which is its own value."""

    def __init__(self, config: CompressedAttentionConfig, embed: int, *, rngs: nnx.Rngs):
        c, axis = config, config.axis
        self.query_down = Linear(EMBED, embed, LATENT, c.q_lora_rank, rngs=rngs)
        self.query_norm = Norm(c.norm, c.q_lora_rank, LATENT)
        self.query = Linear(LATENT, c.q_lora_rank, axis, c.heads * c.head_dim, rngs=rngs)
        self.key = Linear(EMBED, embed, LATENT, c.head_dim, rngs=rngs)
        self.key_norm = Norm(c.norm, c.head_dim, LATENT)
        self.entries = Compressor(c.pool, c.norm, embed, rngs=rngs) if c.pool else None
        self.indexer = BlockSelector(c, embed, c.q_lora_rank, rngs=rngs) if c.indexer else None
        self.sinks = nnx.Param(jnp.zeros(c.heads, jnp.float32), axes=(axis,))
        width = c.heads // c.groups * c.head_dim
        shape = c.groups, c.out_rank, width
        self.out_down = param(rngs, (axis, Axis("up"), LATENT), shape)
        self.out = Linear(axis, c.groups * c.out_rank, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.query_down, self.key) | XLA_ONLY

    def __call__(self, x: Activations, batch: Batch, cache: Any) -> tuple[Unreduced, Any]:
        """Attends, as `Attention`; the cache holds the window, entries and the indexer's."""
        c, positions = self.config, batch.positions
        window, entries_cache, index = (None, None, None) if cache is None else cache
        low = self.query_norm(self.query_down(x))
        queries = self.query(low).reshape(*positions.shape, -1, c.head_dim)
        squares = jnp.mean(jnp.square(queries.astype(jnp.float32)), axis=-1, keepdims=True)
        queries = (queries * jax.lax.rsqrt(squares + c.norm.epsilon)).astype(queries.dtype)
        queries = _rotated(queries, positions, c.rope)
        key = _rotated(self.key_norm(self.key(x))[:, :, None], positions, c.rope)
        selected = window_of(batch, window, c.window)[:, None]
        recent, window = update_cache(key, None, batch, window, c.window)
        keys = recent.read(positions).dequantized_keys(x.dtype)
        if self.entries is not None and c.pool is not None:
            entries, entries_cache = self.entries(x, batch, entries_cache, c.rope)
            chosen = None
            if self.indexer is not None:
                chosen, index = self.indexer(x, low, batch, index, c.rope)
            if chosen is None:
                complete = complete_blocks(positions, c.pool.block)[:, None, :, None]
                every = jnp.arange(entries.shape[1])
                chosen = jnp.where(every < complete, every, -1)
            chosen = jnp.where(chosen < 0, -1, chosen + keys.shape[2])
            selected = jnp.concatenate([selected, chosen], axis=-1)
            keys = jnp.concatenate([keys, entries[:, None].astype(keys.dtype)], axis=2)
        few = gathers(keys.shape[2], selected.shape[-1], *queries.shape[1:3])
        kv = KV(AttentionCache(keys, None), selected=selected, gathers=few)
        config = AttentionConfig(c.heads, 1, c.head_dim, c.head_dim)
        sinks = self.sinks.get_value()
        y = attend(queries[:, :, None], kv, batch, config=config, sinks=sinks).array
        y = rope(y.reshape(queries.shape), -positions, c.rope)
        y = jnp.roll(y, -c.rope.dim, axis=-1)
        y = y.reshape(*positions.shape, -1, c.heads // c.groups * c.head_dim)
        y = matmul_by_head(y, self.out_down.get_value()).reshape(*positions.shape, -1)
        caches = window, entries_cache, index
        return self.out.unreduced(y), None if cache is None else caches
