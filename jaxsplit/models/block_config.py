"""Configs of layers of other shapes than the usual one, which is `BlockConfig`."""

import dataclasses

from jaxsplit.models.config import BlockConfig, FeedForward, LayerConfig
from jaxsplit.models.residual_config import (
    AltUpConfig,
    NGramConfig,
    PerLayerEmbeddingConfig,
    ResidualConfig,
    SwitchConfig,
)
from jaxsplit.ops.norm.spec import NormConfig


@dataclasses.dataclass(frozen=True)
class ParallelBlockConfig(LayerConfig):
    """Mixer and MLP read the same stream (Wang and Komatsuzaki 2021, GPT-J-6B): without `mlp_norm`,
    what the mixer reads.

    Attributes:
      mlp_scale: multiplies the output of the MLP.
    """

    mlp_scale: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedStreamBlockConfig(LayerConfig):
    """Norms are in the stream: outputs are added to what the norms have made of it.

    Attributes:
      scale: multiplies the normalized stream that outputs are added to.
    """

    scale: float


@dataclasses.dataclass(frozen=True)
class RoutedEarlyBlockConfig(LayerConfig):
    """The router of the experts reads the stream before the mixer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoMLPsBlockConfig(LayerConfig):
    """Beside the usual MLP, another one reads the stream before the mixer.

    Attributes:
      stream_mlp: that one; it has a norm of its own, as `mlp_norm`.
    """

    stream_mlp: FeedForward


@dataclasses.dataclass(frozen=True)
class TokenShiftBlockConfig(BlockConfig):
    """The MLP, a `ChannelMixConfig`, reads the token before too (RWKV)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchedBlockConfig(BlockConfig):
    """The usual layer, with adapters that tokens switch on.

    Attributes:
      switch: the adapters.
    """

    switch: SwitchConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamsBlockConfig(LayerConfig):
    """Mixer and MLP read from and write to several streams.

    Attributes:
      mixer_residual, mlp_residual: how they do.
      ngrams: embeddings of n-grams that are added to the streams first; None: none.
    """

    mixer_residual: ResidualConfig
    mlp_residual: ResidualConfig
    ngrams: NGramConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AltUpBlockConfig(LayerConfig):
    """One of several streams is computed, the others are predicted (Gemma 3n).

    Attributes:
      altup: how.
      mixer_post_norm, mlp_post_norm: of what mixer and MLP write.
      per_layer_embedding: added to the streams that are not computed.
    """

    altup: AltUpConfig
    mixer_post_norm: NormConfig
    mlp_post_norm: NormConfig
    per_layer_embedding: PerLayerEmbeddingConfig
