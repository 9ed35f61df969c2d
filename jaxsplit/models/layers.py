"""Layers that know their logical axes: norm, projection, embedding, rotary positions.

A parameter's logical axes are in its metadata: `param.axes`, one name per dimension. Matrices are
`[out, in]`, plain or quantized (`jaxsplit.quant`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsplit.models.axes import gather_over, is_split, shard_of, sum_over
from jaxsplit.models.config import RopeConfig
from jaxsplit.quant import matmul, take_rows


def param(rngs: nnx.Rngs | None, axes: tuple[str, ...], shape: tuple[int, ...]) -> nnx.Param:
    """A float32 parameter: ones without `rngs` (a norm), else normal with variance `1 / in`."""
    if rngs is None:
        return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
    return nnx.Param(_normal(rngs.params(), shape), axes=axes)


@functools.partial(jax.jit, static_argnums=1)  # traced once for each shape
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return shape[-1] ** -0.5 * jax.random.normal(key, shape, jnp.float32)


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in float32."""

    def __init__(self, size: int, epsilon: float):
        self.scale = param(None, ("embed",), (size,))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        """`[..., size]` to the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * self.scale.get_value()).astype(x.dtype)


class Linear(nnx.Module):
    """A projection from one logical axis to another.

    A kernel split along its columns reads the devices' own parts of `x`, and the partial sums are
    added up; one that is not gathers the parts of `x` first. Rows of the residual stream are
    gathered, since it is whole on every device; rows of other axes stay where they are.
    """

    def __init__(
        self,
        in_axis: str,
        in_size: int,
        out_axis: str,
        out_size: int,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.rows = "embed_out" if out_axis == "embed" else out_axis
        self.columns = in_axis if in_axis == "embed" else f"{in_axis}_in"
        self.kernel = param(rngs, (self.rows, self.columns), (out_size, in_size))
        self.bias = nnx.Param(jnp.zeros(out_size, jnp.float32), axes=(out_axis,)) if bias else None
        self.in_axis = in_axis
        self.out_size = out_size

    def __call__(self, x: Array) -> Array:
        """`[..., in]` to `[..., out]` in the dtype of `x`, accumulated in float32."""
        if not is_split(self.columns):
            x = gather_over(x, self.in_axis)
        y = sum_over(matmul(x, self.kernel.get_value()), self.columns)
        if self.rows == "embed_out":
            y = gather_over(y.astype(x.dtype), self.rows, self.out_size)
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Token embedding, split by vocabulary; `attend` uses the same matrix as output head."""

    def __init__(self, vocab: int, embed: int, *, rngs: nnx.Rngs):
        self.table = param(rngs, ("vocab", "embed"), (vocab, embed))

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """int32 `[...]` to `[..., embed]`: each device looks up the rows that it holds."""
        table = self.table.get_value()
        size = table.shape[0]
        local = tokens - shard_of("vocab") * size
        held = (local >= 0) & (local < size)
        rows = take_rows(table, jnp.clip(local, 0, size - 1), jnp.float32)
        return sum_over(jnp.where(held[..., None], rows, 0), "vocab").astype(dtype)

    def attend(self, x: Array) -> Array:
        """`[..., embed]` to float32 logits `[..., vocab]` of this device's rows."""
        return matmul(x, self.table.get_value())


def rope(x: Array, positions: Array, config: RopeConfig, factors: Array | None = None) -> Array:
    """Turns heads by their positions (Su et al. 2021, arXiv:2104.09864), computed in float32.

    Args:
      x: `[batch, time, ..., head_dim]`.
      positions: int32 `[batch, time]`.
      config: frequencies and scaling.
      factors: float32 `[dim / 2]` that divide the frequencies, or None.

    Returns:
      the shape and dtype of `x`; dimensions from `config.dim` on are unchanged.
    """
    frequencies, magnitude = config.frequencies()
    frequencies = jnp.asarray(frequencies)
    if factors is not None:
        frequencies = frequencies / factors
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*positions.shape, *[1] * (x.ndim - 3), -1)
    cos, sin = jnp.cos(angles) * np.float32(magnitude), jnp.sin(angles) * np.float32(magnitude)
    turning, rest = jnp.split(x.astype(jnp.float32), [config.dim], axis=-1)
    pairs = (-1, 2) if config.interleaved else (2, -1)
    axis = -1 if config.interleaved else -2
    turning = turning.reshape(*x.shape[:-1], *pairs)
    a, b = jnp.moveaxis(turning, axis, 0)
    turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
    turned = turned.reshape(*x.shape[:-1], config.dim)
    return jnp.concatenate([turned, rest], axis=-1).astype(x.dtype)
