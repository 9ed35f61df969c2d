"""Model files: header, metadata, raw blocks. No devices here."""

from jaxsplit.formats.ggml_types import IK_TYPES, STORED_TYPES, StoredType
from jaxsplit.formats.gguf import GGUFTensor, ModelFile, TensorInfo, open_gguf, take_blocks

__all__ = [
    "IK_TYPES",
    "STORED_TYPES",
    "GGUFTensor",
    "ModelFile",
    "StoredType",
    "TensorInfo",
    "open_gguf",
    "take_blocks",
]
