"""Tokenizer models: one class for each supported value of `tokenizer.ggml.model`.

A model tokenizes text without special tokens, and maps tokens to bytes.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.bpe import ByteLevelBPE, Gemma4BPE, LongestMatch, SentencePieceBPE
from jaxsplit.text.metadata import require
from jaxsplit.text.unigram import Plamo2, Plamo3, Unigram


class TokenizerModel(Protocol):
    """Interface of a tokenizer model.

    Attributes:
        bos, eos: default ids of the special tokens, if the file does not name them.
        add_bos: whether text starts with BOS by default.
        always_bos: text starts with BOS whatever the file says.
        space_prefix: text at the start of a prompt or after a special token gets a leading space.
        clean_spaces: conventional detokenization removes spaces before punctuation.
    """

    bos: int | None
    eos: int | None
    add_bos: bool
    always_bos: bool
    space_prefix: bool
    clean_spaces: bool

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]): ...

    def encode(self, text: bytes) -> list[int]:
        """Tokenizes text without special tokens; invalid UTF-8 is allowed."""
        ...

    def piece(self, token: str) -> bytes:
        """The bytes of a normal token."""
        ...


TOKENIZER_MODELS: dict[str, type[TokenizerModel]] = {
    "gpt2": ByteLevelBPE,
    "llama": SentencePieceBPE,
    "gemma4": Gemma4BPE,
    "rwkv": LongestMatch,
    "t5": Unigram,
    "plamo2": Plamo2,
    "plamo3": Plamo3,
}


def find_model(metadata: Mapping[str, Any]) -> type[TokenizerModel]:
    """The class for the file's `tokenizer.ggml.model`.

    Raises:
        JaxsplitError: the file has no tokenizer, or an unknown one.
    """
    model = require(metadata, "tokenizer.ggml.model", str)
    if model in ("no_vocab", "none"):
        raise JaxsplitError(
            f"the file has no tokenizer (tokenizer.ggml.model is {model!r}): "
            "only token ids can be used with it"
        )
    if model not in TOKENIZER_MODELS:
        raise JaxsplitError(
            f"tokenizer.ggml.model is {model!r}, which is unknown; supported: "
            f"{', '.join(TOKENIZER_MODELS)}"
        )
    return TOKENIZER_MODELS[model]
