"""Models of well-known shapes with random, valid weights: speed depends on shapes and types, not on
values. The vocabulary is made up.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import IK_TYPES, STORED_TYPES, GGUFTensor, ModelFile, TensorInfo
from jaxsplit.llm import open_model
from jaxsplit.quant import dequantize_rows


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes; `mlp` is the width of each expert where there are `experts`.

    `biases`: all matrices of a layer have them; `sinks`: a score of each head that no key has;
    `mlp_norm`: what the file calls the norm before the MLP.
    """

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
    window: int = 0
    biases: bool = False
    sinks: bool = False
    mlp_norm: str = "ffn_norm"

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
        sizes: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("attn_norm", self.mlp_norm), (self.embed,)
        )
        if self.arch.startswith("qwen3"):
            sizes |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
        if self.experts:
            sizes["ffn_gate_inp"] = (self.experts, self.embed)
        if self.sinks:
            sizes["attn_sinks"] = (self.heads,)
        if self.biases:
            sizes |= {f"{name}.bias": size[:-1] for name, size in self.matrices.items()}
            if self.experts:
                sizes["ffn_gate_inp.bias"] = (self.experts,)
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
        if self.window:
            numbers["attention.sliding_window"] = self.window
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
    "llama2-13b": Shape(5120, 40, 40, 40, 128, 13824, vocab=32000),
    "llama-70b": Shape(8192, 80, 64, 8, 128, 28672),
    "gpt-oss-20b": Shape(
        *(2880, 24, 64, 8, 64, 2880),
        arch="gpt-oss",
        vocab=201088,
        experts=32,
        experts_used=4,
        window=128,
        biases=True,
        sinks=True,
        mlp_norm="post_attention_norm",
    ),
    "qwen3-30b-a3b": Shape(
        *(2048, 48, 32, 4, 128, 768), arch="qwen3moe", vocab=151936, experts=128, experts_used=8
    ),
}

# Where a block keeps its scales, and their ratio to the first: affine types are centred. Those of
# ik_llama.cpp begin with the scale of the block, or of its row.
_SCALES: dict[str, dict[int, float]] = {
    "F32": {},
    "F16": {},
    "BF16": {},
    "Q8_0": {0: 1.0},
    "MXFP4": {0: 1.0},
    "Q4_0": {0: 1.0},
    "Q4_1": {0: 1.0, 2: -7.5},
    "Q5_0": {0: 1.0},
    "Q5_1": {0: 1.0, 2: -15.5},
    "Q2_K": {80: 1.0, 82: 1.5},
    "Q3_K": {108: 1.0},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
    **{name: {0: 1.0} for name in ("IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")},
    **{name: {0: 1.0} for name in IK_TYPES if name not in ("I2_S", "BF16_R16", "MXFP4_R8")},
    "Q2_K_R4": {0: 1.0, 2: 1.5},
    "Q4_K_R4": {0: 1.0, 2: 7.5},
    "Q5_K_R4": {0: 1.0, 2: 15.5},
}
QUANTIZED = [kind for kind, scales in _SCALES.items() if scales]
"""Types of which `random_blocks` makes blocks."""

_MIXES = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "MXFP4_MOE": "Q8_0"}

# Mixes such as those of published files for ik_llama.cpp: types of the matrices in MLPs but for
# the down projection, of the down projection, and of attention.
_IK_MIXES = {
    "mix-IQ5_K": ("IQ5_K", "IQ6_K", "Q8_0"),
    "mix-IQ4_K": ("IQ4_K", "IQ5_K", "IQ6_K"),
    "mix-IQ4_KS": ("IQ4_KS", "IQ5_KS", "IQ6_K"),
    "mix-IQ4_KSS": ("IQ4_KSS", "IQ4_KS", "IQ5_KS"),
    "mix-IQ3_K": ("IQ3_K", "IQ4_KS", "IQ5_KS"),
    "mix-IQ3_KS": ("IQ3_KS", "IQ4_KS", "IQ5_KS"),
    "mix-IQ2_KL": ("IQ2_KL", "IQ3_KS", "IQ5_KS"),
    "mix-IQ2_KS": ("IQ2_KS", "IQ2_KL", "IQ5_KS"),
    "mix-IQ3_KT": ("IQ3_KT", "IQ4_KT", "IQ5_KS"),
    "mix-IQ2_KT": ("IQ2_KT", "IQ3_KT", "IQ4_KT"),
    "mix-IQ1_KT": ("IQ1_KT", "IQ2_KT", "IQ4_KT"),
}


def tensor_types(mix: str, shape: Shape) -> dict[str, str]:
    """The type of each matrix in llama-quantize's mixes `Q4_K_M`, `Q5_K_M` and `MXFP4_MOE`, in a
    mix for ik_llama.cpp, or of one type."""
    if mix in _IK_MIXES:
        return _ik_tensor_types(mix, shape)
    if mix == "MXFP4_MOE":
        types = tensor_types("Q8_0", shape)
        return {name: "MXFP4" if name.endswith("_exps") else kind for name, kind in types.items()}
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


