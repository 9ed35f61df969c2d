"""Multi-head latent attention: one small latent vector per token instead of keys and values."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.indexer import Indexer
from jaxsplit.models.layers import Linear, Norm, param, readers_of
from jaxsplit.models.mixer_config import SELECTION, LatentAttentionConfig
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.attention.api import (
    KV,
    apply_temperature,
    attend,
    gathers,
    over_filled,
    update_cache,
)
from jaxsplit.ops.attention.rope import rope
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.matmul.api import batched, matmul
from jaxsplit.quant import Weight, dequantize
from jaxsplit.sharding.axes import EMBED, LATENT, Axis


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

    The cache holds the latent vectors, replicated on every device; heads are split. A few queries
    attend to the latent vectors directly: the up-projections of keys and values are absorbed into
    the queries and the output. For many queries it is cheaper to project the latent vectors up to
    keys and values first. Queries of sparse attention attend to the latent vectors that were
    selected, gathered for each of them, or to all with a mask, whichever is cheaper.
    """

    def __init__(self, config: LatentAttentionConfig, embed: int, *, rngs: nnx.Rngs):
        c, heads = config, config.axis
        width = c.heads * (c.head_dim + c.shared_dim)

        def stack(*shape: int) -> nnx.Param:
            return param(rngs, (heads, Axis("up"), LATENT), (c.heads, *shape))

        low = c.q_lora_rank
        self.query_down = Linear(EMBED, embed, LATENT, low, rngs=rngs) if low else None
        self.query_norm = Norm(c.norm, low, LATENT) if low else None
        source = (LATENT, low) if low else (EMBED, embed)
        self.query = Linear(*source, heads, width, rngs=rngs)
        self.latent = Linear(EMBED, embed, LATENT, c.kv_lora_rank + c.shared_dim, rngs=rngs)
        self.latent_norm = Norm(c.norm, c.kv_lora_rank, LATENT)
        shared = c.shared_key_norm
        self.shared_key_norm = Norm(shared, c.shared_dim, LATENT) if shared else None
        self.key_up = stack(
            *((c.head_dim, c.kv_lora_rank) if c.k_up_transposed else (c.kv_lora_rank, c.head_dim))
        )
        self.value_up = stack(c.value_dim, c.kv_lora_rank)
        self.sinks = nnx.Param(jnp.zeros(c.heads, jnp.float32), axes=(heads,)) if c.sinks else None
        gate_width = 1 if c.gate and c.gate.per_head else c.value_dim
        self.gate = Linear(EMBED, embed, heads, c.heads * gate_width, rngs=rngs) if c.gate else None
        self.indexer = Indexer(c.indexer, embed, low, rngs=rngs) if c.indexer else None
        self.out = Linear(heads, c.heads * c.value_dim, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        readers = readers_of(x, self.query_down or self.query, self.latent, self.gate)
        return readers if self.indexer is None else readers | XLA_ONLY

    def __call__(
        self,
        x: Activations,
        batch: Batch,
        cache: Any,
    ) -> tuple[Unreduced, Any]:
        """Attends, as `Attention`; the cache holds latent vectors and the indexer's keys."""
        c, positions = self.config, batch.positions
        latents, index = (None, None) if cache is None else cache
        low = x
        if self.query_down is not None and self.query_norm is not None:
            low = self.query_norm(self.query_down(x))
        if self.indexer is not None:
            assert not isinstance(low, Activations)
            batch.lent[SELECTION], index = self.indexer(x, low, batch, index)
        queries = self.query(low).reshape(*positions.shape, -1, c.head_dim + c.shared_dim)
        queries = apply_temperature(queries, positions, c.attn_temperature)
        queries, rope_queries = jnp.split(queries, [c.head_dim], axis=-1)
        latent, rope_key = jnp.split(self.latent(x), [c.kv_lora_rank], axis=-1)
        if self.shared_key_norm is not None:
            rope_key = self.shared_key_norm(rope_key)
        rope_key = rope_key[:, :, None]
        if c.rope is not None:
            freq_factors = c.rope.divisors(batch.freq_factors)
            rope_queries = rope(rope_queries, positions, c.rope, freq_factors)
            rope_key = rope(rope_key, positions, c.rope, freq_factors)
        latent = jnp.concatenate([self.latent_norm(latent)[:, :, None], rope_key], axis=-1)
        # Multiplications per key: absorbed attention takes more for each query, but needs no
        # up-projection of the key.
        absorbed = 2 * c.kv_lora_rank + c.shared_dim
        expanded = c.head_dim + c.value_dim + c.shared_dim
        expanded += c.kv_lora_rank * (c.head_dim + c.value_dim) / positions.shape[1]
        cost = max(1.0, absorbed / expanded)
        kv, latents = self._keys(latent, batch, latents, queries.shape[2], cost)
        cache = None if cache is None else (latents, index)
        if kv.gathers or absorbed <= expanded:
            y = self._absorbed(queries, rope_queries, kv, batch)
        else:

            def run(kv: KV) -> Array:
                return self._expanded(queries, rope_queries, kv, batch)

            y = over_filled(run, kv, batch.positions)
        y = y.reshape(*positions.shape, -1)
        if self.gate is not None and c.gate is not None:
            y = c.gate(y, self.gate(x), c.value_dim)
        return self.out.unreduced(y), cache

    def _keys(
        self,
        latent: Array,
        batch: Batch,
        cache: AttentionCache | None,
        heads: int,
        cost: float,
    ) -> tuple[KV, AttentionCache | None]:
        """Writes the vectors of new tokens to the cache, and returns those that they attend to.

        Args:
          heads: how many attend to them, on this device.
          cost: of absorbed attention, relative to the cheaper form.
        """
        c = self.config
        selected = batch.lent.get(SELECTION) if c.sparse else None
        if selected is None:
            return update_cache(latent, None, batch, cache, c.window)
        if cache is None:
            kv = KV(AttentionCache.of(latent, None, latent.dtype))
        else:
            cache = cache.write(AttentionCache.of(latent, None, cache.keys.dtype), batch)
            kv = KV(cache, pages=batch.pages_of(ring=False))
        few = gathers(kv.length, selected.shape[-1], latent.shape[1], heads, cost)
        return dataclasses.replace(kv, selected=selected, gathers=few), cache

    def _attend(self, queries: Array, kv: KV, batch: Batch, kv_heads: int, value_dim: int) -> Array:
        """Attends with queries `[batch, time, kv_heads, group, width]`: `[batch, time, heads,
        value_dim]`."""
        c = self.config
        options: dict[str, Any] = {"scale": c.scale, "window": c.window}
        config = AttentionConfig(c.heads, kv_heads, queries.shape[-1], value_dim, **options)
        sinks = None if self.sinks is None else self.sinks.get_value()
        y = attend(queries, kv, batch, config=config, sinks=sinks).array
        return y.reshape(*queries.shape[:2], -1, value_dim)

    def _absorbed(self, queries: Array, rope_queries: Array, kv: KV, batch: Batch) -> Array:
        """Attends to the latent vectors, as a single KV head.

        Args:
          queries: `[batch, time, heads, head_dim]`.
          rope_queries: their rotated dimensions, `[batch, time, heads, rope.dim]`.
          kv: latent vectors, followed by the rotated dimensions of the keys.
          batch: of the tokens.

        Returns:
          `[batch, time, heads, value_dim]`.
        """
        c = self.config
        up = self.key_up.get_value()
        up = _transposed(up, queries.dtype) if c.k_up_transposed else up
        queries = jnp.concatenate([matmul_by_head(queries, up), rope_queries], axis=-1)
        y = self._attend(queries[:, :, None], kv, batch, 1, c.kv_lora_rank)
        return matmul_by_head(y, self.value_up.get_value())

    def _expanded(self, queries: Array, rope_queries: Array, kv: KV, batch: Batch) -> Array:
        """As `_absorbed`, with the keys and values of each head."""
        c, dtype = self.config, queries.dtype
        memory = kv.read(batch.positions)
        latent = memory.dequantized_keys(dtype)[:, 0]
        latent, rope_key = jnp.split(latent, [c.kv_lora_rank], axis=-1)
        up = self.key_up.get_value()
        keys = _matmul_to_heads(latent, up if c.k_up_transposed else _transposed(up, dtype))
        values = _matmul_to_heads(latent, self.value_up.get_value())
        rope_key = jnp.broadcast_to(rope_key[:, :, None], (*keys.shape[:3], c.shared_dim))
        keys = jnp.concatenate([keys, rope_key], axis=-1)
        queries = jnp.concatenate([queries, rope_queries], axis=-1)[:, :, :, None]
        kv = KV(AttentionCache.of(keys, values, dtype), kv.positions, selected=kv.selected)
        return self._attend(queries, kv, batch, c.heads, c.value_dim)


def matmul_by_head(x: Array, w: Weight) -> Array:
    """Multiplies `[batch, time, heads, in]` with each head's matrix, `[heads, out, in]`: `[batch,
    time, heads, out]`."""
    rows = jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])
    y = batched(matmul)(rows, w)
    return jnp.moveaxis(y.reshape(x.shape[2], *x.shape[:2], -1), 0, 2).astype(x.dtype)


def _matmul_to_heads(x: Array, w: Weight) -> Array:
    """Multiplies `[batch, time, in]` with each head's matrix, `[heads, out, in]`: `[batch, time,
    heads, out]`."""
    return batched(matmul, in_axes=(None, 0), out_axes=2)(x, w).astype(x.dtype)


def _transposed(w: Weight, dtype: jnp.dtype) -> Array:
    """Each head's matrix `[out, in]` as `[in, out]`, dequantized."""
    return jnp.swapaxes(dequantize(w, dtype), -1, -2)
