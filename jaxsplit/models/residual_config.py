"""Configs of residual connections: several streams, and what is done to a stream after a layer."""

# `RecurrentCache` holds descriptions of arrays too.
# pyright: reportArgumentType=false

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxsplit.cache.layers import CacheArray, RecurrentCache
from jaxsplit.ops.norm.spec import NormConfig


@dataclasses.dataclass(frozen=True)
class HyperConnectionConfig:
    """Hyper-connections (Zhu et al. 2024, arXiv:2409.19606; Xie et al. 2025, arXiv:2512.24880).

    Attributes:
      streams: copies of the residual stream.
      epsilon: added to weights of what is read, and to the sums of the mixing matrix.
      norm_epsilon: of the norm of what weights are functions of.
      iterations: of Sinkhorn and Knopp for the mixing matrix; 0: streams are not mixed.
      magnitude, offset: weights of the output are a sigmoid times `magnitude`, plus `offset`.
    """

    streams: int
    epsilon: float
    norm_epsilon: float
    iterations: int = 0
    magnitude: float = 2.0
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class HyperHeadConfig:
    """What the last norm reads of several streams.

    Attributes:
      streams, epsilon, norm_epsilon: as in `HyperConnectionConfig`.
      mean: the mean of the streams; else a weighted sum.
    """

    streams: int
    epsilon: float
    norm_epsilon: float
    mean: bool = False


@dataclasses.dataclass(frozen=True)
class LowRankConnectionConfig:
    """Hyper-connections with low-rank gates.

    Attributes:
      streams: copies of the residual stream.
      rank: of the gates.
      norm: of each stream.
      writes: outputs are added to the streams; else only the head reads them.
    """

    streams: int
    rank: int
    norm: NormConfig
    writes: bool = True


@dataclasses.dataclass(frozen=True)
class AttentionResidualConfig:
    """Attention over the outputs of earlier blocks of layers.

    Attributes:
      norm: of what is scored.
      begins: a block of layers begins here: the stream so far is kept, and another one begins.
    """

    norm: NormConfig
    begins: bool = False


@dataclasses.dataclass(frozen=True)
class NGramConfig:
    """Embeddings of n-grams that a layer adds to the streams first.

    Attributes:
      streams: of the layer.
      rows, width: of the table.
      size: tokens of the longest n-gram; the shortest has 2.
      heads: hashes of each n-gram.
      multipliers: of the token and those before it.
      sizes, offsets: rows of each hash, and where they begin.
      kernel_size: taps of the convolution, `size` tokens apart.
      eos: the token before which others do not count.
      norm: of keys, queries and of what is convolved.
      embed: width of a stream.
    """

    streams: int
    rows: int
    width: int
    size: int
    heads: int
    multipliers: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    kernel_size: int
    eos: int
    norm: NormConfig
    embed: int
    by_token: ClassVar = True

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence: the last tokens, and what the convolution has seen."""
        convolved = (self.kernel_size - 1) * self.size, self.streams * self.embed
        shapes = (self.size - 1, 1), convolved
        return RecurrentCache(tuple(CacheArray(s, (None, None), jnp.float32) for s in shapes))


@dataclasses.dataclass(frozen=True)
class SwitchConfig:
    """Adapters of a model, of which each token has one.

    Attributes:
      adapters: how many, with the one of tokens before any that switches.
      rank: of each.
      tokens: ids that switch on adapters 1, 2 and so on.
      gain: how much more than others such a token counts, as a logarithm.
      first: the layer finds out which adapter each token has.
    """

    adapters: int
    rank: int
    tokens: tuple[int, ...]
    gain: float
    first: bool = False

    @property
    def by_token(self) -> bool:
        """Whether it looks at token ids."""
        return self.first

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache | None:
        """What it keeps of a sequence: sums over its tokens."""
        sums = RecurrentCache((CacheArray((1, 3), (None, None), jnp.float32),))
        return sums if self.first else None


@dataclasses.dataclass(frozen=True)
class AltUpConfig:
    """Alternating updates (Baykal et al. 2023, arXiv:2301.13310), and a low-rank residual layer.

    Attributes:
      streams: copies of the residual stream, of which the first is computed.
      laurel_rank: of the residual layer.
      norm: of what routers read and of the residual layer's output.
    """

    streams: int
    laurel_rank: int
    norm: NormConfig


ResidualConfig = HyperConnectionConfig | LowRankConnectionConfig | AttentionResidualConfig
HeadResidualConfig = (
    AltUpConfig | HyperHeadConfig | LowRankConnectionConfig | AttentionResidualConfig
)


@dataclasses.dataclass(frozen=True)
class PerLayerEmbeddingConfig:
    """The token's embedding for this layer, gated by the stream, is added to it (Gemma 3n).

    Attributes:
      width: of the embedding.
      norm: of what is added.
    """

    name: ClassVar = "per_layer_embedding"
    width: int
    norm: NormConfig


@dataclasses.dataclass(frozen=True)
class OutputScaleConfig:
    """The stream is multiplied by a constant; None: by a parameter."""

    name: ClassVar = "output_scale"
    constant: float | None = None


@dataclasses.dataclass(frozen=True)
class CarriedConfig:
    """What is carried is added to the stream.

    Attributes:
      scaled: times a parameter.
      swap: the stream before that is carried on instead.
    """

    name: ClassVar = "carried"
    scaled: bool = False
    swap: bool = False


@dataclasses.dataclass(frozen=True)
class EndNormConfig:
    """The stream is normalized."""

    name: ClassVar = "end_norm"
    norm: NormConfig


AfterConfig = PerLayerEmbeddingConfig | OutputScaleConfig | CarriedConfig | EndNormConfig
"""What is done to the stream after a layer; `name` is that of its module in the layer."""