def _ik_tensor_types(mix: str, shape: Shape) -> dict[str, str]:
    """As `tensor_types`, of a mix for ik_llama.cpp."""
    hidden, down, attention = _IK_MIXES[mix]
    types = {"token_embd": "IQ6_K" if shape.tied else "IQ4_K"}
    if not shape.tied:
        types["output"] = "IQ6_K"
    for i in range(shape.layers):
        for name in shape.matrices:
            kind = down if name.startswith("ffn_down") else hidden
            types[f"blk.{i}.{name}"] = attention if name.startswith("attn") else kind
    return types


def _number(value: float, dtype: str) -> np.ndarray:
    """The bytes of a number."""
    return np.array([value], dtype).view(np.uint8)


def _e8m0(value: float) -> np.ndarray:
    """The byte of the nearest power of 2 (E8M0; OCP Microscaling Formats 1.0)."""
    return np.array([127 + round(math.log2(value))], np.uint8)


_SCALE_CODES: dict[str, Callable[[float], np.ndarray]] = {"MXFP4": _e8m0}
"""How types encode scales that are not stored as numbers."""


@functools.cache
def _pool(kind: str, count: int, std: float) -> np.ndarray:
    """Blocks of weights of about the given standard deviation: uint8 `[count, block_bytes]`."""
    rng = np.random.default_rng(0)
    if not _SCALES[kind]:
        values = rng.normal(0, std, count).astype(np.float32)
        packed = gguf.quants.quantize(values[None], gguf.GGMLQuantizationType[kind])
        return packed.view(np.uint8).reshape(count, -1)
    return random_blocks(rng, kind, count, std)


def random_blocks(rng: np.random.Generator, kind: str, count: int, std: float = 1.0) -> np.ndarray:
    """Random bytes with the same scales in all blocks, so that the weights have about the given
    standard deviation: uint8 `[count, block_bytes]`."""
    stored = STORED_TYPES[kind]
    blocks = rng.integers(0, 256, (count, stored.block_bytes), dtype=np.uint8)
    encoded = _SCALE_CODES.get(kind, partial(_number, dtype=stored.scale or "<f2"))

    def scale(first: float) -> None:
        for offset, ratio in _SCALES[kind].items():
            value = encoded(first * ratio)
            blocks[:, offset : offset + len(value)] = value

    scale(1.0)
    rows = -(-min(count, 4096) // stored.rows) * stored.rows
    sample = np.resize(blocks, (rows, 1, blocks.shape[1]))
    scale(std / dequantize_rows(kind, stored.file_bytes(sample).reshape(rows, -1)).std())
    return blocks


def _tensor(name: str, kind: str, shape: tuple[int, ...]) -> GGUFTensor:
    """A tensor that takes little memory: each row begins one block after the row before."""
    if len(shape) == 1:
        return GGUFTensor.of_bytes(name, kind, shape, np.ones(shape, np.float32).view(np.uint8))
    *rows, columns, size = TensorInfo(name, kind, shape).blocks_shape
    rows = math.prod(rows)
    pool = _pool(kind, 2 ** math.ceil(math.log2(rows + columns)), shape[-1] ** -0.5)
    part = np.lib.stride_tricks.as_strided(
        pool, (rows, 1, columns, 1, size), (size, 0, size, 0, 1), writeable=False
    )
    return GGUFTensor(name, kind, shape, (part,))


def random_model(spec: str) -> ModelFile:
    """The model of `shape:type`, such as `llama-8b:Q8_0`, as if it had been read from a file.

    Raises:
      JaxsplitError: the shape or the type is unknown; the message lists the known ones.
    """
    name, _, mix = spec.partition(":")
    if name not in SHAPES or (_MIXES.get(mix, mix) not in _SCALES and mix not in _IK_MIXES):
        raise JaxsplitError(
            f"{spec!r} is not SHAPE:TYPE; shapes are {', '.join(SHAPES)}; types are "
            f"{', '.join([*_SCALES, *_MIXES, *_IK_MIXES])}"
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
    names = {key: key if key.endswith(".bias") else f"{key}.weight" for key in kinds}
    tensors = {names[key]: _tensor(names[key], *kind) for key, kind in kinds.items()}
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
    known = {int(kind): kind.name for kind in gguf.LlamaFileType}  # ik_llama.cpp has others
    if not kind and number in known:
        kind = known[number].removeprefix("MOSTLY_").removeprefix("ALL_")
    return {"model": name, "type": kind or None}


_ROWS = 4096  # written at a time: whole units of interleaved rows
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
        number: Any = tensor.stored.number
        info = gguf.gguf_writer.TensorInfo(shape=tensor.shape, dtype=number, nbytes=tensor.nbytes)
        writer.tensors[0][tensor.name] = info
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for tensor in tensors:
        rows, columns = math.prod(tensor.shape[:-1]), tensor.blocks_shape[-2]
        for start in range(0, rows, _ROWS):
            blocks = tensor.take(np.arange(start, min(start + _ROWS, rows)), np.arange(columns))
            out.write(tensor.stored.file_bytes(blocks).data)
        writer.write_padding(out, out.tell())
    writer.close()
