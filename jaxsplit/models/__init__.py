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
from jaxsplit.models.config import BlockConfig, DenseMoEConfig, MLPConfig, ModelConfig, MoEConfig
from jaxsplit.models.decoder import Block, Decoder
from jaxsplit.models.hybrid import Hybrid
from jaxsplit.models.indexer import BlockSparseAttention
from jaxsplit.models.layers import Embedding, Linear, Norm
from jaxsplit.models.linear_attention import DeltaNet, Mamba2, ShortConv
from jaxsplit.models.mixer_config import (
    BlockIndexerConfig,
    BlockSparseConfig,
    DeltaNetConfig,
    HybridConfig,
    IndexerConfig,
    LatentAttentionConfig,
    LinearConfig,
    Mamba2Config,
    ShortConvConfig,
)
from jaxsplit.models.mla import LatentAttention
from jaxsplit.models.mlp import MLP
from jaxsplit.models.moe import DenseMoE, MoE
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
    "CacheArray",
    "Decoder",
    "DeltaNet",
    "DeltaNetConfig",
    "DenseMoE",
    "DenseMoEConfig",
    "Embedding",
    "ForwardContext",
    "GateConfig",
    "Hybrid",
    "HybridConfig",
    "IndexerConfig",
    "LatentAttention",
    "LatentAttentionConfig",
    "Linear",
    "LinearConfig",
    "MLPConfig",
    "Mamba2",
    "Mamba2Config",
    "MoE",
    "MoEConfig",
    "ModelConfig",
    "Norm",
    "NormConfig",
    "RecurrentCache",
    "RopeConfig",
    "ShortConv",
    "ShortConvConfig",
    "forward_context",
    "init_cache",
]
