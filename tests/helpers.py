"""Reference data, tiny models and commands for the tests."""

import contextlib
import functools
import importlib
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gguf
import jax
import numpy as np
from absl import flags

from jaxsplit.engine import SamplingConfig
from jaxsplit.formats import ModelFile, TensorInfo

DATA = Path(__file__).parent / "data"
GREEDY = SamplingConfig(temperature=0.0)
Q8_0 = {"norm.weight": "F32", ".weight": "Q8_0"}


@contextlib.contextmanager
def command_module(name: str) -> Iterator[ModuleType]:
    """The module of a command, whose flags are the only ones: commands have flags in common."""

    def defined() -> list[str]:
        by_module = flags.FLAGS.flags_by_module_dict().items()
        return [module for module, own in by_module if own and module.startswith("jaxsplit.cli.")]

    def remove(modules: list[str]) -> None:
        by_module = flags.FLAGS.flags_by_module_dict()
        flags.FLAGS.remove_flag_values({f.name: f for m in modules for f in by_module[m]})

    others = defined()
    remove(others)
    loaded = sys.modules.get(f"jaxsplit.cli.{name}")
    yield importlib.reload(loaded) if loaded else importlib.import_module(f"jaxsplit.cli.{name}")
    remove(defined())
    for module in others:
        if hasattr(sys.modules[module], "main"):
            importlib.reload(sys.modules[module])


@functools.cache
def quick_options() -> dict[str, bool | int]:
    """XLA options with which programs are compiled, not optimized: in one piece, since tests share
    the cores, and without fusion emitters, which compile slowly; some versions have no other way.
    """
    options = {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    quickest = options | {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=quickest)()
    except jax.errors.JaxRuntimeError:
        return options
    return quickest


def quick_environment() -> dict[str, str]:
    """This environment, for processes that compile far longer than they run."""
    flags = [f"--{name}={str(value).lower()}" for name, value in quick_options().items()]
    return os.environ | {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags])}


def quick_jit(function: Callable, **options) -> Callable:
    """`jax.jit` of what runs once or twice. Operations one by one take far longer: each is compiled
    for each shape."""
    jitted = functools.cache(lambda: jax.jit(function, compiler_options=quick_options(), **options))
    return lambda *args, **kwargs: jitted()(*args, **kwargs)


def nmse(actual: np.ndarray, expected: np.ndarray) -> float:
    """Normalized mean square error, in float64."""
    actual, expected = np.float64(actual), np.float64(expected)
    return float(np.sum((actual - expected) ** 2) / np.sum(expected**2))


def last_tokens(engine) -> list[int]:
    """The token of each slot that the next step will feed."""
    return engine.read(engine.tokens())[0].tolist()


def continuation(engine, tokens, sampling: SamplingConfig = GREEDY, count: int = 12) -> list[int]:
    """Ids that an engine chooses after a prompt in slot 0."""
    engine.start(tokens, sampling)
    return [last_tokens(engine)[0], *engine.loop(count, count)[0].tolist()]


def bytes_by_device(tree) -> dict[jax.Device, int]:
    """What the arrays of a tree take on each device."""
    held = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    return held


def recipe(name: str) -> dict:
    """The recipe of a tiny model: metadata, and for each tensor name, shape and distribution."""
    return json.loads((DATA / "arch" / f"{name}.json").read_text())


def first_layers(name: str, count: int) -> dict:
    """The recipe of a model that has only the first layers of another."""
    whole = recipe(name)
    left_out = tuple(f"blk.{i}." for i in range(count, 100))
    return whole | {
        "name": f"{name}-{count}",
        "metadata": [
            [key, kinds, count if key.endswith(".block_count") else value]
            for key, kinds, value in whole["metadata"]
        ],
        "tensors": [t for t in whole["tensors"] if not t["name"].startswith(left_out)],
    }


