"""Kinds of tokenizers: one class for each supported value of `tokenizer.ggml.model`.

A kind tokenizes text that holds no special tokens, and says what bytes a token stands for. The
merging itself is done by the `tokenizers` library.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.pretokenizers import pre_tokenizer

_SPACE = "\u2581"  # Stands for a space in SentencePiece vocabularies.
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


class Kind(Protocol):
    """What a `Tokenizer` needs to know of its kind.

    Attributes:
        bos, eos: ids of the special tokens when the file does not name them.
        add_bos: whether text starts with BOS when the file does not say so.
        always_bos: text starts with BOS whatever the file says.
        space_prefix: text that starts a prompt or follows a special token gets a leading space.
        clean_spaces: the model's conventional detokenization removes spaces before punctuation.
    """

    bos: int | None
    eos: int | None
    add_bos: bool
    always_bos: bool
    space_prefix: bool
    clean_spaces: bool

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int]): ...

    def encode(self, text: bytes) -> list[int]:
        """Ids of a text without special tokens; invalid UTF-8 is allowed."""

    def piece(self, token: str) -> bytes:
        """The bytes that a normal token of the vocabulary stands for."""


class ByteLevelBPE:
    """`gpt2`: merges by rank over bytes, in words cut by the file's pre-tokenizer."""

    bos = eos = None
    always_bos = space_prefix = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int]):
        from tokenizers import Regex, Tokenizer, pre_tokenizers

        pre = pre_tokenizer(metadata.get("tokenizer.ggml.pre"))
        self.add_bos, self.clean_spaces = pre.add_bos, pre.clean_spaces
        self._characters = _byte_alphabet()
        self._bytes = {c: bytes([byte]) for byte, c in enumerate(self._characters)}
        merges = _read_merges(metadata, ids)
        model = _bpe_model(ids, merges, ignore_merges=pre.ignore_merges)
        self._bpe, self._bpe_of_bytes = Tokenizer(model), Tokenizer(model)
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])

    def encode(self, text: bytes) -> list[int]:
        out = []
        for valid, surrogates in _decode_lenient(text):
            out += self._bpe.encode(valid, add_special_tokens=False).ids
            characters = "".join(self._characters[byte] for byte in surrogates)
            out += self._bpe_of_bytes.encode(characters, add_special_tokens=False).ids
        return out

    def piece(self, token: str) -> bytes:
        return b"".join(self._bytes.get(c) or c.encode() for c in token)


class SentencePieceBPE:
    """`llama`: merges by score over characters, with byte tokens for those it does not know."""

    bos, eos = 1, 2
    add_bos = True
    always_bos = clean_spaces = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int]):
        from tokenizers import Tokenizer

        self.space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        scores = require(metadata, "tokenizer.ggml.scores")
        self._byte_ids = [ids[name] for name in _BYTE_TOKENS if name in ids]
        if len(self._byte_ids) < 256:
            raise JaxsplitError(
                f"the vocabulary has {len(self._byte_ids)} of the 256 tokens <0x00> to <0xFF> "
                "that a tokenizer of kind 'llama' needs"
            )
        self._bpe = Tokenizer(_bpe_model(ids, _merges_of(ids, scores), byte_fallback=True))

    def encode(self, text: bytes) -> list[int]:
        out = []
        while text:
            bad = 0
            try:
                valid, bad_at = text.decode(), len(text)
            except UnicodeDecodeError as error:
                bad_at = error.start
                valid = text[:bad_at].decode()
                # The lead byte says how many bytes become byte tokens, whatever they are.
                lead = text[bad_at]
                bad = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            escaped = valid.replace(" ", _SPACE)
            out += self._bpe.encode(escaped, add_special_tokens=False).ids
            out += [self._byte_ids[byte] for byte in text[bad_at : bad_at + bad]]
            text = text[bad_at + bad :]
        return out

    def piece(self, token: str) -> bytes:
        return token.replace(_SPACE, " ").encode()


