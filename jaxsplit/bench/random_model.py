"""Models of well-known shapes with random, valid weights: speed depends on shapes and types, not on
values. The vocabulary is made up.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import GGUFTensor, ModelFile
from jaxsplit.llm import open_model


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes; `mlp` is the width of each expert where there are `experts`."""

    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    arch: str = "llama"
    vocab: int = 128256
    tied: bool = False
    experts: int = 0
    experts_used: int = 0

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The shape of each matrix of a layer: `[out, in]`, experts first."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "attn_q": (q, self.embed),
            "attn_k": (kv, self.embed),
            "attn_v": (kv, self.embed),
            "attn_output": (self.embed, q),
        }
        stack, suffix = ((self.experts,), "_exps") if self.experts else ((), "")
        sizes |= {f"ffn_{name}{suffix}": (*stack, self.mlp, self.embed) for name in ("gate", "up")}
        sizes[f"ffn_down{suffix}"] = (*stack, self.embed, self.mlp)
        return sizes

    @property
    def plain(self) -> dict[str, tuple[int, ...]]:
        """What a layer has in float32."""
        sizes: dict[str, tuple[int, ...]] = {"attn_norm": (self.embed,), "ffn_norm": (self.embed,)}
        if self.arch.startswith("qwen3"):
            sizes |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
        if self.experts:
            sizes["ffn_gate_inp"] = (self.experts, self.embed)
        return sizes

    @property
    def metadata(self) -> dict[str, Any]:
        """The keys of the GGUF header, with a vocabulary of bytes and made-up words."""
        numbers = {
            "context_length": 131072,
            "embedding_length": self.embed,
            "block_count": self.layers,
            "feed_forward_length": self.mlp,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": 500000.0,
            "vocab_size": self.vocab,
        }
        if self.experts:
            numbers |= {
                "expert_count": self.experts,
                "expert_used_count": self.experts_used,
                "expert_feed_forward_length": self.mlp,
            }
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = iter(range(0x100, 0x200))
        alphabet = [chr(b if b in printable else next(others)) for b in range(256)]
        words = [f"w{i}" for i in range(self.vocab - 258)]
        return {
            "general.architecture": self.arch,
            **{f"{self.arch}.{key}": value for key, value in numbers.items()},
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*alphabet, *words, "<s>", "</s>"],
            "tokenizer.ggml.token_type": [1] * (self.vocab - 2) + [3, 3],
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": self.vocab - 2,
            "tokenizer.ggml.eos_token_id": self.vocab - 1,
            "tokenizer.ggml.add_bos_token": True,
        }


SHAPES = {
    "llama-tiny": Shape(256, 2, 8, 4, 32, 768, vocab=4096),
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, tied=True),
    "llama-8b": Shape(4096, 32, 32, 8, 128, 14336),
    "llama-70b": Shape(8192, 80, 64, 8, 128, 28672),
    "qwen3-30b-a3b": Shape(
        *(2048, 48, 32, 4, 128, 768), arch="qwen3moe", vocab=151936, experts=128, experts_used=8
    ),
}

# Where a block keeps its float16 scales, and their ratio to the first: affine types are centred.
_SCALES = {
    "F32": {},
    "F16": {},
    "BF16": {},
    "Q8_0": {0: 1.0},
    "Q4_0": {0: 1.0},
    "Q4_1": {0: 1.0, 2: -7.5},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
}
_MIXES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}


def tensor_types(mix: str, shape: Shape) -> dict[str, str]:
    """The type of each matrix in llama-quantize's mixes `Q4_K_M` and `Q5_K_M`, or of one type."""
    base = _MIXES.get(mix, mix)
    types = {"token_embd": "Q6_K" if base != mix and shape.tied else base}
    if not shape.tied:
        types["output"] = "Q6_K" if base != mix else base
    for i in range(shape.layers):
        first = shape.layers // 8
        more = i < first or i >= 7 * shape.layers // 8 or (i - first) % 3 == 2
        for name in shape.matrices:
            better = base != mix and more and name.startswith(("attn_v", "ffn_down"))
            types[f"blk.{i}.{name}"] = "Q6_K" if better else base
    return types


@functools.cache
def _pool(kind: str, count: int, std: float) -> np.ndarray:
    """Blocks of weights of about the given standard deviation: uint8 `[count, block_bytes]`."""
    rng = np.random.default_rng(0)
    ggml = gguf.GGMLQuantizationType[kind]
    size = gguf.GGML_QUANT_SIZES[ggml][1]
    if not _SCALES[kind]:
        values = rng.normal(0, std, count).astype(np.float32)
        return gguf.quants.quantize(values[None], ggml).view(np.uint8).reshape(count, size)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)

    def scale(first: float) -> None:
        for offset, ratio in _SCALES[kind].items():
            blocks[:, offset : offset + 2] = np.array([first * ratio], np.float16).view(np.uint8)

    scale(1.0)
    spread = gguf.quants.dequantize(blocks[:4096].reshape(1, -1), ggml).std()
    scale(std / spread)
    return blocks


