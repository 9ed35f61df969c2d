"""Parsers that find the tool calls in an answer while it is streamed.

They are generators in the manner of recursive descent: `None` asks for more text, anything else is
a piece of the answer. Nothing is decided before the text decides it, so the result cannot depend on
how the text is cut.
"""

import itertools
import json
import re
from collections.abc import Generator
from typing import TypeVar

from jaxsplit.text.notations import DECODERS, as_object, escaped, from_text, json_types, loads
from jaxsplit.text.tool_calls import Schemas, ToolFormat, parts_of

T = TypeVar("T")
Piece = tuple[str, str]
"""Kind and text: `reasoning`, `content`, the `name` of a call, or a part of its `arguments`."""
Parse = Generator[Piece | None, None, T]

_SPACE = re.compile(r"\s*")
_SEPARATOR = re.compile(r"[\s,;]*")
_BETWEEN_STRINGS = re.compile(r'[^"{}\[\]]*')
_INSIDE_STRING = re.compile(r'(?:[^"\\]+|\\.)*', re.DOTALL)
_SCALAR = re.compile(r"[\w.+-]*")
_NAME_CHARACTER = re.compile(r"[\w-]")
_CLOSING = {"{": "}", "[": "]"}
_NAME_KEYS = ("name", "tool_name")
_ARGUMENTS_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type", "tool_call_id")
_KEY_LENGTH = 200  # the longest key of an argument, or id of a call, in characters
_MESSAGE_START, _CHANNEL, _MESSAGE = "<|start|>assistant", "<|channel|>", "<|message|>"
_MESSAGE_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")


