"""What a decoder looks like: sizes and choices, independent of where they came from."""

import dataclasses
import functools
import itertools
from typing import Any

import jax.numpy as jnp

from jaxsplit.models.mixer_config import ChannelMixConfig, LatentAttentionConfig, Mixer
from jaxsplit.models.residual_config import (
    AfterConfig,
    AltUpConfig,
    HeadResidualConfig,
    PerLayerEmbeddingConfig,
)
from jaxsplit.models.stream import StreamLayout
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.moe.spec import MLPConfig, MoEConfig
from jaxsplit.ops.norm.spec import NormConfig


@dataclasses.dataclass(frozen=True)
class DenseMoEConfig:
    """An MLP and a mixture of experts side by side.

    Attributes:
      dense: the MLP.
      moe: the experts.
      norm: of what each of them reads and writes; the router reads the stream normalized without
        parameters, times a vector. None: no norms.
      router_scale: multiplies the router's normalized input.
    """

    dense: MLPConfig
    moe: MoEConfig
    norm: NormConfig | None = None
    router_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class GroveMoEConfig:
    """A mixture of experts, and smaller experts of groups of them that read its output.

    Attributes:
      moe: the mixture.
      chunk: each of the smaller experts.
      per_group: experts of a group.
      scale: multiplies what the smaller experts add.
    """

    moe: MoEConfig
    chunk: MLPConfig
    per_group: int
    scale: float


