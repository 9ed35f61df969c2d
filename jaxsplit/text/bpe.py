"""Tokenizer models that merge pairs (BPE), and the one that takes the longest match.

The `tokenizers` library merges by rank; it cannot express merging by score.
"""

import heapq
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.metadata import get, require, token_bytes
from jaxsplit.text.pretokenizers import pre_tokenizer

SPACE = "\u2581"
"""Stands for a space in SentencePiece vocabularies."""

_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


class ByteLevelBPE:
    """`gpt2`: merges by rank over bytes, within the pre-tokenizer's words."""

    bos: int | None = None
    eos: int | None = None
    always_bos: bool = False
    space_prefix: bool = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]):
        from tokenizers import Regex, pre_tokenizers

        pre = pre_tokenizer(get(metadata, "tokenizer.ggml.pre", str))
        self.add_bos, self.clean_spaces = pre.add_bos, pre.clean_spaces
        self._characters = _byte_alphabet()
        self._bytes = {c: bytes([byte]) for byte, c in enumerate(self._characters)}
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in pre.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

        def spell(text: str) -> list[int]:
            return [ids[c] for c in text if c in ids]

        bpe = _RankBPE(metadata, ids, spell, ignore_merges=pre.ignore_merges)
        self._encode_bytes = bpe.encoder()
        self._encode_text = bpe.encoder(pre_tokenizers.Sequence([*splits, byte_level]))

    def encode(self, text: bytes) -> list[int]:
        out = []
        for valid, surrogates in _decode_lenient(text):
            out += self._encode_text(valid)
            out += self._encode_bytes("".join(self._characters[byte] for byte in surrogates))
        return out

    def piece(self, token: str) -> bytes:
        return b"".join(self._bytes.get(c) or token_bytes(c) for c in token)


class SentencePieceBPE:
    """`llama`: merges by score over characters, with byte tokens for unknown ones.

    Works on bytes, so that tokens and texts that are not UTF-8 need no special cases.
    """

    bos: int | None = 1
    eos: int | None = 2
    add_bos: bool = True
    always_bos: bool = False
    clean_spaces: bool = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]):
        self.space_prefix = bool(get(metadata, "tokenizer.ggml.add_space_prefix", bool, True))
        scores = require(metadata, "tokenizer.ggml.scores", list[float])
        self._byte_ids = byte_token_ids(ids)
        self._ids = {token_bytes(token): id for token, id in ids.items()}
        self._scores = {token: scores[id] for token, id in self._ids.items()}

    def encode(self, text: bytes) -> list[int]:
        symbols = _SYMBOLS.findall(text.replace(b" ", SPACE.encode()))
        out: list[int] = []
        for token in merge_by_score(symbols, self._scores):
            if token in self._ids:
                out.append(self._ids[token])
            else:
                out += [self._byte_ids[byte] for byte in token]
        return out

    def piece(self, token: str) -> bytes:
        return token_bytes(token.replace(SPACE, " "))


# One character each. The lead byte alone says how many bytes a character has, valid or not.
_SYMBOLS = re.compile(b"[\xc0-\xdf].?|[\xe0-\xef].{0,2}|[\xf0-\xff].{0,3}|.", re.DOTALL)


def merge_by_score(symbols: Sequence[bytes], scores: Mapping[bytes, float]) -> list[bytes]:
    """Merges neighboring symbols into tokens until no two of them form one.

    The pair with the best score is merged first, the leftmost of equals. Symbols need not be tokens
    themselves. This is SentencePiece's BPE:
    https://github.com/google/sentencepiece/blob/master/src/bpe_model.cc

    Args:
        symbols: the characters of a text.
        scores: of each token; higher is better.

    Returns:
        The tokens and unmerged symbols, in O(n log n) time.
    """
    merged = [*symbols, b""]  # Empty where a symbol was merged into its left neighbor.
    end = len(symbols)
    following, previous = [*range(1, end + 1), end], [*range(-1, end)]
    pairs = map(bytes.__add__, symbols, symbols[1:])
    heap = [(-scores[pair], left, pair) for left, pair in enumerate(pairs) if pair in scores]
    heapq.heapify(heap)
    while heap:
        _, left, token = heapq.heappop(heap)
        right = following[left]
        if not merged[left] or merged[left] + merged[right] != token:
            continue  # Stale: one of the two has been merged since.
        merged[left], merged[right] = token, b""
        after, before = following[right], previous[left]
        following[left], previous[after] = after, left
        if after < end and (pair := token + merged[after]) in scores:
            heapq.heappush(heap, (-scores[pair], left, pair))
        if before >= 0 and (pair := merged[before] + token) in scores:
            heapq.heappush(heap, (-scores[pair], before, pair))
    return [token for token in merged if token]


