"""GGUF files: header, metadata, raw blocks; which architecture they hold. No devices here."""

from jaxsplit.gguf.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture,
    model_config,
    tensor_names,
)
from jaxsplit.gguf.reader import GGUFFile, GGUFTensor, open_gguf

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GGUFFile",
    "GGUFTensor",
    "architecture",
    "model_config",
    "open_gguf",
    "tensor_names",
]
