"""GGUF files of LoRA adapters, and of models with adapters merged into their weights."""

import shutil

import gguf
import numpy as np

RANK, ALPHA = 3, 6.0


def shapes_of(path):
    """`[out, in]` of each F32 matrix of a file."""
    return {
        t.name: tuple(int(n) for n in t.shape[::-1])
        for t in gguf.GGUFReader(path).tensors
        if len(t.shape) == 2
    }


def write_adapter(path, factors, architecture="llama", alpha=ALPHA, kind="F32", **metadata):
    """Writes an adapter as llama.cpp's converter does.

    Args:
      path: the file to write.
      factors: `(lora_a, lora_b)` by the name of the tensor that they change.
      architecture, alpha: of the adapter.
      kind: GGML type of its tensors.
      **metadata: strings, with `__` for dots; None: the key is left out.
    """
    strings = {"general__type": "adapter", "adapter__type": "lora"} | metadata
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in strings.items():
        if value is not None:
            writer.add_string(key.replace("__", "."), value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    kind = gguf.GGMLQuantizationType[kind]
    for name, pair in factors.items():
        for end, values in zip("ab", pair, strict=True):
            if values is not None:
                data = gguf.quants.quantize(values, kind)
                writer.add_tensor(f"{name}.lora_{end}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_factors(shapes, seed, rank=RANK):
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(size=(rank, columns), scale=columns**-0.5).astype(np.float32),
            rng.normal(size=(rows, rank), scale=0.3).astype(np.float32),
        )
        for name, (rows, columns) in shapes.items()
    }


def write_merged(path, base, *changes):
    """Writes a copy of a file with adapters added to its weights: pairs of factors and scale."""
    shutil.copy(base, path)
    tensors = {t.name: t for t in gguf.GGUFReader(path, "r+").tensors}
    for factors, scale in changes:
        for name, (down, up) in factors.items():
            delta = np.float64(up) @ np.float64(down) * scale * ALPHA / len(down)
            tensors[name].data[:] += delta.astype(np.float32)
    return path
