"""The decoder as Flax NNX modules; usable alone, without files, meshes or engine."""

from jaxsplit.cache.layers import (
    AttentionCache,
    Batch,
    Cache,
    CacheArray,
    RecurrentCache,
    init_cache,
)
from jaxsplit.context import ForwardContext, forward_context
from jaxsplit.models.attention import Attention
from jaxsplit.models.compressed import CompressedAttention
from jaxsplit.models.config import (
    BlockConfig,
    DenseMoEConfig,
    GroveMoEConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from jaxsplit.models.decoder import Block, Decoder
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
    "MLP",
    "Attention",
    "AttentionCache",
    "AttentionConfig",
    "Axis",
    "AxisRules",
    "Batch",
    "Block",
    "BlockConfig",
    "BlockIndexerConfig",
    "BlockSparseAttention",
    "BlockSparseConfig",
    "Cache",
    "ChannelMix",
    "ChannelMixConfig",
    "CacheArray",
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
    "LightningAttention",
    "LightningConfig",
    "Linear",
    "LinearConfig",
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
    "PoolConfig",
    "RWKV6",
    "RWKV7",
    "RWKV6Config",
    "RWKV7Config",
    "RecurrentCache",
    "RopeConfig",
    "ShortConv",
    "ShortConvConfig",
    "forward_context",
    "init_cache",
]
