"""Write a GGUF file of a well-known model's shapes with random, valid weights.

  python benchmarks/random_gguf.py llama-8b:Q4_K_M out.gguf

Any engine can load the file: speed depends on shapes and types, not on values. The vocabulary is
made up.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator

import gguf
import numpy as np


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
    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Those of a layer in float32."""
        sizes = {"attn_norm": (self.embed,), "ffn_norm": (self.embed,)}
        if self.arch.startswith("qwen3"):
            sizes |= {"attn_q_norm": (self.head_dim,), "attn_k_norm": (self.head_dim,)}
        if self.experts:
            sizes["ffn_gate_inp"] = (self.experts, self.embed)
        return sizes


SHAPES = {
    "llama-1b": Shape(2048, 16, 32, 8, 64, 8192, tied=True),
    "llama-8b": Shape(4096, 32, 32, 8, 128, 14336),
    "llama-70b": Shape(8192, 80, 64, 8, 128, 28672),
    "qwen3-30b-a3b": Shape(
        *(2048, 48, 32, 4, 128, 768), arch="qwen3moe", vocab=151936, experts=128, experts_used=8
    ),
}

# Where a block keeps its float16 scales, and their ratio to the first: affine types are centred.
_SCALES = {
    "Q8_0": {0: 1.0},
    "Q4_0": {0: 1.0},
    "Q4_1": {0: 1.0, 2: -7.5},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
}


def tensor_types(mix: str, shape: Shape) -> dict[str, str]:
    """The type of each matrix in llama-quantize's mixes `Q4_K_M` and `Q5_K_M`, or of one type."""
    base = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}.get(mix, mix)
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


def random_blocks(kind: str, count: int, std: float, rng: np.random.Generator) -> np.ndarray:
    """Blocks of weights of about the given standard deviation: uint8 `[count, block_bytes]`."""
    ggml = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[ggml]
    if kind in ("F32", "F16", "BF16"):
        values = rng.normal(0, std, count).astype(np.float32)
        return gguf.quants.quantize(values[None], ggml).view(np.uint8).reshape(count, size)
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)

    def scale(first: float) -> None:
        for offset, ratio in _SCALES[kind].items():
            blocks[:, offset : offset + 2] = np.float16([first * ratio]).view(np.uint8)

    scale(1.0)
    spread = gguf.quants.dequantize(blocks[:4096].reshape(1, -1), ggml).std()
    scale(std / spread)
    return blocks


def tensor_blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator:
    """The blocks of matrices in pieces of at most 64 MB: slices of one random pool."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    left = math.prod(shape) // block
    pool = random_blocks(kind, min(left, 2**26 // size), shape[-1] ** -0.5, rng)
    while left:
        yield pool[:left]
        left -= min(left, len(pool))


def write(spec: str, path: str) -> None:
    """Writes the file of `model:type`, such as `llama-8b:Q8_0`."""
    model, _, mix = spec.partition(":")
    shape = SHAPES[model]
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(spec)
    writer.add_context_length(131072)
    writer.add_embedding_length(shape.embed)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.mlp)
    writer.add_vocab_size(shape.vocab)
    _add_vocabulary(writer, shape.vocab)
    sizes = {"token_embd": (shape.vocab, shape.embed), "output": (shape.vocab, shape.embed)}
    tensors: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{name}.weight", kind, (sizes | shape.matrices)[name.split(".")[-1]])
        for name, kind in tensor_types(mix, shape).items()
    ]
    tensors.append(("output_norm.weight", "F32", (shape.embed,)))
    for i in range(shape.layers):
        tensors += [(f"blk.{i}.{n}.weight", "F32", size) for n, size in shape.vectors.items()]
    for name, kind, dims in tensors:
        ggml = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[ggml]
        stored = (*dims[:-1], dims[-1] // block * size)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), math.prod(stored), raw_dtype=ggml)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for _, kind, dims in tensors:
        pieces = [np.ones(dims, np.float32)] if len(dims) == 1 else tensor_blocks(kind, dims, rng)
        for piece in pieces:
            out.write(piece.data)
        writer.write_padding(out, out.tell())
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter, vocab: int) -> None:
    """One token for each byte, then made-up words."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    alphabet = [chr(b if b in printable else next(others)) for b in range(256)]
    words = [f"w{i}" for i in range(vocab - 258)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, *words, "<s>", "</s>"])
    writer.add_token_types([1] * (vocab - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(vocab - 2)
    writer.add_eos_token_id(vocab - 1)
    writer.add_add_bos_token(True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1].partition(":")[0] not in SHAPES:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(SHAPES)}:TYPE OUT.gguf")
    write(*sys.argv[1:])
