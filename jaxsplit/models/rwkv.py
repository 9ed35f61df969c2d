"""RWKV-6 and RWKV-7: linear attention with a token shift, and MLPs with one."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.comm.api import all_gather, local_units
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import current_context
from jaxsplit.models.dplr import dplr_attention
from jaxsplit.models.layers import Linear, Norm, param
from jaxsplit.models.mixer_config import ChannelMixConfig, RWKV6Config, RWKV7Config
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.matmul.api import batched, matmul
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

_GROUP_NORM = NormConfig("layer", 64e-5, bias=True)


def token_shift(x: Array, past: Array | None, batch: Batch) -> tuple[Array, Array]:
    """The token before each.

    Args:
      x: `[batch, time, embed]`.
      past: the last token before, float32 `[batch, 1, embed]`; None: zeros.
      batch: positions of the tokens.

    Returns:
      `[batch, time, embed]`, and the last token, shaped as `past`.
    """
    x = x.astype(jnp.float32)
    past = jnp.zeros_like(x[:, :1]) if past is None else past
    tokens = jnp.concatenate([past, x], axis=1)
    count = (batch.positions >= 0).sum(axis=1)
    return tokens[:, :-1], jnp.take_along_axis(tokens, count[:, None, None], axis=1)


def _vector(axis: Axis, size: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(size, jnp.float32), axes=(axis,))


class _LowRank(nnx.Module):
    """A bias, and a projection of the input through few dimensions: a low-rank MLP."""

    def __init__(self, embed: int, rank: int, axis: Axis, size: int, *, rngs: nnx.Rngs):
        self.bias = _vector(axis, size)
        self.down = Linear(EMBED, embed, LATENT, rank, rngs=rngs)
        self.up = Linear(LATENT, rank, axis, size, rngs=rngs)

    def __call__(self, x: Array, *, tanh: bool = False) -> Array:
        """`[..., embed]` to float32 `[..., size]`."""
        low = self.down(x)
        y = self.up(jnp.tanh(low) if tanh else low)
        return y.astype(jnp.float32) + self.bias.get_value()


class RWKV7(nnx.Module):
    """The time mixing of RWKV-7 (Peng et al. 2025, arXiv:2503.14456, section 4): names as there."""

    def __init__(self, config: RWKV7Config, embed: int, *, rngs: nnx.Rngs):
        c, heads = config, config.axis
        inner = c.heads * c.head_dim

        def projection() -> Linear:
            return Linear(EMBED, embed, heads, inner, rngs=rngs)

        def low_rank(rank: int) -> _LowRank:
            return _LowRank(embed, rank, heads, inner, rngs=rngs)

        self.lerp = nnx.Dict({name: _vector(EMBED, embed) for name in c.lerps})
        self.receptance, self.key, self.value = projection(), projection(), projection()
        self.decay, self.iclr = low_rank(c.decay_rank), low_rank(c.iclr_rank)
        self.value_mix = None if c.first else low_rank(c.value_rank)
        rank = c.gate_rank
        self.gate_down = Linear(EMBED, embed, LATENT, rank, rngs=rngs) if rank else None
        self.gate_up = Linear(LATENT, rank, heads, inner, rngs=rngs) if rank else None
        self.removal_scale, self.iclr_scale, self.bonus = (_vector(heads, inner) for _ in range(3))
        self.norm = Norm(_GROUP_NORM, inner, heads, group=c.head_dim) if c.norm else None
        self.out = Linear(heads, inner, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`: XLA, which mixes tokens."""
        return XLA_ONLY

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated cache."""
        c, shape, rows = self.config, x.shape[:2], x.array
        past = None if cache is None else cache.read(batch)
        before, last = token_shift(rows, None if past is None else past.inputs[0], batch)
        shift = before - rows.astype(jnp.float32)
        mixed = {
            name: (rows + shift * mu.get_value()).astype(rows.dtype)
            for name, mu in self.lerp.items()
        }

        def heads(x: Array) -> Array:
            return x.astype(jnp.float32).reshape(*shape, -1, c.head_dim)

        def vector(p: nnx.Param) -> Array:
            return p.get_value().reshape(-1, c.head_dim)

        r, k = heads(self.receptance(mixed["r"])), heads(self.key(mixed["k"]))
        v, iclr = heads(self.value(mixed["v"])), heads(jax.nn.sigmoid(self.iclr(mixed["a"])))
        log_decay = -0.606531 * heads(jax.nn.sigmoid(self.decay(mixed["w"], tanh=True)))
        if self.value_mix is None:
            batch.side_inputs.carried = _whole(v, c.axis).astype(rows.dtype)
        else:
            assert batch.side_inputs.carried is not None
            first = heads(_local(batch.side_inputs.carried, c.axis, c.head_dim))
            v = v + (first - v) * heads(jax.nn.sigmoid(self.value_mix(mixed["v"])))
        removed = k * vector(self.removal_scale)
        length = jnp.sqrt(jnp.sum(removed * removed, axis=-1, keepdims=True))
        removed = removed / jnp.maximum(length, 1e-12)
        k = k * (1 + (iclr - 1) * vector(self.iclr_scale))
        # Padding leaves the state unchanged.
        exists = (batch.positions >= 0)[..., None, None]
        y, state = dplr_attention(
            r,
            jnp.where(exists, k, 0),
            v,
            log_decay=jnp.where(exists, log_decay, 0),
            state=None if past is None else past.state,
            removal=(jnp.where(exists, removed * iclr, 0), -removed),
        )
        if self.norm is not None:
            y = self.norm(y.reshape(*shape, -1)).reshape(y.shape)
        y = y + jnp.sum(k * r * vector(self.bonus), axis=-1, keepdims=True) * v
        y = y.reshape(*shape, -1).astype(rows.dtype)
        if self.gate_down is not None and self.gate_up is not None:
            y = y * self.gate_up(jax.nn.sigmoid(self.gate_down(mixed["g"])))
        if cache is not None:
            cache = cache.write(RecurrentCache((last,), state), batch)
        return self.out.unreduced(y), cache


def _whole(x: Array, axis: Axis) -> Array:
    """This device's heads `[batch, time, heads, width]` as all heads in order: `[batch, time,
    heads * width]`."""
    units = np.asarray(current_context().rules.units(axis))
    first = np.asarray([np.flatnonzero(units == unit)[0] for unit in range(axis.units)])
    gathered = all_gather(x.reshape(*x.shape[:2], -1), axis)
    gathered = gathered.reshape(*x.shape[:2], -1, x.shape[-1])
    return gathered[:, :, first].reshape(*x.shape[:2], -1)


def _local(x: Array, axis: Axis, width: int) -> Array:
    """All heads in order, `[batch, time, heads * width]`, as this device's: the same shape with
    fewer heads."""
    units = local_units(axis)
    heads = x.reshape(*x.shape[:2], -1, width)[:, :, jnp.maximum(units, 0)]
    return jnp.where((units >= 0)[:, None], heads, 0).reshape(*x.shape[:2], -1)


class RWKV6(nnx.Module):
    """The time mixing of RWKV-6 (Peng et al. 2024, arXiv:2404.05892, section 4): names as there."""

    def __init__(self, config: RWKV6Config, embed: int, *, rngs: nnx.Rngs):
        c, (heads, kv_heads) = config, config.axes
        inner, kv_inner = c.heads * c.head_dim, c.kv_heads * c.head_dim

        def projection(axis: Axis, size: int, *, bias: bool = False) -> Linear:
            return Linear(EMBED, embed, axis, size, bias=bias, rngs=rngs)

        self.lerp_input = _vector(EMBED, embed)
        self.lerp = nnx.Dict({name: _vector(EMBED, embed) for name in c.lerps})
        self.lerp_down = projection(LATENT, len(c.lerps) * c.mix_rank)
        shape = len(c.lerps), embed, c.mix_rank
        self.lerp_up = param(rngs, (Axis("lerp"), EMBED, LATENT), shape)
        self.receptance = projection(heads, inner, bias=c.bias)
        self.key = projection(kv_heads, kv_inner, bias=c.bias)
        self.value = projection(kv_heads, kv_inner, bias=c.bias)
        self.gate = projection(heads, inner)
        self.decay = _LowRank(embed, c.decay_rank, heads, inner, rngs=rngs)
        self.bonus = _vector(heads, inner) if c.bonus else None
        self.norm = Norm(_GROUP_NORM, inner, heads, group=c.head_dim) if c.bonus else None
        self.out = Linear(heads, inner, EMBED, embed, rngs=rngs)
        self.config = config

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`: XLA, which mixes tokens."""
        return XLA_ONLY

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated cache."""
        c, shape, rows = self.config, x.shape[:2], x.array
        past = None if cache is None else cache.read(batch)
        before, last = token_shift(rows, None if past is None else past.inputs[0], batch)
        mixed = self._mixed(rows, before - rows.astype(jnp.float32))

        def heads(x: Array) -> Array:
            return x.astype(jnp.float32).reshape(*shape, -1, c.head_dim)

        r, k, v = (
            heads(projection(mixed[name]))
            for projection, name in ((self.receptance, "r"), (self.key, "k"), (self.value, "v"))
        )
        k, v = (jnp.repeat(y, r.shape[2] // k.shape[2], axis=2) for y in (k, v))
        log_decay = heads(-jnp.exp(self.decay(mixed["w"], tanh=True)))
        gate = self.gate(mixed["g"])
        if self.bonus is None:
            r, k = r * c.head_dim**-0.5, k * -jnp.expm1(log_decay)
            gate, bonus = jax.nn.sigmoid(gate), None
        else:
            gate, bonus = jax.nn.silu(gate), self.bonus.get_value().reshape(-1, c.head_dim)
        # Padding leaves the state unchanged.
        exists = (batch.positions >= 0)[..., None, None]
        y, state = dplr_attention(
            r,
            jnp.where(exists, k, 0),
            v,
            log_decay=jnp.where(exists, log_decay, 0),
            state=None if past is None else past.state,
            bonus=bonus,
        )
        y = y.reshape(*shape, -1)
        y = (y if self.norm is None else self.norm(y)).astype(rows.dtype) * gate
        if cache is not None:
            cache = cache.write(RecurrentCache((last,), state), batch)
        return self.out.unreduced(y), cache

    def _mixed(self, x: Array, shift: Array) -> dict[str, Array]:
        """The inputs of the projections, `[batch, time, embed]` each: tokens and their changes from
        the ones before, in shares that depend on both."""
        names = self.config.lerps
        low = (x + shift * self.lerp_input.get_value()).astype(x.dtype)
        low = jnp.tanh(self.lerp_down(low)).reshape(-1, len(names), self.config.mix_rank)
        shares = batched(matmul)(jnp.moveaxis(low, 1, 0), self.lerp_up.get_value())
        return {
            name: (x + shift * (self.lerp[name].get_value() + share)).astype(x.dtype)
            for name, share in zip(names, shares.reshape(-1, *x.shape), strict=True)
        }


class ChannelMix(nnx.Module):
    """The MLP of RWKV, which reads the token before, too (arXiv:2404.05892, section 4)."""

    def __init__(self, config: ChannelMixConfig, embed: int, *, rngs: nnx.Rngs):
        c, axis = config, Axis("mlp", config.intermediate_size)
        self.lerp_key = _vector(EMBED, embed)
        self.lerp_receptance = _vector(EMBED, embed) if c.gated else None
        self.key = Linear(EMBED, embed, axis, c.intermediate_size, rngs=rngs)
        self.value = Linear(axis, c.intermediate_size, EMBED, embed, rngs=rngs)
        self.receptance = Linear(EMBED, embed, EMBED, embed, rngs=rngs) if c.gated else None

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`: XLA, which mixes tokens."""
        return XLA_ONLY

    def __call__(
        self, x: Activations, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Unreduced, RecurrentCache | None]:
        """`[batch, time, embed]` to the same, and the updated cache."""
        rows = x.array
        past = None if cache is None else cache.read(batch).inputs[0]
        before, last = token_shift(rows, past, batch)
        shift = before - rows.astype(jnp.float32)
        keys = (rows + shift * self.lerp_key.get_value()).astype(rows.dtype)
        hidden = jnp.square(jax.nn.relu(self.key(keys)))
        y = self.value.unreduced(hidden)
        if self.receptance is not None and self.lerp_receptance is not None:
            gate = (rows + shift * self.lerp_receptance.get_value()).astype(rows.dtype)
            gate = jax.nn.sigmoid(self.receptance(gate))
            y = Unreduced.of(y.all_reduce(rows.dtype) * gate)
        if cache is not None:
            cache = cache.write(RecurrentCache((last,)), batch)
        return y, cache