class Gemma4BPE:
    """`gemma4`: merges by rank over the characters of a line, with byte tokens."""

    bos: int | None = None
    eos: int | None = None
    add_bos: bool = True
    always_bos: bool = True  # Files that say otherwise are wrong.
    space_prefix = False
    clean_spaces = True

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]):
        self._ids = ids
        self._byte_ids = byte_token_ids(ids)

        def spell(text: str) -> list[int]:
            return [self._byte_ids[byte] for byte in text.encode()]

        self._encode_line = _RankBPE(metadata, ids, spell, byte_fallback=True).encoder()

    def encode(self, text: bytes) -> list[int]:
        out = []
        for valid, surrogates in _decode_lenient(text):
            for line in re.findall(r"\n+|[^\n]+", valid.replace(" ", SPACE)):
                if line[0] == "\n" and line in self._ids:
                    out.append(self._ids[line])
                else:
                    out += self._encode_line(line)
            out += [self._byte_ids[byte] for byte in surrogates]
        return out

    def piece(self, token: str) -> bytes:
        return token_bytes(token.replace(SPACE, " "))


class LongestMatch:
    """`rwkv`: RWKV's World vocabulary; the longest token that the text goes on with, each time.

    Tokens are bytes, written as Python does.
    """

    bos: int | None = None
    eos: int | None = None
    add_bos: bool = False
    always_bos: bool = False
    space_prefix: bool = False
    clean_spaces: bool = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]):
        self._ids = {self.piece(token): id for token, id in ids.items()}
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise JaxsplitError(
                f"the vocabulary has no token for {len(missing)} of the 256 bytes that its "
                f"tokenizer needs, such as {bytes(missing[:1])!r}"
            )
        # The lengths of tokens by how they begin, the longest first.
        lengths: dict[bytes, set[int]] = {}
        for token in self._ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(found)[::-1] for start, found in lengths.items()}

    def encode(self, text: bytes) -> list[int]:
        out, at = [], 0
        while at < len(text):
            for length in (*self._lengths.get(text[at : at + 2], ()), 1):
                id = self._ids.get(text[at : at + length])
                if id is not None:
                    break
            else:
                raise AssertionError("every byte is a token")
            out.append(id)
            at += min(length, len(text) - at)
        return out

    def piece(self, token: str) -> bytes:
        return _PYTHON_ESCAPE.sub(_unescaped, token_bytes(token))


_PYTHON_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)


def _unescaped(match: re.Match[bytes]) -> bytes:
    """The byte of an escape sequence of Python's."""
    if match[1]:
        return bytes.fromhex(match[1].decode())
    return {b"t": b"\t", b"n": b"\n", b"r": b"\r"}.get(match[2], match[2])


class _RankBPE:
    """A file's merges in the `tokenizers` library.

    The library requires an id for every string in a merge. Strings that are not tokens get ids
    after the vocabulary's, and are spelled out with tokens where they remain.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        ids: Mapping[str, int],
        spell: Callable[[str], list[int]],
        **options: bool,
    ):
        from tokenizers import models

        # The library holds only valid UTF-8, and no text contains other tokens.
        vocabulary = {token: id for token, id in ids.items() if not SURROGATE.search(token)}
        merges = _read_merges(metadata)
        first_free = max(ids.values()) + 1
        self._spelled: dict[int, list[int]] = {}
        for left, right in merges:
            for text in (left, right, left + right):
                if text not in vocabulary:
                    id = vocabulary[text] = first_free + len(self._spelled)
                    self._spelled[id] = spell(text)
        self._model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, **options)

    def encoder(self, pre_tokenizer: Any = None) -> Callable[[str], list[int]]:
        """A function from text to ids, with an optional pre-tokenizer of the library."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer(self._model)
        if pre_tokenizer:
            tokenizer.pre_tokenizer = pre_tokenizer

        def encode(text: str) -> list[int]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            return [id for found in ids for id in self._spelled.get(found, (found,))]

        return encode


SURROGATE = re.compile("[\ud800-\udfff]")


def _read_merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`tokenizer.ggml.merges` as pairs, best first; of duplicates the first counts."""
    merges = {}
    for merge in require(metadata, "tokenizer.ggml.merges", list[str]):
        # The first character of the left part may itself be a space.
        at = merge.find(" ", 1)
        if at > 0 and merge[at + 1 :] and not SURROGATE.search(merge):
            merges[merge[:at], merge[at + 1 :]] = None
    return [*merges]


def byte_token_ids(ids: Mapping[str, int]) -> list[int]:
    """The ids of `<0x00>` to `<0xFF>`, for models that need all of them."""
    found = [ids[name] for name in _BYTE_TOKENS if name in ids]
    if len(found) < 256:
        raise JaxsplitError(
            f"the vocabulary has {len(found)} of the 256 tokens <0x00> to <0xFF> "
            "that its tokenizer needs"
        )
    return found


def _decode_lenient(text: bytes) -> list[tuple[str, bytes]]:
    """Decodes UTF-8 with one U+FFFD for each invalid byte, but accepts overlong sequences.

    Returns:
        Pairs of valid text and the encoded surrogates after it, which the `tokenizers` library
        does not accept in a `str`.
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
    """Decodes one sequence of lead and trailing bytes that a strict decoder has rejected."""
    lead, *trail = match[0].encode("utf-8", "surrogateescape")
    code_point = lead & (0x3F >> len(trail))
    for byte in trail:
        code_point = code_point << 6 | byte & 0x3F
    return chr(code_point) if trail and code_point <= 0x10FFFF else "\ufffd" * len(match[0])


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
