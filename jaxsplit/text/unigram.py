"""Tokenizer models that take the segmentation with the best sum of scores: unigram and PLaMo's."""

import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.bpe import SPACE, SURROGATE, byte_token_ids
from jaxsplit.text.metadata import get, get_token_id, require, token_bytes
from jaxsplit.text.special import TokenType

_UNKNOWN_PENALTY = 10.0  # SentencePiece's, and that of the `tokenizers` library.


class Unigram:
    """`t5`: SentencePiece's unigram model (Kudo 2018, arXiv:1804.10959), with its normalization:
    https://github.com/google/sentencepiece/blob/master/doc/normalization.md

    Texts between special and user-defined tokens are normalized each on its own. A character that
    is in no token becomes byte tokens, or, in vocabularies without them, the unknown token.
    """

    bos: int | None = None
    eos: int | None = 1
    add_bos: bool = False
    always_bos: bool = False
    clean_spaces: bool = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]):
        self.space_prefix = bool(get(metadata, "tokenizer.ggml.add_space_prefix", bool, True))
        self._remove_spaces = bool(
            get(metadata, "tokenizer.ggml.remove_extra_whitespaces", bool, True)
        )
        rules = get(metadata, "tokenizer.ggml.precompiled_charsmap", list[int])
        self._rules = Charsmap(rules) if rules else None
        scores = require(metadata, "tokenizer.ggml.scores", list[float])
        self._ids = _normal_tokens(ids, types)
        pieces = {token: scores[id] for token, id in self._ids.items()}
        worst = min(pieces.values(), default=0.0)
        self._segment = _Segmenter(pieces, worst - _UNKNOWN_PENALTY)
        self._byte_ids = byte_token_ids(ids) if TokenType.BYTE in types else None
        self._unknown = get_token_id(metadata, "unknown", len(types), 2)
        if self._byte_ids is None and self._unknown is None:
            raise JaxsplitError(
                "the vocabulary has neither the tokens <0x00> to <0xFF> nor an unknown token "
                "(tokenizer.ggml.unknown_token_id), and its tokenizer needs one of them"
            )

    def encode(self, text: bytes) -> list[int]:
        out: list[int] = []
        for piece in self._segment(self._normalize(text)):
            if piece in self._ids:
                out.append(self._ids[piece])
            elif self._byte_ids is not None:
                out += [self._byte_ids[byte] for byte in piece.encode()]
            elif self._unknown is not None:
                out.append(self._unknown)
        return out

    def piece(self, token: str) -> bytes:
        return token_bytes(token.replace(SPACE, " "))

    def _normalize(self, text: bytes) -> str:
        """Applies the file's rules, removes extra spaces, and escapes the others. A byte that is
        not UTF-8 becomes U+FFFD, which rules do not replace."""
        after_space = self._remove_spaces and not self.space_prefix
        out: list[str] = []
        for part in self._replaced(text):
            part = part.lstrip(" ") if after_space else part
            if part:
                out.append(part)
                after_space = self._remove_spaces and part.endswith(" ")
        normalized = "".join(out).replace(" ", SPACE)
        return normalized.rstrip(SPACE) if self._remove_spaces else normalized

    def _replaced(self, text: bytes) -> Iterator[str]:
        for fragment in _split_invalid(text):
            if SURROGATE.match(fragment):
                yield "\ufffd" * len(fragment)
            else:
                yield from self._rules.apply(fragment) if self._rules else fragment


class Charsmap:
    """The rules of `tokenizer.ggml.precompiled_charsmap`, such as those of NFKC.

    Each replaces some characters by others. They are the length of a trie in bytes, uint32; the
    trie, a double array of uint32 as Darts-clone writes it
    (https://github.com/s-yata/darts-clone); and the replacements, each ended by a zero byte. All
    integers are little-endian.

    Args:
        values: the bytes, signed or unsigned.

    Raises:
        JaxsplitError: the lengths do not fit.
    """

    def __init__(self, values: Sequence[int]):
        data = bytes(value & 0xFF for value in values)
        end = 4 + int.from_bytes(data[:4], "little")
        if len(data) < 4 or end > len(data) or end % 4 or end == 4:
            raise JaxsplitError(
                f"tokenizer.ggml.precompiled_charsmap has {len(data)} bytes, but its trie should "
                f"end at byte {end}: the file is damaged, convert the model again"
            )
        units = array("I", data[4:end])
        if array("H", [1]).tobytes() == b"\0\1":
            units.byteswap()
        self._units = units.tolist()
        self._replacements = data[end:]

    def apply(self, text: str) -> Iterator[str]:
        """The parts of a text, each a character or the replacement of the longest match."""
        data, at = text.encode(), 0
        while at < len(data):
            length, replacement = self._longest(data, at)
            if not length:
                length = _UTF8_LENGTHS[data[at] >> 4]
                replacement = data[at : at + length].decode()
            yield replacement
            at += length

    def _longest(self, data: bytes, at: int) -> tuple[int, str]:
        """The length of the longest match at a place, 0 for none, and what replaces it."""
        units = self._units
        node, value, length = _child_offset(units[0]), None, 0
        for end in range(at, len(data)):
            node ^= data[end]
            # The label of a unit is its first byte, or, with the highest bit, that of a value.
            if node >= len(units) or units[node] & 0x800000FF != data[end]:
                break
            unit = units[node]
            node ^= _child_offset(unit)
            if unit & 0x100 and node < len(units):
                value, length = units[node] & 0x7FFFFFFF, end + 1 - at
        if value is None:
            return 0, ""
        replacement = self._replacements[value : self._replacements.find(b"\0", value)]
        return length, replacement.decode("utf-8", "replace")


