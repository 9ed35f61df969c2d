"""Embeddings of n-grams of tokens, looked up by hashes and added to the residual streams."""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.models.layers import Embedding, Linear, Norm, param
from jaxsplit.models.residual_config import NGramConfig
from jaxsplit.quant import dequantize
from jaxsplit.sharding.axes import EMBED, LATENT, Axis

_LIMBS = 4  # of 16 bits each: JAX computes in 32 bits


def _times(tokens: Array, multiplier: int) -> list[Array]:
    """Token ids times a number, modulo 2**64: limbs of 16 bits, the lowest first."""
    tokens = tokens.astype(jnp.uint32)
    digits = tokens & 0xFFFF, tokens >> 16
    limbs, carry = [], jnp.zeros_like(tokens)
    sums = [carry] * (_LIMBS + 1)
    for i, digit in enumerate(digits):
        for j in range(_LIMBS - i):
            product = digit * np.uint32((multiplier >> (16 * j)) & 0xFFFF)
            sums[i + j] = sums[i + j] + (product & 0xFFFF)
            sums[i + j + 1] = sums[i + j + 1] + (product >> 16)
    for limb in sums[:_LIMBS]:
        total = limb + carry
        limbs.append(total & 0xFFFF)
        carry = total >> 16
    return limbs


def _modulo(limbs: list[Array], size: int) -> Array:
    """The remainder of a number of 64 bits, int32; `size` is at most 2**24."""
    remainder = jnp.zeros_like(limbs[0])
    for limb in limbs[::-1]:
        for byte in (limb >> 8, limb & 0xFF):
            remainder = (remainder * 256 + byte) % np.uint32(size)
    return remainder.astype(jnp.int32)


class NGrams(nnx.Module):
    """Embeddings of the last tokens, gated by the streams, and a convolution over them."""

    def __init__(self, config: NGramConfig, embed: int, *, rngs: nnx.Rngs):
        c, width = config, config.streams * embed
        self.embedding = Embedding(c.rows, c.width, rngs=rngs)
        self.key = Linear(EMBED, embed, LATENT, width, rngs=rngs)
        self.value = Linear(EMBED, embed, LATENT, embed, rngs=rngs)
        self.key_norm, self.query_norm, self.conv_norm = (
            Norm(c.norm, width, EMBED, group=embed) for _ in range(3)
        )
        self.kernel = param(rngs, (EMBED, Axis("conv")), (width, c.kernel_size))
        self.config = config

    def __call__(
        self, streams: Array, batch: Batch, cache: RecurrentCache | None
    ) -> tuple[Array, RecurrentCache | None]:
        """Adds to the streams.

        Args:
          streams: `[batch, time, streams * embed]`.
          batch: positions of the tokens, and their ids.
          cache: the last tokens, and what the convolution has seen; None: nothing.

        Returns:
          the streams, and the updated cache.
        """
        c, shape = self.config, streams.shape[:2]
        past = (None, None) if cache is None else cache.read(batch).inputs
        count = (batch.positions >= 0).sum(axis=1)[:, None]
        assert batch.side_inputs.tokens is not None
        rows, tokens = self._rows(batch.side_inputs.tokens, past[0], count)
        e = self.embedding(rows, streams.dtype).reshape(*shape, -1)

        def split(x: Array) -> Array:
            return x.astype(jnp.float32).reshape(*shape, c.streams, -1)

        keys = split(self.key_norm(self.key(e)))
        scores = (keys * split(self.query_norm(streams))).sum(axis=-1) * keys.shape[-1] ** -0.5
        gates = jax.nn.sigmoid(jnp.sign(scores) * jnp.sqrt(jnp.maximum(jnp.abs(scores), 1e-6)))
        added = gates[..., None] * self.value(e).astype(jnp.float32)[:, :, None]
        added = added.reshape(*shape, -1)
        normed, before = self.conv_norm(added), (c.kernel_size - 1) * c.size
        earlier = jnp.zeros((shape[0], before, normed.shape[-1])) if past[1] is None else past[1]
        inputs = jnp.concatenate([earlier, normed], axis=1)
        kernel = dequantize(self.kernel.get_value(), jnp.float32)
        taps = (inputs[:, k * c.size :][:, : shape[1]] * kernel[:, k] for k in range(c.kernel_size))
        streams = (streams + added + jax.nn.silu(reduce(add, taps))).astype(streams.dtype)
        if cache is not None:
            last = (count + jnp.arange(before))[..., None]
            new = RecurrentCache((tokens, jnp.take_along_axis(inputs, last, axis=1)))
            cache = cache.write(new, batch)
        return streams, cache

    def _rows(self, tokens: Array, past: Array | None, count: Array) -> tuple[Array, Array]:
        """Rows of the table, int32 `[batch, time, heads]`, and the last tokens.

        Args:
          tokens: int32 `[batch, time]`.
          past: the last tokens before plus 1, 0 for none, float32 `[batch, size - 1, 1]`; None:
            there are none.
          count: how many tokens there are, int32 `[batch, 1]`.
        """
        c, (size, time) = self.config, tokens.shape
        before = c.size - 1
        earlier = jnp.zeros((size, before), jnp.int32)
        if past is not None:
            earlier = past[..., 0].astype(jnp.int32)
        known = jnp.concatenate([earlier, tokens + 1], axis=1)
        ended = jnp.zeros((size, time), bool)
        mix = [jnp.zeros((size, time), jnp.uint32)] * _LIMBS
        rows = []
        for n in range(c.size):
            token = known[:, before - n : before - n + time] - 1
            # Tokens before an end of text do not count.
            ended = ended | (token < 0) | (token == c.eos)
            token = jnp.where(ended, c.eos, token)
            hashed = _times(token, c.multipliers[n])
            mix = [a ^ b for a, b in zip(mix, hashed, strict=True)]
            if n:
                heads = range((n - 1) * c.heads, n * c.heads)
                rows += [_modulo(mix, c.sizes[h]) + c.offsets[h] for h in heads]
        last = jnp.take_along_axis(known, count + jnp.arange(before), axis=1)
        return jnp.stack(rows, axis=-1), last[..., None].astype(jnp.float32)
