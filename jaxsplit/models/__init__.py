"""The decoder as Flax NNX modules; usable alone, without files, meshes or engine."""

from jaxsplit.models.attention import Attention
from jaxsplit.models.axes import Axis, AxisRules, axis_rules
from jaxsplit.models.cache import (
    AttentionCache,
    Batch,
    Cache,
    CacheArray,
    RecurrentCache,
    init_cache,
)
from jaxsplit.models.config import BlockConfig, MLPConfig, ModelConfig, MoEConfig
from jaxsplit.models.decoder import Block, Decoder
from jaxsplit.models.latent import LatentAttention
from jaxsplit.models.layers import Embedding, Linear, Norm
from jaxsplit.models.mixer_config import (
    AttentionConfig,
    DeltaNetConfig,
    LatentAttentionConfig,
    Mamba2Config,
    NormConfig,
    RopeConfig,
    ShortConvConfig,
)
from jaxsplit.models.mlp import MLP
from jaxsplit.models.moe import DenseMoE, MoE
from jaxsplit.models.recurrent import DeltaNet, Mamba2, ShortConv

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
    "Cache",
    "CacheArray",
    "Decoder",
    "DeltaNet",
    "DeltaNetConfig",
    "DenseMoE",
    "DenseMoEConfig",
    "Embedding",
    "LatentAttention",
    "LatentAttentionConfig",
    "Linear",
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
    "axis_rules",
    "init_cache",
]
