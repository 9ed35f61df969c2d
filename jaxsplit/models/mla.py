"""Attention whose keys and values come from one small latent vector for each token."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.contiguous import AttentionCache, Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.layers import Linear, Norm, param, readers_of
from jaxsplit.models.mixer_config import LatentAttentionConfig
from jaxsplit.ops.activations.layout import Activations, Readers
from jaxsplit.ops.attention.api import KV, apply_temperature, attend, update_cache
from jaxsplit.ops.attention.rope import rope
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.matmul.api import matmul
from jaxsplit.quant import Weight, dequantize
from jaxsplit.sharding.axes import EMBED, LATENT, Axis


class LatentAttention(nnx.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).

    The cache holds the latent vectors. Few queries read them as they are, keys' and values'
    projections being moved to the queries and to what they have read ("absorbed"); many queries
    share the cost of making keys and values of them. The latent vectors are on every device, the
    heads are split.
    """

    def __init__(self, config: LatentAttentionConfig, embed: int, *, rngs: nnx.Rngs):
        c, heads = config, config.axis
        width = c.heads * (c.head_dim + c.rope.dim)

        def stack(*shape: int) -> nnx.Param:
            return param(rngs, (heads, Axis("up"), LATENT), (c.heads, *shape))

        low = c.q_lora_rank
        self.query_down = Linear(EMBED, embed, LATENT, low, rngs=rngs) if low else None
        self.query_norm = Norm(c.norm, low, LATENT) if low else None
        source = (LATENT, low) if low else (EMBED, embed)
        self.query = Linear(*source, heads, width, rngs=rngs)
        self.latent = Linear(EMBED, embed, LATENT, c.kv_lora_rank + c.rope.dim, rngs=rngs)
        self.latent_norm = Norm(c.norm, c.kv_lora_rank, LATENT)
        self.key_up = stack(
            *((c.head_dim, c.kv_lora_rank) if c.k_up_transposed else (c.kv_lora_rank, c.head_dim))
        )
        self.value_up = stack(c.value_dim, c.kv_lora_rank)
        self.out = Linear(heads, c.heads * c.value_dim, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.query_down or self.query, self.latent)

    def __call__(
        self, x: Activations, batch: Batch, cache: AttentionCache | None
    ) -> tuple[Unreduced, AttentionCache | None]:
        """What the tokens read from one another; as `Attention`."""
        c, positions = self.config, batch.positions
        factors = batch.freq_factors.get(c.rope.freq_factors)
        low = x if self.query_down is None else self.query_norm(self.query_down(x))
        queries = self.query(low).reshape(*positions.shape, -1, c.head_dim + c.rope.dim)
        queries = apply_temperature(queries, positions, c.attn_temperature)
        queries, turning = jnp.split(queries, [c.head_dim], axis=-1)
        turning = rope(turning, positions, c.rope, factors)
        latent, key = jnp.split(self.latent(x), [c.kv_lora_rank], axis=-1)
        key = rope(key[:, :, None], positions, c.rope, factors)
        kept = jnp.concatenate([self.latent_norm(latent)[:, :, None], key], axis=-1)
        memory, key_positions, cache = update_cache(kept, None, batch, cache, None)
        kv = KV(memory, key_positions)
        many = positions.shape[1] * (2 * c.kv_lora_rank - c.head_dim - c.value_dim)
        if many <= c.kv_lora_rank * (c.head_dim + c.value_dim):
            y = self._absorbed(queries, turning, kv, batch)
        else:
            y = self._expanded(queries, turning, kv, batch)
        return self.out.unreduced(y.reshape(*positions.shape, -1)), cache

    def _absorbed(self, queries: Array, turning: Array, kv: KV, batch: Batch) -> Array:
        """Queries `[batch, time, heads, width]` and their turning part to values likewise."""
        c = self.config
        up = self.key_up.get_value()
        to_latent = _times(queries, _turned(up, queries.dtype) if c.k_up_transposed else up)
        queries = jnp.concatenate([to_latent, turning], axis=-1)[:, :, None]
        config = AttentionConfig(c.heads, 1, queries.shape[-1], c.kv_lora_rank, scale=c.scale)
        y = attend(queries, kv, batch, config=config).array
        return _times(y.reshape(*queries.shape[:2], -1, c.kv_lora_rank), self.value_up.get_value())

    def _expanded(self, queries: Array, turning: Array, kv: KV, batch: Batch) -> Array:
        """As `_absorbed`, with keys and values of each head."""
        c, dtype = self.config, queries.dtype
        kept = kv.memory.dequantized(dtype)[:, 0]
        latent, key = jnp.split(kept, [c.kv_lora_rank], axis=-1)
        up = self.key_up.get_value()
        keys = _for_each_head(latent, up if c.k_up_transposed else _turned(up, dtype))
        values = _for_each_head(latent, self.value_up.get_value())
        turned = jnp.broadcast_to(key[:, :, None], (*keys.shape[:3], c.rope.dim))
        keys = jnp.concatenate([keys, turned], axis=-1)
        queries = jnp.concatenate([queries, turning], axis=-1)[:, :, :, None]
        config = AttentionConfig(c.heads, c.heads, queries.shape[-1], c.value_dim, scale=c.scale)
        kv = KV(AttentionCache.of(keys, values, dtype), kv.positions)
        y = attend(queries, kv, batch, config=config).array
        return y.reshape(*queries.shape[:3], -1)


def _times(x: Array, w: Weight) -> Array:
    """`[batch, time, heads, in]` with a matrix `[out, in]` for each head."""
    rows = jnp.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3])
    y = jax.vmap(matmul)(rows, w)
    return jnp.moveaxis(y.reshape(x.shape[2], *x.shape[:2], -1), 0, 2).astype(x.dtype)


def _for_each_head(x: Array, w: Weight) -> Array:
    """`[batch, time, in]` with each head's matrix `[out, in]`: `[batch, time, heads, out]`."""
    return jax.vmap(matmul, in_axes=(None, 0), out_axes=2)(x, w).astype(x.dtype)


def _turned(w: Weight, dtype: jnp.dtype) -> Array:
    """Each head's matrix `[out, in]` as `[in, out]`."""
    return jnp.swapaxes(dequantize(w, dtype), -1, -2)
