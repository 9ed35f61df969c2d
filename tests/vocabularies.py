"""Metadata of small vocabularies with scores."""

from typing import Any

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PLAMO_CONTROL = ["<|plamo:unk|>", "<|plamo:bos|>", "<|plamo:eos|>", "<|plamo:pad|>"]
UNIGRAM_PIECES = {
    **{"\u2581": -2.0, "\u2581the": -3.0, "the": -4.5, "\u2581a": -2.5, "a": -3.5, "b": -5.0},
    **{"ab": -4.0, "bc": -6.0, "c": -6.5, "\u2581你": -5.5, "好": -5.0, "é": -7.0, ".": -2.2},
}
PLAMO_PIECES = {
    **{"a": -3.0, "b": -3.1, "ab": -6.1, "abc": -2.0, "bc": -3.5, "c": -3.0, " the": -1.5},
    **{"the": -2.5, " ": -4.0, "日本": -2.0, "本": -5.0, "  ": -4.5, "aaaa": -1.0, "aa": -1.2},
}


def unigram_metadata(pieces: dict[str, float] | None = None, bytes: bool = True) -> dict[str, Any]:
    """`<pad> </s> <unk>`, a user-defined token, bytes, and pieces, or those above."""
    pieces = UNIGRAM_PIECES if pieces is None else pieces
    names = ["<pad>", "</s>", "<unk>", "<tag>", *(BYTES if bytes else [])]
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [*names, *pieces],
        "tokenizer.ggml.scores": [0.0] * len(names) + [*pieces.values()],
        "tokenizer.ggml.token_type": [3, 3, 2, 4] + [6] * (len(names) - 4) + [1] * len(pieces),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }


def plamo_metadata(pieces: dict[str, float] | None = None, model: str = "plamo2") -> dict[str, Any]:
    """Control tokens, a user-defined token, bytes, and pieces, or those above."""
    pieces = PLAMO_PIECES if pieces is None else pieces
    names = [*PLAMO_CONTROL, "<tag>", *BYTES]
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": [*names, *pieces, "[PAD1]"],
        "tokenizer.ggml.scores": [0.0] * len(names) + [*pieces.values(), -1000.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 3, 4] + [6] * 256 + [1] * len(pieces) + [5],
        "tokenizer.ggml.add_space_prefix": False,
    }
