"""A layer: a mixer of tokens and an MLP around the residual stream."""

from typing import Any

from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.config import BlockConfig, LayerConfig
from jaxsplit.models.layers import Norm, add_norm, norm
from jaxsplit.models.modules import FeedForwardModule, MixerModule, module
from jaxsplit.ops.norm.api import add

Added = Unreduced | None
"""What a layer has computed, still to be added to the residual stream; None: nothing."""

Output = tuple[Added, Array, Any]
"""What a layer has computed, the residual stream, and the layer's cache."""


class Layer(nnx.Module):
    """The parts that layers of every shape have. `Block` is the usual one, the others are in
    `blocks.py`."""

    def __init__(self, config: LayerConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.mixer_norm = norm(c.mixer_norm, embed) if c.mixer else None
        self.mixer: MixerModule = module(c.mixer, embed, rngs)
        self.mlp_norm = norm(c.mlp_norm, embed) if c.mlp else None
        self.mlp: FeedForwardModule = module(c.mlp, embed, rngs)
        self.config: Any = config

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        """What the layer makes of the residual stream.

        Args:
          y: what the layer before has computed.
          residual: the stream `[batch, time, embed]`, or several, `[batch, time, streams * embed]`.
          batch: where the tokens belong, and what accompanies the stream.
          cache: what the layer kept of earlier tokens; None: nothing.
        """
        raise NotImplementedError


class Block(Layer):
    """The usual layer: `x + mixer(norm(x))`, then `x + mlp(norm(x))` (Touvron et al. 2023,
    arXiv:2302.13971, section 2.2). The last addition is left to the next layer's norm."""

    def __init__(self, config: BlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        self.mixer_post_norm = norm(config.mixer_post_norm, embed)
        self.mlp_post_norm = norm(config.mlp_post_norm, embed)
        self.after = nnx.Dict({c.name: module(c, embed, rngs) for c in config.after})

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        c = self.config
        if c.mixer is not None:
            x, residual = add_norm(y, residual, self.mixer_norm, self.mixer.readers(residual))
            y, cache = self.mixer(x, batch, cache)
            y = scaled(y, residual, c.mixer_scale, self.mixer_post_norm)
        if c.mlp is not None:
            x, residual = add_norm(y, residual, self.mlp_norm, self.mlp.readers(residual))
            y = self.mlp(x, batch.side_inputs.tokens)
            y = scaled(y, residual, c.mlp_scale, self.mlp_post_norm)
        return *self.finished(y, residual, batch), cache

    def finished(self, y: Added, residual: Array, batch: Batch) -> tuple[Added, Array]:
        """The stream after the layer: `y` is added only if something is done to the sum."""
        if not self.config.after:
            return y, residual
        residual = add(y, residual)
        for step in self.config.after:
            residual = self.after[step.name](residual, batch)
        return None, residual


def scaled(y: Unreduced, residual: Array, scale: float, norm: Norm | None) -> Unreduced:
    """What a mixer or an MLP adds to the stream, scaled and normalized if need be."""
    if norm is None and scale == 1:
        return y
    total = y.all_reduce(residual.dtype) * scale
    return Unreduced.of(total if norm is None else norm(total))
