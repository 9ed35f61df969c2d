"""The decoder as Flax NNX modules; usable alone, without files, meshes or engine."""

from jaxsplit.models.attention import Attention
from jaxsplit.models.axes import Axis, AxisRules, axis_rules
from jaxsplit.models.cache import AttentionCache, Batch, Cache, CacheArray, init_cache
from jaxsplit.models.config import (
    AttentionConfig,
    BlockConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from jaxsplit.models.decoder import Block, Decoder
from jaxsplit.models.layers import Embedding, Linear, Norm
from jaxsplit.models.mlp import MLP

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
    "Embedding",
    "Linear",
    "MLPConfig",
    "ModelConfig",
    "Norm",
    "NormConfig",
    "RopeConfig",
    "axis_rules",
    "init_cache",
]
