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
from jaxsplit.ops.attention.api import MAX_SCORES, update_cache
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
          the indices of the selected keys, int32 `[batch, time, n]`, beyond the last one for none;
          None: there are not more keys than may be selected. And the cache with the new keys.
        """
        c, shape = self.config, batch.positions.shape
        queries = self.query(low).reshape(*shape, c.heads, c.head_dim)
        queries = _rotated(queries, batch, c.rope, last=c.rope_last)
        keys = self.key_norm(self.key(x))[:, :, None]
        keys = _rotated(keys, batch, c.rope, last=c.rope_last)
        weights = self.weight(x).astype(jnp.float32) * (c.heads * c.head_dim) ** -0.5
        if self.pool is not None and c.pool is not None:
            keys, cache = self.pool(x, keys[:, :, 0], batch, cache, lambda entries, _: entries)
            return self._of_blocks(queries, keys, weights, batch.positions, c.pool.block), cache
        memory, _, cache = update_cache(keys, None, batch, cache, None)
        if memory.length <= c.top_k:
            return None, cache
        keys = memory.dequantized_keys(x.dtype)[:, 0]
        return select(queries, keys, weights, batch.positions, c.top_k), cache

    def _of_blocks(
        self, queries: Array, keys: Array, weights: Array, positions: Array, block: int
    ) -> Array | None:
        """The keys of the selected blocks, and those of the block that is not complete."""
        blocks = self.config.top_k // block
        if keys.shape[1] <= blocks:
            return None
        complete = complete_blocks(positions, block)[..., None]
        chosen = select(queries, keys, weights, complete[..., 0] - 1, blocks)
        chosen = jnp.where(chosen < complete, chosen, 2**30 // block)
        chosen = jnp.concatenate([chosen, complete], axis=-1)[..., None]
        return (chosen * block + jnp.arange(block)).reshape(*positions.shape, -1)


def _rotated(x: Array, batch: Batch, config: RopeConfig | None, *, last: bool) -> Array:
    """Rotated heads, `[batch, time, heads, width]`; the last dimensions come first if they are
    rotated."""
    if config is None:
        return x
    x = jnp.roll(x, config.dim, axis=-1) if last else x
    return rope(x, batch.positions, config, config.divisors(batch.freq_factors))


def select(queries: Array, keys: Array, weights: Array, positions: Array, top_k: int) -> Array:
    """The keys with the largest scores, at and before each query's position.

    Args:
      queries: `[batch, time, heads, width]`.
      keys: `[batch, keys, width]`, each at its position.
      weights: of the heads, float32 `[batch, time, heads]`.
      positions: of the queries, int32 `[batch, time]`.
      top_k: how many.

    Returns:
      int32 `[batch, time, top_k]`: also keys after the position, if there are not enough.
    """

    def select_one(query: Array, weight: Array, position: Array) -> Array:
        scores = jnp.einsum(
            "bhd,bsd->bhs", query, keys, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.einsum("bh,bhs->bs", weight, jax.nn.relu(scores), precision="highest")
        visible = jnp.arange(keys.shape[1]) <= position[:, None]
        return lax.top_k(jnp.where(visible, scores, -jnp.inf), top_k)[1]

    by_time = (jnp.moveaxis(a, 1, 0) for a in (queries, weights, positions))
    at_once = max(1, MAX_SCORES // (keys.shape[1] * queries.shape[2]))
    chosen = lax.map(lambda query: select_one(*query), tuple(by_time), batch_size=at_once)
    return jnp.moveaxis(chosen, 0, 1)


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
          the mask of the keys in the selected blocks, bool `[batch, kv_heads, time, keys]`; None:
          there are not more blocks than may be selected. And the cache with the new keys.
        """
        c, positions = self.config, batch.positions
        queries = self.query(x).reshape(*positions.shape, -1, c.head_dim)
        queries = _rotated(self.query_norm(queries), batch, c.rope, last=False)
        new = self.key_norm(self.key(x))[:, :, None]
        new = _rotated(new, batch, c.rope, last=False)
        memory, _, cache = update_cache(new, None, batch, cache, None)
        index = memory.dequantized_keys(x.dtype)[:, 0]
        blocks = -(-keys // c.block)
        if blocks <= c.top_k:
            return None, cache
        positions = positions[:, None, :, None]
        scores = jnp.einsum(
            "btgd,bsd->bgts", queries, index, precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        scores = jnp.where(jnp.arange(keys) <= positions, scores, -jnp.inf)
        padding = [(0, 0)] * 3 + [(0, blocks * c.block - keys)]
        scores = jnp.pad(scores, padding, constant_values=-jnp.inf)
        scores = scores.reshape(*scores.shape[:3], blocks, c.block).max(axis=-1)
        distance = positions // c.block - jnp.arange(blocks)
        scores = jnp.where((distance >= 0) & (distance < c.local), jnp.inf, scores)
        chosen = lax.top_k(scores, c.top_k)[1]
        mask = jax.nn.one_hot(chosen, blocks, dtype=bool).any(axis=-2)
        return jnp.repeat(mask, c.block, axis=-1)[..., :keys], cache


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
        """Selects blocks, as `BlockIndexer`; the mask is the same for all key heads, and shows the
        block that is not complete."""
        c, positions = self.config, batch.positions

        def finish(entries: Array, first: Array) -> Array:
            return rope(self.key_norm(entries)[:, :, None], first, c.rope)[:, :, 0]

        entries, cache = self.pool(x, self.key(x), batch, cache, finish)
        if entries.shape[1] <= c.top_k:
            return None, cache
        queries = self.query(x).reshape(*positions.shape, c.heads, c.head_dim)
        queries = rope(self.query_norm(queries), positions, c.rope).astype(jnp.float32)
        weights = jnp.full((*positions.shape, c.heads), c.head_dim**-0.5)
        complete = complete_blocks(positions, c.block)
        chosen = mask_of(select(queries, entries, weights, complete - 1, c.top_k), entries.shape[1])
        chosen = jnp.repeat(chosen, c.block, axis=-1)[..., :keys]
        chosen = jnp.pad(chosen, [(0, 0)] * 3 + [(0, keys - chosen.shape[-1])])
        last = jnp.arange(keys) >= (complete * c.block)[..., None]
        return chosen & ~last[:, None] | last[:, None], cache


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
        visible, index = self.indexer(x, batch, index, keys)
        y, kv = self.attention(x, batch, kv, visible)
        return y, None if cache is None else (kv, index)


def mask_of(selected: Array, keys: int) -> Array:
    """The mask of selected keys, int32 `[batch, time, n]`: bool `[batch, 1, time, keys]`."""
    rows = jnp.zeros((*selected.shape[:2], keys), bool)
    batch, time = (jnp.arange(size) for size in selected.shape[:2])
    return rows.at[batch[:, None, None], time[:, None], selected].set(True)[:, None]
