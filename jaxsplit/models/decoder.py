"""The decoder: layers over a residual stream, made from a `ModelConfig`.

Sizes in the forward pass are read off the parameters, not the config: on a mesh each device runs
the same code over the heads, hidden units and vocabulary rows that it holds.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch, Cache
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import ForwardContext, current_context, forward_context
from jaxsplit.models.altup import AltUp, AltUpProjections, Laurel, altup_layer
from jaxsplit.models.attention import Attention, TokenwiseLinear
from jaxsplit.models.compressed import CompressedAttention
from jaxsplit.models.config import (
    BlockConfig,
    DenseMoEConfig,
    GroveMoEConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from jaxsplit.models.hybrid import Hybrid
from jaxsplit.models.indexer import BlockSparseAttention
from jaxsplit.models.kda import KimiDeltaAttention, LightningAttention
from jaxsplit.models.layers import (
    Embedding,
    Linear,
    Norm,
    PerLayerEmbedding,
    PerLayerEmbeddings,
    add_norm,
    norm,
    param,
)
from jaxsplit.models.linear_attention import DeltaNet, Mamba2, ShortConv
from jaxsplit.models.mamba import Mamba
from jaxsplit.models.mixer_config import (
    CARRIED,
    TOKENS,
    BlockSparseConfig,
    ChannelMixConfig,
    CompressedAttentionConfig,
    DeltaNetConfig,
    HybridConfig,
    KDAConfig,
    LatentAttentionConfig,
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MambaConfig,
    RWKV6Config,
    RWKV7Config,
    ShortConvConfig,
)
from jaxsplit.models.mla import LatentAttention
from jaxsplit.models.mlp import MLP
from jaxsplit.models.moe import DenseMoE, GroveMoE, MoE
from jaxsplit.models.ngrams import NGrams
from jaxsplit.models.residual import (
    AttentionResidual,
    HyperConnection,
    HyperHead,
    LowRankConnection,
    Residual,
)
from jaxsplit.models.residual_config import (
    AltUpConfig,
    AttentionResidualConfig,
    HyperConnectionConfig,
    HyperHeadConfig,
    LowRankConnectionConfig,
    NGramConfig,
)
from jaxsplit.models.rwkv import RWKV6, RWKV7, ChannelMix
from jaxsplit.models.switch import attach, token_adapters
from jaxsplit.ops.activations.layout import Activations, Readers
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.matmul.api import matmul
from jaxsplit.ops.matmul.api import readers_of as matmul_readers
from jaxsplit.ops.norm.api import add
from jaxsplit.quant import Weight, take_rows
from jaxsplit.sharding.axes import EMBED, Axis


class MixerModule(Protocol):
    """A module that lets tokens see one another."""

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        ...

    def __call__(self, x: Activations, batch: Batch, cache: Any) -> tuple[Unreduced, Any]:
        """`[batch, time, embed]` to the same, and the cache with these tokens."""
        ...


class FeedForwardModule(Protocol):
    """A module that transforms each token by itself."""

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`."""
        ...

    def __call__(self, x: Activations) -> Unreduced:
        """`[..., embed]` to the same."""
        ...


MODULES: Mapping[type, Callable[..., Any]] = {
    AttentionConfig: Attention,
    LatentAttentionConfig: LatentAttention,
    DeltaNetConfig: DeltaNet,
    Mamba2Config: Mamba2,
    ShortConvConfig: ShortConv,
    LinearConfig: TokenwiseLinear,
    HybridConfig: Hybrid,
    BlockSparseConfig: BlockSparseAttention,
    CompressedAttentionConfig: CompressedAttention,
    KDAConfig: KimiDeltaAttention,
    LightningConfig: LightningAttention,
    MambaConfig: Mamba,
    RWKV6Config: RWKV6,
    RWKV7Config: RWKV7,
    ChannelMixConfig: ChannelMix,
    MLPConfig: MLP,
    MoEConfig: MoE,
    DenseMoEConfig: DenseMoE,
    GroveMoEConfig: GroveMoE,
    HyperConnectionConfig: HyperConnection,
    HyperHeadConfig: HyperHead,
    LowRankConnectionConfig: LowRankConnection,
    AttentionResidualConfig: AttentionResidual,
    AltUpConfig: AltUpProjections,
    NGramConfig: NGrams,
}
"""The module that each config of a mixer, an MLP or a residual connection describes."""


