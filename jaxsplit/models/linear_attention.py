"""Mixers that keep a state of one size however long a sequence is.

Convolutions and states are computed in float32. Tokens at negative positions change no state, and
a sequence whose first token is at position 0 starts from nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsplit.cache.contiguous import Batch, RecurrentCache
from jaxsplit.comm.api import all_reduce_units, is_split, local_units
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.layers import Linear, Norm, param, readers_of
from jaxsplit.models.mixer_config import (
    DeltaNetConfig,
    LinearAttentionConfig,
    Mamba2Config,
    ShortConvConfig,
)
from jaxsplit.ops.activations.layout import Activations, Readers
from jaxsplit.sharding.axes import EMBED, HEAD_DIM, Axis

_CHUNK = 64
_HIGHEST = lax.Precision.HIGHEST


class CausalConv(nnx.Module):
    """A convolution of each channel over the last tokens."""

    def __init__(
        self, axis: Axis, channels: int, kernel_size: int, *, bias: bool = False, rngs: nnx.Rngs
    ):
        self.kernel = param(rngs, (axis, Axis("conv")), (channels, kernel_size))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32), axes=(axis,)) if bias else None

    def __call__(self, x: Array, past: Array | None, batch: Batch) -> tuple[Array, Array]:
        """The convolved channels.

        Args:
          x: `[batch, time, channels]`.
          past: earlier inputs, float32 `[batch, kernel_size - 1, channels]`; None: there are none.
          batch: where the tokens belong.

        Returns:
          float32 `[batch, time, channels]`, and the last inputs with these tokens.
        """
        kernel = self.kernel.get_value().astype(jnp.float32)
        kernel_size, time = kernel.shape[-1], x.shape[1]
        if past is None:
            past = jnp.zeros((x.shape[0], kernel_size - 1, x.shape[2]), jnp.float32)
        inputs = jnp.concatenate([past, x.astype(jnp.float32)], axis=1)
        y = sum(inputs[:, i : i + time] * kernel[:, i] for i in range(kernel_size))
        if self.bias is not None:
            y = y + self.bias.get_value()
        count = (batch.positions >= 0).sum(axis=1)
        last = count[:, None] + jnp.arange(kernel_size - 1)
        return y, jnp.take_along_axis(inputs, last[..., None], axis=1)


class ConvLinear(Linear):
    """A projection of the residual stream, convolved and activated by a SiLU."""

    def __init__(
        self, embed: int, axis: Axis, size: int, kernel_size: int, *, bias: bool, rngs: nnx.Rngs
    ):
        super().__init__(EMBED, embed, axis, size, rngs=rngs)
        self.conv = CausalConv(axis, size, kernel_size, bias=bias, rngs=rngs)

    def __call__(self, x: Activations, past: Array | None, batch: Batch) -> tuple[Array, Array]:
        """`[batch, time, embed]` to float32 `[batch, time, size]`, and the convolution's inputs."""
        y, past = self.conv(super().__call__(x), past, batch)
        return jax.nn.silu(y), past


