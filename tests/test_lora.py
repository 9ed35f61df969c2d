"""LoRA adapters against the same models with the adapters merged into their weights."""

import re
import shutil

import gguf
import numpy as np
import pytest
from helpers import nmse, recipe
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.errors import JaxsplitError

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Matrices that are no projections: tables, experts, convolutions, the latent up-projections.
NO_PROJECTION = re.compile(r"token_embd|position_embd|_exps|conv|attn_(k|v|kv)_b\.|ssm_(a|d)$")
RANK, ALPHA = 3, 6.0
TOLERANCE = 1e-9  # of float32, twice: the order of sums differs


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


@pytest.fixture(scope="module")
def adapted(recipe_gguf, tmp_path_factory):
    """`adapted(name)`: a recipe's file, an adapter of all its projections, and the merged file."""
    folder, made = tmp_path_factory.mktemp("lora"), {}

    def get(name):
        if name not in made:
            base, arch = recipe_gguf(name), recipe(name)["arch"]
            shapes = {n: s for n, s in shapes_of(base).items() if not NO_PROJECTION.search(n)}
            factors = random_factors(shapes, 1)
            adapter = write_adapter(folder / f"{name}-adapter.gguf", factors, arch)
            merged = write_merged(folder / f"{name}.gguf", base, (factors, 0.5))
            made[name] = base, adapter, merged
        return made[name]

    return get


SPLITS = {
    "none": {"split_mode": "none"},
    "graph": {"mesh": "tensor:3"},
    "stages": {"mesh": "stage:2,tensor:2"},
    "row": {"split_mode": "row", "devices": 2},
}


@pytest.mark.parametrize(
    ("name", "split"),
    [("llama", split) for split in SPLITS]
    + [("phi3", split) for split in SPLITS]
    + [
        (name, "graph")
        for name in (
            "command-r",
            "deepseek2",
            "gemma2",
            "granitehybrid",
            "llama-bias",
            "qwen2moe",
            "qwen3next",
            "stablelm",
        )
    ],
)
def test_equals_merged_weights(adapted, load, name, split):
    base, adapter, merged = adapted(name)
    tokens = recipe(name)["tokens"][:24]
    expected = load(merged, split_mode="none").logits(tokens)
    lm = load(base, lora=f"{adapter}:0.5", **SPLITS[split])
    assert nmse(lm.logits(tokens), expected) < TOLERANCE
    assert nmse(lm.logits(tokens, one_by_one=True), expected) < TOLERANCE
    assert nmse(load(base, split_mode="none").logits(tokens), expected) > 1e-2
