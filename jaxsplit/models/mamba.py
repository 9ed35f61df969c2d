"""Selective state spaces whose parameters are read from the convolved input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import forward_context
from jaxsplit.models.layers import Linear, Norm, param, readers_of
from jaxsplit.models.linear_attention import ConvLinear, linear_attention
from jaxsplit.models.mixer_config import MambaConfig
from jaxsplit.ops.activations.layout import Activations, Readers
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

_CHUNK = 32  # tokens whose states are computed in parallel
_HIGHEST = lax.Precision.HIGHEST


class Mamba(nnx.Module):
    """Mamba (Gu and Dao 2023, arXiv:2312.00752): each channel has a state with a decay for each of
    its dimensions; or, as in Mamba-2, channels form heads with one decay."""

    def __init__(self, config: MambaConfig, embed: int, *, rngs: nnx.Rngs):
        c, axis = config, config.axis
        self.value = ConvLinear(embed, axis, c.channels, c.kernel_size, bias=c.conv_bias, rngs=rngs)
        self.gate = Linear(EMBED, embed, axis, c.channels, rngs=rngs)

        def read(size: int) -> Linear:
            return Linear(axis, c.channels, LATENT, size, rngs=rngs)

        self.dt_down, self.B, self.C = read(c.dt_rank), read(c.state_size), read(c.state_size)
        sizes = c.dt_rank, c.state_size, c.state_size
        self.dt_norm, self.B_norm, self.C_norm = (
            Norm(c.norm, size, LATENT) if c.norm else None for size in sizes
        )
        self.dt = Linear(LATENT, c.dt_rank, axis, c.heads, bias=True, rngs=rngs)
        shape = (c.heads,) if c.scalar_decay else (c.heads, c.state_size)
        axes = (axis,) if c.scalar_decay else (axis, Axis("state"))
        self.A = nnx.Param(jnp.full(shape, -1, jnp.float32), axes=axes)
        self.D = param(None, (axis,), (c.heads,))
        self.out = Linear(axis, c.channels, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return readers_of(x, self.value, self.gate)

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated cache."""
        c, shape = self.config, x.shape[:2]
        past = None if cache is None else cache.read(batch)
        before, state = (None, None) if past is None else (past.inputs[0], past.state)
        values, inputs = self.value(x, before, batch)
        dt, B, C = self._parameters(values.astype(x.dtype))
        values = values.reshape(*shape, -1, c.channels // c.heads)
        # Padding leaves the state unchanged: a step of 0 neither decays nor writes.
        dt = jnp.where(batch.positions[..., None] >= 0, dt, 0)
        A = self.A.get_value().astype(jnp.float32)
        writes = values * dt[..., None]
        if c.scalar_decay:
            y, state = linear_attention(
                C[:, :, None],
                B[:, :, None],
                writes[:, :, None],
                None,
                log_decay=(dt * A)[:, :, None],
                state=None if state is None else state[:, None],
            )
            y, state = y[:, :, 0], state[:, 0]
        else:
            y, state = _scan(writes[..., 0], dt, A, B, C, None if state is None else state[..., 0])
            y, state = y[..., None], state[..., None]
        y = y + self.D.get_value()[:, None] * values
        y = y.reshape(*shape, -1) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        if cache is not None:
            cache = cache.write(RecurrentCache((inputs,), state), batch)
        return self.out.unreduced(y.astype(x.dtype)), cache

    def _parameters(self, x: Array) -> tuple[Array, Array, Array]:
        """Steps, float32 `[batch, time, heads]`, and B and C, float32 `[batch, time, state_size]`,
        of channels `[batch, time, channels]`."""
        c = self.config
        linears = self.dt_down, self.B, self.C
        with forward_context(fuse_all_reduce=False):  # one for all of them
            parts = [linear.unreduced(x) for linear in linears]
        joined = jnp.concatenate([part.local_sum for part in parts], axis=-1)
        joined = Unreduced(joined[None], reduce_over=parts[0].reduce_over).all_reduce(jnp.float32)
        low, B, C = jnp.split(joined, [c.dt_rank, c.dt_rank + c.state_size], axis=-1)
        norms = self.dt_norm, self.B_norm, self.C_norm
        parts = low, B, C
        low, B, C = (y if norm is None else norm(y) for y, norm in zip(parts, norms, strict=True))
        dt = self.dt(low.astype(x.dtype)).astype(jnp.float32)
        return jax.nn.softplus(dt), B, C


def _scan(
    writes: Array, dt: Array, A: Array, B: Array, C: Array, state: Array | None
) -> tuple[Array, Array]:
    """The recurrence of Mamba: `S = exp(dt A) S + writes B`, read with C.

    Args:
      writes, dt: float32 `[batch, time, channels]`.
      A: float32 `[channels, state_size]`.
      B, C: float32 `[batch, time, state_size]`.
      state: float32 `[batch, channels, state_size]`; None: zeros.

    Returns:
      float32 `[batch, time, channels]`, and the state after the last token.
    """
    batch, time = dt.shape[:2]
    size = min(time, _CHUNK)
    if state is None:
        state = jnp.zeros((batch, *A.shape))

    def chunked(x: Array) -> Array:
        """`[batch, time, width]` to `[chunks, size, batch, width]`."""
        x = jnp.pad(x, [(0, 0), (0, -time % size), (0, 0)])
        return jnp.moveaxis(x.reshape(batch, -1, size, x.shape[-1]), 0, 2)

    def after(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        """Decay and write of two spans of tokens, one after the other."""
        return first[0] * second[0], first[1] * second[0] + second[1]

    def step(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        writes, dt, B, C = chunk
        spans = jnp.exp(dt[..., None] * A), writes[..., None] * B[:, :, None]
        decay, written = lax.associative_scan(after, spans)
        states = decay * state + written
        return states[-1], jnp.einsum("tbdn,tbn->tbd", states, C, precision=_HIGHEST)

    state, y = lax.scan(step, state, tuple(map(chunked, (writes, dt, B, C))))
    return jnp.moveaxis(y, 2, 0).reshape(batch, -1, dt.shape[-1])[:, :time], state
