"""GGUF files: header, metadata, raw blocks; which architecture they hold. No devices here."""

from jaxsplit.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture,
    model_config,
    tensor_names,
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
    "tensor_names",
]
