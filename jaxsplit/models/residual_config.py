"""Residual connections of several streams: configs."""

import dataclasses

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


ResidualConfig = (
    AltUpConfig | HyperConnectionConfig | LowRankConnectionConfig | AttentionResidualConfig
)
HeadResidualConfig = (
    AltUpConfig | HyperHeadConfig | LowRankConnectionConfig | AttentionResidualConfig
)
