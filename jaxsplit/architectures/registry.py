"""The architectures that are supported, by their GGUF names."""

from collections.abc import Mapping

import numpy as np

from jaxsplit.architectures import dense, gemma, hybrids, mla, moe, rwkv
from jaxsplit.architectures.entry import Architecture, decoder
from jaxsplit.architectures.harmless import check_keys
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import NAMES, tensor_names
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile
from jaxsplit.models.config import ModelConfig

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "architecture",
    "decoder",
    "model_config",
    "parameter_tensors",
]

ARCHITECTURES: dict[str, Architecture] = {
    **dense.ARCHITECTURES,
    **gemma.ARCHITECTURES,
    **moe.ARCHITECTURES,
    **mla.ARCHITECTURES,
    **hybrids.ARCHITECTURES,
    **rwkv.ARCHITECTURES,
}


def architecture(file: ModelFile) -> Architecture:
    """The entry of a file's architecture.

    Raises:
      JaxsplitError: it is not supported; the message lists those that are.
    """
    if not isinstance(file.architecture, str) or file.architecture not in ARCHITECTURES:
        raise JaxsplitError(
            f"{file.path}: architecture {file.architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[file.architecture]


def model_config(file: ModelFile, context: int = 0) -> ModelConfig:
    """The config of the model in a file.

    Args:
      file: its header.
      context: tokens that it will be used with, on which a few architectures depend; 0: as many as
        it was made for.

    Raises:
      JaxsplitError: an unknown architecture, a missing or unsupported value, or a key that may
        change what the model computes but is not supported.
    """
    entry = architecture(file)
    header = Header(file, context, entry.norms)
    config = entry.config(header)
    check_keys(header, config, entry.harmless)
    return config


def parameter_tensors(
    file: ModelFile, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, np.ndarray | None]]:
    """Which tensor each parameter comes from; as `tensor_names`."""
    entry = architecture(file)
    return tensor_names(file, config, {**NAMES, **entry.names}, entry.unused, shapes)