def linear_attention(
    queries: Array,
    keys: Array,
    values: Array,
    beta: Array | None,
    log_decay: Array,
    state: Array | None,
) -> tuple[Array, Array]:
    """Reads from a matrix of associations that forgets, chunk by chunk.

    Of each token, with state S, query q, key k, value v, decay a and write strength beta b:

        S = a S + k v^T                    without beta: Mamba-2's state space
        S = a S + b k (v - a S^T k)^T      with one: the gated delta rule
        y = S^T q

    Inside a chunk all tokens are computed together: Dao and Gu 2024, arXiv:2405.21060, section 6;
    Yang et al. 2024, arXiv:2412.06464, section 3.3.

    Args:
      queries, keys: float32 `[batch, time, key_heads, key_dim]`.
      values: float32 `[batch, time, key_heads, group, value_dim]`.
      beta: float32 `[batch, time, key_heads, group]`, or None.
      log_decay: float32 `[batch, time, key_heads, group]`, at most 0.
      state: float32 `[batch, key_heads, group, key_dim, value_dim]`; None: zeros.

    Returns:
      float32 `[batch, time, key_heads, group, value_dim]`, and the state after the last token.
    """
    batch, time = values.shape[:2]
    size = min(time, _CHUNK)

    def chunked(x: Array, at: int) -> Array:
        """`[batch, time, ...]` to `[chunks, batch, ...]` with the chunk's tokens at a dimension."""
        x = jnp.pad(x, [(0, 0), (0, -time % size), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), (1, 2), (0, at))

    def product(subscripts: str, *arrays: Array) -> Array:
        return jnp.einsum(subscripts, *arrays, precision=_HIGHEST)

    if state is None:
        state = jnp.zeros((batch, *values.shape[2:4], keys.shape[-1], values.shape[-1]))
    queries, keys = chunked(queries, 3), chunked(keys, 3)
    values, log_decay = chunked(values, 4), chunked(log_decay, 4)
    total = jnp.cumsum(log_decay, axis=-1)
    until = np.tri(size, dtype=bool)
    # What is left at token i of what token j wrote.
    left = jnp.exp(jnp.where(until, total[..., :, None] - total[..., None, :], -jnp.inf))
    reads = product("nbhid,nbhjd->nbhij", queries, keys)[:, :, :, None] * left
    corrections = None
    if beta is not None:
        beta = chunked(beta, 4)[..., None]
        corrections = beta * jnp.eye(size)
        if size > 1:
            alike = product("nbhid,nbhjd->nbhij", keys, keys)[:, :, :, None] * left
            corrections = lax.linalg.triangular_solve(
                beta * alike, corrections, left_side=True, lower=True, unit_diagonal=True
            )
    left_of_state = jnp.exp(total)[..., None]
    left_at_end = jnp.exp(total[..., -1:] - total)[..., None]

    def step(state: Array, chunk: tuple) -> tuple[Array, Array]:
        q, k, v, reads, corrections, of_state, at_end = chunk
        if corrections is not None:
            known = of_state * product("bhid,bhgde->bhgie", k, state)
            v = product("bhgij,bhgje->bhgie", corrections, v - known)
        y = of_state * product("bhid,bhgde->bhgie", q, state)
        y = y + product("bhgij,bhgje->bhgie", reads, v)
        state = of_state[..., -1:, :] * state + product("bhid,bhgie->bhgde", k, at_end * v)
        return state, y

    chunks = (queries, keys, values, reads, corrections, left_of_state, left_at_end)
    state, y = lax.scan(step, state, chunks)
    y = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(batch, -1, *values.shape[2:4], values.shape[-1])
    return y[:, :time], state


