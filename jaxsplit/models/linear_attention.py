"""Mixers with a recurrent state of constant size: linear attention and short convolutions.

Convolutions and states are computed in float32. Tokens at negative positions are padding and leave
the state unchanged. A sequence whose first token is at position 0 starts from a zero state.
"""

from functools import reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.comm.api import all_reduce_unique_units, is_split, local_units
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

_CHUNK = 64  # tokens that are computed in parallel
_HIGHEST = lax.Precision.HIGHEST


class CausalConv(nnx.Module):
    """A causal depthwise convolution over the last `kernel_size` tokens."""

    def __init__(
        self, axis: Axis, channels: int, kernel_size: int, *, bias: bool = False, rngs: nnx.Rngs
    ):
        self.kernel = param(rngs, (axis, Axis("conv")), (channels, kernel_size))
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32), axes=(axis,)) if bias else None

    def __call__(self, x: Array, past: Array | None, batch: Batch) -> tuple[Array, Array]:
        """Convolves the tokens and the inputs before them.

        Args:
          x: `[batch, time, channels]`.
          past: the last inputs before, float32 `[batch, kernel_size - 1, channels]`; None: zeros.
          batch: positions of the tokens.

        Returns:
          float32 `[batch, time, channels]`, and the last inputs including these tokens, shaped as
          `past`.
        """
        kernel = self.kernel.get_value().astype(jnp.float32)
        kernel_size, time = kernel.shape[-1], x.shape[1]
        if past is None:
            past = jnp.zeros((x.shape[0], kernel_size - 1, x.shape[2]), jnp.float32)
        inputs = jnp.concatenate([past, x.astype(jnp.float32)], axis=1)
        y = reduce(add, (inputs[:, i : i + time] * kernel[:, i] for i in range(kernel_size)))
        if self.bias is not None:
            y = y + self.bias.get_value()
        count = (batch.positions >= 0).sum(axis=1)
        last = count[:, None] + jnp.arange(kernel_size - 1)
        return y, jnp.take_along_axis(inputs, last[..., None], axis=1)


class ConvLinear(Linear):
    """A projection of the residual stream, followed by a convolution and SiLU."""

    def __init__(
        self, embed: int, axis: Axis, size: int, kernel_size: int, *, bias: bool, rngs: nnx.Rngs
    ):
        super().__init__(EMBED, embed, axis, size, rngs=rngs)
        self.conv = CausalConv(axis, size, kernel_size, bias=bias, rngs=rngs)

    def __call__(self, x: Activations, past: Array | None, batch: Batch) -> tuple[Array, Array]:
        """Float32 `[batch, time, size]` for `[batch, time, embed]`, and the convolution's last
        inputs."""
        y, past = self.conv(super().__call__(x), past, batch)
        return jax.nn.silu(y), past


