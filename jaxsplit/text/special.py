"""Special tokens of a vocabulary, and the ones that end generation.

GGUF files have token types, but they are often wrong or missing; as in llama.cpp, well-known names
correct and complete them.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxsplit.text.metadata import get, get_token_id


class TokenType(enum.IntEnum):
    """The values of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


HIDDEN = frozenset({TokenType.CONTROL, TokenType.UNKNOWN})
"""Types that are recognized in text, and shown in decoded text, only on request."""

_END_NAMES = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"),
    *("<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~["),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
# Fill-in-the-middle tokens: (name in the metadata key, token texts, whether they end generation).
_FILL_IN_THE_MIDDLE = (
    (
        "fim_pre",
        ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>")
        + ("\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
        False,
    ),
    (
        "fim_suf",
        ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>")
        + ("\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
        False,
    ),
    (
        "fim_mid",
        ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>")
        + ("\u2581<MID>", "<|code_middle|>", "<|middle|>"),
        False,
    ),
    ("fim_pad", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), True),
    ("fim_rep", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), True),
    ("fim_sep", ("<|file_sep|>",), True),
)
# Channel markers of gpt-oss, shown to users.
_SHOWN_NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class SpecialTokens:
    """The result of `find_special_tokens`.

    Attributes:
        types: the corrected type of every token, by id.
        end_ids: ids that end generation.
        strip_left: ids that consume the white space before them.
        strip_right: ids that consume the white space after them.
    """

    types: list[int]
    end_ids: frozenset[int]
    strip_left: frozenset[int]
    strip_right: frozenset[int]


def find_special_tokens(
    metadata: Mapping[str, Any], ids: Mapping[str, int], types: Sequence[int], eos: int | None
) -> SpecialTokens:
    """Completes the file's token types and collects the end-of-generation tokens.

    Args:
        metadata: the GGUF file's.
        ids: token text to id.
        types: the file's token types, by id.
        eos: the end-of-sequence id, if the model has one.

    Raises:
        JaxsplitError: a key's value has the wrong type.
    """
    types = list(types)
    end_ids = {ids[name] for name in _END_NAMES if name in ids}
    for id in end_ids:
        types[id] = TokenType.CONTROL
    for key, names, ends in _FILL_IN_THE_MIDDLE:
        id = get_token_id(metadata, key, len(types))
        if id is None:
            id = next((ids[name] for name in names if name in ids), None)
            if id is not None:
                types[id] = TokenType.CONTROL
        if ends and id is not None:
            end_ids.add(id)
    named = (get_token_id(metadata, key, len(types)) for key in ("eot", "eom"))
    end_ids |= {id for id in (eos, *named) if id is not None}

    for name in _SHOWN_NAMES:
        if name in ids:
            types[ids[name]] = TokenType.USER_DEFINED
    # If a model has its own tokens to end a turn, the generic one only separates messages.
    if ids.keys() >= {"<|return|>", "<|call|>", "<|end|>"} or (
        ids.keys() >= {"<|calls|>", "<|flush|>", "<|end|>"}
    ):
        end_ids.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if ids.keys() >= {"<|tool_response>", "</s>"}:
        end_ids.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL

    left: set[int] = set()
    right: set[int] = set()
    name = get(metadata, "general.name", str, "").lower()
    pre = get(metadata, "tokenizer.ggml.pre", str, "")
    if pre in ("jina-v2-de", "jina-v2-es", "jina-v2-code"):
        left = {ids[t] for t in ("<mask>",) if t in ids}
    elif "modern-bert" in name:
        left = {ids[t] for t in ("[MASK]",) if t in ids}
    elif "phi-3" in name or "phi3" in name:
        right = {id for id, type in enumerate(types) if is_special(type)}
        right -= {ids.get(t) for t in ("<unk>", "<s>", "<|endoftext|>")}
    return SpecialTokens(types, frozenset(end_ids), frozenset(left), frozenset(right))


def is_special(type: int) -> bool:
    """Whether tokens of this type are matched in text before it is tokenized."""
    return type in HIDDEN or type == TokenType.USER_DEFINED
