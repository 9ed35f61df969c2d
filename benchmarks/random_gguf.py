"""Write a GGUF file of a well-known model's shapes with random, valid weights.

  python benchmarks/random_gguf.py llama-8b:Q4_K_M out.gguf

Any engine can load the file: speed depends on shapes and types, not on values. The vocabulary is
made up.
"""

import sys
from collections.abc import Iterator

import gguf
import numpy as np

_FIELDS = ("embed", "layers", "heads", "kv_heads", "head_dim", "mlp", "tied")
SHAPES = {
    "llama-1b": (2048, 16, 32, 8, 64, 8192, True),
    "llama-8b": (4096, 32, 32, 8, 128, 14336, False),
    "llama-70b": (8192, 80, 64, 8, 128, 28672, False),
}
VOCAB = 128256

# Where a block keeps its float16 scales, and their ratio to the first: affine types are centred.
_SCALES = {
    "Q8_0": {0: 1.0},
    "Q4_0": {0: 1.0},
    "Q4_1": {0: 1.0, 2: -7.5},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q5_K": {0: 1.0, 2: 15.5},
    "Q6_K": {208: 1.0},
}


def tensor_types(mix: str, layers: int, tied: bool) -> dict[str, str]:
    """The type of each tensor of llama-quantize's mixes `Q4_K_M` and `Q5_K_M`, or of one type."""
    base = {"Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K"}.get(mix, mix)
    types = {"token_embd": "Q6_K" if base != mix and tied else base}
    types["output"] = "Q6_K" if base != mix else base
    for i in range(layers):
        first = layers // 8
        more = i < first or i >= 7 * layers // 8 or (i - first) % 3 == 2
        for name in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            types[f"blk.{i}.{name}"] = base
        for name in ("attn_v", "ffn_down"):
            types[f"blk.{i}.{name}"] = "Q6_K" if base != mix and more else base
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


def tensor_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> Iterator:
    """A matrix's blocks in pieces of at most 64 MB: slices of one random pool."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    left = rows * columns // block
    pool = random_blocks(kind, min(left, 2**26 // size), columns**-0.5, rng)
    while left:
        yield pool[:left]
        left -= min(left, len(pool))


def write(spec: str, path: str) -> None:
    """Writes the file of `model:type`, such as `llama-8b:Q8_0`."""
    model, _, mix = spec.partition(":")
    shape = dict(zip(_FIELDS, SHAPES[model], strict=True))
    embed, q = shape["embed"], shape["heads"] * shape["head_dim"]
    kv, mlp = shape["kv_heads"] * shape["head_dim"], shape["mlp"]
    sizes = {
        "token_embd": (VOCAB, embed),
        "output": (VOCAB, embed),
        "attn_q": (q, embed),
        "attn_k": (kv, embed),
        "attn_v": (kv, embed),
        "attn_output": (embed, q),
        "ffn_gate": (mlp, embed),
        "ffn_up": (mlp, embed),
        "ffn_down": (embed, mlp),
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(spec)
    writer.add_context_length(131072)
    writer.add_embedding_length(embed)
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    _add_vocabulary(writer)
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for name, kind in tensor_types(mix, shape["layers"], shape["tied"]).items():
        if name == "output" and shape["tied"]:
            continue
        tensors.append((f"{name}.weight", kind, sizes[name.split(".")[-1]]))
    norms = [f"blk.{i}.{n}_norm.weight" for i in range(shape["layers"]) for n in ("attn", "ffn")]
    tensors += [(name, "F32", (embed,)) for name in ["output_norm.weight", *norms]]
    for name, kind, dims in tensors:
        ggml = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[ggml]
        if len(dims) == 1:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), dims[0] * 4)
            continue
        row = dims[1] // block * size
        writer.add_tensor_info(
            name, (dims[0], row), np.dtype(np.uint8), dims[0] * row, raw_dtype=ggml
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    out = writer.fout[0]
    writer.write_padding(out, out.tell())
    for _, kind, dims in tensors:
        vector = len(dims) == 1
        for piece in [np.ones(dims, np.float32)] if vector else tensor_blocks(kind, *dims, rng):
            out.write(piece.data)
        writer.write_padding(out, out.tell())
    writer.close()


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """One token for each byte, then made-up words."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    alphabet = [chr(b if b in printable else next(others)) for b in range(256)]
    words = [f"w{i}" for i in range(VOCAB - 258)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*alphabet, *words, "<s>", "</s>"])
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCAB - 2)
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_add_bos_token(True)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1].partition(":")[0] not in SHAPES:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(SHAPES)}:TYPE OUT.gguf")
    write(*sys.argv[1:])
