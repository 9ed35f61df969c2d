"""Layers of other shapes than `Block`, called as any `Layer`, and the table of all of them."""

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch
from jaxsplit.context import forward_context
from jaxsplit.models.after import PerLayerEmbedding
from jaxsplit.models.altup import AltUp, Laurel
from jaxsplit.models.block import Added, Block, Layer, Output, scaled
from jaxsplit.models.block_config import (
    AltUpBlockConfig,
    NormalizedStreamBlockConfig,
    ParallelBlockConfig,
    RoutedEarlyBlockConfig,
    StreamsBlockConfig,
    SwitchedBlockConfig,
    TokenShiftBlockConfig,
    TwoMLPsBlockConfig,
)
from jaxsplit.models.config import BlockConfig, LayerConfig
from jaxsplit.models.layers import Norm, add_norm, norm
from jaxsplit.models.modules import FeedForwardModule, module
from jaxsplit.models.moe import MoE
from jaxsplit.models.ngrams import NGrams
from jaxsplit.models.residual import Residual
from jaxsplit.models.rwkv import ChannelMix
from jaxsplit.models.switch import attach, token_adapters
from jaxsplit.ops.activations.layout import XLA_ONLY


class ParallelBlock(Layer):
    """Mixer and MLP read the same stream, and both are added to it."""

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        c, readers = self.config, self.mixer.readers(residual)
        if self.mlp_norm is None:
            readers |= self.mlp.readers(residual)
        x, residual = add_norm(y, residual, self.mixer_norm, readers)
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            y, cache = self.mixer(x, batch, cache)
            if self.mlp_norm is not None:
                x, _ = add_norm(None, residual, self.mlp_norm, self.mlp.readers(residual))
            mlp = self.mlp(x, batch.side_inputs.tokens)
        return y + (mlp if c.mlp_scale == 1 else mlp * c.mlp_scale), residual, cache


class NormalizedStreamBlock(Layer):
    """Outputs are added to what the norms have made of the stream."""

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        scale = self.config.scale
        x, residual = add_norm(y, residual, self.mixer_norm, self.mixer.readers(residual))
        residual = (x.array * scale).astype(residual.dtype)
        y, cache = self.mixer(x, batch, cache)
        x, residual = add_norm(y, residual, self.mlp_norm, self.mlp.readers(residual))
        residual = (x.array * scale).astype(residual.dtype)
        return self.mlp(x, batch.side_inputs.tokens), residual, cache


class RoutedEarlyBlock(Layer):
    """The router of the experts reads the stream before the mixer."""

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        x, residual = add_norm(y, residual, self.mixer_norm, self.mixer.readers(residual))
        stream = residual
        y, cache = self.mixer(x, batch, cache)
        x, residual = add_norm(y, residual, self.mlp_norm, self.mlp.readers(residual))
        y = cast(MoE, self.mlp)(x, batch.side_inputs.tokens, router_input=stream)
        return y, residual, cache


