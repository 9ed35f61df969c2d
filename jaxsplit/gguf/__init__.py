"""GGUF files: header, metadata, raw blocks; which architecture they hold. No devices here."""

from jaxsplit.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture,
    model_config,
    parameter_tensors,
)
from jaxsplit.gguf.reader import GGUFTensor, ModelFile, TensorInfo, open_gguf

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GGUFTensor",
    "ModelFile",
    "TensorInfo",
    "architecture",
    "model_config",
    "open_gguf",
    "parameter_tensors",
]