def module(config: Any, embed: int, rngs: nnx.Rngs) -> Any:
    """The module of a mixer's or an MLP's config; None for None."""
    return None if config is None else MODULES[type(config)](config, embed, rngs=rngs)


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: BlockConfig, embed: int, *, rngs: nnx.Rngs):
        c = config
        self.mixer_norm = norm(c.mixer_norm, embed) if c.mixer else None
        self.mixer: MixerModule | None = module(c.mixer, embed, rngs)
        self.mixer_post_norm = norm(c.mixer_post_norm, embed)
        self.mlp_norm = norm(c.mlp_norm, embed) if c.mlp else None
        self.mlp: FeedForwardModule | None = module(c.mlp, embed, rngs)
        self.mlp_post_norm = norm(c.mlp_post_norm, embed)
        self.stream_norm = norm(c.mlp_norm, embed) if c.stream_mlp else None
        self.stream_mlp: FeedForwardModule | None = module(c.stream_mlp, embed, rngs)
        self.per_layer_embedding = (
            PerLayerEmbedding(c.per_layer_embedding, embed, c.per_layer_embedding_norm, rngs=rngs)
            if c.per_layer_embedding
            else None
        )
        self.output_scale = param(None, (Axis("scalar"),), (1,)) if c.output_scale else None
        self.end_norm = norm(c.end_norm, embed)
        self.carried_scale = param(None, (Axis("scalar"),), (1,)) if c.carried_scale else None
        self.config = config

    def __call__(
        self,
        y: Unreduced | None,
        residual: Array,
        batch: Batch,
        cache: Any,
        per_layer_embedding: Array | None = None,
    ) -> tuple[Unreduced | None, Array, Any]:
        """What the layer makes of the residual stream.

        Args:
          y: what the layer before has computed, still to be added to the stream; None: nothing.
          residual: `[batch, time, embed]`.
          batch: where the tokens belong.
          cache: what the layer kept of earlier tokens; None: nothing.
          per_layer_embedding: the tokens' embeddings for this layer, `[batch, time, width]`.

        Returns:
          what this layer has computed, still to be added, the stream, and the layer's cache.
        """
        c, stream = self.config, None
        mlp_cache = None
        if has_state := isinstance(self.mlp, ChannelMix):
            cache, mlp_cache = (None, None) if cache is None else cache
        if self.mixer is not None:
            x, residual = add_norm(y, residual, self.mixer_norm, self._mixer_readers(residual))
            stream = residual
            residual = self._after_norm(x, residual)
            if c.parallel:
                y, cache = self._parallel(x, residual, batch, cache)
                return self._scaled(y, residual), residual, cache
            y, cache = self.mixer(x, batch, cache)
            y = self._scaled(y, residual, self.mixer_post_norm, c.mixer_scale)
        if self.mlp is not None:
            x, residual = add_norm(y, residual, self.mlp_norm, self.mlp.readers(residual))
            residual = self._after_norm(x, residual)
            if isinstance(self.mlp, ChannelMix):
                y, mlp_cache = cast(ChannelMix, self.mlp)(x, batch, mlp_cache)
            else:
                y = self._transformed(x, residual if stream is None else stream, batch)
            y = self._scaled(y, residual, self.mlp_post_norm, c.mlp_scale)
        if has_state and mlp_cache is not None:
            cache = cache, mlp_cache
        if not self._ends_in_stream:
            return y, residual, cache
        residual = add(y, residual)
        if self.per_layer_embedding is not None:
            assert per_layer_embedding is not None
            residual = residual + self.per_layer_embedding(residual, per_layer_embedding)
        if self.output_scale is not None:
            residual = (residual * self.output_scale.get_value()).astype(residual.dtype)
        if self.carried_scale is not None:
            carried = batch.lent[CARRIED] * self.carried_scale.get_value()
            residual = (residual + carried).astype(residual.dtype)
        residual = residual * c.stream_scale
        if self.end_norm is not None:
            residual = self.end_norm(residual)
        if c.exchange is not None:
            carried = batch.lent[CARRIED]
            batch.lent[CARRIED] = residual if c.exchange == "swap" else carried
            residual = residual + carried
        return None, residual, cache

    @property
    def _ends_in_stream(self) -> bool:
        """Whether something is done to the stream after the MLP."""
        modules = (
            *(self.per_layer_embedding, self.output_scale, self.carried_scale, self.end_norm),
            self.config.exchange,
        )
        return any(m is not None for m in modules) or self.config.stream_scale != 1

    def _after_norm(self, x: Activations, residual: Array) -> Array:
        """The stream to add to: as it was, or, after a norm, what the norm has made of it."""
        scale = self.config.normalized_residual
        return residual if scale is None else (x.array * scale).astype(residual.dtype)

    def _parallel(
        self, x: Activations, residual: Array, batch: Batch, cache: Any
    ) -> tuple[Unreduced, Any]:
        """What mixer and MLP write that both read the stream before the layer."""
        assert self.mixer is not None and self.mlp is not None
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            y, cache = self.mixer(x, batch, cache)
            if self.mlp_norm is not None:
                x, _ = add_norm(None, residual, self.mlp_norm, self.mlp.readers(residual))
            mlp = self.mlp(x)
        c = self.config
        y = y if c.mixer_scale == 1 else y * c.mixer_scale
        return y + (mlp if c.mlp_scale == 1 else mlp * c.mlp_scale), cache

    def _transformed(self, x: Activations, stream: Array, batch: Batch) -> Unreduced:
        """The outputs of the MLPs, of `stream` before the mixer and `x` after it."""
        assert self.mlp is not None
        if isinstance(self.mlp, MoE) and self.config.routes_stream:
            return self.mlp(x, stream)
        if isinstance(self.mlp, MoE) and self.mlp.config.by_token:
            return self.mlp(x, tokens=batch.lent[TOKENS])
        if self.stream_mlp is None:
            return self.mlp(x)
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            before, _ = add_norm(None, stream, self.stream_norm, self.stream_mlp.readers(stream))
            return self.stream_mlp(before) + self.mlp(x)

    def _mixer_readers(self, x: Array) -> Readers:
        """Who reads the normalized stream: the mixer, and perhaps the MLP beside it."""
        assert self.mixer is not None
        readers = self.mixer.readers(x)
        return readers | self.mlp.readers(x) if self.mlp and self._shares_norm else readers

    @property
    def _shares_norm(self) -> bool:
        return self.config.parallel and self.mlp_norm is None

    def _scaled(
        self, y: Unreduced, residual: Array, norm: Norm | None = None, scale: float = 1.0
    ) -> Unreduced:
        """What a mixer or an MLP adds to the stream, scaled and normalized if need be."""
        after = self.config.residual_scale
        if norm is None and scale == after == 1:
            return y
        total = y.all_reduce(residual.dtype) * scale
        return Unreduced.of((total if norm is None else norm(total)) * after)