FeedForward = GroveMoEConfig | MLPConfig | MoEConfig | DenseMoEConfig | ChannelMixConfig


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What layers of every shape have: a mixer of tokens and an MLP, which read a residual stream.

    Attributes:
      mixer: how tokens see one another; None: the layer has no mixer.
      mlp: what is done to each token; None: the layer has no MLP.
      mixer_norm, mlp_norm: of what they read; None: no norm.
      source: which layer of the file it is, several layers may be one; None: its number.
    """

    mixer: Mixer | None
    mlp: FeedForward | None
    mixer_norm: NormConfig | None = NormConfig()
    mlp_norm: NormConfig | None = NormConfig()
    source: int | None = dataclasses.field(default=None, compare=False, kw_only=True)

    @property
    def streams(self) -> int:
        """How many residual streams it reads if it is the first layer."""
        return max(self._of_parts("streams"), default=1)

    @property
    def begins_stream(self) -> bool:
        """Whether later layers read one stream more."""
        return any(self._of_parts("begins"))

    @property
    def by_token(self) -> bool:
        """Whether something is looked up by token ids."""
        return any(self._of_parts("by_token"))

    def cache(self, context: int, dtype: jnp.dtype) -> Any:
        """What it keeps of a sequence: a tree of `CacheArray`s, or one for each of several parts
        that keep something; None: nothing."""
        caches = tuple(cache(context, dtype) for cache in self._of_parts("cache"))
        return caches if len(caches) > 1 else next(iter(caches), None)

    def _of_parts(self, name: str) -> list[Any]:
        """An attribute of those of its parts that have it, in the order of fields."""
        parts = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [getattr(part, name) for part in parts if hasattr(part, name)]


@dataclasses.dataclass(frozen=True)
class BlockConfig(LayerConfig):
    """The usual layer: a mixer, then an MLP, each added to the residual stream.

    Attributes:
      mixer_post_norm, mlp_post_norm: of what they write; None: no norm.
      mixer_scale, mlp_scale: multiply their outputs, before these norms.
      after: what is done to the stream then, in this order.
    """

    mixer_post_norm: NormConfig | None = None
    mlp_post_norm: NormConfig | None = None
    mixer_scale: float = 1.0
    mlp_scale: float = 1.0
    after: tuple[AfterConfig, ...] = ()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder.

    Attributes:
      architecture: the GGUF architecture's name, for messages only.
      vocab: tokens in the vocabulary.
      embed: width of the residual stream.
      context: longest context that the model was made for, in tokens.
      blocks: the layers.
      norm: of the last layer's output; None: no norm.
      altup: how several streams begin; None: each is the embedding.
      head_residual: what is read of several streams after the last layer; None: there is one.
      per_layer_embeddings: tokens have an embedding for each layer; None: they have not.
      embedding_scale: multiplies embeddings.
      embedding_norm: of embeddings; None: no norm.
      learned_positions: positions that have an embedding of their own; 0: none have.
      tied: the embedding is the output head too.
      head_bias: the head has a bias.
      logit_scale: multiplies logits.
      carried: width of what goes with the residual stream from the embedding, or the first layer,
        to all layers; 0: nothing.
      carries_embedding: it is the embedding.
      substitutes: tokens that have the embeddings of others, and which these are.
      embedding_offset: a parameter is added to the stream that layers read first.
      logit_softcap: logits are bounded to this by a tanh; None: they are not.
    """

    architecture: str
    vocab: int
    embed: int
    context: int
    blocks: tuple[LayerConfig, ...]
    norm: NormConfig | None = NormConfig()
    altup: AltUpConfig | None = None
    head_residual: HeadResidualConfig | None = None
    per_layer_embeddings: PerLayerEmbeddingConfig | None = None
    embedding_scale: float = 1.0
    embedding_norm: NormConfig | None = None
    learned_positions: int = 0
    tied: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    carried: int = 0
    carries_embedding: bool = False
    substitutes: tuple[tuple[int, int], ...] = ()
    embedding_offset: bool = False
    logit_softcap: float | None = None

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.blocks)

    def source(self, layer: int) -> int:
        """The layer of the file that a layer is."""
        source = self.blocks[layer].source
        return layer if source is None else source

    def first_use(self, layer: int) -> int:
        """The first layer with the same parameters."""
        return self._first_uses[layer]

    @functools.cached_property
    def _first_uses(self) -> list[int]:
        first: dict[int, int] = {}
        return [first.setdefault(self.source(i), i) for i in range(self.layers)]

    def streams(self, layer: int) -> int:
        """How many streams of the width `embed` a layer is given."""
        return self.blocks[0].streams + sum(b.begins_stream for b in self.blocks[:layer])

    def stream_layout(self, layer: int) -> StreamLayout:
        """What a layer is given if it is the first of a stage."""
        return StreamLayout(
            residual=self.streams(layer) * self.embed,
            per_layer=self.per_layer_embeddings.width if self.per_layer_embeddings else 0,
            layers=self.layers - layer if self.per_layer_embeddings else 0,
            carried=self.carried,
        )

    @property
    def looks_up_tokens(self) -> int:
        """How many of the first layers there are up to the last one that looks up by token ids."""
        return max((i + 1 for i, b in enumerate(self.blocks) if b.by_token), default=0)

    @property
    def colocated_layers(self) -> list[range]:
        """Runs of layers that must be in one stage: one that lends keys and values, or a selection
        of keys, and all layers up to the last one that uses them."""
        lenders, spans = {}, {}
        if self.looks_up_tokens:  # which only the first stage knows
            spans[0] = range(self.looks_up_tokens)
        for i, block in enumerate(self.blocks):
            if name := getattr(block.mixer, "borrows", None):
                spans[lenders[name]] = range(lenders[name], i + 1)
            if name := getattr(block.mixer, "lends", None):
                lenders[name] = i
        return list(spans.values())

    def cache(self, context: int, dtype: jnp.dtype, layers: range | None = None) -> list:
        """What layers keep of a sequence: caches of `CacheArray`s.

        Args:
          context: tokens.
          dtype: of keys and values.
          layers: which; None: all.
        """
        blocks = self.blocks if layers is None else self.blocks[layers.start : layers.stop]
        return [block.cache(context, dtype) for block in blocks]

    @property
    def attention(self) -> AttentionConfig | LatentAttentionConfig | None:
        """Of the first layer that has any."""
        mixers = (getattr(block.mixer, "attention", block.mixer) for block in self.blocks)
        return next(
            (m for m in mixers if isinstance(m, AttentionConfig | LatentAttentionConfig)), None
        )

    def summary(self) -> dict[str, Any]:
        """Everything that is there as plain values, for people; alike layers together."""

        def plain(config: Any) -> Any:
            if isinstance(config, tuple):
                return [plain(part) for part in config]
            if not dataclasses.is_dataclass(config):
                return config
            fields = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
            given = {k: plain(v) for k, v in fields if v is not None and v is not False and v != ()}
            return given | {"type": type(config).__name__}

        runs: dict[str, Any] = {}
        start = 0
        for _, group in itertools.groupby(self.blocks):
            blocks = list(group)
            stop = start + len(blocks)
            runs[f"{start}-{stop - 1}" if len(blocks) > 1 else str(start)] = plain(blocks[0])
            start = stop
        summary = plain(self) | {"blocks": runs}
        del summary["type"]
        return summary