class Gemma4BPE:
    """`gemma4`: merges by rank over characters, with byte tokens; lines are cut apart."""

    bos = eos = None
    add_bos = always_bos = True  # Files that say otherwise are known to be wrong.
    space_prefix = False
    clean_spaces = True

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int]):
        from tokenizers import Tokenizer

        self._ids = ids
        merges = _read_merges(metadata, ids)
        self._bpe = Tokenizer(_bpe_model(ids, merges, byte_fallback=True))

    def encode(self, text: bytes) -> list[int]:
        out = []
        for valid, surrogates in _decode_lenient(text):
            for line in re.findall(r"\n+|[^\n]+", valid.replace(" ", _SPACE)):
                if line[0] == "\n" and line in self._ids:
                    out.append(self._ids[line])
                else:
                    out += self._bpe.encode(line, add_special_tokens=False).ids
            out += [self._ids[_BYTE_TOKENS[byte]] for byte in surrogates]
        return out

    def piece(self, token: str) -> bytes:
        return token.replace(_SPACE, " ").encode()


KINDS: dict[str, type[Kind]] = {
    "gpt2": ByteLevelBPE,
    "llama": SentencePieceBPE,
    "gemma4": Gemma4BPE,
}


def find_kind(metadata: Mapping[str, Any]) -> type[Kind]:
    """The kind that `tokenizer.ggml.model` names.

    Raises:
        JaxsplitError: the file has no tokenizer, or an unknown one.
    """
    model = require(metadata, "tokenizer.ggml.model")
    if model in ("no_vocab", "none"):
        raise JaxsplitError(
            f"the file has no tokenizer (tokenizer.ggml.model is {model!r}): "
            "only token ids can be used with it"
        )
    if model not in KINDS:
        raise JaxsplitError(
            f"tokenizer.ggml.model is {model!r}, which is unknown; supported: {', '.join(KINDS)}"
        )
    return KINDS[model]


def require(metadata: Mapping[str, Any], key: str) -> Any:
    """The value of a key without which there is no tokenizer."""
    if key not in metadata:
        raise JaxsplitError(f"{key} is missing from the file: only token ids can be used with it")
    return metadata[key]


def check_length(metadata: Mapping[str, Any], key: str, tokens: int) -> None:
    """Refuses a list that does not have a value for each token of the vocabulary."""
    if key in metadata and len(metadata[key]) != tokens:
        raise JaxsplitError(
            f"{key} has {len(metadata[key])} values, but the vocabulary has {tokens} tokens: "
            "the file is damaged, convert the model again"
        )


def _bpe_model(ids: dict[str, int], merges: Sequence[tuple[str, str]], **options: bool) -> Any:
    from tokenizers import models

    return models.BPE(vocab=ids, merges=merges, fuse_unk=False, **options)


def _read_merges(metadata: Mapping[str, Any], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """`tokenizer.ggml.merges` as pairs, without those that name no tokens."""
    merges = []
    for merge in require(metadata, "tokenizer.ggml.merges"):
        # The first character of the left part may itself be a space.
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if left in ids and right in ids and left + right in ids:
            merges.append((left, right))
    return merges


def _merges_of(ids: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best score of the result first."""
    merges = []
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((left, right))
    return merges


def _decode_lenient(text: bytes) -> list[tuple[str, bytes]]:
    """Decodes UTF-8 with one U+FFFD for each invalid byte, but accepts overlong sequences.

    Returns:
        Pairs of valid text and the encoded surrogates after it, which no `str` for the
        `tokenizers` library may hold.
    """
    decoded = text.decode("utf-8", "surrogateescape")
    parts = re.split("([\ud800-\udfff]+)", _ESCAPED.sub(_decode_escaped, decoded)) + [""]
    surrogates = (part.encode("utf-8", "surrogatepass") for part in parts[1::2])
    return list(zip(parts[::2], surrogates, strict=True))


_ESCAPED = re.compile(
    "[\udcc0-\udcdf][\udc80-\udcbf]|[\udce0-\udcef][\udc80-\udcbf]{2}"
    "|[\udcf0-\udcf7][\udc80-\udcbf]{3}|[\udc80-\udcff]"
)


def _decode_escaped(match: re.Match[str]) -> str:
    """Decodes what a strict decoder has refused: one sequence of lead and trailing bytes."""
    lead, *trail = match[0].encode("utf-8", "surrogateescape")
    code_point = lead & (0x3F >> len(trail))
    for byte in trail:
        code_point = code_point << 6 | byte & 0x3F
    return chr(code_point) if trail and code_point <= 0x10FFFF else "\ufffd" * len(match[0])


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable ones are themselves, the others U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