def _tensor(name: str, kind: str, shape: tuple[int, ...]) -> GGUFTensor:
    """A tensor that takes little memory: each row begins one block after the row before."""
    tensor = GGUFTensor(name, kind, shape, np.empty(0, np.uint8))
    *rows, columns, size = tensor.blocks_shape
    if len(shape) == 1:
        blocks = np.ones(shape, np.float32).view(np.uint8).reshape(columns, size)
        return dataclasses.replace(tensor, blocks=blocks)
    count = math.prod(rows) + columns
    pool = _pool(kind, 2 ** math.ceil(math.log2(count)), shape[-1] ** -0.5)
    strides = [size * math.prod(rows[i + 1 :]) for i in range(len(rows))]
    blocks = np.lib.stride_tricks.as_strided(
        pool, tensor.blocks_shape, (*strides, size, 1), writeable=False
    )
    return dataclasses.replace(tensor, blocks=blocks)


def random_model(spec: str) -> ModelFile:
    """The model of `shape:type`, such as `llama-8b:Q8_0`, as if it had been read from a file.

    Raises:
      JaxsplitError: the shape or the type is unknown; the message lists the known ones.
    """
    name, _, mix = spec.partition(":")
    if name not in SHAPES or _MIXES.get(mix, mix) not in _SCALES:
        raise JaxsplitError(
            f"{spec!r} is not SHAPE:TYPE; shapes are {', '.join(SHAPES)}; types are "
            f"{', '.join([*_SCALES, *_MIXES])}"
        )
    shape = SHAPES[name]
    ends = {"token_embd": (shape.vocab, shape.embed), "output": (shape.vocab, shape.embed)}
    kinds = {
        key: (kind, (ends | shape.matrices)[key.split(".")[-1]])
        for key, kind in tensor_types(mix, shape).items()
    }
    kinds["output_norm"] = ("F32", (shape.embed,))
    for i in range(shape.layers):
        kinds |= {f"blk.{i}.{key}": ("F32", size) for key, size in shape.plain.items()}
    tensors = {f"{key}.weight": _tensor(f"{key}.weight", *kind) for key, kind in kinds.items()}
    return ModelFile(Path(spec), shape.metadata | {"general.name": spec}, tensors)


def model_file(model: str | None, random: str | None) -> ModelFile:
    """What `--model=FILE` or `--random=SHAPE:TYPE` chooses.

    Raises:
      JaxsplitError: both are given, or neither; or what is given cannot be used.
    """
    if model is not None and random is None:
        return open_model(model)
    if random is not None and model is None:
        return random_model(random)
    raise JaxsplitError("give either --model=FILE or --random=SHAPE:TYPE")


def model_and_type(file: ModelFile) -> dict[str, str | None]:
    """Name and quantized type of a model, as `record.ROW` has them."""
    name, _, kind = file.metadata.get("general.name", file.path.stem).partition(":")
    number = file.metadata.get("general.file_type")
    if not kind and number is not None:
        kind = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    return {"model": name, "type": kind or None}


_KINDS = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}


def write(spec: str, path: str) -> None:
    """Writes the file of `random_model(spec)`."""
    model = random_model(spec)
    tensors = [t for t in model.tensors.values() if isinstance(t, GGUFTensor)]
    writer = gguf.GGUFWriter(path, model.architecture)
    for key, value in model.metadata.items():
        if key != "general.architecture":
            writer.add_key_value(key, value, gguf.GGUFValueType[_KINDS[type(value)]])
    for tensor in tensors:
        *rows, columns, size = tensor.blocks_shape
        ggml = gguf.GGMLQuantizationType[tensor.type]
        stored = (*rows, columns * size) if tensor.type != "F32" else tensor.shape
        dtype = np.dtype(np.uint8 if tensor.type != "F32" else np.float32)
        writer.add_tensor_info(tensor.name, stored, dtype, tensor.nbytes, raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for tensor in tensors:
        blocks = tensor.blocks.reshape(-1, tensor.blocks.shape[-2] * tensor.blocks.shape[-1])
        for start in range(0, len(blocks), 4096):
            out.write(np.ascontiguousarray(blocks[start : start + 4096]).data)
        writer.write_padding(out, out.tell())
    writer.close()
