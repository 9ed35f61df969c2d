"""A tiny model with a vocabulary, and random numbers that can be repeated."""

import os
import secrets

import gguf
import numpy as np

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "Ġ t", "Ġt he")


def fresh_rng():
    """A generator with a new seed, which pytest shows when the test fails.

    JAXSPLIT_TEST_SEED=SEED repeats a run.
    """
    seed = int(os.environ.get("JAXSPLIT_TEST_SEED") or secrets.randbits(32))
    print(f"repeat with JAXSPLIT_TEST_SEED={seed}")
    return np.random.default_rng(seed)


def byte_alphabet():
    """GPT-2's character for each byte: printable ones are themselves, the others U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_tiny_model(path, **overrides):
    """Writes a random Llama with a byte-level vocabulary and a ChatML template.

    Its head knows only printable ASCII and line ends, so that generated text is readable and never
    ends by itself.

    Args:
      path: the file to write.
      **overrides: sizes (`embed`, `layers`, `heads`, `kv_heads`, `mlp`, `context`), `kind` (a GGML
        type for the matrices, F32 or one that the gguf package can quantize to), `seed`, `metadata`
        (GGUF keys to strings or integers, None to leave one out) and `tensors` (names to float32
        arrays, None to leave one out).
    """
    sizes = {"embed": 64, "layers": 2, "heads": 4, "kv_heads": 2, "mlp": 96, "context": 256}
    others = {"kind": "F32", "seed": 0, "metadata": {}, "tensors": {}}
    if unknown := set(overrides) - set(sizes | others):
        raise TypeError(f"unknown: {unknown}")
    o = sizes | others | overrides
    rng = np.random.default_rng(o["seed"])
    characters = byte_alphabet()
    tokens = [*characters, *(merge.replace(" ", "") for merge in MERGES), *SPECIAL]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    metadata = {
        "llama.context_length": o["context"],
        "llama.embedding_length": o["embed"],
        "llama.block_count": o["layers"],
        "llama.feed_forward_length": o["mlp"],
        "llama.attention.head_count": o["heads"],
        "llama.attention.head_count_kv": o["kv_heads"],
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": o["embed"] // o["heads"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(control if t in SPECIAL else normal) for t in tokens],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.chat_template": CHATML,
        **o["metadata"],
    }

    def matrix(rows, columns):
        return rng.normal(size=(rows, columns), scale=columns**-0.5).astype(np.float32)

    head = matrix(len(tokens), o["embed"])
    spoken = [" ", "\n", *map(chr, range(0x21, 0x7F))]
    head[[t not in {characters[ord(c)] for c in spoken} for t in tokens]] = 0
    kv = o["embed"] // o["heads"] * o["kv_heads"]
    tensors = {
        "token_embd.weight": matrix(len(tokens), o["embed"]) * o["embed"] ** 0.5,
        "output_norm.weight": np.ones(o["embed"], np.float32),
        "output.weight": 8 * head,
    }
    for i in range(o["layers"]):
        tensors |= {
            f"blk.{i}.attn_norm.weight": np.ones(o["embed"], np.float32),
            f"blk.{i}.attn_q.weight": matrix(o["embed"], o["embed"]),
            f"blk.{i}.attn_k.weight": matrix(kv, o["embed"]),
            f"blk.{i}.attn_v.weight": matrix(kv, o["embed"]),
            f"blk.{i}.attn_output.weight": matrix(o["embed"], o["embed"]),
            f"blk.{i}.ffn_norm.weight": np.ones(o["embed"], np.float32),
            f"blk.{i}.ffn_gate.weight": matrix(o["mlp"], o["embed"]),
            f"blk.{i}.ffn_up.weight": matrix(o["mlp"], o["embed"]),
            f"blk.{i}.ffn_down.weight": matrix(o["embed"], o["mlp"]),
        }
    tensors |= o["tensors"]
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if value is not None:
            add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            add.get(type(value), writer.add_array)(key, value)
    for name, values in tensors.items():
        if values is not None:
            kind = gguf.GGMLQuantizationType[o["kind"] if values.ndim == 2 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
