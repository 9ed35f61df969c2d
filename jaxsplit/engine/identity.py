"""What keys and values depend on besides tokens, as a hash."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxsplit.formats import GGUFTensor, ModelFile, TensorInfo
from jaxsplit.weights.adapters import Adapter
from jaxsplit.weights.checkpoint import StoredTensor

_SAMPLE = 256
"""Bytes that are read of each tensor, at its start and in its middle: a fine-tuned model may have
the header of the one that it was made of."""


def model_hash(file: ModelFile, **options: Any) -> bytes:
    """Hash of a model: its header, samples of its tensors, and options.

    Args:
      file: the model.
      **options: what its numbers depend on besides, with a `repr` that says all.
    """
    found = hashlib.blake2b(digest_size=32)
    metadata = json.dumps(dict(file.metadata), sort_keys=True, default=repr)
    for part in (metadata, repr(sorted(options.items()))):
        found.update(len(part).to_bytes(8, "little") + part.encode())
    _add_tensors(found, file.tensors)
    return found.digest()


def adapter_hash(adapter: Adapter) -> bytes:
    """Hash of a LoRA adapter, whatever its scale."""
    found = hashlib.blake2b(repr(adapter.alpha).encode(), digest_size=32)
    pairs = adapter.pairs.items()
    tensors = {f"{base}.{i}": one for base, pair in pairs for i, one in enumerate(pair)}
    _add_tensors(found, tensors)
    return found.digest()


def prefix_root(model: bytes, adapters: Iterable[bytes], scales: Iterable[float]) -> bytes:
    """Hash of a model with adapters. An adapter of scale 0 changes nothing."""
    applied = sorted((h, s) for h, s in zip(adapters, scales, strict=True) if s)
    content = b"".join(h + np.float64(s).tobytes() for h, s in applied)
    return hashlib.blake2b(model + content, digest_size=32).digest()


def _add_tensors(found: Any, tensors: Mapping[str, TensorInfo]) -> None:
    folders: dict[str, None] = {}
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.type} {tensor.shape}\n".encode())
        if isinstance(tensor, GGUFTensor):
            content = tensor.blocks.reshape(-1)
            for start in (0, len(content) // 2):
                found.update(content[start : start + _SAMPLE].tobytes())
        elif isinstance(tensor, StoredTensor):
            folders[os.fspath(tensor.folder)] = None
    for folder in folders:  # of a checkpoint, whose arrays are compressed
        for path, _, names in sorted(os.walk(folder)):
            for name in sorted(names):
                status = os.stat(os.path.join(path, name))
                place = os.path.join(os.path.relpath(path, folder), name)
                found.update(f"{place} {status.st_size} {status.st_mtime_ns}\n".encode())