def linear_attention(
    queries: Array,
    keys: Array,
    values: Array,
    beta: Array | None,
    *,
    log_decay: Array,
    state: Array | None,
) -> tuple[Array, Array]:
    """Linear attention with a decaying state, in chunks.

    For each token, with state S, query q, key k, value v, decay a and write strength beta b:

        S = a S + k v^T                    without beta: Mamba-2's state space model
        S = a S + b k (v - a S^T k)^T      with beta: the gated delta rule
        y = S^T q

    All tokens of a chunk are computed in parallel: Dao and Gu 2024, arXiv:2405.21060, section 6;
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

    def chunked(x: Array, axis: int) -> Array:
        """`[batch, time, ...]` to `[chunks, batch, ...]` with the tokens of a chunk at an axis."""
        x = jnp.pad(x, [(0, 0), (0, -time % size), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), (1, 2), (0, axis))

    if state is None:
        state = jnp.zeros((batch, *values.shape[2:4], keys.shape[-1], values.shape[-1]))
    queries, keys = chunked(queries, 3), chunked(keys, 3)
    values, log_decay = chunked(values, 4), chunked(log_decay, 4)
    total = jnp.cumsum(log_decay, axis=-1)
    causal = np.tri(size, dtype=bool)
    decay = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
    scores = _einsum("nbhid,nbhjd->nbhij", queries, keys)[:, :, :, None] * decay
    corrections = None if beta is None else _corrections(chunked(beta, 4)[..., None], keys, decay)
    since_start = jnp.exp(total)[..., None]
    until_end = jnp.exp(total[..., -1:] - total)[..., None]
    chunks = _Chunk(queries, keys, values, scores, corrections, since_start, until_end)
    state, y = lax.scan(_chunk_step, state, chunks)
    y = jnp.moveaxis(y, (0, 4), (1, 2)).reshape(batch, -1, *values.shape[2:4], values.shape[-1])
    return y[:, :time], state


class _Chunk(NamedTuple):
    """The operands of a chunk, float32; stacked over chunks for `lax.scan`.

    Attributes:
      queries, keys: `[batch, key_heads, size, key_dim]`.
      values: `[batch, key_heads, group, size, value_dim]`.
      scores: `q_i . k_j`, decayed, 0 for j > i: `[batch, key_heads, group, size, size]`.
      corrections: from `_corrections`, shaped as `scores`; None without beta.
      since_start: decay from the start of the chunk: `[batch, key_heads, group, size, 1]`.
      until_end: decay to the end of the chunk, shaped as `since_start`.
    """

    queries: Array
    keys: Array
    values: Array
    scores: Array
    corrections: Array | None
    since_start: Array
    until_end: Array


def _corrections(beta: Array, keys: Array, decay: Array) -> Array:
    """The matrices T that turn the values V of a chunk into its writes of the delta rule, `T V`.

    Write i is `beta_i (v_i - sum of the earlier writes j, times decay_ij k_i . k_j)`: a lower
    triangular system.

    Args:
      beta: `[chunks, batch, key_heads, group, size, 1]`.
      keys: `[chunks, batch, key_heads, size, key_dim]`.
      decay: between tokens, `[chunks, batch, key_heads, group, size, size]`.

    Returns:
      float32, shaped as `decay`.
    """
    size = decay.shape[-1]
    corrections = beta * jnp.eye(size)
    if size > 1:
        overlaps = _einsum("nbhid,nbhjd->nbhij", keys, keys)[:, :, :, None] * decay
        corrections = lax.linalg.triangular_solve(
            beta * overlaps, corrections, left_side=True, lower=True, unit_diagonal=True
        )
    return corrections


def _chunk_step(state: Array, chunk: _Chunk) -> tuple[Array, Array]:
    """Reads from the state and from the chunk, and updates the state."""
    q, k, v, scores, corrections, since_start, until_end = chunk
    if corrections is not None:
        known = since_start * _einsum("bhid,bhgde->bhgie", k, state)
        v = _einsum("bhgij,bhgje->bhgie", corrections, v - known)
    y = since_start * _einsum("bhid,bhgde->bhgie", q, state)
    y = y + _einsum("bhgij,bhgje->bhgie", scores, v)
    state = since_start[..., -1:, :] * state + _einsum("bhid,bhgie->bhgde", k, until_end * v)
    return state, y


def _einsum(subscripts: str, *arrays: Array) -> Array:
    return jnp.einsum(subscripts, *arrays, precision=_HIGHEST)


class LinearAttention(nnx.Module):
    """The common parts of the delta net and Mamba-2."""

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
        """Mixes the tokens with the earlier tokens of their sequences.

        Args:
          x: `[batch, time, embed]`.
          batch: slots and positions of the tokens.
          cache: states and convolution inputs of earlier tokens; None: there are none.

        Returns:
          `[batch, time, embed]`, and the updated cache.
        """
        c, shape = self.config, x.shape[:2]
        past = None if cache is None else cache.read(batch)
        past_inputs = (None,) * 3 if past is None else past.inputs
        projections = zip((self.query, self.key, self.value), past_inputs, strict=True)
        projected, inputs = zip(*(p(x, before, batch) for p, before in projections), strict=True)
        queries, keys = (y.reshape(*shape, -1, c.key_dim) for y in projected[:2])
        heads = (keys.shape[2], -1)  # key heads, and the value heads that share each of them
        values = projected[2].reshape(*shape, *heads, c.value_dim)
        gate = getattr(jax.nn, c.gate)(self.gate(x).astype(jnp.float32)).reshape(values.shape)
        dt = jax.nn.softplus(self.dt(x).astype(jnp.float32) + self.dt_bias.get_value())
        # Padding leaves the state unchanged: dt = 0 stops the decay, a zero key writes nothing.
        exists = batch.positions[..., None] >= 0
        dt, keys = jnp.where(exists, dt, 0), jnp.where(exists[..., None], keys, 0)
        log_decay = (dt * self.A.get_value()).reshape(*shape, *heads)
        operands = self._operands(x, queries, keys, values, dt.reshape(*shape, *heads))
        state = None if past is None else past.state
        if state is not None:
            state = state.reshape(-1, *values.shape[2:4], *state.shape[2:])
        y, state = linear_attention(*operands, log_decay=log_decay, state=state)
        y = self._output(y, values, gate).reshape(*shape, -1).astype(x.dtype)
        if cache is not None:
            state = state.reshape(shape[0], -1, *state.shape[3:])
            cache = cache.write(RecurrentCache(inputs, state), batch)
        return self.out.unreduced(y), cache

    def _operands(
        self, x: Activations, queries: Array, keys: Array, values: Array, dt: Array
    ) -> tuple[Array, Array, Array, Array | None]:
        """The queries, keys, values and beta of `linear_attention`."""
        raise NotImplementedError

    def _output(self, y: Array, values: Array, gate: Array) -> Array:
        """Normalizes and gates the output; all `[batch, time, key_heads, group, value_dim]`."""
        raise NotImplementedError


class DeltaNet(LinearAttention):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): a write replaces the value that the
    state holds for its key."""

    def __init__(self, config: DeltaNetConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        heads, _ = config.axes
        self.beta = Linear(EMBED, embed, heads, config.value_heads, rngs=rngs)
        self.norm = Norm(config.norm, config.value_dim, HEAD_DIM) if config.norm else None
        self.epsilon = config.epsilon

    def readers(self, x: Array) -> Readers:
        linears = self.query, self.key, self.value, self.gate, self.dt, self.beta
        return readers_of(x, *linears)

    def _operands(
        self, x: Activations, queries: Array, keys: Array, values: Array, dt: Array
    ) -> tuple[Array, Array, Array, Array]:
        def normalized(x: Array) -> Array:
            return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + self.epsilon)

        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32)).reshape(dt.shape)
        queries, scale = normalized(queries), queries.shape[-1] ** -0.5
        return queries * scale, normalized(keys), values, beta

    def _output(self, y: Array, values: Array, gate: Array) -> Array:
        return (y if self.norm is None else self.norm(y)) * gate