class TwoMLPsBlock(Layer):
    """Another MLP reads the stream before the mixer, through a norm of its own."""

    def __init__(self, config: TwoMLPsBlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        self.stream_norm = norm(config.mlp_norm, embed)
        self.stream_mlp: FeedForwardModule = module(config.stream_mlp, embed, rngs)

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        tokens = batch.side_inputs.tokens
        x, residual = add_norm(y, residual, self.mixer_norm, self.mixer.readers(residual))
        stream = residual
        y, cache = self.mixer(x, batch, cache)
        x, residual = add_norm(y, residual, self.mlp_norm, self.mlp.readers(residual))
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            before, _ = add_norm(None, stream, self.stream_norm, self.stream_mlp.readers(stream))
            y = self.stream_mlp(before, tokens) + self.mlp(x, tokens)
        return y, residual, cache


class TokenShiftBlock(Block):
    """The MLP reads the token before too, which the cache keeps."""

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        c, (mixer_cache, mlp_cache) = self.config, (None, None) if cache is None else cache
        x, residual = add_norm(y, residual, self.mixer_norm, self.mixer.readers(residual))
        y, mixer_cache = self.mixer(x, batch, mixer_cache)
        y = scaled(y, residual, c.mixer_scale, self.mixer_post_norm)
        x, residual = add_norm(y, residual, self.mlp_norm, self.mlp.readers(residual))
        y, mlp_cache = cast(ChannelMix, self.mlp)(x, batch, mlp_cache)
        y = scaled(y, residual, c.mlp_scale, self.mlp_post_norm)
        cache = None if cache is None else (mixer_cache, mlp_cache)
        return *self.finished(y, residual, batch), cache


class SwitchedBlock(Block):
    """The usual layer, with adapters that tokens switch on."""

    def __init__(self, config: SwitchedBlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        attach((self.mixer, self.mlp), config.switch, rngs)

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        cache, sums = (None, None) if cache is None else cache
        if self.config.switch.first:
            batch.side_inputs.carried, sums = token_adapters(self.config.switch, batch, sums)
        adapters = batch.side_inputs.carried
        assert adapters is not None
        with forward_context(token_adapters=adapters.astype(jnp.float32)):
            y, residual, cache = super().__call__(y, residual, batch, cache)
        return y, residual, (cache, sums)


class StreamsBlock(Layer):
    """Mixer and MLP read from and write to several streams."""

    def __init__(self, config: StreamsBlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        self.mixer_residual: Residual = module(config.mixer_residual, embed, rngs)
        self.mlp_residual: Residual = module(config.mlp_residual, embed, rngs)
        self.ngrams: NGrams | None = module(config.ngrams, embed, rngs)

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        assert y is None
        ngrams = None
        if self.ngrams is not None:
            cache, ngrams = (None, None) if cache is None else cache
            residual, ngrams = self.ngrams(residual, batch, ngrams)
        x, gates = self.mixer_residual.read(residual)
        x, _ = add_norm(None, x, self.mixer_norm, self.mixer.readers(x))
        y, cache = self.mixer(x, batch, cache)
        residual = self.mixer_residual.write(residual, y.all_reduce(residual.dtype), gates)
        x, gates = self.mlp_residual.read(residual)
        x, _ = add_norm(None, x, self.mlp_norm, self.mlp.readers(x))
        y = self.mlp(x, batch.side_inputs.tokens)
        residual = self.mlp_residual.write(residual, y.all_reduce(residual.dtype), gates)
        return None, residual, cache if ngrams is None else (cache, ngrams)


class AltUpBlock(Layer):
    """Computes one of several streams, with `Laurel` beside the mixer, and predicts the others."""

    def __init__(self, config: AltUpBlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        self.mixer_post_norm = Norm(config.mixer_post_norm, embed)
        self.mlp_post_norm = Norm(config.mlp_post_norm, embed)
        self.per_layer_embedding = PerLayerEmbedding(config.per_layer_embedding, embed, rngs=rngs)
        self.altup = AltUp(config.altup, embed, rngs=rngs)
        self.laurel = Laurel(config.altup, embed, rngs=rngs)

    def __call__(self, y: Added, residual: Array, batch: Batch, cache: Any) -> Output:
        assert y is None
        dtype, predictions = residual.dtype, self.altup.predictions(residual)
        active = predictions[:, :, 0].astype(dtype)
        x, _ = add_norm(None, active, self.mixer_norm, XLA_ONLY)
        mixed, cache = self.mixer(x, batch, cache)
        mixed = self.mixer_post_norm(mixed.all_reduce(dtype))
        active = (active + mixed + self.laurel(x.array)) * 2**-0.5
        x, _ = add_norm(None, active, self.mlp_norm, XLA_ONLY)
        hidden = self.mlp(x, batch.side_inputs.tokens).all_reduce(dtype)
        active = (active + self.mlp_post_norm(hidden)).astype(jnp.float32)
        streams = self.altup.corrected(predictions, active)
        added = self.per_layer_embedding.gated(self.altup.scaled(streams).astype(dtype), batch)
        streams = self.altup.added_to_others(streams, added.astype(jnp.float32))
        return None, streams.astype(dtype).reshape(residual.shape), cache


BLOCKS: Mapping[type[LayerConfig], type[Layer]] = {
    BlockConfig: Block,
    ParallelBlockConfig: ParallelBlock,
    NormalizedStreamBlockConfig: NormalizedStreamBlock,
    RoutedEarlyBlockConfig: RoutedEarlyBlock,
    TwoMLPsBlockConfig: TwoMLPsBlock,
    TokenShiftBlockConfig: TokenShiftBlock,
    SwitchedBlockConfig: SwitchedBlock,
    StreamsBlockConfig: StreamsBlock,
    AltUpBlockConfig: AltUpBlock,
}
"""The layer that each config describes."""
