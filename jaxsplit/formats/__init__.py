"""Model files: header, metadata, raw blocks. No devices here."""

from jaxsplit.formats.gguf import GGUFTensor, ModelFile, TensorInfo, open_gguf

__all__ = ["GGUFTensor", "ModelFile", "TensorInfo", "open_gguf"]