class CallParser:
    """Finds the calls between a format's marks in the text of an answer, without its reasoning."""

    def __init__(self, format: ToolFormat, tools: Schemas):
        """Starts a text.

        Args:
          format: how calls are written.
          tools: JSON schemas of the arguments of the functions that may be called, by name.
        """
        self._format = format
        self._tools = tools
        self._text = ""
        self._at = 0  # what is before has been parsed
        self._ended = False
        self._streamed: int | None = None  # in a JSON text: what is before was handed over
        self._in_string = False
        self._name = ""  # of the call that is being parsed
        self._calls = 0  # whose names were handed over
        self._parameters_taken = 0  # of the call that is being parsed
        self._run = self._answer()

    def push(self, text: str) -> list[Piece]:
        """Takes the next piece of the text."""
        self._text += text
        pieces: list[Piece] = []
        for piece in self._run:
            if piece is None:
                break
            pieces.append(piece)
        return pieces

    def finish(self) -> list[Piece]:
        """Ends the text; returns what was held back."""
        self._ended = True
        return [piece for piece in self._run if piece]

    # The answer

    def _answer(self) -> Parse[None]:
        starts = self._format.starts
        mark = re.compile("|".join(map(re.escape, starts)))
        if self._format.bare:
            yield from self._try(self._section())
        while True:
            found = mark.search(self._text, self._at)
            end = found.start() if found else self._held_from(starts)
            # White space before a call, or after the last one, is not content.
            end = self._at + len(self._text[self._at : end].rstrip())
            yield from self._content(end)
            if found:
                calls = self._calls
                yield from self._try(self._section())
                if self._calls == calls:
                    yield from self._content(found.end() - end)
            elif not (yield from self._more()):
                break
        if not self._calls:
            yield from self._content(len(self._text))

    def _section(self) -> Parse[bool]:
        """Takes calls and the marks around them."""
        calls = self._calls
        yield from self._literal(self._format.begin)
        yield from self._try(self._call())
        if self._calls == calls:
            return False
        while (yield from self._try(self._call())):
            pass
        yield from self._literal(self._format.end)
        return True

    def _call(self) -> Parse[bool]:
        """Takes what the pattern of a call shows."""
        parts = [*parts_of(self._format.call), ("", None)]
        for (literal, field), (following, _) in itertools.pairwise(parts):
            if not (yield from self._literal(literal)):
                return False
            taken = True
            match field:
                case "name":
                    taken = yield from self._function_name()
                case "id":
                    id = yield from self._until(following, _KEY_LENGTH, keep=True)
                    taken = id is not None and re.fullmatch(self._format.id, id) is not None
                case "arguments":
                    taken = yield from self._arguments()
                case "call" | "calls":
                    taken = yield from self._call_objects()
                case "parameters":
                    taken = yield from self._parameters()
                case "python" | "gemma":
                    taken = yield from self._decoded(field, following)
            if not taken:
                return False
        if self._format.parameter:  # The pattern is complete, and so are the arguments.
            if self._parameters_taken:
                yield "arguments", "}"
            else:
                yield from self._hand_over("{}")
        return True

    # Parts of a call

    def _function_name(self) -> Parse[bool]:
        yield from self._match(_SPACE)
        # One character more tells `get` from `get_weather`.
        while any(name.startswith(self._text[self._at :]) for name in self._tools):
            if not (yield from self._more()):
                break
        names = [name for name in self._tools if self._text.startswith(name, self._at)]
        self._name = max(names, key=len, default="")
        self._at += len(self._name)
        return bool(names) and not _NAME_CHARACTER.match(self._text, self._at)

    def _call_objects(self) -> Parse[bool]:
        """Takes JSON objects, in an array or not."""
        yield from self._literal("[")
        if not (yield from self._try(self._call_object())):
            return False
        while (yield from self._try(self._call_object())):
            pass
        while (yield from self._literal("]")) or (yield from self._literal("}")):
            pass  # Models also write too many of them.
        return True

    def _call_object(self) -> Parse[bool]:
        """Takes a JSON object of a function's name and its arguments, in any order."""
        yield from self._match(_SEPARATOR)
        if not (yield from self._literal("{")):
            return False
        named = called = False
        arguments: str | None = None  # that came before the name
        while True:
            yield from self._match(_SPACE)
            key = yield from self._string_value()
            if key is None or not (yield from self._literal(":")):
                return False
            yield from self._match(_SPACE)
            if key in _NAME_KEYS and not named:
                name = yield from self._string_value()
                if name is None or name not in self._tools:
                    return False
                self._name, named = name, True
            elif key in _ARGUMENTS_KEYS and not called and arguments is None:
                if named:
                    called = yield from self._arguments()
                    if not called:
                        return False
                else:
                    start = self._at
                    if not (yield from self._value()):
                        return False
                    arguments = as_object(self._text[start : self._at])
                    if arguments is None:
                        return False
            elif key not in _OTHER_KEYS or not (yield from self._value()):
                return False
            if not (yield from self._literal(",")):
                break
        if not named or not (yield from self._literal("}")):
            return False
        if not called:
            yield from self._hand_over(arguments or "{}")
        return True

    def _arguments(self) -> Parse[bool]:
        """Takes a JSON object, and hands it over as it comes."""
        yield from self._match(_SPACE)
        start = self._at
        if self._text.startswith("{", start):
            yield from self._hand_over("")
            self._streamed = self._at
            complete = yield from self._value()
            yield from self._stream()
            self._streamed = None
            return complete
        if not (yield from self._value()):
            return False
        arguments = as_object(self._text[start : self._at])
        if arguments is None:
            return False
        yield from self._hand_over(arguments)
        return True

    def _parameters(self) -> Parse[bool]:
        """Takes the arguments one by one."""
        (opening, _), (between, _), (closing, _) = parts_of(self._format.parameter)
        properties = self._tools[self._name].get("properties") or {}
        self._parameters_taken = 0
        while True:
            start = self._at
            if not (yield from self._literal(opening)):
                return True
            key = yield from self._until(between, _KEY_LENGTH)
            if key is None:
                self._at = start
                return False
            if not self._parameters_taken:
                yield from self._hand_over("")
            yield "arguments", "{" if not self._parameters_taken else ", "
            self._parameters_taken += 1
            yield "arguments", json.dumps(key, ensure_ascii=False) + ": "
            types = json_types(properties.get(key))
            parse = (
                self._text_parameter(closing)
                if types == {"string"}
                else (self._typed_parameter(closing, types))
            )
            if not (yield from parse):
                return False

    def _text_parameter(self, closing: str) -> Parse[bool]:
        """Takes a text and the mark after it, and hands it over as a JSON string as it comes."""
        closings = (closing,)
        if "\n{value}\n" in self._format.parameter:
            closings = (closing, "\n" + closing)
            while self._at == len(self._text) and (yield from self._more()):
                pass
            self._at += self._text.startswith("\n", self._at)
        yield "arguments", '"'
        while True:
            found = self._text.find(closing, self._at)
            end = found if found >= 0 else self._held_from(closings)
            if found > self._at and len(closings) > 1 and self._text[found - 1] == "\n":
                end -= 1
            yield "arguments", json.dumps(self._text[self._at : end], ensure_ascii=False)[1:-1]
            if found >= 0:
                yield "arguments", '"'
                self._at = found + len(closing)
                return True
            self._text, self._at = self._text[end:], 0
            if not (yield from self._more()):
                return False

    def _typed_parameter(self, closing: str, types: set[str]) -> Parse[bool]:
        """Takes a text and the mark after it, and hands it over as JSON of one of some types."""
        start, text = self._at, None
        if types and "string" not in types:
            yield from self._match(_SPACE)
            # The mark may also be in a string of the value.
            if (yield from self._value()) and (yield from self._literal(closing)):
                text = self._text[start : self._at - len(closing)]
            else:
                self._at = start
        if text is None:
            text = yield from self._until(closing)
        if text is None:
            return False
        if "\n{value}\n" in self._format.parameter:
            text = text.removeprefix("\n").removesuffix("\n")
        yield "arguments", from_text(text, types)
        return True

    def _decoded(self, notation: str, mark: str) -> Parse[bool]:
        """Takes the text before a mark, and hands over the calls that it stands for."""
        start = self._at
        if (yield from self._until(mark, keep=True)) is None:
            self._at = len(self._text)
        calls = DECODERS[notation](self._text[start : self._at])
        if not calls or any(name not in self._tools for name, _ in calls):
            return False
        for name, arguments in calls:
            self._name = name
            yield from self._hand_over(arguments)
        return True

    # JSON

    def _value(self) -> Parse[bool]:
        """Takes a JSON value. Only strings and brackets are checked."""
        closing: list[str] = []
        while True:
            run = yield from self._match(_BETWEEN_STRINGS if closing else _SCALAR)
            if run and not closing:
                return True
            character = self._text[self._at : self._at + 1]
            if character == '"':
                if not (yield from self._string()):
                    return False
            elif character in _CLOSING:
                closing.append(_CLOSING[character])
                self._at += 1
            elif closing and character == closing[-1]:
                closing.pop()
                self._at += 1
            else:
                return False
            if not closing:
                return True

    def _string(self) -> Parse[bool]:
        if not self._text.startswith('"', self._at):
            return False
        yield from self._stream()
        self._in_string = True
        self._at += 1
        while True:
            match = _INSIDE_STRING.match(self._text, self._at)
            self._at = match.end() if match else self._at
            complete = self._text.startswith('"', self._at)
            if complete or not (yield from self._more()):
                break
        self._at += complete
        yield from self._stream()
        self._in_string = False
        return complete

    def _string_value(self) -> Parse[str | None]:
        start = self._at
        if not (yield from self._string()):
            return None
        try:
            return loads(self._text[start : self._at], strict=False)
        except ValueError:
            return None

    # Text

    def _more(self) -> Parse[bool]:
        """Asks for more text; `False` at its end."""
        if self._ended:
            return False
        if self._streamed is not None:
            yield from self._stream()
            self._text, self._at, self._streamed = self._text[self._at :], 0, 0
        yield None
        return True

    def _match(self, pattern: re.Pattern[str]) -> Parse[str]:
        """Takes the longest run that matches; the pattern must match every part of it, too."""
        while True:
            match = pattern.match(self._text, self._at)
            end = match.end() if match else self._at
            if end < len(self._text) or not (yield from self._more()):
                break
        run, self._at = self._text[self._at : end], end
        return run

    def _literal(self, literal: str) -> Parse[bool]:
        """Takes a text; white space in and before it may be missing, or be of any kind."""
        start = self._at
        for word in literal.split():
            yield from self._match(_SPACE)
            while not self._text.startswith(word, self._at):
                may_follow = word.startswith(self._text[self._at :])
                if not may_follow or not (yield from self._more()):
                    self._at = start
                    return False
            self._at += len(word)
        return True

    def _until(self, mark: str, limit: int | None = None, keep: bool = False) -> Parse[str | None]:
        """Takes a text of no more than `limit` characters, and the mark after it."""
        searched = self._at
        stop = None if limit is None else self._at + limit + len(mark)
        while (found := self._text.find(mark, searched, stop)) < 0:
            searched = max(self._at, len(self._text) - len(mark) + 1)
            too_long = stop is not None and len(self._text) >= stop
            if too_long or not (yield from self._more()):
                return None
        text = self._text[self._at : found]
        self._at = found if keep else found + len(mark)
        return text

    def _try(self, parse: Parse[bool]) -> Parse[bool]:
        """Parses, and takes nothing if that fails before a name is handed over."""
        start, calls = self._at, self._calls
        parsed = yield from parse
        if not parsed and self._calls == calls:
            self._at = start
        return parsed

    def _held_from(self, marks: tuple[str, ...]) -> int:
        """Where text starts that may be the beginning of a mark."""
        if self._ended:
            return len(self._text)
        longest = max(map(len, marks))
        for start in range(max(self._at, len(self._text) - longest + 1), len(self._text)):
            if any(mark.startswith(self._text[start:]) for mark in marks):
                return start
        return len(self._text)

    # Pieces

    def _content(self, end: int, kind: str = "content") -> Parse[None]:
        if end > self._at:
            yield kind, self._text[self._at : end]
        self._text, self._at = self._text[end:], 0

    def _hand_over(self, arguments: str) -> Parse[None]:
        """Starts a call, of which nothing can be taken back from now on."""
        self._calls += 1
        yield "name", self._name
        if arguments:
            yield "arguments", arguments

    def _stream(self) -> Parse[None]:
        """Hands over what was taken of a JSON text."""
        if self._streamed is not None and self._at > self._streamed:
            text = self._text[self._streamed : self._at]
            yield "arguments", escaped(text) if self._in_string else text
            self._streamed = self._at


