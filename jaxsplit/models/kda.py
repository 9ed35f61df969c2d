"""Kimi delta attention and lightning attention: linear attention by heads."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.comm.api import local_units
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.dplr import dplr_attention
from jaxsplit.models.layers import Linear, Norm, readers_of
from jaxsplit.models.linear_attention import ConvLinear, linear_attention
from jaxsplit.models.mixer_config import KDAConfig, LightningConfig
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.sharding.axes import EMBED, HEAD_DIM, LATENT, Axis


class LowRankLinear(nnx.Module):
    """A projection of the residual stream through few dimensions."""

    def __init__(self, embed: int, rank: int, axis: Axis, size: int, *, rngs: nnx.Rngs):
        self.down = Linear(EMBED, embed, LATENT, rank, rngs=rngs)
        self.up = Linear(LATENT, rank, axis, size, rngs=rngs)

    def __call__(self, x: Activations) -> Array:
        """`[..., embed]` to `[..., size]`."""
        return self.up(self.down(x))


class KimiDeltaAttention(nnx.Module):
    """Kimi delta attention (Kimi Team 2025, arXiv:2510.26692): the gated delta rule with a decay
    for each key dimension."""

    def __init__(self, config: KDAConfig, embed: int, *, rngs: nnx.Rngs):
        c, heads = config, config.axis
        inner = c.heads * c.head_dim

        def convolved() -> ConvLinear:
            return ConvLinear(embed, heads, inner, c.kernel_size, bias=False, rngs=rngs)

        def projection(rank: int) -> Linear | LowRankLinear:
            if rank:
                return LowRankLinear(embed, rank, heads, inner, rngs=rngs)
            return Linear(EMBED, embed, heads, inner, rngs=rngs)

        self.query, self.key, self.value = convolved(), convolved(), convolved()
        self.decay, self.gate = projection(c.decay_rank), projection(c.gate_rank)
        self.beta = Linear(EMBED, embed, heads, c.heads, rngs=rngs)
        self.dt_bias = nnx.Param(jnp.zeros(inner, jnp.float32), axes=(heads,))
        self.A = nnx.Param(jnp.full(c.heads, -1, jnp.float32), axes=(heads,))
        self.norm = Norm(c.norm, c.head_dim, HEAD_DIM)
        self.out = Linear(heads, inner, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.query, self.key, self.value, self.beta) | XLA_ONLY

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated cache."""
        c, shape = self.config, x.shape[:2]
        past = None if cache is None else cache.read(batch)
        past_inputs = (None,) * 3 if past is None else past.inputs
        convolved = zip((self.query, self.key, self.value), past_inputs, strict=True)
        projected, inputs = zip(*(p(x, before, batch) for p, before in convolved), strict=True)
        queries, keys, values = (y.reshape(*shape, -1, c.head_dim) for y in projected)

        def normalized(x: Array) -> Array:
            return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + c.epsilon)

        # Padding leaves the state unchanged: it does not decay, and a zero key writes nothing.
        exists = (batch.positions >= 0)[..., None, None]
        queries = normalized(queries) * c.head_dim**-0.5
        keys = jnp.where(exists, normalized(keys), 0)
        log_decay = jnp.where(exists, self._log_decay(x).reshape(keys.shape), 0)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))[..., None]
        writes = beta * keys
        y, state = dplr_attention(
            queries,
            writes,
            values,
            log_decay=log_decay,
            state=None if past is None else past.state,
            removal=(writes, -keys * jnp.exp(log_decay)),
        )
        gate = jax.nn.sigmoid(self.gate(x).astype(jnp.float32)).reshape(y.shape)
        y = (self.norm(y) * gate).reshape(*shape, -1).astype(x.dtype)
        if cache is not None:
            cache = cache.write(RecurrentCache(inputs, state), batch)
        return self.out.unreduced(y), cache

    def _log_decay(self, x: Activations) -> Array:
        """Float32 `[batch, time, heads * head_dim]`."""
        c = self.config
        z = self.decay(x).astype(jnp.float32) + self.dt_bias.get_value()
        A = jnp.repeat(self.A.get_value(), c.head_dim)
        if c.lower_bound is None:
            return A * jax.nn.softplus(z)
        return c.lower_bound * jax.nn.sigmoid(jnp.abs(A) * z)


class LightningAttention(nnx.Module):
    """Lightning attention (Qin et al. 2024, arXiv:2401.04658): linear attention with a constant
    decay for each head, its output normalized and gated (MiniMax 2025, arXiv:2501.08313)."""

    def __init__(self, config: LightningConfig, embed: int, *, rngs: nnx.Rngs):
        c, heads = config, config.axis
        inner = c.heads * c.head_dim

        def projection() -> Linear:
            return Linear(EMBED, embed, heads, inner, rngs=rngs)

        self.query, self.key, self.value, self.gate = (projection() for _ in range(4))
        self.out_norm = Norm(c.norm, inner, heads)
        self.out = Linear(heads, inner, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.query, self.key, self.value, self.gate)

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated cache."""
        c, shape = self.config, x.shape[:2]
        past = None if cache is None else cache.read(batch).state
        queries, keys, values = (
            jax.nn.silu(projection(x).astype(jnp.float32)).reshape(*shape, -1, c.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        exists = (batch.positions >= 0)[..., None]
        slopes = 2.0 ** (-8 / c.heads * np.arange(1, c.heads + 1)) * c.rate
        log_decay = jnp.asarray(-slopes, jnp.float32)[local_units(c.axis)]
        y, state = linear_attention(
            queries,
            jnp.where(exists[..., None], keys, 0),
            values[:, :, :, None],
            None,
            log_decay=jnp.where(exists, log_decay, 0)[..., None],
            state=None if past is None else past[:, :, None],
        )
        gate = jax.nn.sigmoid(self.gate(x).astype(jnp.float32))
        y = self.out_norm(y.reshape(*shape, -1)) * gate
        if cache is not None:
            cache = cache.write(RecurrentCache((), state[:, :, 0]), batch)
        return self.out.unreduced(y.astype(x.dtype)), cache
