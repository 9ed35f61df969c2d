"""The tokenizer of a GGUF file."""

import codecs
import functools
import re
import reprlib
from collections.abc import Container, Iterable, Mapping
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.bpe import Kind, find_kind
from jaxsplit.text.chat import ChatTemplate
from jaxsplit.text.metadata import check_length, get, get_token_id, require, token_bytes
from jaxsplit.text.special import HIDDEN, TokenType, find_special_tokens, is_special

SHOW_SPECIAL = ("template", "none", "all")
"""Which control tokens are written out when ids are decoded: see `Tokenizer.decode`."""

_WHITE_SPACE = b" \t\n\v\f\r"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Turns text into token ids and back. Build one with `Tokenizer.from_metadata`.

    Attributes:
        vocab_size: number of tokens.
        bos_id, eos_id: ids of the begin- and end-of-sequence tokens, None if there is none.
        add_bos, add_eos: whether the model wants them around a text.
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
            for id, token in enumerate(require(metadata, "tokenizer.ggml.tokens", list[str]))
        ]
        if not tokens:
            raise JaxsplitError(
                "tokenizer.ggml.tokens is empty: only token ids can be used with it"
            )
        ids = {token: id for id, token in enumerate(tokens)}
        types = get(metadata, "tokenizer.ggml.token_type", list[int])
        types = [TokenType.NORMAL] * len(tokens) if types is None else types
        check_length("tokenizer.ggml.token_type", types, len(tokens))
        scores = get(metadata, "tokenizer.ggml.scores", list[float])
        if scores is not None:
            check_length("tokenizer.ggml.scores", scores, len(tokens))
        self._kind: Kind = kind(metadata, ids)
        self._metadata = metadata
        self._tokens = tokens
        self.vocab_size = len(tokens)
        self.bos_id = get_token_id(metadata, "bos", len(tokens), kind.bos)
        self.eos_id = get_token_id(metadata, "eos", len(tokens), kind.eos)
        add_bos = get(metadata, "tokenizer.ggml.add_bos_token", bool, self._kind.add_bos)
        self.add_bos = bool(add_bos or kind.always_bos) and self.bos_id is not None
        add_eos = get(metadata, "tokenizer.ggml.add_eos_token", bool, False)
        self.add_eos = bool(add_eos) and self.eos_id is not None

        self._special = find_special_tokens(metadata, ids, types, self.eos_id)
        self.end_ids = self._special.end_ids
        for id, (token, type) in enumerate(zip(tokens, self._special.types, strict=True)):
            if type == TokenType.BYTE and not _BYTE_TOKEN.fullmatch(token):
                raise JaxsplitError(
                    f"tokenizer.ggml.tokens[{id}] is {token!r}, but must be one of <0x00> to "
                    "<0xFF>, because its tokenizer.ggml.token_type says that it is a byte"
                )
        # Longer tokens are recognized in text before shorter ones.
        self._matched = sorted(
            (
                (token_bytes(tokens[id]), id)
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
                pre-tokenizer, or a key is missing or has a value of another type.
        """
        return cls(metadata)

    def encode(
        self,
        text: str | bytes,
        add_special: bool = True,
        parse_special: bool = False,
        *,
        add_eos: bool = False,
    ) -> list[int]:
        """Turns text into token ids.

        Args:
            text: a string, or bytes that need not be valid UTF-8.
            add_special: begin with BOS where the model wants it. A text whose own first id is BOS
                gets no other one.
            parse_special: recognize control tokens that are written in the text. Never use it on
                text that is not trusted. User-defined tokens are recognized always.
            add_eos: end with EOS where the model wants it: for complete texts, never for those
                that a model is to continue. A text whose own last id is EOS gets no other one.

        Raises:
            JaxsplitError: the text is neither a string nor bytes.
        """
        ids: list[int] = []
        after_special = True
        for fragment in self._fragments(_to_bytes(text), parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
                after_special = True
            else:
                prefix = b" " if after_special and self._kind.space_prefix else b""
                ids += self._kind.encode(prefix + fragment)
                after_special = False
        if add_special and self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_eos and self.add_eos and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def decode(
        self,
        ids: Iterable[int],
        skip_special: bool = True,
        *,
        show_special: str | None = None,
        continuation: bool = False,
        clean_spaces: bool = False,
    ) -> str:
        """Turns token ids into text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens; otherwise they are written out.
            show_special: instead, which control tokens to write out: `none`, `all`, or `template`,
                which are the markers of thoughts and tool calls (`markup_ids`).
            continuation: the ids continue a text, as generated ones do. Otherwise, where `encode`
                puts a space before text, one space at the start of the first token is dropped
                (none if a special token such as BOS comes first, as in llama.cpp).
            clean_spaces: remove spaces before punctuation, for models whose conventional
                detokenization does so. This is not the inverse of `encode`.

        Raises:
            JaxsplitError: an id is outside the vocabulary, or `show_special` is unknown.
        """
        shown = show_special or ("none" if skip_special else "all")
        data = self.decode_bytes(ids, show_special=shown, continuation=continuation)
        if clean_spaces and self._kind.clean_spaces:
            data = re.sub(rb" ([?!.,])", rb"\1", data)
            data = re.sub(rb" ' ", rb"'", data)
            data = re.sub(rb" ('(?:s|m|re|ve))", rb"\1", data)
        return data.decode("utf-8", "replace")

    def decode_bytes(
        self,
        ids: Iterable[int],
        *,
        show_special: str = "none",
        continuation: bool = False,
    ) -> bytes:
        """As `decode`, but returns the bytes as the tokens have them."""
        return self._join(ids, self._shown(show_special), continuation)

    def stream(
        self,
        *,
        show_special: str = "none",
        continuation: bool = False,
    ) -> "TextStream":
        """Decodes ids one at a time; all texts together are those of `decode`."""
        return TextStream(self, self._shown(show_special), continuation)

    @functools.cached_property
    def markup_ids(self) -> frozenset[int]:
        """Control tokens that mark thoughts and tool calls in an answer.

        The file's chat template tells them (see `ChatTemplate.find_markup`). End tokens and
        tokens with a metadata key of their own, such as BOS, are not among them. Without a valid
        template there are none.
        """
        try:
            template = ChatTemplate.from_metadata(self._metadata)
        except JaxsplitError:  # A chat reports it.
            return frozenset()
        named = {
            value
            for key, value in self._metadata.items()
            if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
            if isinstance(value, int)
        }
        control = {
            self._tokens[id]: id
            for id, type in enumerate(self._special.types)
            if type == TokenType.CONTROL and id not in self.end_ids and id not in named
        }
        return frozenset(control[token] for token in template.find_markup(control))

    def token_text(self, id: int) -> str:
        """The token as the vocabulary spells it, for messages; invalid UTF-8 as `\\xff`."""
        return token_bytes(self._token(id)).decode("utf-8", "backslashreplace")

    def _token(self, id: int) -> str:
        if not 0 <= id < self.vocab_size:
            raise JaxsplitError(
                f"token id {id} is outside the vocabulary; valid: 0 to {self.vocab_size - 1}"
            )
        return self._tokens[id]

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

    def _shown(self, show_special: str) -> Container[int]:
        """The control tokens to write out."""
        match show_special:
            case "template":
                return self.markup_ids
            case "none":
                return ()
            case "all":
                return range(self.vocab_size)
        raise JaxsplitError(
            f"show_special={show_special!r} is unknown; supported: {', '.join(SHOW_SPECIAL)}"
        )

    def _join(self, ids: Iterable[int], shown: Container[int], continuation: bool) -> bytes:
        pieces = [self._piece(id, shown) for id in ids]
        if pieces and self._kind.space_prefix and not continuation:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces)

    def _piece(self, id: int, shown: Container[int]) -> bytes:
        """The bytes that one token stands for."""
        token = self._token(id)
        match self._special.types[id]:
            case TokenType.CONTROL | TokenType.UNKNOWN:
                return token_bytes(token) if id in shown else b""
            case TokenType.USER_DEFINED:
                return token_bytes(token)
            case TokenType.NORMAL:
                return self._kind.piece(token)
            case TokenType.BYTE:
                return bytes([int(token[3:5], 16)])
        return b""


class TextStream:
    """Decodes token ids as they come, and never gives out half a character."""

    def __init__(self, tokenizer: Tokenizer, shown: Container[int], continuation: bool):
        self._tokenizer = tokenizer
        self._shown = shown
        self._continuation = continuation
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Takes the next id; returns the text that is complete with it, often empty."""
        piece = self._tokenizer._join([id], self._shown, self._continuation)
        self._continuation = True
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Ends the text; returns U+FFFD if its last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


def _to_bytes(text: str | bytes) -> bytes:
    """UTF-8, with the bytes that `surrogateescape` has hidden in a string."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    if not isinstance(text, str):
        raise JaxsplitError(f"text is {reprlib.repr(text)}, but must be a string or bytes")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # Other surrogates, which no decoder has put there.
        return text.encode("utf-8", "surrogatepass")
