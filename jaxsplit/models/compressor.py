"""Blocks of tokens as single entries, for attention and for indexers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch, RecurrentCache
from jaxsplit.models.layers import Linear, param
from jaxsplit.models.mixer_config import PoolConfig
from jaxsplit.ops.activations.layout import Activations
from jaxsplit.quant import dequantize
from jaxsplit.sharding.axes import EMBED, LATENT, Axis


class BlockPool(nnx.Module):
    """Softmax pooling of the tokens of each block, element by element (DeepSeek-AI 2026,
    DeepSeek-V4, compressed sparse attention).

    An entry exists from the last token of its block on. With `overlap` it is pooled from the block
    before, too, which has values and scores of its own.
    """

    def __init__(self, config: PoolConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.gate = Linear(EMBED, embed, LATENT, c.row_width, rngs=rngs) if c.gated else None
        shape = c.block, c.row_width
        self.place = param(rngs, (Axis("place"), LATENT), shape) if c.gated else None
        self.config = config

    def __call__(
        self,
        x: Activations,
        rows: Array,
        batch: Batch,
        cache: RecurrentCache | None,
        finish: Callable[[Array, Array], Array],
    ) -> tuple[Array, RecurrentCache | None]:
        """Pools the blocks that are complete.

        Args:
          x: `[batch, time, embed]`.
          rows: what is pooled, `[batch, time, row_width]`.
          batch: where the tokens belong.
          cache: of earlier tokens; None: there are none.
          finish: of entries, float32 `[batch, blocks, width]`, and the positions of their blocks'
            first tokens, int32 `[batch, blocks]`.

        Returns:
          float32 entries `[batch, blocks, width]`, and the updated cache.
        """
        c, positions = self.config, batch.positions
        (size, time), before = positions.shape, c.rows_before
        rows = rows.astype(jnp.float32)
        scores = jnp.zeros_like(rows)
        if self.gate is not None and self.place is not None:
            place = dequantize(self.place.get_value(), jnp.float32)
            scores = self.gate(x).astype(jnp.float32) + place[positions % c.block]
        rows = jnp.concatenate([rows, scores], axis=-1)
        if cache is None:
            earlier = jnp.zeros((size, before, rows.shape[-1]))
            entries = jnp.zeros((size, max(1, time // c.block), c.width))
        else:
            earlier, entries = cache.read(batch).inputs
        rows = jnp.concatenate([earlier, rows], axis=1)
        count, first = (positions >= 0).sum(axis=1)[:, None], jnp.maximum(positions[:, :1], 0)
        block = first // c.block + jnp.arange(time // c.block + 1)
        end = c.block * (block + 1) - 1 - first  # the new token that completes the block
        window = jnp.clip(end[..., None] + jnp.arange(before + 1), 0, rows.shape[1] - 1)
        pooled = rows[jnp.arange(size)[:, None, None], window]
        pooled = finish(self._pooled(pooled, block), c.block * block)
        target = jnp.where((end >= 0) & (end < count), block, entries.shape[1])
        entries = entries.at[jnp.arange(size)[:, None], target].set(pooled, mode="drop")
        if cache is not None:
            last = (count + jnp.arange(before))[..., None]
            new = RecurrentCache((jnp.take_along_axis(rows, last, axis=1), entries))
            cache = cache.write(new, batch)
        return entries, cache

    def _pooled(self, window: Array, block: Array) -> Array:
        """Pools windows of tokens, `[batch, blocks, tokens, 2 * row_width]`, of blocks with these
        numbers: `[batch, blocks, width]`."""
        c = self.config
        rows, scores = jnp.split(window, 2, axis=-1)
        if c.overlap:
            rows, scores = (
                jnp.concatenate([x[:, :, : c.block, : c.width], x[:, :, c.block :, c.width :]], 2)
                for x in (rows, scores)
            )
            exists = (block > 0)[..., None] | (jnp.arange(2 * c.block) >= c.block)
            scores = jnp.where(exists[..., None], scores, -jnp.inf)
        return (jax.nn.softmax(scores, axis=2) * rows).sum(axis=2)


def complete_blocks(positions: Array, block: int) -> Array:
    """How many blocks are complete after each position: int32, shaped as `positions`."""
    return (positions + 1) // block
