"""The decoder as Flax NNX modules; usable alone, without files, meshes or engine."""

from jaxsplit.models.axes import AxisRules, axis_rules
from jaxsplit.models.cache import Cache, LayerCache, init_cache
from jaxsplit.models.config import ModelConfig, RopeConfig
from jaxsplit.models.decoder import MLP, Attention, Block, Decoder
from jaxsplit.models.layers import Embedding, Linear, RMSNorm

__all__ = [
    "MLP",
    "Attention",
    "AxisRules",
    "Block",
    "Cache",
    "Decoder",
    "Embedding",
    "LayerCache",
    "Linear",
    "ModelConfig",
    "RMSNorm",
    "RopeConfig",
    "axis_rules",
    "init_cache",
]