class ChannelParser(CallParser):
    """Splits answers of gpt-oss, which consist of messages in channels.

    A message is `<|start|>assistant<|channel|>CHANNEL<|message|>TEXT<|end|>`; the prompt has the
    start of the first. That of the channel `analysis` is reasoning. One to a function, in either of
    `<|start|>assistant to=functions.NAME<|channel|>…` and `<|channel|>… to=functions.NAME …`, is a
    call. (https://cookbook.openai.com/articles/openai-harmony)
    """

    def __init__(
        self, format: ToolFormat, tools: Schemas, prompt: str = "", parse_reasoning: bool = True
    ):
        """Starts an answer.

        Args:
          format: of the calls.
          tools: JSON schemas of the arguments of the functions that may be called, by name.
          prompt: text of the prompt, which may end inside of a message.
          parse_reasoning: `False` leaves reasoning in the content, with its marks.
        """
        super().__init__(format, tools)
        self._parse_reasoning = parse_reasoning
        _, start, header = prompt.rpartition("<|start|>")
        if header.startswith("assistant"):
            header, message, _ = header.partition(_MESSAGE)
            self._text = start + header + message
        self._prompted = len(self._text)  # The prompt's part is no content.

    def _answer(self) -> Parse[None]:
        marks = _MESSAGE_START, _CHANNEL, *_MESSAGE_ENDS
        mark = re.compile("|".join(map(re.escape, marks)))
        kind, with_marks = "content", False
        while True:
            found = mark.search(self._text, self._at)
            yield from self._content(found.start() if found else self._held_from(marks), kind)
            if not found:
                if not (yield from self._more()):
                    break
            elif found.group() in _MESSAGE_ENDS:
                self._at = len(found.group())
                if with_marks:
                    yield from self._restored(0)
                kind, with_marks = "content", False
            else:
                header = yield from self._until(_MESSAGE, _KEY_LENGTH)
                if header is None:
                    yield from self._content(len(found.group()), kind)
                    continue
                prompted, self._prompted = self._prompted, 0
                recipient = _RECIPIENT.search(header)
                self._name = recipient.group(1) if recipient else ""
                calls = self._calls
                if self._name in self._tools:
                    yield from self._try(self._arguments())
                if self._calls > calls:
                    kind, with_marks = "content", False
                    continue
                is_reasoning = _CHANNEL + "analysis" in header and not recipient
                kind = "reasoning" if is_reasoning and self._parse_reasoning else "content"
                with_marks = bool(recipient) or (is_reasoning and not self._parse_reasoning)
                if with_marks:
                    yield from self._restored(prompted)

    def _restored(self, start: int) -> Parse[None]:
        """Hands over what was taken, from `start` on."""
        end, self._at = self._at, start
        yield from self._content(end)

    def _content(self, end: int, kind: str = "content") -> Parse[None]:
        self._at = min(end, max(self._at, self._prompted))
        self._prompted = max(0, self._prompted - end)
        yield from super()._content(end, kind)