def recipe_values(seed: int, spec: dict) -> np.ndarray:
    """A tensor's values, float32 or whole numbers, from bits that are the same in every NumPy."""
    shape = spec["shape"][::-1]
    raw = np.random.PCG64([seed, zlib.crc32(spec["name"].encode())]).random_raw(math.prod(shape))
    uniform = (raw >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    if spec.get("type") == "I32":
        low, high = int(spec["low"]), int(spec["high"])
        return (low + (uniform * np.float32(high - low + 1)).astype(np.int32)).reshape(shape)
    spread = np.float32(spec["std"] * math.sqrt(12))
    values = np.float32(spec["mean"]) + spread * (uniform - np.float32(0.5))
    return np.clip(values, np.float32(spec["low"]), np.float32(spec["high"])).reshape(shape)


def write_recipe(recipe: dict, path: Path, quantize: dict[str, str] | None = None) -> None:
    """Writes a recipe's GGUF file; `quantize` maps ends of tensor names to GGML types."""
    writer = gguf.GGUFWriter(path, recipe["arch"])
    for key, kinds, value in recipe["metadata"]:
        sub_type = gguf.GGUFValueType[kinds[1]] if len(kinds) > 1 else None
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[0]], sub_type=sub_type)
    for spec in recipe["tensors"]:
        values = recipe_values(recipe["seed"], spec)
        if values.dtype == np.int32:
            writer.add_tensor(spec["name"], values)
            continue
        kind = next((k for end, k in (quantize or {}).items() if spec["name"].endswith(end)), "F32")
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(spec["name"], gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def changed_recipe(path, metadata=None, shapes=None, name="llama"):
    """Writes a recipe with other metadata values (None: left out) and tensor shapes (likewise).

    New metadata are given as `(type, value)`, shapes in GGUF order.
    """
    changed = recipe(name)
    new = dict(metadata or {})
    changed["metadata"] = [
        (key, kinds, new.pop(key, (None, value))[1])
        for key, kinds, value in changed["metadata"]
        if new.get(key, ()) is not None or new.pop(key)
    ] + [(key, [kind], value) for key, (kind, value) in new.items()]
    shapes = dict(shapes or {})
    changed["tensors"] = [
        spec | {"shape": shapes.pop(spec["name"], spec["shape"])} for spec in changed["tensors"]
    ] + [changed["tensors"][0] | {"name": name, "shape": shape} for name, shape in shapes.items()]
    changed["tensors"] = [spec for spec in changed["tensors"] if spec["shape"]]
    write_recipe(changed, path)
    return path


def recipe_file(recipe: dict, metadata: dict | None = None) -> ModelFile:
    """The header that a recipe's file would have, with other metadata (None: left out)."""
    metadata = {key: value for key, _, value in recipe["metadata"]} | (metadata or {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return ModelFile(
        Path(recipe["name"]),
        {"general.architecture": recipe["arch"]} | metadata,
        {
            t["name"]: TensorInfo(t["name"], t.get("type", "F32"), tuple(t["shape"][::-1]))
            for t in recipe["tensors"]
        },
    )


def make_recipe(
    name: str,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int = 32,
    mlp: int = 192,
    layers: int = 2,
    embed: int = 128,
) -> dict:
    """A recipe of a random Llama with the given sizes, as `write_recipe` takes it."""
    vocab, q, kv = 163, heads * head_dim, kv_heads * head_dim

    def tensor(name: str, *shape: int) -> dict:
        norm = len(shape) == 1
        spread = {"mean": 1.0, "std": 0.2} if norm else {"mean": 0.0, "std": shape[0] ** -0.5 * 1.5}
        return {"name": name, "shape": shape, "low": -4.0, "high": 4.0, **spread}

    tensors = [
        tensor("token_embd.weight", embed, vocab),
        tensor("output_norm.weight", embed),
        tensor("output.weight", embed, vocab),
    ]
    for i in range(layers):
        tensors += [
            tensor(f"blk.{i}.attn_norm.weight", embed),
            tensor(f"blk.{i}.attn_q.weight", embed, q),
            tensor(f"blk.{i}.attn_k.weight", embed, kv),
            tensor(f"blk.{i}.attn_v.weight", embed, kv),
            tensor(f"blk.{i}.attn_output.weight", q, embed),
            tensor(f"blk.{i}.ffn_norm.weight", embed),
            tensor(f"blk.{i}.ffn_gate.weight", embed, mlp),
            tensor(f"blk.{i}.ffn_up.weight", embed, mlp),
            tensor(f"blk.{i}.ffn_down.weight", mlp, embed),
        ]
    numbers = {
        "context_length": 256,
        "embedding_length": embed,
        "block_count": layers,
        "feed_forward_length": mlp,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    metadata = [[f"llama.{key}", ["UINT32"], value] for key, value in numbers.items()]
    metadata += [
        ["llama.attention.layer_norm_rms_epsilon", ["FLOAT32"], 1e-5],
        ["tokenizer.ggml.model", ["STRING"], "no_vocab"],
    ]
    seed = zlib.crc32(name.encode())
    return {"name": name, "arch": "llama", "seed": seed, "metadata": metadata, "tensors": tensors}


SHAPES = {
    f"{h}-{kv}": make_recipe(f"heads-{h}-{kv}", heads=h, kv_heads=kv)
    for h, kv in ((9, 3), (8, 2), (6, 1), (14, 2))
}

FEW_LAYERS = {"gemma3": first_layers("gemma3-pattern3", 3)}
"""Recipes with fewer layers of each kind than those of the same names."""
