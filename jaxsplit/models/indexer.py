"""Indexers: which keys the queries of sparse attention may see.

An indexer is small: every device has all of it, and selects for itself.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxsplit.cache.layers import AttentionCache, Batch, RecurrentCache
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.attention import Attention
from jaxsplit.models.compressor import BlockPool, complete_blocks
from jaxsplit.models.layers import Linear, Norm
from jaxsplit.models.mixer_config import (
    BlockIndexerConfig,
    BlockSparseConfig,
    IndexerConfig,
    PooledBlockIndexerConfig,
)
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.attention.api import KV, MAX_SCORES, over_filled, update_cache
from jaxsplit.ops.attention.rope import RopeConfig, rope
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

_INDEX = Axis("index")


class Indexer(nnx.Module):
    """The lightning indexer of DeepSeek sparse attention (DeepSeek-AI 2025, DeepSeek-V3.2-Exp,
    section 2.1): scores of keys are sums over few, small heads.

    Args:
      config: of the indexer.
      embed: width of the residual stream.
      low: width of the vector that queries come from.
    """

    def __init__(self, config: IndexerConfig, embed: int, low: int, *, rngs: nnx.Rngs):
        c = config
        self.query = Linear(LATENT, low, _INDEX, c.heads * c.head_dim, rngs=rngs)
        self.key = Linear(EMBED, embed, _INDEX, c.head_dim, rngs=rngs)
        self.key_norm = Norm(c.norm, c.head_dim, _INDEX)
        self.weight = Linear(EMBED, embed, _INDEX, c.heads, rngs=rngs)
        self.pool = BlockPool(c.pool, embed, rngs=rngs) if c.pool else None
        self.config = config

    def __call__(
        self, x: Activations, low: Array, batch: Batch, cache: Any
    ) -> tuple[Array | None, Any]:
        """Selects keys.

        Args:
          x: `[batch, time, embed]`.
          low: what queries come from, `[batch, time, low]`.
          batch: where the tokens belong.
          cache: keys of earlier tokens; None: there are none.

        Returns:
          the selected keys, as in `KV`, int32 `[batch, 1, time, n]`; None: there are not more keys
          than may be selected. And the cache with the new keys.
        """
        c, shape = self.config, batch.positions.shape
        queries = self.query(low).reshape(*shape, c.heads, c.head_dim)
        queries = _rotated(queries, batch, c.rope, last=c.rope_last)
        keys = self.key_norm(self.key(x))[:, :, None]
        keys = _rotated(keys, batch, c.rope, last=c.rope_last)
        weights = self.weight(x).astype(jnp.float32) * (c.heads * c.head_dim) ** -0.5
        if self.pool is not None and c.pool is not None:
            keys, cache = self.pool(x, keys[:, :, 0], batch, cache, lambda entries, _: entries)
            top_k, block = c.top_k // c.pool.block, c.pool.block
            return select_blocks(queries, keys, weights, batch.positions, top_k, block), cache
        kv, cache = update_cache(keys, None, batch, cache, None)
        if kv.length <= c.top_k:
            return None, cache

        def run(kv: KV) -> Array:
            keys = kv.read(batch.positions).dequantized_keys(x.dtype)[:, 0]
            return select(queries, keys, weights, batch.positions, c.top_k)

        return over_filled(run, kv, batch.positions, at_least=c.top_k), cache


def _rotated(x: Array, batch: Batch, config: RopeConfig | None, *, last: bool) -> Array:
    """Rotated heads, `[batch, time, heads, width]`; the last dimensions come first if they are
    rotated."""
    if config is None:
        return x
    x = jnp.roll(x, config.dim, axis=-1) if last else x
    return rope(x, batch.positions, config, config.divisors(batch.freq_factors))


def select(queries: Array, keys: Array, weights: Array, positions: Array, top_k: int) -> Array:
    """The keys with the largest scores, of those at and before each query's position.

    Args:
      queries: `[batch, time, heads, width]`.
      keys: `[batch, keys, width]`, each at its position.
      weights: of the heads, float32 `[batch, time, heads]`.
      positions: of the queries, int32 `[batch, time]`.
      top_k: how many.

    Returns:
      int32 `[batch, 1, time, top_k]`, negative for none.
    """

    def select_one(query: Array, weight: Array, position: Array) -> Array:
        scores = jnp.einsum(
            "bhd,bsd->bhs", query, keys, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.einsum("bh,bhs->bs", weight, jax.nn.relu(scores), precision="highest")
        visible = jnp.arange(keys.shape[1]) <= position[:, None]
        chosen = lax.top_k(jnp.where(visible, scores, -jnp.inf), top_k)[1]
        return jnp.where(chosen <= position[:, None], chosen, -1)

    by_time = (jnp.moveaxis(a, 1, 0) for a in (queries, weights, positions))
    at_once = max(1, MAX_SCORES // (keys.shape[1] * queries.shape[2]))
    chosen = lax.map(lambda query: select_one(*query), tuple(by_time), batch_size=at_once)
    return jnp.moveaxis(chosen, 0, 1)[:, None]


def select_blocks(
    queries: Array, entries: Array, weights: Array, positions: Array, top_k: int, block: int
) -> Array | None:
    """As `select`, by entries `[batch, blocks, width]` for blocks of keys: the keys of the blocks,
    and of the one that is not complete. None: there are not more blocks than `top_k`."""
    if entries.shape[1] <= top_k:
        return None
    complete = complete_blocks(positions, block)
    chosen = select(queries, entries, weights, complete - 1, top_k)
    return _keys_of(jnp.concatenate([chosen, complete[:, None, :, None]], -1), positions, block)


def _keys_of(blocks: Array, positions: Array, block: int) -> Array:
    """The keys at and before each position, int32 `[batch, time]`, of its blocks, int32 `[batch,
    heads, time, n]`: `[batch, heads, time, n * block]`; negative for none."""
    keys = blocks[..., None] * block + jnp.arange(block)
    keys = jnp.where((blocks < 0)[..., None], -1, keys).reshape(*blocks.shape[:3], -1)
    return jnp.where(keys <= positions[:, None, :, None], keys, -1)


class BlockIndexer(nnx.Module):
    """The indexer of block-sparse attention (MiniMax M3): blocks of keys are selected for each key
    head, by the largest score in them.

    Args:
      config: of the indexer.
      attention: the attention to the blocks.
      embed: width of the residual stream.
    """

    def __init__(
        self, config: BlockIndexerConfig, attention: AttentionConfig, embed: int, *, rngs: nnx.Rngs
    ):
        c, (_, kv_heads) = config, attention.axes
        self.query = Linear(EMBED, embed, kv_heads, attention.kv_heads * c.head_dim, rngs=rngs)
        self.key = Linear(EMBED, embed, _INDEX, c.head_dim, rngs=rngs)
        self.query_norm = Norm(c.norm, c.head_dim, _INDEX)
        self.key_norm = Norm(c.norm, c.head_dim, _INDEX)
        self.config = config

    def __call__(
        self, x: Activations, batch: Batch, cache: AttentionCache | None, keys: int
    ) -> tuple[Array | None, AttentionCache | None]:
        """Selects blocks.

        Args:
          x: `[batch, time, embed]`.
          batch: where the tokens belong.
          cache: keys of earlier tokens; None: there are none.
          keys: how many the attention reads.

        Returns:
          the keys of the selected blocks, as in `KV`, int32 `[batch, kv_heads, time, n]`; None:
          there are not more blocks than may be selected. And the cache with the new keys.
        """
        c, positions = self.config, batch.positions
        queries = self.query(x).reshape(*positions.shape, -1, c.head_dim)
        queries = _rotated(self.query_norm(queries), batch, c.rope, last=False)
        new = self.key_norm(self.key(x))[:, :, None]
        new = _rotated(new, batch, c.rope, last=False)
        kv, cache = update_cache(new, None, batch, cache, None)
        index = kv.read(positions).dequantized_keys(x.dtype)[:, 0]
        blocks = -(-keys // c.block)
        if blocks <= c.top_k:
            return None, cache
        places = positions[:, None, :, None]
        scores = jnp.einsum(
            "btgd,bsd->bgts", queries, index, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.where(jnp.arange(keys) <= places, scores, -jnp.inf)
        padding = [(0, 0)] * 3 + [(0, blocks * c.block - keys)]
        scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
        scores = scores.reshape(*scores.shape[:3], blocks, c.block).max(axis=-1)
        distance = places // c.block - jnp.arange(blocks)
        scores = jnp.where((distance >= 0) & (distance < c.local), jnp.inf, scores)
        return _keys_of(lax.top_k(scores, c.top_k)[1], positions, c.block), cache


class PooledBlockIndexer(nnx.Module):
    """An indexer that selects blocks of keys for all heads, by the means of their keys.

    Args:
      config: of the indexer.
      embed: width of the residual stream.
    """

    def __init__(self, config: PooledBlockIndexerConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.query = Linear(EMBED, embed, _INDEX, c.heads * c.head_dim, rngs=rngs)
        self.key = Linear(EMBED, embed, _INDEX, c.head_dim, rngs=rngs)
        self.query_norm = Norm(c.norm, c.head_dim, _INDEX)
        self.key_norm = Norm(c.norm, c.head_dim, _INDEX)
        self.pool = BlockPool(c.pool, embed, rngs=rngs)
        self.config = config

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None, keys: int
    ) -> tuple[Array | None, RecurrentCache | None]:
        """Selects blocks, as `BlockIndexer`: the same for all key heads, and the block that is not
        complete."""
        c, positions = self.config, batch.positions

        def finish(entries: Array, first: Array) -> Array:
            return rope(self.key_norm(entries)[:, :, None], first, c.rope)[:, :, 0]

        entries, cache = self.pool(x, self.key(x), batch, cache, finish)
        queries = self.query(x).reshape(*positions.shape, c.heads, c.head_dim)
        queries = rope(self.query_norm(queries), positions, c.rope).astype(jnp.float32)
        weights = jnp.full((*positions.shape, c.heads), c.head_dim**-0.5)
        return select_blocks(queries, entries, weights, positions, c.top_k, c.block), cache


class BlockSparseAttention(nnx.Module):
    """Attention to blocks of keys that an indexer selects."""

    def __init__(self, config: BlockSparseConfig, embed: int, *, rngs: nnx.Rngs):
        self.attention = Attention(config.attention, embed, rngs=rngs)
        self.indexer = (
            BlockIndexer(config.indexer, config.attention, embed, rngs=rngs)
            if isinstance(config.indexer, BlockIndexerConfig)
            else PooledBlockIndexer(config.indexer, embed, rngs=rngs)
        )

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return self.attention.readers(x) | XLA_ONLY

    def __call__(self, x: Activations, batch: Batch, cache: Any) -> tuple[Unreduced, Any]:
        """Attends, as `Attention`; the cache holds keys and values, and the indexer's keys."""
        kv, index = (None, None) if cache is None else cache
        keys = x.shape[1]
        if kv is not None:
            pages = batch.pages_of(ring=False)
            keys = kv.length * (1 if pages is None else pages.shape[1])
        selected, index = self.indexer(x, batch, index, keys)
        y, kv = self.attention(x, batch, kv, selected)
        return y, None if cache is None else (kv, index)
