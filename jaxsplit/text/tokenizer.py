"""The tokenizer of a GGUF file."""

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.kinds import Kind, check_length, find_kind, require
from jaxsplit.text.special import HIDDEN, TokenType, find_special_tokens, is_special

_WHITE_SPACE = b" \t\n\v\f\r"


class Tokenizer:
    """Turns text into token ids and back. Build one with `Tokenizer.from_metadata`.

    Attributes:
        vocab_size: number of tokens.
        bos_id, eos_id: ids of the begin- and end-of-sequence tokens, None if there is none.
        add_bos, add_eos: whether `encode` adds them when asked for special tokens.
        end_ids: every token that ends generation: end of sequence, of turn, of message.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    end_ids: frozenset[int]

    def __init__(self, metadata: Mapping[str, Any]):
        """See `from_metadata`."""
        kind = find_kind(metadata)
        # An empty token would match everywhere.
        tokens = [
            token or f"[EMPTY_{id}]"
            for id, token in enumerate(require(metadata, "tokenizer.ggml.tokens"))
        ]
        ids = {token: id for id, token in enumerate(tokens)}
        types = metadata.get("tokenizer.ggml.token_type", [TokenType.NORMAL] * len(tokens))
        check_length(metadata, "tokenizer.ggml.token_type", len(tokens))
        check_length(metadata, "tokenizer.ggml.scores", len(tokens))
        self._kind: Kind = kind(metadata, ids)
        self._tokens = tokens
        self.vocab_size = len(tokens)
        self.bos_id = self._special_id(metadata, "bos", kind.bos)
        self.eos_id = self._special_id(metadata, "eos", kind.eos)
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", self._kind.add_bos)
        self.add_bos = bool(add_bos or kind.always_bos) and self.bos_id is not None
        add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
        self.add_eos = bool(add_eos) and self.eos_id is not None

        self._special = find_special_tokens(metadata, ids, types, self.eos_id)
        self.end_ids = self._special.end_ids
        # Longer tokens are recognized in text before shorter ones.
        self._matched = sorted(
            (
                (tokens[id].encode(), id)
                for id, t in enumerate(self._special.types)
                if is_special(t)
            ),
            key=lambda entry: -len(entry[0]),
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Builds the tokenizer that the metadata of a GGUF file describes.

        Args:
            metadata: GGUF keys to plain Python values.

        Raises:
            JaxsplitError: the file has no tokenizer, one of an unknown kind or with an unknown
                pre-tokenizer, or a key is missing.
        """
        return cls(metadata)

    def encode(
        self, text: str | bytes, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Turns text into token ids.

        Args:
            text: a string, or bytes that need not be valid UTF-8.
            add_special: add BOS and EOS where the model wants them.
            parse_special: recognize control tokens that are written in the text. Never use it on
                text that is not trusted. User-defined tokens are recognized always.
        """
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        ids = [self.bos_id] if add_special and self.add_bos else []
        after_special = True
        for fragment in self._fragments(data, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
                after_special = True
            else:
                prefix = b" " if after_special and self._kind.space_prefix else b""
                ids += self._kind.encode(prefix + fragment)
                after_special = False
        return ids + ([self.eos_id] if add_special and self.add_eos else [])

    def decode(
        self,
        ids: Iterable[int],
        skip_special: bool = True,
        *,
        continuation: bool = False,
        clean_spaces: bool = False,
    ) -> str:
        """Turns token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens; otherwise they are written out.
            continuation: the ids continue a text, as generated ones do. Otherwise, where `encode`
                puts a space before text, one space at the start of the first token is dropped
                (none if a special token such as BOS comes first, as in llama.cpp).
            clean_spaces: remove spaces before punctuation, for models whose conventional
                detokenization does so. This is not the inverse of `encode`.
        """
        data = self.decode_bytes(ids, skip_special, continuation=continuation)
        if clean_spaces and self._kind.clean_spaces:
            data = re.sub(rb" ([?!.,])", rb"\1", data)
            data = re.sub(rb" ' ", rb"'", data)
            data = re.sub(rb" ('(?:s|m|re|ve))", rb"\1", data)
        return data.decode("utf-8", "replace")

    def decode_bytes(
        self, ids: Iterable[int], skip_special: bool = True, *, continuation: bool = False
    ) -> bytes:
        """As `decode`, but returns the bytes as the tokens have them."""
        pieces = [self._piece(id, skip_special) for id in ids]
        if pieces and self._kind.space_prefix and not continuation:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces)

    def stream(self, skip_special: bool = True, *, continuation: bool = False) -> "TextStream":
        """Decodes ids one at a time; all texts together are those of `decode`."""
        return TextStream(self, skip_special, continuation)

    def token_text(self, id: int) -> str:
        """The token as the vocabulary spells it, for messages."""
        if not 0 <= id < self.vocab_size:
            raise JaxsplitError(
                f"token id {id} is outside the vocabulary; valid: 0 to {self.vocab_size - 1}"
            )
        return self._tokens[id]

    def _special_id(
        self, metadata: Mapping[str, Any], name: str, default: int | None
    ) -> int | None:
        id = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        return id if id is not None and 0 <= id < self.vocab_size else None

    def _fragments(self, text: bytes, parse_special: bool) -> list[bytes | int]:
        """Splits text around the special tokens in it, which become ids."""
        fragments: list[bytes | int] = [text] if text else []
        for token, id in self._matched:
            if token not in text or (not parse_special and self._special.types[id] in HIDDEN):
                continue
            split: list[bytes | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    split.append(fragment)
                    continue
                parts = fragment.split(token)
                for n, part in enumerate(parts):
                    if n > 0:
                        split.append(id)
                        if id in self._special.strip_right:
                            part = part.lstrip(_WHITE_SPACE)
                    if n < len(parts) - 1 and id in self._special.strip_left:
                        part = part.rstrip(_WHITE_SPACE)
                    if part:
                        split.append(part)
            fragments = split
        return fragments

    def _piece(self, id: int, skip_special: bool) -> bytes:
        """The bytes that one token stands for."""
        token = self.token_text(id)
        match self._special.types[id]:
            case TokenType.CONTROL | TokenType.UNKNOWN:
                return b"" if skip_special else token.encode()
            case TokenType.USER_DEFINED:
                return token.encode()
            case TokenType.NORMAL:
                return self._kind.piece(token)
            case TokenType.BYTE:
                return bytes([int(token[3:5], 16)])
        return b""


class TextStream:
    """Decodes token ids as they come, and never gives out half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, continuation: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._continuation = continuation
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Takes the next id; returns the text that is complete with it, often empty."""
        piece = self._tokenizer.decode_bytes(
            [id], self._skip_special, continuation=self._continuation
        )
        self._continuation = True
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Ends the text; returns U+FFFD if its last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
