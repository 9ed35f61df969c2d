"""Softmax attention."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.layers import Linear, Norm, param, project, readers_of
from jaxsplit.models.mixer_config import LinearConfig
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.attention.api import self_attention
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import EMBED, HEAD_DIM, Axis


class TokenwiseLinear(nnx.Module):
    """A projection in place of a mixer."""

    def __init__(self, config: LinearConfig, embed: int, *, rngs: nnx.Rngs):
        self.out = Linear(EMBED, embed, EMBED, embed, rngs=rngs)

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return self.out.readers(x)

    def __call__(self, x: Activations, batch: Batch, cache: None) -> tuple[Unreduced, None]:
        """`[batch, time, embed]` to the same."""
        return self.out.unreduced(x), cache


class Attention(nnx.Module):
    """Causal attention with grouped key and value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, config: AttentionConfig, embed: int, *, rngs: nnx.Rngs):
        c, (heads, kv_heads) = config, config.axes

        def linear(axis: Axis, count: int, width: int, bias: bool) -> Linear:
            return Linear(EMBED, embed, axis, count * width, bias=bias, rngs=rngs)

        def norm(norm: NormConfig | None, axis: Axis, count: int, width: int) -> Norm | None:
            if norm is None:
                return None
            if c.norm_over == "head":
                return Norm(norm, width, HEAD_DIM)
            return Norm(norm, count * width, axis, group=width if c.norm_over == "each" else None)

        own_kv = c.kv_source is None
        own_value = own_kv and not c.value_is_key
        self.query = linear(heads, c.heads, c.head_dim, c.qkv_bias)
        self.key = linear(kv_heads, c.kv_heads, c.head_dim, c.qkv_bias) if own_kv else None
        self.value = linear(kv_heads, c.kv_heads, c.value_dim, c.qkv_bias) if own_value else None
        gate_width = 1 if c.gate and c.gate.per_head else c.value_dim
        self.gate = linear(heads, c.heads, gate_width, False) if c.gate else None
        self.query_norm = norm(c.query_norm, heads, c.heads, c.head_dim)
        self.key_norm = norm(c.key_norm, kv_heads, c.kv_heads, c.head_dim) if own_kv else None
        self.value_norm = norm(c.value_norm, kv_heads, c.kv_heads, c.value_dim) if own_kv else None
        self.sinks = nnx.Param(jnp.zeros(c.heads, jnp.float32), axes=(heads,)) if c.sinks else None
        self.query_scale = param(None, (heads,), (c.heads,)) if c.query_scale else None
        inner = c.heads * c.value_dim
        self.out_norm = Norm(c.out_norm, inner, heads) if c.out_norm else None
        self.out = Linear(heads, inner, EMBED, embed, bias=c.out_bias, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.query, self.key, self.value, self.gate)

    def __call__(
        self,
        x: Activations,
        batch: Batch,
        cache: AttentionCache | None,
        selected: Array | None = None,
    ) -> tuple[Unreduced, AttentionCache | None]:
        """What the tokens read from one another.

        Args:
          x: `[batch, time, embed]`.
          batch: where the tokens belong.
          cache: keys and values of earlier tokens; None: there are none.
          selected: the keys that they see, as in `KV`; None: all.

        Returns:
          `[batch, time, embed]`, and the cache with these tokens.
        """
        decoding = x.shape[1] == 1  # the op then sums split-K parts itself
        linears = self.query, self.key, self.value, self.gate
        query, key, value, gate = project(x, *linears, split_k=decoding)
        y, cache = self_attention(
            query,
            key,
            key if value is None else value,
            batch,
            cache,
            config=self.config,
            params=self.params,
            dtype=x.dtype,
            readers=XLA_ONLY if self.gate or self.out_norm else self.out.readers(x),
            selected=selected,
        )
        if gate is not None and self.config.gate is not None:
            y = Activations(self.config.gate(y.array, gate.local_output, self.config.value_dim))
        if self.out_norm is not None:
            y = Activations(self.out_norm(y.array))
        return self.out.unreduced(y), cache

    @property
    def params(self) -> AttentionParams:
        """What the op needs beside projections."""
        norms = self.query_norm, self.key_norm, self.value_norm
        sinks = None if self.sinks is None else self.sinks.get_value()
        scale = None if self.query_scale is None else self.query_scale.get_value()
        params = (n and n.params for n in norms)
        return AttentionParams(*params, sinks=sinks, query_scale=scale)
