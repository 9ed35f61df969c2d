"""The parts of layers, by their configs."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.models.after import Carried, EndNorm, OutputScale, PerLayerEmbedding
from jaxsplit.models.altup import AltUpProjections
from jaxsplit.models.attention import Attention, TokenwiseLinear
from jaxsplit.models.compressed import CompressedAttention
from jaxsplit.models.config import DenseMoEConfig, GroveMoEConfig, MLPConfig, MoEConfig
from jaxsplit.models.hybrid import Hybrid
from jaxsplit.models.indexer import BlockSparseAttention
from jaxsplit.models.kda import KimiDeltaAttention, LightningAttention
from jaxsplit.models.linear_attention import DeltaNet, Mamba2, ShortConv
from jaxsplit.models.mamba import Mamba
from jaxsplit.models.mixer_config import (
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
)
from jaxsplit.models.residual_config import (
    AltUpConfig,
    AttentionResidualConfig,
    CarriedConfig,
    EndNormConfig,
    HyperConnectionConfig,
    HyperHeadConfig,
    LowRankConnectionConfig,
    NGramConfig,
    OutputScaleConfig,
    PerLayerEmbeddingConfig,
)
from jaxsplit.models.rwkv import RWKV6, RWKV7, ChannelMix
from jaxsplit.ops.activations.layout import Activations, Readers
from jaxsplit.ops.attention.spec import AttentionConfig


class MixerModule(Protocol):
    """A module that lets tokens see one another."""

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        ...

    def __call__(self, x: Activations, batch: Batch, cache: Any) -> tuple[Unreduced, Any]:
        """`[batch, time, embed]` to the same, and the cache with these tokens."""
        ...


class FeedForwardModule(Protocol):
    """A module that transforms each token by itself; its id, int32 `[...]`, is for those that look
    something up."""

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[..., embed]`."""
        ...

    def __call__(self, x: Activations, tokens: Array | None = None) -> Unreduced:
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
    PerLayerEmbeddingConfig: PerLayerEmbedding,
    OutputScaleConfig: OutputScale,
    CarriedConfig: Carried,
    EndNormConfig: EndNorm,
}
"""The module that each config of a part of a layer describes: a mixer, an MLP, a residual
connection, or what is done to the stream after the layer."""


def module(config: Any, embed: int, rngs: nnx.Rngs) -> Any:
    """The module of a config of `MODULES`; None for None."""
    return None if config is None else MODULES[type(config)](config, embed, rngs=rngs)
