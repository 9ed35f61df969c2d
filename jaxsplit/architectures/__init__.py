"""Architectures: from a file's metadata to a `ModelConfig`, from its tensors to parameters."""

from jaxsplit.architectures.entry import Architecture
from jaxsplit.architectures.registry import (
    ARCHITECTURES,
    architecture,
    model_config,
    parameter_tensors,
)

__all__ = ["ARCHITECTURES", "Architecture", "architecture", "model_config", "parameter_tensors"]