class Mamba2(LinearAttention):
    """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): x, B and C are values, keys and queries."""

    def __init__(self, config: Mamba2Config, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        heads, _ = config.axes
        self.D = param(None, (heads,), (config.value_heads,))
        self.norm = GroupedRMSNorm(config, config.norm.epsilon) if config.norm else None

    def _operands(
        self, x: Activations, queries: Array, keys: Array, values: Array, dt: Array
    ) -> tuple[Array, Array, Array, None]:
        return queries, keys, values * dt[..., None], None

    def _output(self, y: Array, values: Array, gate: Array) -> Array:
        y = (y + self.D.get_value().reshape(*y.shape[2:4], 1) * values) * gate
        return y if self.norm is None else self.norm(y)


class GroupedRMSNorm(nnx.Module):
    """RMSNorm over all value heads of a key head, which may be split over devices."""

    def __init__(self, config: LinearAttentionConfig, epsilon: float):
        heads, key_heads = config.axes
        self.size = config.value_heads // config.key_heads * config.value_dim
        self.scale = param(None, (heads,), (config.key_heads * self.size,))
        self.epsilon = epsilon
        self.heads, self.key_heads = heads, key_heads

    def __call__(self, x: Array) -> Array:
        """Normalizes float32 `[batch, time, key_heads, group, value_dim]`."""
        squares = jnp.sum(x * x, axis=(-2, -1))
        if self.key_heads.units == 1:
            squares = all_reduce_unique_units(squares.sum(axis=-1, keepdims=True), self.heads)
        elif is_split(self.heads):
            owner = jax.nn.one_hot(local_units(self.key_heads), self.key_heads.units)
            total = all_reduce_unique_units(
                jnp.matmul(squares, owner, precision=_HIGHEST), self.heads
            )
            squares = jnp.matmul(total, owner.T, precision=_HIGHEST)
        normed = x * lax.rsqrt(squares / self.size + self.epsilon)[..., None, None]
        return normed * self.scale.get_value().reshape(x.shape[2:])


class ShortConv(nnx.Module):
    """LFM2's gated short convolution: a gate, a causal convolution, a gate."""

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
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated cache."""
        past = None if cache is None else cache.read(batch).inputs[0]
        y, past = self.conv(self.in_gate(x) * self.value(x), past, batch)
        if cache is not None:
            cache = cache.write(RecurrentCache((past,)), batch)
        return self.out.unreduced(self.out_gate(x) * y.astype(x.dtype)), cache
