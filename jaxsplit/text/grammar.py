"""Grammars that generated texts satisfy: which tokens may follow, through the library `llguidance`.

The library has one grammar format, a variant of Lark's; every kind of grammar is translated to it.
"""

import collections
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxsplit.arguments import checked_choice
from jaxsplit.errors import JaxsplitError
from jaxsplit.text.tokenizer import Tokenizer

_MOST_COMPILED = 64
"""Grammars that are kept for later requests."""

_MOST_PLACES = 1000
"""Parts of a JSON schema that are searched for an error."""

# A mask has every token that the grammar permits. Otherwise, where only one text can follow, it has
# only the token with which the tokenizer would begin it.
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'

# Models go on with white space for ever where JSON permits it. Here, in one place, it is a space,
# or a line break and the next line's indentation.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\r?\n[ \t]{0,32})"}


@dataclasses.dataclass(frozen=True)
class Grammar:
    """What a generated text must satisfy.

    Attributes:
      kind: of the text below:
        `json_object`: any JSON object; there is no text.
        `json_schema`: a JSON schema, as JSON. Its `x-guidance` has the library's own options.
        `choice`: a JSON array of strings, of which the generated text is one.
        `regex`: a regular expression for the whole text, in the syntax of Rust's `regex`.
        `lark`: a grammar in llguidance's variant of Lark, with a rule `start`.
        `gbnf`: a grammar in llama.cpp's format, with a rule `root`.
      text: the schema, the expression or the grammar.

    Raises:
      JaxsplitError: the kind is unknown, or the text is not a string of characters.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        checked_choice("grammar.kind", self.kind, KINDS)
        if not isinstance(self.text, str):
            raise JaxsplitError(f"grammar.text={self.text!r:.40} must be a string")
        if alone := re.search("[\ud800-\udfff]", self.text):
            raise JaxsplitError(
                f"grammar.text has half a character at {alone.start()}: {alone[0]!r}"
            )

    @classmethod
    def of(cls, given: Any) -> "Grammar":
        """A grammar, or one from a mapping of its fields.

        Raises:
          JaxsplitError: it is neither, or the fields do not suit.
        """
        if isinstance(given, Mapping) and "kind" in given and given.keys() <= {"kind", "text"}:
            return cls(**given)
        if not isinstance(given, cls):
            raise JaxsplitError(
                f"grammar={given!r:.40} must be a jaxsplit.Grammar, or an object of kind and text"
            )
        return given

    @property
    def lark(self) -> str:
        """The same in llguidance's variant of Lark.

        Raises:
          JaxsplitError: the text is not what the kind says, or `llguidance` is not installed.
        """
        return _TO_LARK[self.kind](self)


def _json(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise JaxsplitError(f"grammar: the {grammar.kind} is not JSON: {error}") from None


def _json_object(grammar: Grammar) -> str:
    if grammar.text:
        raise JaxsplitError(
            f"grammar: json_object takes no text, not {grammar.text[:40]!r}; a schema's kind is "
            "json_schema"
        )
    return _of_schema({"type": "object"})


def _json_schema(grammar: Grammar) -> str:
    schema = _json(grammar)
    if not (isinstance(schema, dict) or schema is True):
        raise JaxsplitError(
            f"grammar: a json_schema that permits any text is a JSON object, not "
            f"{grammar.text[:40]!r}"
        )
    return _of_schema({} if schema is True else schema)


def _of_schema(schema: dict[str, Any]) -> str:
    options = schema.get("x-guidance", {})
    if isinstance(options, dict):
        schema = schema | {"x-guidance": _JSON_OPTIONS | options}
    return f"start: %json {json.dumps(schema)}"


def _choice(grammar: Grammar) -> str:
    choices = _json(grammar)
    if not (isinstance(choices, list) and choices and all(isinstance(x, str) for x in choices)):
        raise JaxsplitError(
            f"grammar: a choice is a JSON array of strings, not {grammar.text[:40]!r}"
        )
    return "start: " + " | ".join(map(json.dumps, choices))


def _regex(grammar: Grammar) -> str:
    return f"start: /{_llguidance().regex_to_lark(grammar.text, use_ascii='d')}/"


def _gbnf(grammar: Grammar) -> str:
    _llguidance()
    convert = importlib.import_module("llguidance.gbnf_to_lark").gbnf_to_lark
    try:
        return convert(grammar.text)
    except Exception as error:  # of many types
        raise JaxsplitError(f"grammar: the gbnf is invalid: {_line(str(error))}") from None


_TO_LARK: dict[str, Callable[[Grammar], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "choice": _choice,
    "regex": _regex,
    "lark": lambda grammar: grammar.text,
    "gbnf": _gbnf,
}
KINDS = tuple(_TO_LARK)
"""Of a `Grammar`."""


class Matcher:
    """How far a text has come in its grammar. Made by `Grammars.matcher`.

    Args:
      state: the library's matcher, from now on this one's own.
      ends: uint32 `[words]`: a bit for each token that ends the text.
    """

    def __init__(self, state: Any, ends: np.ndarray):
        self.state, self.ends = state, ends

    def accept(self, token: int) -> bool:
        """Adds a token, which the mask permits and which does not end the text.

        Returns:
          whether the text is complete: nothing may follow.
        """
        return self.state.consume_token(token) and self.state.is_stopped()


class Grammars:
    """Compiles grammars for a tokenizer. Thread-safe.

    Args:
      tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._compiled = functools.lru_cache(_MOST_COMPILED)(self._compile)

    def check(self, grammar: Grammar) -> None:
        """Compiles a grammar, or finds it among those of earlier requests.

        Raises:
          JaxsplitError: it is invalid or needs what is not supported, or `llguidance` is not
            installed.
        """
        self._compiled(grammar)

    def matcher(self, grammar: Grammar, end_ids: Collection[int]) -> Matcher:
        """The matcher of a new text.

        Args:
          grammar: that it is to satisfy.
          end_ids: tokens that end the text: they are permitted where the grammar permits the end.

        Raises:
          JaxsplitError: as `check`.
        """
        ends = np.zeros(self._words, np.uint32)
        for token in end_ids:
            if token < self._end:
                ends[token // 32] |= np.uint32(1 << token % 32)
        return Matcher(self._compiled(grammar).deep_copy(), ends)

    def masks(self, matchers: Sequence[Sequence[Matcher | None]]) -> np.ndarray:
        """Which tokens may follow.

        Args:
          matchers: of the rows of each data replica; None permits everything.

        Returns:
          uint32 `[data, rows, words]`: bit `i` of word `w` permits token `32 * w + i`. No bit is
          set where nothing can follow; then there is an `error`.
        """
        rows = max(map(len, matchers))
        found = np.full((len(matchers), rows, self._words), -1, np.int32)
        flat = found.reshape(-1, self._words)
        present = [
            (matcher, replica * rows + row)
            for replica, own in enumerate(matchers)
            for row, matcher in enumerate(own)
            if matcher is not None
        ]
        fill = importlib.import_module("llguidance.numpy")
        if len(present) == 1:
            [(matcher, at)] = present
            fill.fill_next_token_bitmask(matcher.state, flat, at)
        elif present:
            pairs = [(matcher.state, at) for matcher, at in present]
            fill.fill_next_token_bitmask_par(self._executor, pairs, flat)
        masks, (word, bit) = flat.view(np.uint32), divmod(self._end, 32)
        for matcher, at in present:
            mask = masks[at]
            may_end = mask[word] >> bit & 1
            mask &= ~matcher.ends
            if matcher.state.is_error():
                mask[:] = 0
            elif may_end:
                mask |= matcher.ends
        return found.view(np.uint32)

    def error(self, matcher: Matcher) -> JaxsplitError | None:
        """Why nothing can follow; None: something can."""
        permitted = self.masks([[matcher]])
        if matcher.state.is_error():
            why = _line(matcher.state.get_error())
            return JaxsplitError(f"grammar: the text cannot go on: {why}; try a simpler grammar")
        permitted[0, 0, self._end // 32] &= ~np.uint32(1 << self._end % 32)
        if not permitted.any():
            return JaxsplitError(
                "grammar: the text cannot go on: no token is permitted; the vocabulary lacks what "
                "the grammar needs, or tokens that end the text are part of it"
            )
        return None

    @property
    def _end(self) -> int:
        """The token that stands for the end of the text, whichever tokens end it: the first after
        the vocabulary."""
        return self._tokenizer.vocab_size

    @property
    def _words(self) -> int:
        """Of a mask."""
        return self._end // 32 + 1

    @functools.cached_property
    def _executor(self) -> Any:
        return _llguidance().LLExecutor()

    @functools.cached_property
    def _vocabulary(self) -> Any:
        """The vocabulary as the library knows it. Control tokens have no text: a grammar permits
        them only where it has their names, in Lark as `<|name|>`."""
        library, tokenizer = _llguidance(), self._tokenizer
        tokens = [tokenizer.decode_bytes([i], continuation=True) for i in range(self._end)]
        control = {i for i, token in enumerate(tokens) if not token} | tokenizer.end_ids
        for i in control:
            tokens[i] = tokenizer.token_text(i).encode()
        vocabulary = library.TokenizerWrapper(
            _Vocabulary(self._end, None, [*tokens, b"<end>"], [*sorted(control), self._end])
        )
        return library.LLTokenizer(vocabulary)

    def _compile(self, grammar: Grammar) -> Any:
        """The library's matcher at the beginning of a text."""
        try:
            state = self._matcher(grammar.lark)
        except RecursionError:
            raise JaxsplitError(f"grammar: the {grammar.kind} is nested too deeply") from None
        if not state.is_error():
            return state
        error, place = _line(state.get_error()), ""
        if grammar.kind == "json_schema":
            place = self._place(json.loads(grammar.text), error)
            place = f" at {place if len(place) < 80 else place[:40] + '…' + place[-40:]}"
        if grammar.kind not in ("lark", "gbnf"):  # whose author has not seen the Lark
            error = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", error)
        raise JaxsplitError(f"grammar: the {grammar.kind} is invalid{place}: {error}")

    def _matcher(self, lark: str) -> Any:
        # Silent: errors are told to the caller.
        return _llguidance().LLMatcher(self._vocabulary, lark + _OPTIONS, log_level=0)

    def _place(self, schema: Any, error: str) -> str:
        """The smallest part of a schema that has an error by itself."""
        parts = [part for _, part in zip(range(_MOST_PLACES), _parts(schema, "#"), strict=False)]
        for place, part in reversed(parts):
            state = self._matcher(_of_schema(part))
            if state.is_error() and _line(state.get_error()) == error:
                return place
        return "#"


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What `llguidance.TokenizerWrapper` takes."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]

    def __call__(self, text: bytes) -> list[int]:
        """Masks without forced tokens need no encoder."""
        raise NotImplementedError


def _parts(schema: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The objects in a JSON schema and their places, each before those in it."""
    waiting = collections.deque([(place, schema)])
    while waiting:
        place, part = waiting.popleft()
        if isinstance(part, dict):
            yield place, part
        pairs = part.items() if isinstance(part, dict) else enumerate(part)
        waiting += [(f"{place}/{k}", x) for k, x in pairs if isinstance(x, dict | list)]


def _line(error: str) -> str:
    """What is wrong, of an error in several lines."""
    of_regex = re.search(r"^error: (.*)", error, re.MULTILINE)
    return of_regex[1] if of_regex else error.strip().partition("\n")[0]


@functools.cache
def _llguidance() -> Any:
    """The library.

    Raises:
      JaxsplitError: it is not installed.
    """
    try:
        return importlib.import_module("llguidance")
    except ImportError:
        raise JaxsplitError(
            "grammar needs llguidance, which is not installed: pip install 'jaxsplit[grammar]'"
        ) from None
