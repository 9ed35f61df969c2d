"""Answers of chat models: reasoning, content and tool calls, while they are streamed."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxsplit.text.call_parser import CallParser, ChannelParser, Piece
from jaxsplit.text.reasoning import ReasoningParser
from jaxsplit.text.tool_calls import tool_format, tool_schemas


@dataclasses.dataclass(frozen=True)
class ToolCallDelta:
    """A piece of a tool call.

    Attributes:
      index: which call of the answer, from 0.
      name: the function's name, with the first piece of a call.
      arguments: a piece of the JSON text of the arguments.
    """

    index: int
    name: str | None = None
    arguments: str = ""


@dataclasses.dataclass(frozen=True)
class Delta:
    """A piece of an answer: of its reasoning, of its content, or of a call."""

    reasoning: str = ""
    content: str = ""
    call: ToolCallDelta | None = None


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A tool call: the function's name, and the JSON text of its arguments."""

    name: str
    arguments: str


class AnswerParser:
    """Splits an answer into reasoning, content and tool calls while it is streamed.

    The result does not depend on how the text is cut. Marks belong to none of the three, nor do
    line ends around reasoning and white space around calls. A text that does not parse as a call is
    content. A call that breaks off after its name was handed over stays a call with incomplete
    arguments; the text from there on is content.
    """

    def __init__(
        self,
        *,
        prompt: str = "",
        template: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        parse_reasoning: bool = True,
    ):
        """Starts an answer.

        Args:
          prompt: text of the prompt, which may end with an opening mark of reasoning.
          template: source of the chat template, which determines the format of tool calls.
          tools: functions that may be called, in OpenAI's form: `{"type": "function", "function":
            {"name": …, "parameters": …}}`. Calls of other functions are content.
          parse_reasoning: `False` leaves reasoning in the content, with its marks. It is not
            searched for calls either way.
        """
        format, schemas = tool_format(template), tool_schemas(tools)
        self._parse_reasoning = parse_reasoning
        self._reasoning_parser: ReasoningParser | None = None
        self._call_parser: CallParser | None = None
        if format and format.channels:
            self._call_parser = ChannelParser(format, schemas, prompt, parse_reasoning)
        else:
            self._reasoning_parser = ReasoningParser(prompt)
            if format and schemas:
                self._call_parser = CallParser(format, schemas)
        self._texts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._calls: list[tuple[str, list[str]]] = []

    @property
    def reasoning(self) -> str:
        """Reasoning so far."""
        return "".join(self._texts["reasoning"])

    @property
    def content(self) -> str:
        """Content so far."""
        return "".join(self._texts["content"])

    @property
    def calls(self) -> list[ToolCall]:
        """Tool calls so far."""
        return [ToolCall(name, "".join(arguments)) for name, arguments in self._calls]

    def push(self, text: str) -> list[Delta]:
        """Takes the next piece of the answer; returns what it decides."""
        return self._deltas(self._pieces(text))

    def finish(self) -> list[Delta]:
        """Ends the answer; returns what was held back."""
        return self._deltas(self._pieces(None))

    def _pieces(self, text: str | None) -> Iterator[Piece]:
        """Pieces of the answer after a piece of its text, or after the end."""
        content = text or ""
        if parser := self._reasoning_parser:
            shown = parser.flush() if text is None else parser.push(text)
            if self._parse_reasoning:
                reasoning, content = parser.unread()
                yield "reasoning", reasoning
            else:
                yield "content", "".join(piece for is_reasoning, piece in shown if is_reasoning)
                content = "".join(piece for is_reasoning, piece in shown if not is_reasoning)
        if parser := self._call_parser:
            yield from parser.push(content)
            if text is None:
                yield from parser.finish()
        else:
            yield "content", content

    def _deltas(self, pieces: Iterable[Piece]) -> list[Delta]:
        """Pieces as deltas, of which neighbours of the same meaning are one."""
        deltas: list[Delta] = []
        for kind, text in pieces:
            last = deltas[-1] if deltas else Delta()
            if kind == "name":
                deltas.append(Delta(call=ToolCallDelta(len(self._calls), text)))
                self._calls.append((text, []))
            elif not text:
                continue
            elif kind == "arguments":
                self._calls[-1][1].append(text)
                if last.call:
                    deltas.pop()
                call = last.call or ToolCallDelta(len(self._calls) - 1)
                call = dataclasses.replace(call, arguments=call.arguments + text)
                deltas.append(Delta(call=call))
            else:
                self._texts[kind].append(text)
                if before := getattr(last, kind):
                    deltas.pop()
                deltas.append(Delta(**{kind: before + text}))
        return deltas
