"""Residual connections of several streams: what a mixer or an MLP reads of them, and how its output
is added.

The streams of a token are side by side in the residual stream, `[batch, time, streams * embed]`.
Their mixtures are computed in float32, on every device.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.models.layers import Linear, Norm, param
from jaxsplit.models.residual_config import (
    AttentionResidualConfig,
    HyperConnectionConfig,
    HyperHeadConfig,
    LowRankConnectionConfig,
)
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

_GATES = Axis("gates")
_einsum = jnp.einsum


class Residual(Protocol):
    """How a mixer or an MLP is connected to the streams."""

    def read(self, streams: Array) -> tuple[Array, Any]:
        """What it reads, `[batch, time, embed]`, and what `write` needs."""
        ...

    def write(self, streams: Array, y: Array, gates: Any) -> Array:
        """The streams with its output `[batch, time, embed]`."""
        ...


def _split(streams: Array, count: int) -> Array:
    """`[batch, time, streams * embed]` as float32 `[batch, time, streams, embed]`."""
    return streams.astype(jnp.float32).reshape(*streams.shape[:2], count, -1)


def _joined(streams: Array, dtype: jnp.dtype) -> Array:
    """`[batch, time, streams, embed]` as `[batch, time, streams * embed]`."""
    return streams.astype(dtype).reshape(*streams.shape[:2], -1)


class _Gates(nnx.Module):
    """Linear functions of all streams, which are normalized together, scaled in groups and biased.

    Args:
      sizes: of the groups.
    """

    def __init__(
        self, sizes: tuple[int, ...], streams: int, embed: int, norm: NormConfig, *, rngs: nnx.Rngs
    ):
        self.norm = Norm(norm, streams * embed, EMBED)
        self.mix = Linear(EMBED, streams * embed, LATENT, sum(sizes), rngs=rngs)
        self.scale = param(None, (_GATES,), (len(sizes),))
        self.base = nnx.Param(jnp.zeros(sum(sizes), jnp.float32), axes=(_GATES,))
        self.sizes = sizes

    def __call__(self, streams: Array) -> list[Array]:
        """Float32 `[batch, time, size]` of each group."""
        y = self.mix(self.norm(streams.astype(jnp.float32)))
        scale, base, start, groups = self.scale.get_value(), self.base.get_value(), 0, []
        for i, size in enumerate(self.sizes):
            part = slice(start, start + size)
            groups.append(scale[i] * y[..., part] + base[part])
            start += size
        return groups


class HyperConnection(nnx.Module):
    """Manifold-constrained hyper-connections (Xie et al. 2025, arXiv:2512.24880), or
    hyper-connections without a mixing matrix."""

    def __init__(self, config: HyperConnectionConfig, embed: int, *, rngs: nnx.Rngs):
        c, n = config, config.streams
        sizes = (n, n, n * n) if c.iterations else (n, n)
        self.gates = _Gates(sizes, n, embed, NormConfig("rms", c.norm_epsilon, False), rngs=rngs)
        self.config = config

    def read(self, streams: Array) -> tuple[Array, Any]:
        """As in `Residual`: a weighted sum of the streams."""
        c = self.config
        read, written, *mixed = self.gates(streams)
        weights = jax.nn.sigmoid(read) + c.epsilon
        x = _einsum("btn,btne->bte", weights, _split(streams, c.streams), precision="highest")
        return x.astype(streams.dtype), (written, *mixed)

    def write(self, streams: Array, y: Array, gates: Any) -> Array:
        """As in `Residual`: streams are mixed, and the output is added to each."""
        c, (written, *mixed) = self.config, gates
        x = _split(streams, c.streams)
        if mixed:
            x = _einsum("btij,btie->btje", self._mixing(mixed[0]), x, precision="highest")
        weights = c.magnitude * jax.nn.sigmoid(written) + c.offset
        return _joined(x + weights[..., None] * y[:, :, None].astype(x.dtype), streams.dtype)

    def _mixing(self, logits: Array) -> Array:
        """A doubly stochastic matrix `[batch, time, source, destination]` (Sinkhorn and Knopp
        1967)."""
        c = self.config
        matrix = logits.reshape(*logits.shape[:2], c.streams, c.streams)
        matrix = jax.nn.softmax(matrix, axis=-1) + c.epsilon

        def divided(matrix: Array, axis: int) -> Array:
            return matrix / (matrix.sum(axis=axis, keepdims=True) + c.epsilon)

        matrix = divided(matrix, -2)
        for _ in range(c.iterations - 1):
            matrix = divided(divided(matrix, -1), -2)
        return matrix


class HyperHead(nnx.Module):
    """What the last norm reads of several streams: a weighted sum, or their mean."""

    def __init__(self, config: HyperHeadConfig, embed: int, *, rngs: nnx.Rngs):
        c, norm = config, NormConfig("rms", config.norm_epsilon, False)
        self.gates = None if c.mean else _Gates((c.streams,), c.streams, embed, norm, rngs=rngs)
        self.config = config

    def read(self, streams: Array) -> tuple[Array, None]:
        """As in `Residual`."""
        x = _split(streams, self.config.streams)
        if self.gates is None:
            return x.mean(axis=2).astype(streams.dtype), None
        [read] = self.gates(streams)
        weights = jax.nn.sigmoid(read) + self.config.epsilon
        x = _einsum("btn,btne->bte", weights, x, precision="highest")
        return x.astype(streams.dtype), None


class LowRankConnection(nnx.Module):
    """Hyper-connections whose weights of the streams are low-rank functions of them."""

    def __init__(self, config: LowRankConnectionConfig, embed: int, *, rngs: nnx.Rngs):
        c, width = config, config.streams * embed
        self.norm = Norm(c.norm, width, EMBED, group=embed)
        self.down = Linear(EMBED, width, LATENT, c.rank, rngs=rngs)
        self.up = Linear(LATENT, c.rank, LATENT, width, rngs=rngs)
        self.inject = Linear(EMBED, width, LATENT, c.streams, rngs=rngs) if c.writes else None
        self.config = config

    def read(self, streams: Array) -> tuple[Array, Any]:
        """As in `Residual`: the mean of the normalized streams, each element with a gate."""
        n, x = self.config.streams, self.norm(streams.astype(jnp.float32))
        gates = jax.nn.sigmoid(self.up(jax.nn.silu(self.down(x / n))))
        y = (x * gates).reshape(*x.shape[:2], n, -1).mean(axis=2)
        return y.astype(streams.dtype), None if self.inject is None else self.inject(x) / n

    def write(self, streams: Array, y: Array, gates: Any) -> Array:
        """As in `Residual`: the output is added to each stream with a weight."""
        x = _split(streams, self.config.streams)
        weights = 2 * jax.nn.sigmoid(gates)
        return _joined(x + weights[..., None] * y[:, :, None].astype(x.dtype), streams.dtype)


class AttentionResidual(nnx.Module):
    """Attention over the outputs of earlier blocks of layers (Kimi Team 2026, Attention Residuals).

    The first stream is the sum since the last block began; the others are the sums that blocks
    began with.
    """

    def __init__(self, config: AttentionResidualConfig, embed: int, *, rngs: nnx.Rngs):
        self.score = Norm(config.norm, embed)
        self.embed = embed
        self.config = config

    def read(self, streams: Array) -> tuple[Array, None]:
        """As in `Residual`: a softmax over the streams."""
        x = _split(streams, streams.shape[-1] // self.embed)
        weights = jax.nn.softmax(self.score(x).sum(axis=-1), axis=-1)
        y = _einsum("btn,btne->bte", weights, x, precision="highest")
        return y.astype(streams.dtype), None

    def write(self, streams: Array, y: Array, gates: None) -> Array:
        """As in `Residual`: the output is added to the sum, or begins another."""
        if self.config.begins:
            return jnp.concatenate([y.astype(streams.dtype), streams], axis=-1)
        first = streams[..., : self.embed] + y.astype(streams.dtype)
        return jnp.concatenate([first, streams[..., self.embed :]], axis=-1)