_UTF8_LENGTHS = [1] * 12 + [2, 2, 3, 4]  # By the upper four bits of the first byte.


def _child_offset(unit: int) -> int:
    """What the index of a unit of the double array is combined with, to find its children."""
    return (unit >> 10) << ((unit & 0x200) >> 6)


class Plamo2:
    """`plamo2`: PLaMo 2's tokenizer (Preferred Networks, tokenization_plamo.py of
    https://huggingface.co/pfnet/plamo-2-1b).

    The scores are integers, in ten-thousandths. Of equal segmentations, the one with the longest
    token first is taken. A character that is in no token costs 1000, and becomes byte tokens.
    Control tokens are not found in text: `Tokenizer.encode` recognizes them where it may.
    """

    bos: int | None = 1
    eos: int | None = 2
    add_bos: bool = False
    always_bos: bool = False
    space_prefix: bool = False
    clean_spaces: bool = False

    def __init__(self, metadata: Mapping[str, Any], ids: dict[str, int], types: Sequence[int]):
        scores = require(metadata, "tokenizer.ggml.scores", list[float])
        self._byte_ids = byte_token_ids(ids)
        # Tokens that are not better than an unknown character are padding.
        self._ids = {
            token: id
            for token, id in _normal_tokens(ids, types).items()
            if math.isfinite(scores[id]) and round(scores[id] * 1e4) > _PLAMO_UNKNOWN
        }
        # The library prefers the longest token last; so it works from the end.
        pieces = {token[::-1]: float(round(scores[id] * 1e4)) for token, id in self._ids.items()}
        self._segment = _Segmenter(pieces, _PLAMO_UNKNOWN)

    def encode(self, text: bytes) -> list[int]:
        out: list[int] = []
        for valid in _split_invalid(text):
            for fragment in self._fragments(valid):
                out += self._encode(fragment)
        return out

    def piece(self, token: str) -> bytes:
        return token_bytes(token)

    def _fragments(self, text: str) -> Sequence[str]:
        """The parts of a text that tokens do not cross."""
        return [text]

    def _encode(self, text: str) -> list[int]:
        if SURROGATE.match(text):  # Bytes that are not UTF-8.
            return [self._byte_ids[byte] for byte in token_bytes(text)]
        out: list[int] = []
        for reverse in reversed(self._segment(text[::-1])):
            piece = reverse[::-1]
            if piece in self._ids:
                out.append(self._ids[piece])
            else:
                out += [self._byte_ids[byte] for byte in piece.encode()]
        return out


_PLAMO_UNKNOWN = -1e7


class Plamo3(Plamo2):
    """`plamo3`: PLaMo 3's tokenizer (https://huggingface.co/pfnet/plamo-3-nict-2b-base): that of
    PLaMo 2, with boundaries.

    No token crosses the ends of a control token's name, of a character four or more times, or of
    two or more spaces. U+EE00 stands for a boundary, and is not tokenized itself. These numbers are
    those of a port of llama.cpp; they were not compared with the model's own files.
    """

    def _fragments(self, text: str) -> Sequence[str]:
        for pattern in _PLAMO3_ISOLATED:
            text = pattern.sub("\uee00\\g<0>\uee00", text)
        return [fragment for fragment in text.split("\uee00") if fragment]


_PLAMO3_ISOLATED = (re.compile(r"<\|plamo:[^|\s]{,64}\|>"), re.compile(r"(.)\1{3,}| {2,}"))


class _Segmenter:
    """Finds the segmentation of a text with the largest sum of scores (Viterbi 1967).

    Of equal ones, the longest last piece is taken, and so on from the end. The search is that of
    the `tokenizers` library's unigram model; its pieces must be characters, at least.

    Args:
        scores: of the pieces.
        unknown: the score of a character that no piece covers; lower than those of the pieces.
    """

    def __init__(self, scores: Mapping[str, float], unknown: float):
        from tokenizers import Tokenizer, models

        # Unknown characters have the lowest score less a penalty. The empty piece stands for them:
        # no text contains it, and its score is the lowest.
        pieces = [("", unknown + _UNKNOWN_PENALTY), *scores.items()]
        self._tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))

    def __call__(self, text: str) -> list[str]:
        """The pieces; neighboring characters that no piece covers are one."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return [text[start:end] for start, end in offsets]


def _split_invalid(text: bytes) -> list[str]:
    """The text, split at bytes that are not UTF-8, which are surrogate escapes."""
    return re.split("([\udc80-\udcff]+)", text.decode("utf-8", "surrogateescape"))


def _normal_tokens(ids: Mapping[str, int], types: Sequence[int]) -> dict[str, int]:
    """The tokens that are found in text. None of the others is, nor one that is not UTF-8."""
    return {
        token: id
        for token, id in ids.items()
        if types[id] in (TokenType.NORMAL, TokenType.UNDEFINED) and not SURROGATE.search(token)
    }
