"""Alternating updates: layers compute one of several streams and predict the others (Gemma 3n)."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.models.layers import Linear, Norm, param
from jaxsplit.models.residual_config import AltUpConfig
from jaxsplit.quant import dequantize
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

_COEFFICIENTS = Axis("coefficients")


def _rescaled(x: Array, like: Array) -> Array:
    """Vectors `[..., embed]` with the lengths of others."""
    length, wanted = (jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True)) for y in (x, like))
    return x * wanted / jnp.maximum(length, 1e-20)


class AltUpProjections(nnx.Module):
    """The streams that layers begin with, and what the head reads of them."""

    def __init__(self, config: AltUpConfig, embed: int, *, rngs: nnx.Rngs):
        shape = config.streams - 1, embed, embed
        self.kernel = param(rngs, (Axis("streams"), Axis("up"), LATENT), shape)

    def _projected(self, x: Array) -> Array:
        """`[batch, time, streams - 1 or 1, embed]` to `[batch, time, streams - 1, embed]`."""
        kernel = dequantize(self.kernel.get_value(), jnp.float32)
        x = jnp.broadcast_to(x, (*x.shape[:2], kernel.shape[0], x.shape[3]))
        return jnp.einsum("btje,jfe->btjf", x, kernel, precision="highest")

    def begin(self, x: Array) -> Array:
        """An embedding `[batch, time, embed]` as streams, `[batch, time, streams * embed]`."""
        first = x.astype(jnp.float32)[:, :, None]
        streams = jnp.concatenate([first, _rescaled(self._projected(first), first)], axis=2)
        return streams.astype(x.dtype).reshape(*x.shape[:2], -1)

    def read(self, streams: Array) -> tuple[Array, None]:
        """The mean of the first stream and projections of the others, as in `Residual`."""
        count = self.kernel.shape[0] + 1
        x = streams.astype(jnp.float32).reshape(*streams.shape[:2], count, -1)
        first = x[:, :, :1]
        x = jnp.concatenate([first, _rescaled(self._projected(x[:, :, 1:]), first)], axis=2)
        return x.mean(axis=2).astype(streams.dtype), None


class AltUp(nnx.Module):
    """Predicts the streams after a layer, and corrects them by what it has computed (Baykal et al.
    2023, arXiv:2301.13310)."""

    def __init__(self, config: AltUpConfig, embed: int, *, rngs: nnx.Rngs):
        n = config.streams
        self.router_norm = Norm(config.norm, embed)
        self.router = Linear(EMBED, embed, LATENT, n, rngs=rngs)
        self.predict = Linear(LATENT, n, LATENT, n * n, rngs=rngs)
        self.correct = Linear(LATENT, n, LATENT, n, rngs=rngs)
        self.correct_scale = param(None, (EMBED,), (embed,))
        self.streams = n

    def _modalities(self, x: Array) -> Array:
        """Float32 `[batch, time, streams]` of a stream `[batch, time, embed]`."""
        return jnp.tanh(self.router(self.router_norm(x) / x.shape[-1]))

    def predictions(self, streams: Array) -> Array:
        """Float32 `[batch, time, streams, embed]` for `[batch, time, streams * embed]`."""
        x = streams.astype(jnp.float32).reshape(*streams.shape[:2], self.streams, -1)
        weights = self.predict(self._modalities(x[:, :, 0]))
        weights = weights.reshape(*x.shape[:2], self.streams, self.streams)
        return x + jnp.einsum("btij,btje->btie", weights, x, precision="highest")

    def corrected(self, predictions: Array, y: Array) -> Array:
        """Predictions corrected by the layer's output, float32 `[batch, time, embed]`."""
        weights = 1 + self.correct(self._modalities(y))
        return predictions + weights[..., None] * (y - predictions[:, :, 0])[:, :, None]

    def scaled(self, streams: Array) -> Array:
        """The stream that is computed, of `[batch, time, streams, embed]`, scaled."""
        return streams[:, :, 0] * self.correct_scale.get_value()

    def added_to_others(self, streams: Array, x: Array) -> Array:
        """Adds `[batch, time, embed]` to the streams that are not computed."""
        others = (jnp.arange(self.streams) > 0)[:, None]
        return streams + jnp.where(others, x[:, :, None], 0)


class Laurel(nnx.Module):
    """A learned augmented residual layer of low rank (Menghani et al. 2024, arXiv:2411.07501)."""

    def __init__(self, config: AltUpConfig, embed: int, *, rngs: nnx.Rngs):
        self.down = Linear(EMBED, embed, LATENT, config.laurel_rank, rngs=rngs)
        self.up = Linear(LATENT, config.laurel_rank, EMBED, embed, rngs=rngs)
        self.norm = Norm(config.norm, embed)

    def __call__(self, x: Array) -> Array:
        """`[batch, time, embed]` to the same."""
        return x + self.norm(self.up(self.down(x)))
