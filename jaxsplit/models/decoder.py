"""The decoder: blocks of attention and MLP over a residual stream, made from a `ModelConfig`.

Sizes in the forward pass are read off the parameters, not the config: on a mesh each device runs
the same code over the heads, hidden units and vocabulary rows that it holds.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxsplit.models.cache import Cache, LayerCache
from jaxsplit.models.config import ModelConfig
from jaxsplit.models.layers import Embedding, Linear, RMSNorm, param, rope
from jaxsplit.quant import matmul


class Attention(nnx.Module):
    """Causal attention with grouped key and value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.query = Linear("embed", c.embed, "heads", q, bias=c.qkv_bias, rngs=rngs)
        self.key = Linear("embed", c.embed, "kv_heads", kv, bias=c.qkv_bias, rngs=rngs)
        self.value = Linear("embed", c.embed, "kv_heads", kv, bias=c.qkv_bias, rngs=rngs)
        self.out = Linear("heads", q, "embed", c.embed, bias=c.out_bias, rngs=rngs)
        self.config = config

    def __call__(
        self,
        x: Array,
        positions: Array,
        slots: Array | None,
        cache: LayerCache | None,
        rope_factors: Array | None,
    ) -> tuple[Array, LayerCache | None]:
        """`[batch, time, embed]` to the same, and the cache with this call's keys and values."""
        batch, time, _ = x.shape
        c = self.config
        keys = self.key(x).reshape(batch, time, -1, c.head_dim)
        values = self.value(x).reshape(batch, time, -1, c.head_dim)
        kv_heads = keys.shape[2]
        queries = self.query(x).reshape(batch, time, kv_heads, -1, c.head_dim)
        queries = rope(queries, positions, c.rope, rope_factors)
        keys = rope(keys, positions, c.rope, rope_factors)
        if cache is None:
            memory = LayerCache(keys.swapaxes(1, 2), values.swapaxes(1, 2))
            key_positions = positions
        else:
            cache = cache.update(
                keys, values, jnp.arange(batch) if slots is None else slots, positions
            )
            memory = cache.read(slots)
            key_positions = jnp.arange(memory.keys.shape[2])[None]
        y = attend(queries, memory, positions, key_positions)
        return self.out(y.reshape(batch, time, -1)), cache


def attend(queries: Array, memory: LayerCache, positions: Array, key_positions: Array) -> Array:
    """Softmax attention over the keys at and before each query's position.

    Args:
      queries: `[batch, time, kv_heads, group, head_dim]`.
      memory: keys and values, `[batch, kv_heads, keys, head_dim]`. Scales of 8-bit ones multiply
        the scores and the weights, so that keys and values are used as they are stored.
      positions: int32 `[batch, time]`.
      key_positions: int32 `[batch or 1, keys]`.

    Returns:
      the shape and dtype of `queries`; scores and softmax are float32.
    """
    dtype = queries.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    scale = queries.shape[-1] ** -0.5
    scores = jnp.einsum(
        "btkgd,bksd->bkgts",
        queries,
        memory.keys.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if memory.key_scale is not None:
        scores = scores * memory.key_scale[:, :, None, None]
    seen = key_positions[:, None, :] <= positions[:, :, None]
    scores = jnp.where(seen[:, None, None], scores * scale, -1e30)
    weights = jax.nn.softmax(scores, axis=-1)
    if memory.value_scale is not None:
        weights = weights * memory.value_scale[:, :, None, None]
    return jnp.einsum(
        "bkgts,bksd->btkgd",
        weights.astype(dtype),
        memory.values.astype(dtype),
        precision=precision,
        preferred_element_type=jnp.float32,
    ).astype(dtype)


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        c = config
        self.gate = Linear("embed", c.embed, "mlp", c.mlp, bias=c.mlp_bias, rngs=rngs)
        self.up = Linear("embed", c.embed, "mlp", c.mlp, bias=c.mlp_bias, rngs=rngs)
        self.down = Linear("mlp", c.mlp, "embed", c.embed, bias=c.mlp_bias, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[..., embed]` to the same."""
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and added to the stream."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed, config.norm_epsilon)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed, config.norm_epsilon)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x: Array,
        positions: Array,
        slots: Array | None,
        cache: LayerCache | None,
        rope_factors: Array | None,
    ) -> tuple[Array, LayerCache | None]:
        """`[batch, time, embed]` to the same, and the layer's cache."""
        y, cache = self.attention(self.attention_norm(x), positions, slots, cache, rope_factors)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A language model: tokens in, logits out.

    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> logits, _ = model(tokens)

    A decoder may be a part of a model: a run of its layers, the embedding with the first of them,
    norm and head with the last. A part without the embedding takes the output of the part before.

    Args:
      config: what to build.
      layers: which layers; None: all.
      dtype: of the activations.
      rngs: for the parameters' initial values.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers = range(config.layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.layers
        vocab = (config.vocab, config.embed)
        self.embedding = (
            Embedding(*vocab, rngs=rngs) if self.first or (self.last and config.tied) else None
        )
        self.rope_factors = (
            param(None, (None,), (config.rope.dim // 2,)) if config.rope_factors else None
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in layers])
        self.norm = RMSNorm(config.embed, config.norm_epsilon) if self.last else None
        self.head = (
            Linear("embed", config.embed, "vocab", config.vocab, rngs=rngs)
            if self.last and not config.tied
            else None
        )
        self.config = config
        self.layers = layers
        self.dtype = dtype

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: Cache | None = None,
        slots: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Logits of every position.

        Args:
          tokens: int32 `[batch, time]`.
          positions: int32 `[batch, time]`, negative for padding; None counts from 0.
          cache: keys and values of earlier tokens, from `init_cache`; None: there are none.
          slots: int32 `[batch]`: where in the cache the sequences are; None: in order.

        Returns:
          float32 logits `[batch, time, vocab]` and the cache with these tokens added.
        """
        x, cache = self.hidden(tokens, positions, cache, slots)
        return self.logits(x), cache

    def hidden(
        self,
        inputs: Array,
        positions: Array | None = None,
        cache: Cache | None = None,
        slots: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """The last layer's output.

        Args:
          inputs: tokens, or the output `[batch, time, embed]` of the part before.
          positions, cache, slots: as in `__call__`.

        Returns:
          `[batch, time, embed]` and the cache.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        factors = None if self.rope_factors is None else self.rope_factors.get_value()
        x = self.embedding(inputs, self.dtype) if self.first else inputs
        caches = []
        for i, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[i]
            x, layer_cache = block(x, positions, slots, layer_cache, factors)
            caches.append(layer_cache)
        return x, None if cache is None else caches

    def logits(self, x: Array) -> Array:
        """`[..., embed]` to float32 logits `[..., vocab]`; on a mesh, of this device's rows."""
        x = self.norm(x)
        if self.head is None:
            return self.embedding.attend(x)
        return matmul(x, self.head.kernel.get_value())
