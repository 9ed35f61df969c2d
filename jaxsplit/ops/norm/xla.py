"""Norms in float32, computed by XLA."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.comm.api import all_reduce_unique_units
from jaxsplit.ops.norm.spec import NormParams


def normalize(x: Array, norm: NormParams) -> Array:
    """`[..., size]` to the same shape and dtype."""
    group = norm.group
    x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, group or x.shape[-1])

    def mean(values: Array) -> Array:
        if group:
            return values.mean(axis=-1, keepdims=True)
        total = all_reduce_unique_units(values.sum(axis=-1, keepdims=True), norm.axis)
        return total / norm.size

    if norm.config.kind == "layer":
        x32 = x32 - mean(x32)
    y = x32 * jax.lax.rsqrt(mean(x32 * x32) + norm.config.epsilon)
    y = y.reshape(x.shape)
    if norm.scale is not None:
        y = y * norm.scale
    if norm.bias is not None:
        y = y + norm.bias
    return y.astype(x.dtype)