class LinearAttention(nnx.Module):
    """What the delta net and Mamba-2 have in common."""

    def __init__(self, config: LinearAttentionConfig, embed: int, *, rngs: nnx.Rngs):
        c, (heads, key_heads) = config, config.axes
        inner, keys = c.value_heads * c.value_dim, c.key_heads * c.key_dim

        def project(axis: Axis, size: int) -> ConvLinear:
            return ConvLinear(embed, axis, size, c.kernel_size, bias=c.conv_bias, rngs=rngs)

        self.query, self.key = project(key_heads, keys), project(key_heads, keys)
        self.value = project(heads, inner)
        self.gate = Linear(EMBED, embed, heads, inner, rngs=rngs)
        self.dt = Linear(EMBED, embed, heads, c.value_heads, rngs=rngs)
        self.dt_bias = nnx.Param(jnp.zeros(c.value_heads, jnp.float32), axes=(heads,))
        self.A = nnx.Param(jnp.full(c.value_heads, -1, jnp.float32), axes=(heads,))
        self.out = Linear(heads, inner, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.query, self.key, self.value, self.gate, self.dt)

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """What the tokens read from the states.

        Args:
          x: `[batch, time, embed]`.
          batch: where the tokens belong.
          cache: what earlier tokens left; None: there are none.

        Returns:
          `[batch, time, embed]`, and the cache with these tokens added.
        """
        c, shape = self.config, x.shape[:2]
        past = RecurrentCache((None,) * 3) if cache is None else cache.read(batch)
        projections = zip((self.query, self.key, self.value), past.inputs, strict=True)
        mixed, inputs = zip(*(p(x, before, batch) for p, before in projections), strict=True)
        queries, keys = (y.reshape(*shape, -1, c.key_dim) for y in mixed[:2])
        heads = (keys.shape[2], -1)  # a group for each key head
        values = mixed[2].reshape(*shape, *heads, c.value_dim)
        gate = jax.nn.silu(self.gate(x).astype(jnp.float32)).reshape(values.shape)
        dt = jax.nn.softplus(self.dt(x).astype(jnp.float32) + self.dt_bias.get_value())
        # Padding forgets nothing and, its key being zero, writes nothing.
        real = batch.positions[..., None] >= 0
        dt, keys = jnp.where(real, dt, 0), jnp.where(real[..., None], keys, 0)
        log_decay = (dt * self.A.get_value()).reshape(*shape, *heads)
        associations = self._associate(x, queries, keys, values, dt.reshape(*shape, *heads))
        state = past.state
        if state is not None:
            state = state.reshape(-1, *values.shape[2:4], *state.shape[2:])
        y, state = linear_attention(*associations, log_decay, state)
        y = self._finish(y, values, gate).reshape(*shape, -1).astype(x.dtype)
        if cache is not None:
            state = state.reshape(shape[0], -1, *state.shape[3:])
            cache = cache.write(RecurrentCache(inputs, state), batch)
        return self.out.unreduced(y), cache

    def _associate(
        self, x: Activations, queries: Array, keys: Array, values: Array, dt: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys, values and strengths as `linear_attention` takes them."""
        raise NotImplementedError

    def _finish(self, y: Array, values: Array, gate: Array) -> Array:
        """What was read, normalized and gated: all `[batch, time, key_heads, group, value_dim]`."""
        raise NotImplementedError


class DeltaNet(LinearAttention):
    """The gated delta net: a write replaces what the state knew under its key.

    Yang et al. 2024, arXiv:2412.06464.
    """

    def __init__(self, config: DeltaNetConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        heads, _ = config.axes
        self.beta = Linear(EMBED, embed, heads, config.value_heads, rngs=rngs)
        self.norm = Norm(config.norm, config.value_dim, HEAD_DIM) if config.norm else None

    def readers(self, x: Array) -> Readers:
        linears = self.query, self.key, self.value, self.gate, self.dt, self.beta
        return readers_of(x, *linears)

    def _associate(
        self, x: Activations, queries: Array, keys: Array, values: Array, dt: Array
    ) -> tuple[Array, Array, Array, Array]:
        def unit(x: Array) -> Array:
            return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + self.config.epsilon)

        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32)).reshape(dt.shape)
        return unit(queries) * queries.shape[-1] ** -0.5, unit(keys), values, beta

    def _finish(self, y: Array, values: Array, gate: Array) -> Array:
        return (y if self.norm is None else self.norm(y)) * gate


class Mamba2(LinearAttention):
    """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): x, B and C are values, keys and queries."""

    def __init__(self, config: Mamba2Config, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        heads, _ = config.axes
        self.D = param(None, (heads,), (config.value_heads,))
        self.norm = GroupNorm(config) if config.norm else None

    def _associate(
        self, x: Activations, queries: Array, keys: Array, values: Array, dt: Array
    ) -> tuple[Array, Array, Array, None]:
        return queries, keys, values * dt[..., None], None

    def _finish(self, y: Array, values: Array, gate: Array) -> Array:
        y = (y + self.D.get_value().reshape(*y.shape[2:4], 1) * values) * gate
        return y if self.norm is None else self.norm(y)


class GroupNorm(nnx.Module):
    """RMSNorm over all value heads of a key head, which may be on several devices."""

    def __init__(self, config: LinearAttentionConfig):
        heads, key_heads = config.axes
        self.size = config.value_heads // config.key_heads * config.value_dim
        self.scale = param(None, (heads,), (config.key_heads * self.size,))
        self.epsilon = config.norm.epsilon
        self.heads, self.key_heads = heads, key_heads

    def __call__(self, x: Array) -> Array:
        """float32 `[batch, time, key_heads, group, value_dim]` to the same shape."""
        squares = jnp.sum(x * x, axis=(-2, -1))
        if self.key_heads.units == 1:
            squares = all_reduce_units(squares.sum(axis=-1, keepdims=True), self.heads)
        elif is_split(self.heads):
            owner = jax.nn.one_hot(local_units(self.key_heads), self.key_heads.units)
            whole = all_reduce_units(jnp.matmul(squares, owner, precision=_HIGHEST), self.heads)
            squares = jnp.matmul(whole, owner.T, precision=_HIGHEST)
        normed = x * lax.rsqrt(squares / self.size + self.epsilon)[..., None, None]
        return normed * self.scale.get_value().reshape(x.shape[2:])


class ShortConv(nnx.Module):
    """A short convolution between two gates, as in LFM2."""

    def __init__(self, config: ShortConvConfig, embed: int, *, rngs: nnx.Rngs):
        c, axis = config, config.axis

        def project() -> Linear:
            return Linear(EMBED, embed, axis, c.channels, rngs=rngs)

        self.in_gate, self.out_gate, self.value = project(), project(), project()
        self.conv = CausalConv(axis, c.channels, c.kernel_size, rngs=rngs)
        self.out = Linear(axis, c.channels, EMBED, embed, rngs=rngs)

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.in_gate, self.out_gate, self.value)

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """`[batch, time, embed]` to the same, and the cache with these tokens."""
        past = None if cache is None else cache.read(batch).inputs[0]
        y, past = self.conv(self.in_gate(x) * self.value(x), past, batch)
        if cache is not None:
            cache = cache.write(RecurrentCache((past,)), batch)
        return self.out.unreduced(self.out_gate(x) * y.astype(x.dtype)), cache
