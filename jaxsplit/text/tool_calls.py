"""Formats of tool calls: how models write calls of functions in their answers.

A format is a row of a table. Its patterns show a call as the model writes it, in the manner of
Python's format strings; the parser (`jaxsplit.text.answer`) and the grammar are both derived from
them.
"""

import dataclasses
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls.

    The fields of the patterns:

    - `{name}`: the function's name;
    - `{id}`: a number or an identifier of the call, of which nothing is made;
    - `{arguments}`: a JSON object;
    - `{call}`, `{calls}`: a JSON object of the name and the arguments, or an array of such objects;
    - `{parameters}`: the arguments one by one, each by the pattern `parameter`, in which `{key}`
      and `{value}` are plain text.

    White space in a pattern stands for any white space, also none.

    Attributes:
      name: of the format.
      template_marks: texts that a chat template has if its model speaks the format.
      call: pattern of a call.
      begin: mark before one or several calls; empty if a call is recognized by its own start.
      end: mark after them.
      separator: between two calls, or `None` if each call has its own `begin` and `end`.
      parameter: pattern of an argument.
      keys: keys of the name and of the arguments in `{call}`.
      id: regular expression of `{id}`.
      bare: an answer may start with a call without `begin`.
      channels: answers consist of messages in the channels of gpt-oss.
    """

    name: str
    template_marks: tuple[str, ...]
    call: str
    begin: str = ""
    end: str = ""
    separator: str | None = None
    parameter: str = ""
    keys: tuple[str, str] = ("name", "arguments")
    id: str = ""
    bare: bool = False
    channels: bool = False

    @property
    def starts(self) -> tuple[str, ...]:
        """Marks with which calls start."""
        first = next(parts_of(self.call))[0]
        return tuple(start for start in (self.begin.strip(), first) if start)


def parts_of(pattern: str) -> Iterator[tuple[str, str | None]]:
    """Literals of a pattern, without white space around them, each with the field after it."""
    for literal, field, _, _ in string.Formatter().parse(pattern):
        yield literal.strip(), field


FORMATS = (
    ToolFormat(
        "qwen3-coder",
        ("<tool_call>", "<function="),
        "<function={name}>\n{parameters}</function>\n",
        begin="<tool_call>\n",
        end="</tool_call>",
        parameter="<parameter={key}>\n{value}\n</parameter>\n",
    ),
    ToolFormat(
        "glm",
        ("<tool_call>", "<arg_key>"),
        "<tool_call>{name}\n{parameters}</tool_call>",
        parameter="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
    ToolFormat("hermes", ("<tool_call>",), "{call}", begin="<tool_call>\n", end="\n</tool_call>"),
)
"""The first format all of whose `template_marks` are in a template is the template's."""


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template's source speaks, if it is a known one."""
    return next((f for f in FORMATS if all(mark in template for mark in f.template_marks)), None)


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """JSON schemas of the arguments of tools, by name.

    Args:
      tools: in OpenAI's form, `{"type": "function", "function": {"name": …, "parameters": …}}`.
    """
    functions = (tool.get("function", tool) for tool in tools)
    return {f["name"]: f.get("parameters") or {"type": "object"} for f in functions}
