"""The old name of `formats` and `architectures`, which goes with the next version."""

from jaxsplit.architectures import ARCHITECTURES, Architecture, model_config
from jaxsplit.formats import GGUFTensor, ModelFile, TensorInfo, open_gguf

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "GGUFTensor",
    "ModelFile",
    "TensorInfo",
    "model_config",
    "open_gguf",
]
