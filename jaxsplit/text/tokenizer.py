"""The tokenizer of a GGUF file."""

import codecs
import functools
import re
import reprlib
from collections.abc import Container, Iterable, Mapping
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.chat import ChatTemplate
from jaxsplit.text.metadata import check_length, get, get_token_id, require, token_bytes
from jaxsplit.text.models import TokenizerModel, find_model
from jaxsplit.text.special import HIDDEN, TokenType, find_special_tokens, is_special

SHOW_SPECIAL = ("template", "none", "all")
"""Which control tokens appear in decoded text: see `Tokenizer.decode`."""

_WHITE_SPACE = b" \t\n\v\f\r"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes text to token ids and decodes them. Build one with `Tokenizer.from_metadata`.

    Attributes:
        vocab_size: number of tokens.
        bos_id, eos_id: ids of the begin- and end-of-sequence tokens, or None.
        add_bos, add_eos: whether the model expects them around a text.
        end_ids: tokens that end generation: end of sequence, of turn, of message.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    end_ids: frozenset[int]

    def __init__(self, metadata: Mapping[str, Any]):
        """See `from_metadata`."""
        model = find_model(metadata)
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
        self._metadata = metadata
        self._tokens = tokens
        self.vocab_size = len(tokens)
        self.bos_id = get_token_id(metadata, "bos", len(tokens), model.bos)
        self.eos_id = get_token_id(metadata, "eos", len(tokens), model.eos)
        self._special = find_special_tokens(metadata, ids, types, self.eos_id)
        self._model: TokenizerModel = model(metadata, ids, self._special.types)
        self._normal_piece = functools.cache(self._model.piece)
        add_bos = get(metadata, "tokenizer.ggml.add_bos_token", bool, self._model.add_bos)
        self.add_bos = bool(add_bos or model.always_bos) and self.bos_id is not None
        add_eos = get(metadata, "tokenizer.ggml.add_eos_token", bool, False)
        self.add_eos = bool(add_eos) and self.eos_id is not None

        self.end_ids = self._special.end_ids
        for id, (token, type) in enumerate(zip(tokens, self._special.types, strict=True)):
            if type == TokenType.BYTE and not _BYTE_TOKEN.fullmatch(token):
                raise JaxsplitError(
                    f"tokenizer.ggml.tokens[{id}] is {token!r}, but must be one of <0x00> to "
                    "<0xFF>, because its tokenizer.ggml.token_type says that it is a byte"
                )
        # Longer tokens are matched first.
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
        """Builds a tokenizer from a GGUF file's metadata.

        Args:
            metadata: GGUF keys to plain Python values.

        Raises:
            JaxsplitError: the file has no tokenizer, an unknown model or pre-tokenizer, or a key is
                missing or its value has the wrong type.
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
        """Encodes text to token ids.

        Args:
            text: a string, or bytes that need not be valid UTF-8.
            add_special: start with BOS if the model expects it, unless the text starts with it.
            parse_special: recognize control tokens in the text. Never use it on untrusted text.
                User-defined tokens are always recognized.
            add_eos: end with EOS if the model expects it, unless the text ends with it: for
                complete texts, never for a prompt.

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
                prefix = b" " if after_special and self._model.space_prefix else b""
                ids += self._model.encode(prefix + fragment)
                after_special = False
        bos, eos = self.bos_id, self.eos_id
        if add_special and self.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if add_eos and self.add_eos and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
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
        """Decodes token ids to text; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens.
            show_special: overrides `skip_special`: the control tokens to show, `none`, `all`, or
                `template`: the markers of thoughts and tool calls (`markup_ids`).
            continuation: the ids continue a text, as generated ones do. Otherwise, where `encode`
                adds a leading space, one leading space of the first token is dropped (none after a
                special token such as BOS, as in llama.cpp).
            clean_spaces: remove spaces before punctuation, for models whose conventional
                detokenization does so. This is not the inverse of `encode`.

        Raises:
            JaxsplitError: an id is outside the vocabulary, or `show_special` is unknown.
        """
        shown = show_special or ("none" if skip_special else "all")
        data = self.decode_bytes(ids, show_special=shown, continuation=continuation)
        if clean_spaces and self._model.clean_spaces:
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
        """As `decode`, but returns the tokens' bytes."""
        return self._join(ids, self._shown(show_special), continuation)

    def stream(
        self,
        *,
        show_special: str = "none",
        continuation: bool = False,
    ) -> "TextStream":
        """Decodes ids incrementally; the concatenated text is that of `decode`."""
        return TextStream(self, self._shown(show_special), continuation)

    @functools.cached_property
    def markup_ids(self) -> frozenset[int]:
        """Control tokens that mark thoughts and tool calls in an answer.

        They are found in the file's chat template (see `ChatTemplate.find_markup`), without end
        tokens and tokens with their own metadata key, such as BOS. Without a valid template there
        are none.
        """
        try:
            template = ChatTemplate.from_metadata(self._metadata)
        except JaxsplitError:  # `LM.chat_prompt` reports it.
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
        """A token's text in the vocabulary, for messages; invalid UTF-8 as `\\xff`."""
        return token_bytes(self._token(id)).decode("utf-8", "backslashreplace")

    def _token(self, id: int) -> str:
        if not 0 <= id < self.vocab_size:
            raise JaxsplitError(
                f"token id {id} is outside the vocabulary; valid: 0 to {self.vocab_size - 1}"
            )
        return self._tokens[id]

    def _fragments(self, text: bytes, parse_special: bool) -> list[bytes | int]:
        """Splits text at special tokens, which become ids."""
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
        """The control tokens to show."""
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
        if pieces and self._model.space_prefix and not continuation:
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces)

    def _piece(self, id: int, shown: Container[int]) -> bytes:
        """The bytes of one token."""
        token = self._token(id)
        match self._special.types[id]:
            case TokenType.CONTROL | TokenType.UNKNOWN:
                return token_bytes(token) if id in shown else b""
            case TokenType.USER_DEFINED:
                return token_bytes(token)
            case TokenType.NORMAL:
                return self._normal_piece(token)
            case TokenType.BYTE:
                return bytes([int(token[3:5], 16)])
        return b""


class TextStream:
    """Decodes token ids incrementally, in whole characters."""

    def __init__(self, tokenizer: Tokenizer, shown: Container[int], continuation: bool):
        self._tokenizer = tokenizer
        self._shown = shown
        self._continuation = continuation
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Decodes the next id; returns the text completed by it, often empty."""
        piece = self._tokenizer._join([id], self._shown, self._continuation)
        self._continuation = True
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """Ends the text; returns U+FFFD if its last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


def _to_bytes(text: str | bytes) -> bytes:
    """Encodes as UTF-8, restoring bytes that are surrogate escapes."""
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    if not isinstance(text, str):
        raise JaxsplitError(f"text is {reprlib.repr(text)}, but must be a string or bytes")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # Other surrogates.
        return text.encode("utf-8", "surrogatepass")
