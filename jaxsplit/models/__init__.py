"""The decoder as Flax NNX modules; usable alone, without files, meshes or engine."""

from jaxsplit.cache.layers import (
    AttentionCache,
    Batch,
    Cache,
    CacheArray,
    RecurrentCache,
    SideInputs,
    init_cache,
)
from jaxsplit.context import ForwardContext, forward_context
from jaxsplit.models.attention import Attention
from jaxsplit.models.block import Block, Layer
from jaxsplit.models.block_config import (
    NormalizedStreamBlockConfig,
    ParallelBlockConfig,
    RoutedEarlyBlockConfig,
    TokenShiftBlockConfig,
    TwoMLPsBlockConfig,
)
from jaxsplit.models.compressed import CompressedAttention
from jaxsplit.models.config import (
    BlockConfig,
    DenseMoEConfig,
    GroveMoEConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from jaxsplit.models.decoder import Decoder
from jaxsplit.models.hybrid import Hybrid
from jaxsplit.models.indexer import BlockSparseAttention
from jaxsplit.models.kda import KimiDeltaAttention, LightningAttention
from jaxsplit.models.layers import Embedding, Linear, Norm
from jaxsplit.models.linear_attention import DeltaNet, Mamba2, ShortConv
from jaxsplit.models.mamba import Mamba
from jaxsplit.models.mixer_config import (
    BlockIndexerConfig,
    BlockSparseConfig,
    ChannelMixConfig,
    CompressedAttentionConfig,
    DeltaNetConfig,
    HybridConfig,
    IndexerConfig,
    KDAConfig,
    LatentAttentionConfig,
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MambaConfig,
    PoolConfig,
    RWKV6Config,
    RWKV7Config,
    ShortConvConfig,
)
from jaxsplit.models.mla import LatentAttention
from jaxsplit.models.mlp import MLP
from jaxsplit.models.moe import DenseMoE, GroveMoE, MoE
from jaxsplit.models.rwkv import RWKV6, RWKV7, ChannelMix
from jaxsplit.ops.attention.rope import RopeConfig
from jaxsplit.ops.attention.spec import AttentionConfig, GateConfig
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import Axis, AxisRules

__all__ = [
    "Attention",
    "AttentionCache",
    "AttentionConfig",
    "Axis",
    "AxisRules",
    "Batch",
    "SideInputs",
    "Block",
    "BlockConfig",
    "BlockIndexerConfig",
    "BlockSparseAttention",
    "BlockSparseConfig",
    "Cache",
    "CacheArray",
    "ChannelMix",
    "ChannelMixConfig",
    "CompressedAttention",
    "CompressedAttentionConfig",
    "Decoder",
    "DeltaNet",
    "DeltaNetConfig",
    "DenseMoE",
    "DenseMoEConfig",
    "Embedding",
    "ForwardContext",
    "GateConfig",
    "GroveMoE",
    "GroveMoEConfig",
    "Hybrid",
    "HybridConfig",
    "IndexerConfig",
    "KDAConfig",
    "KimiDeltaAttention",
    "LatentAttention",
    "LatentAttentionConfig",
    "Layer",
    "LayerConfig",
    "LightningAttention",
    "LightningConfig",
    "Linear",
    "LinearConfig",
    "MLP",
    "MLPConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "Norm",
    "NormConfig",
    "NormalizedStreamBlockConfig",
    "ParallelBlockConfig",
    "PoolConfig",
    "RWKV6",
    "RWKV6Config",
    "RWKV7",
    "RWKV7Config",
    "RecurrentCache",
    "RopeConfig",
    "RoutedEarlyBlockConfig",
    "ShortConv",
    "ShortConvConfig",
    "TokenShiftBlockConfig",
    "TwoMLPsBlockConfig",
    "forward_context",
    "init_cache",
]