class StreamsBlock(Block):
    """A layer whose mixer and MLP read from and write to several streams."""

    def __init__(self, config: BlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        mixer = mlp = config.residual
        if isinstance(mixer, AttentionResidualConfig):  # blocks of layers begin before mixers
            mlp = dataclasses.replace(mixer, begins=False)
        self.mixer_residual: Residual = module(mixer, embed, rngs)
        self.mlp_residual: Residual = module(mlp, embed, rngs)
        self.ngrams: NGrams | None = module(config.ngrams, embed, rngs)

    def __call__(
        self,
        y: Unreduced | None,
        residual: Array,
        batch: Batch,
        cache: Any,
        per_layer_embedding: Array | None = None,
    ) -> tuple[Unreduced | None, Array, Any]:
        """As `Block.__call__`; the stream is `[batch, time, streams * embed]`."""
        assert y is None and self.mixer is not None and self.mlp is not None
        ngram_cache = None
        if self.ngrams is not None:
            cache, ngram_cache = (None, None) if cache is None else cache
            residual, ngram_cache = self.ngrams(residual, batch, ngram_cache)
        x, gates = self.mixer_residual.read(residual)
        x, _ = add_norm(None, x, self.mixer_norm, self.mixer.readers(x))
        y, cache = self.mixer(x, batch, cache)
        residual = self.mixer_residual.write(residual, y.all_reduce(residual.dtype), gates)
        x, gates = self.mlp_residual.read(residual)
        x, _ = add_norm(None, x, self.mlp_norm, self.mlp.readers(x))
        y = self._transformed(x, x.array, batch)
        residual = self.mlp_residual.write(residual, y.all_reduce(residual.dtype), gates)
        return None, residual, cache if ngram_cache is None else (cache, ngram_cache)


class AltUpBlock(Block):
    """A layer that computes one of several streams."""

    def __init__(self, config: BlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        assert isinstance(config.residual, AltUpConfig)
        self.altup = AltUp(config.residual, embed, rngs=rngs)
        self.laurel = Laurel(config.residual, embed, rngs=rngs)

    def __call__(
        self,
        y: Unreduced | None,
        residual: Array,
        batch: Batch,
        cache: Any,
        per_layer_embedding: Array | None = None,
    ) -> tuple[Unreduced | None, Array, Any]:
        """As `Block.__call__`; the stream is `[batch, time, streams * embed]`."""
        assert y is None
        return altup_layer(self, residual, batch, cache, per_layer_embedding)


class SwitchedBlock(Block):
    """A layer with adapters that tokens switch on."""

    def __init__(self, config: BlockConfig, embed: int, *, rngs: nnx.Rngs):
        super().__init__(config, embed, rngs=rngs)
        assert config.switch is not None
        attach((self.mixer, self.mlp), config.switch, rngs)

    def __call__(
        self,
        y: Unreduced | None,
        residual: Array,
        batch: Batch,
        cache: Any,
        per_layer_embedding: Array | None = None,
    ) -> tuple[Unreduced | None, Array, Any]:
        """As `Block.__call__`."""
        switch, sums = self.config.switch, None
        assert switch is not None
        if switch.first:
            cache, sums = (None, None) if cache is None else cache
            batch.lent[CARRIED], sums = token_adapters(switch, batch, sums)
        with forward_context(token_adapters=batch.lent[CARRIED].astype(jnp.float32)):
            y, residual, cache = super().__call__(y, residual, batch, cache, per_layer_embedding)
        return y, residual, cache if sums is None else (cache, sums)


def block_class(config: BlockConfig) -> type[Block]:
    """The kind of layer that a config describes."""
    if isinstance(config.residual, AltUpConfig):
        return AltUpBlock
    if config.switch is not None:
        return SwitchedBlock
    return Block if config.residual is None else StreamsBlock


@functools.partial(jax.jit, static_argnums=1)
def _run_block(
    context: ForwardContext,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    stream: tuple[Unreduced | None, Array],
    batch: Batch,
    cache: Any,
    per_layer_embedding: Array | None,
) -> tuple[tuple[Unreduced | None, Array], Any, Mapping]:
    """`Block.__call__` as a program of its own, traced once for all layers that are alike.

    Args:
      context: of the forward pass.
      graphdef, state: the block.
      stream: `y` and `residual`.
      batch, cache, per_layer_embedding: its other arguments.

    Returns:
      the stream, the cache, and `batch.lent`.
    """
    with forward_context(context):
        block = nnx.merge(graphdef, state)
        y, residual, cache = block(*stream, batch, cache, per_layer_embedding)
    return (y, residual), cache, batch.lent


class Decoder(nnx.Module):
    """A language model: tokens in, logits out.

    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> logits, _ = model(tokens)

    A decoder may be a part of a model: a run of its layers, the embedding with the first of them,
    norm and head with the last. A part without the embedding takes the output of the part before.

    Args:
      config: what to build.
      layers: which layers; None: all.
      dtype: of the activations.
      rngs: for the parameters' initial values.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers = range(config.layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.layers
        c, blocks = config, config.blocks[layers.start : layers.stop]
        self.embedding = (
            Embedding(c.vocab, c.embed, rngs=rngs) if self.first or (self.last and c.tied) else None
        )
        self.positions = (
            param(rngs, (Axis("positions"), EMBED), (c.learned_positions, c.embed))
            if self.first and c.learned_positions
            else None
        )
        self.embedding_norm = norm(c.embedding_norm, c.embed) if self.first else None
        ropes = [getattr(block.mixer, "rope", None) for block in blocks]
        ropes = {rope.freq_factors: rope for rope in ropes if rope}
        self.freq_factors = nnx.Dict(
            {
                name: param(None, (Axis("rope"),), (rope.dim // 2,))
                for name, rope in ropes.items()
                if name
            }
        )
        width, of_layers = c.blocks[0].per_layer_embedding, c.blocks[0].per_layer_embedding_norm
        self.per_layer_embeddings = (
            PerLayerEmbeddings(c.vocab, c.embed, c.layers, width, of_layers, rngs=rngs)
            if self.first and width
            else None
        )
        made: dict[int, Block] = {}
        for i, block in zip(layers, blocks, strict=True):
            if (first := c.first_use(i)) not in made:
                made[first] = block_class(block)(block, c.embed, rngs=rngs)
        self.blocks = nnx.List([made[c.first_use(i)] for i in layers])
        self.embedding_offset = (
            nnx.Param(jnp.zeros(c.embed, jnp.float32), axes=(EMBED,))
            if self.first and c.embedding_offset
            else None
        )
        altup = c.head_residual if isinstance(c.head_residual, AltUpConfig) else None
        self.altup = module(altup, c.embed, rngs) if self.first else None
        self.head_residual = module(c.head_residual, c.embed, rngs) if self.last else None
        self.norm = norm(c.norm, c.embed) if self.last else None
        vocab = Axis("vocab", c.vocab)
        self.head = (
            Linear(EMBED, c.embed, vocab, c.vocab, bias=c.head_bias, rngs=rngs)
            if self.last and not c.tied
            else None
        )
        self.config = config
        self.layers = layers
        self.dtype = dtype

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: Cache | None = None,
        slots: Array | None = None,
        pages: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Logits of every position.

        Args:
          tokens: int32 `[batch, time]`; of a part, as `hidden` takes them.
          positions: int32 `[batch, time]`, consecutive, negative for padding, which comes last;
            None counts from 0.
          cache: what earlier tokens left, from `init_cache`; None: there are none.
          slots: int32 `[batch]`: where in the cache the sequences are; None: in order.
          pages: int32 `[batch, pages]`: the pages of the cache that each sequence has, in order;
            None: its slot.

        Returns:
          float32 logits `[batch, time, vocab]` and the cache with these tokens added.
        """
        stream, cache = self._layers(tokens, positions, cache, slots, pages)
        return self._logits(*stream), cache

    def hidden(
        self,
        inputs: Array,
        positions: Array | None = None,
        cache: Cache | None = None,
        slots: Array | None = None,
        pages: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """The last layer's output.

        Args:
          inputs: tokens, or the output `[batch, time, width]` of the part before.
          positions, cache, slots, pages: as in `__call__`.

        Returns:
          `[batch, time, width]` and the cache; the width is `ModelConfig.stream_width`.
        """
        (y, residual), cache = self._layers(inputs, positions, cache, slots, pages)
        return add(y, residual), cache

    def _layers(
        self,
        inputs: Array,
        positions: Array | None,
        cache: Cache | None,
        slots: Array | None,
        pages: Array | None,
    ) -> tuple[tuple[Unreduced | None, Array], Cache | None]:
        """`hidden`, as what the last layer has computed and the stream to add it to."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        factors = {name: factor.get_value() for name, factor in self.freq_factors.items()}
        batch = Batch(positions, slots, pages, factors)
        if self.first and self.config.looks_up_tokens:
            batch.lent[TOKENS] = inputs
        if self.first:
            residual, per_layer_embeddings = self._embed(inputs, positions)
        else:
            residual, per_layer_embeddings = self._split_stream(inputs)
        if self.first and self.config.carries_embedding:
            batch.lent[CARRIED] = residual
            if self.embedding_offset is not None:
                residual = (residual + self.embedding_offset.get_value()).astype(residual.dtype)
        elif (width := self.config.carried) and not self.first:
            assert per_layer_embeddings is not None
            batch.lent[CARRIED] = per_layer_embeddings[..., -width:]
            _, per_layer_embeddings = self._split_stream(inputs[..., :-width])
        y, caches, context = None, [], current_context()
        for i, block in enumerate(self.blocks):
            per_layer_embedding = None
            if per_layer_embeddings is not None:
                per_layer_embedding, per_layer_embeddings = self._split_stream(
                    per_layer_embeddings, block.config.per_layer_embedding
                )
            layer_cache = None if cache is None else cache[i]
            stream = y, residual
            (y, residual), layer_cache, lent = _run_block(
                context, *nnx.split(block), stream, batch, layer_cache, per_layer_embedding
            )
            batch = dataclasses.replace(batch, lent=lent)
            caches.append(layer_cache)
        carried = batch.lent[CARRIED] if self.config.carried and not self.last else None
        beside = [part for part in (per_layer_embeddings, carried) if part is not None]
        if self.head_residual is not None:
            residual, _ = self.head_residual.read(residual)
        if beside:
            y, residual = None, jnp.concatenate([add(y, residual), *beside], axis=-1)
        return (y, residual), None if cache is None else caches

    def logits(self, x: Array) -> Array:
        """`[..., embed]` to float32 logits `[..., vocab]`; on a mesh, of this device's rows."""
        return self._logits(None, x)

    def normalized(self, x: Array) -> Array:
        """The last layer's output as the head reads it, `[..., embed]`."""
        return x if self.norm is None else self.norm(x)

    def _logits(self, y: Unreduced | None, residual: Array) -> Array:
        """Logits of the stream with what the last layer has computed."""
        c, w = self.config, self._head_matrix
        head = self.head
        readers = matmul_readers(residual, [w]) if head is None else head.readers(residual)
        x, _ = add_norm(y, residual, self.norm, readers)
        logits = matmul(x, w)
        if head is not None and head.bias is not None:
            logits = logits + head.bias.get_value()
        if head is not None and head.lora is not None:
            logits = logits + head.lora(x)
        logits = logits * c.logit_scale
        if c.logit_softcap is None:
            return logits
        return c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    @property
    def _head_matrix(self) -> Weight:
        """The output head, or the embedding if they are tied: `[vocab, embed]`."""
        if self.head is not None:
            return self.head.kernel.get_value()
        assert self.embedding is not None
        return self.embedding.table.get_value()

    def _split_stream(self, x: Array, width: int | None = None) -> tuple[Array, Array | None]:
        """Splits off the first `width` elements, by default the residual stream; the rest is None
        if nothing remains."""
        width = width or self.config.streams(self.layers.start) * self.config.embed
        return x[..., :width], x[..., width:] if x.shape[-1] > width else None

    def _embed(self, tokens: Array, positions: Array) -> tuple[Array, Array | None]:
        """The residual stream and the embeddings for each layer."""
        assert self.embedding is not None
        given = tokens
        for token, other in self.config.substitutes:
            tokens = jnp.where(given == token, other, tokens)
        x = self.embedding(tokens, self.dtype) * self.config.embedding_scale
        if self.positions is not None:
            table = self.positions.get_value()
            x = x + take_rows(table, jnp.maximum(positions, 0), self.dtype)
        x = (x if self.embedding_norm is None else self.embedding_norm(x)).astype(self.dtype)
        beside = self.per_layer_embeddings and self.per_layer_embeddings(tokens, x)
        if self.altup is not None:
            return self.altup.begin(x), beside
        return jnp.tile(x, self.config.streams(0)), beside
