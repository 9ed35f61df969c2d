"""Formats of tool calls: how models write calls of functions in their answers.

A format is a row of a table. Its patterns show a call as the model writes it, in the manner of
Python's format strings; both the parser (`jaxsplit.text.call_parser`) and the grammar follow them.
"""

import dataclasses
import json
import re
import reprlib
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.notations import GEMMA_QUOTE, json_types
from jaxsplit.text.reasoning import MARKS

Schemas = Mapping[str, Mapping[str, Any]]
"""JSON schemas of the arguments of functions, by the functions' names."""


@dataclasses.dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes tool calls.

    The fields of the patterns:

    - `{name}`: the function's name;
    - `{id}`: a number or an identifier of the call, which is dropped;
    - `{arguments}`: a JSON object;
    - `{call}`, `{calls}`: the pattern `object`, or a JSON array of such objects;
    - `{parameters}`: the arguments one by one, each by the pattern `parameter`, in which `{key}`
      and `{value}` are plain text;
    - `{python}`, `{gemma}`: calls in a notation of `jaxsplit.text.notations`.

    White space in a pattern stands for any white space, or for none.

    Attributes:
      name: of the format.
      template_marks: texts in the chat templates of the models that speak the format.
      call: pattern of a call.
      begin: mark before calls; a call that starts with a mark of its own is found without it, too.
      end: mark after calls.
      separator: between calls; `None` if each has its own `begin` and `end`.
      object: pattern of a JSON object with the name and the arguments.
      parameter: pattern of an argument.
      id: regular expression of `{id}`.
      bare: an answer may start with a call without `begin`.
      channels: answers consist of messages in the channels of gpt-oss, one of which may be a call.
      reasoning: opening and closing marks of reasoning in the chat template.
    """

    name: str
    template_marks: tuple[str, ...]
    call: str
    begin: str = ""
    end: str = ""
    separator: str | None = ""
    object: str = '{{"name": "{name}", "arguments": {arguments}}}'
    parameter: str = ""
    id: str = ""
    bare: bool = False
    channels: bool = False
    reasoning: tuple[tuple[str, str], ...] = ()

    @property
    def starts(self) -> tuple[str, ...]:
        """Marks with which calls start."""
        first, _ = next(parts_of(self.call))
        return tuple(start for start in (self.begin.strip(), first) if start)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        required: bool,
        parallel: bool = True,
        name: str | None = None,
        prompt: str = "",
        special_tokens: Mapping[str, int] | None = None,
    ) -> str | None:
        """A grammar of the answers that consist of reasoning and calls.

        The arguments follow their JSON schemas. Keywords that llguidance does not know are ignored,
        unless the function has `"strict": true`.

        Args:
          tools: functions that may be called, in OpenAI's form.
          required: the answer must have a call.
          parallel: it may have several.
          name: the function that must be called.
          prompt: text of the prompt, which may end with an opening mark of reasoning.
          special_tokens: ids of control tokens by their text: of `Tokenizer.markup_ids`. Marks
            that are such tokens are generated as tokens, others as text.

        Returns:
          a grammar in llguidance's dialect of Lark; `None` if any answer is permitted.

        Raises:
          JaxsplitError: there are no tools, or none has the given name.
        """
        if not required and name is None:
            return None
        return _Grammar(self, special_tokens or {}).answer(tools, parallel, name, prompt)


def parts_of(pattern: str) -> Iterator[tuple[str, str | None]]:
    """Literals of a pattern, without white space around them, each with the field after it."""
    for literal, field, _, _ in string.Formatter().parse(pattern):
        yield literal.strip(), field


_NAME = re.compile(r"[\w.:/-]+")
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}
_LFM2 = "<|tool_call_start|>{python}<|tool_call_end|>"

FORMATS = (
    # Qwen3-Coder, Qwen3.5
    ToolFormat(
        "qwen3-coder",
        ("<tool_call>", "<function="),
        "<function={name}>\n{parameters}</function>\n",
        begin="<tool_call>\n",
        end="</tool_call>",
        separator=None,
        parameter="<parameter={key}>\n{value}\n</parameter>\n",
    ),
    # GLM-4.5 and later
    ToolFormat(
        "glm",
        ("<tool_call>", "<arg_key>"),
        "<tool_call>{name}\n{parameters}</tool_call>",
        separator="\n",
        parameter="<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n",
    ),
    # Hermes, Qwen2.5, Qwen3, SmolLM3, Granite 4 and many others
    ToolFormat(
        "hermes",
        ("<tool_call>",),
        "{call}",
        begin="<tool_call>\n",
        end="\n</tool_call>",
        separator=None,
    ),
    ToolFormat(
        "seed-oss",
        ("<seed:tool_call>", "<function="),
        "<function={name}>\n{parameters}</function>\n",
        begin="<seed:tool_call>\n",
        end="</seed:tool_call>",
        separator=None,
        parameter="<parameter={key}>{value}</parameter>\n",
    ),
    ToolFormat(
        "minimax",
        ("<minimax:tool_call>", "<invoke name="),
        '<invoke name="{name}">\n{parameters}</invoke>\n',
        begin="<minimax:tool_call>\n",
        end="</minimax:tool_call>",
        parameter='<parameter name="{key}">{value}</parameter>\n',
    ),
    # LFM2, LFM2.5
    ToolFormat("lfm2", ("<|tool_list_start|>",), _LFM2),
    ToolFormat("lfm2.5", ("<|tool_call_start|>",), _LFM2),
    # Gemma 4
    ToolFormat("gemma", ("<|tool_call>call:",), "<|tool_call>{gemma}<tool_call|>"),
    # Mistral Small 3.2, Magistral, Devstral and later
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]", "[ARGS]"),
        "[TOOL_CALLS]{name}{id}[ARGS]{arguments}",
        id=r"(\[CALL_ID\][\w-]*)?",
    ),
    ToolFormat("mistral-array", ("[TOOL_CALLS]",), "{calls}", begin="[TOOL_CALLS]"),
    # DeepSeek V3, R1
    ToolFormat(
        "deepseek-r1",
        ("<｜tool▁call▁begin｜>", "```json"),
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n"
        "```json\n{arguments}\n```<｜tool▁call▁end｜>",
        separator="\n",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "deepseek-v3.1",
        ("<｜tool▁call▁begin｜>",),
        "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>",
        begin="<｜tool▁calls▁begin｜>",
        end="<｜tool▁calls▁end｜>",
    ),
    ToolFormat(
        "kimi-k2",
        ("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
        "<|tool_call_begin|>functions.{name}{id}"
        "<|tool_call_argument_begin|>{arguments}<|tool_call_end|>",
        begin="<|tool_calls_section_begin|>",
        end="<|tool_calls_section_end|>",
        id=r":[0-9]+",
    ),
    ToolFormat(
        "gpt-oss",
        ("<|channel|>", "<|message|>"),
        "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
        channels=True,
        reasoning=(("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),),
    ),
    ToolFormat(
        "command-r",
        ("<|START_ACTION|>",),
        "{calls}",
        begin="<|START_ACTION|>",
        end="<|END_ACTION|>",
        object='{{"tool_call_id": "{id}", "tool_name": "{name}", "parameters": {arguments}}}',
        id=r"[0-9]+",
    ),
    # Nemotron Nano 2
    ToolFormat("nemotron", ("<TOOLCALL>",), "{calls}", begin="<TOOLCALL>", end="</TOOLCALL>"),
    ToolFormat(
        "phi-4-mini",
        ("<|tool_call|>", "<|/tool_call|>"),
        "{call}",
        begin="<|tool_call|>",
        end="<|/tool_call|>",
        separator=None,
    ),
    # Granite 3
    ToolFormat("granite", ("<|tool_call|>",), "{calls}", begin="<|tool_call|>"),
    # Llama 3.1 to 3.3
    ToolFormat(
        "llama-3",
        ('{"name": function name, "parameters":',),
        "{call}",
        begin="<|python_tag|>",
        separator="; ",
        object='{{"name": "{name}", "parameters": {arguments}}}',
        bare=True,
    ),
)
"""A template speaks the first format of which it has all `template_marks`."""


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template's source speaks, if it is a known one."""
    for format in FORMATS:
        if all(mark in template for mark in format.template_marks):
            marks = tuple(m for m in MARKS if m[1] and m[1] in template)
            return dataclasses.replace(format, reasoning=format.reasoning or marks)
    return None


def after_reasoning(
    grammar: str, template: str, prompt: str, special_tokens: Mapping[str, int]
) -> str:
    """A grammar of the answers whose content satisfies another one.

    Args:
      grammar: of the content, in llguidance's dialect of Lark.
      template: source of the chat template, whose marks tell how its models reason.
      prompt: text of the prompt, which may have begun the reasoning, or ended it.
      special_tokens: as of `ToolFormat.grammar`.
    """
    marks = tuple(m for m in MARKS if m[1] and (m[0] in template or m[1] in template))
    format = tool_format(template) or ToolFormat("", (), "", reasoning=marks)
    writer = _Grammar(dataclasses.replace(format, reasoning=marks), special_tokens)
    return writer.content(grammar, prompt)


def tool_schemas(tools: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """JSON schemas of the arguments of tools, by name.

    Args:
      tools: in OpenAI's form, `{"type": "function", "function": {"name": …, "parameters": …}}`.

    Raises:
      JaxsplitError: a tool has another form.
    """
    return {f["name"]: f.get("parameters") or {} for f in _functions(tools)}


def _functions(tools: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            raise JaxsplitError(
                f"tools[{index}] is {reprlib.repr(tool)}, but must be like "
                '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}'
            )
        if not _NAME.fullmatch(name):
            raise JaxsplitError(
                f"the name of tools[{index}] is {name!r}, but must be of letters, digits and _-.:/"
            )
        schema = function.get("parameters") or {}
        if not isinstance(schema, Mapping) or not all(
            isinstance(schema.get(key) or kind(), kind)
            for key, kind in (("properties", dict), ("required", list))
        ):
            raise JaxsplitError(
                f"the parameters of tool {name!r} are {reprlib.repr(schema)}, but must be "
                'a JSON schema such as {"type": "object", "properties": {}, "required": []}'
            )
        yield function


class _Grammar:
    """Writes the grammar of a format. The methods return expressions of Lark."""

    def __init__(self, format: ToolFormat, special_tokens: Mapping[str, int]):
        self._format = format
        self._special_tokens = {t: id for t, id in special_tokens.items() if t.strip()}
        self._rules = ["TEXT: /(?s:.*)/"]
        self._has_any = False
        # Of the function whose arguments are written:
        self._definitions: dict[str, Any] = {}
        self._strict = False

    def answer(
        self, tools: Iterable[Mapping[str, Any]], parallel: bool, name: str | None, prompt: str
    ) -> str:
        """The whole grammar."""
        format = self._format
        functions = {f["name"]: f for f in _functions(tools)}
        if name is not None:
            if name not in functions:
                found = ", ".join(functions) or "none"
                raise JaxsplitError(f"tool_choice names {name!r}, but the tools are: {found}")
            functions = {name: functions[name]}

        if not functions:
            raise JaxsplitError("tool_choice requires a call, but there are no tools")

        def repeated(expression: str, separator: str) -> str:
            if not parallel or format.channels:
                return expression
            return f"{expression} ({self._text(separator)} {expression})*"

        fields = {field for _, field in parts_of(format.call)}
        pattern = "{python}" if "python" in fields else format.call
        if fields & {"call", "calls"}:
            pattern = format.object
        call = self._rule(" | ".join(self._function(pattern, f) for f in functions.values()))
        begin, end = "" if format.bare else self._text(format.begin), self._text(format.end)
        if fields & {"calls", "python"}:
            array = f'"[" {repeated(call, ", ")} "]"'
            calls = f"{begin} {self._pattern(format.call, calls=array, python=array)} {end}"
        elif format.separator is None:
            calls = repeated(self._rule(f"{begin} {call} {end}"), "\n")
        else:
            calls = f"{begin} {repeated(call, format.separator)} {end}"
        return "\n".join([f"start: {self._reasoning(prompt)} {calls}", *self._rules, ""])

    def content(self, grammar: str, prompt: str) -> str:
        """The grammar of answers without calls."""
        final = ""
        if self._format.channels:
            final = self._text("<|channel|>final<|message|>")
        reasoning = f"{self._reasoning(prompt)} {final}".strip()
        if not reasoning:
            return grammar
        start = f"start: {reasoning} %lark {{\n{grammar}\n}}"
        return "\n".join([start, *self._rules, ""])

    def _reasoning(self, prompt: str) -> str:
        """The rest of what the prompt has begun, or as much as the model likes."""
        end, channels = prompt.rstrip(), self._format.channels
        marks = self._format.reasoning
        if not channels and any(end.endswith(closing) for _, closing in marks):
            return ""  # The template has closed it.
        space = "" if channels else '("\\n" "\\n"?)?'
        for opening, closing in marks:
            if end.endswith(opening):
                return f"{self._text_until(closing)} {space}"
        thoughts = (f"{self._text(o)} {self._text_until(c)} {space}" for o, c in marks)
        return f"({' | '.join(thoughts)})?" if marks else ""

    def _function(self, pattern: str, function: Mapping[str, Any]) -> str:
        schema = {"type": "object"} | (function.get("parameters") or {"properties": {}})
        if "properties" in schema and not schema.keys() & _COMBINING:
            schema = {"additionalProperties": False} | schema
        self._strict = bool(function.get("strict"))
        self._definitions = {k: schema[k] for k in ("$defs", "definitions") if k in schema}
        name = self._text(function["name"])
        writers = {
            "name": lambda: name,
            "id": lambda: "" if re.fullmatch(self._format.id, "") else f"/{self._format.id}/",
            "arguments": lambda: self._json(schema),
            "parameters": lambda: self._members(schema, self._parameter),
            "python": lambda: f'{name} "(" {self._members(schema, self._keyword, ", ")} ")"',
            "gemma": lambda: f'"call:" {name} {self._gemma_object(schema)}',
        }
        return self._pattern(pattern, **{f: writers[f]() for _, f in parts_of(pattern) if f})

    def _members(
        self,
        schema: Mapping[str, Any],
        member: Callable[[str, Any], str],
        separator: str = "",
    ) -> str:
        """Members of an object in the order of its schema, of which some may be left out."""
        first = others = '""'  # from here on, without and with a member before
        for key, value in reversed((schema.get("properties") or {}).items()):
            expression = self._rule(member(key, value))
            skipped = (None, None) if key in (schema.get("required") or ()) else (first, others)
            first, others = (
                self._rule(f"{before} {expression} {others}" + (f" | {skip}" if skip else ""))
                for before, skip in zip(("", self._text(separator)), skipped, strict=True)
            )
        return first

    def _parameter(self, key: str, schema: Any) -> str:
        pattern, types = self._format.parameter, json_types(schema)
        if types and "string" not in types:
            return self._pattern(pattern, key=self._text(key), value=self._json(schema))
        if choices := _choices(schema):
            texts = (c if isinstance(c, str) else json.dumps(c) for c in choices)
            value = f"({' | '.join(map(self._text, texts))})"
            return self._pattern(pattern, key=self._text(key), value=value)
        before, after = pattern.split("{value}")
        closing = after.strip()
        rest = after[after.index(closing) + len(closing) :]
        before = self._pattern(before, key=self._text(key))
        return f"{before} {self._text_until(closing)} {self._text(rest)}"

    def _keyword(self, key: str, schema: Any) -> str:
        return f"{self._text(key + '=')} {self._json(schema)}"

    def _gemma_object(self, schema: Mapping[str, Any]) -> str:
        def member(key: str, value: Any) -> str:
            return f"{self._text(key + ':')} {self._gemma(value)}"

        return f'"{{" {self._members(schema, member, ",")} "}}"'

    def _gemma(self, schema: Any) -> str:
        """A value in Gemma's notation."""
        schema = schema if isinstance(schema, Mapping) else {}
        if choices := _choices(schema):
            quoted = (GEMMA_QUOTE + c + GEMMA_QUOTE if isinstance(c, str) else c for c in choices)
            texts = (c if isinstance(c, str) else json.dumps(c) for c in quoted)
            return f"({' | '.join(map(self._text, texts))})"
        types = schema.get("type") or ()
        schemas = [schema | {"type": t} for t in ([types] if isinstance(types, str) else types)]
        if not types:
            schemas = schema.get("anyOf") or schema.get("oneOf") or ()
            return f"({' | '.join(map(self._gemma, schemas))})" if schemas else self._gemma_any()
        return f"({' | '.join(map(self._gemma_of_type, schemas))})"

    def _gemma_of_type(self, schema: Mapping[str, Any]) -> str:
        match schema["type"]:
            case "string":
                return self._gemma_string()
            case "array":
                item = self._rule(self._gemma(schema.get("items")))
                return f'"[" ({item} ("," {item})*)? "]"'
            case "object":
                self._gemma_any()
                return self._gemma_object(schema) if "properties" in schema else "any_object"
            case _:
                return self._json(schema)

    def _gemma_any(self) -> str:
        if not self._has_any:
            self._has_any = True
            scalar = self._json({"type": ["number", "boolean", "null"]})
            self._rules += [
                f'any: {self._gemma_string()} | {scalar} | "[" (any ("," any)*)? "]" | any_object',
                'any_object: "{" (KEY ":" any ("," KEY ":" any)*)? "}"',
                r"KEY: /[\w-]+/",
            ]
        return "any"

    def _gemma_string(self) -> str:
        return f"{self._text(GEMMA_QUOTE)} {self._text_until(GEMMA_QUOTE)}"

    def _json(self, schema: Any) -> str:
        # White space without end is where models get stuck.
        layout = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
        schema = {**(schema if isinstance(schema, Mapping) else {}), **self._definitions}
        schema["x-guidance"] = {**layout, "lenient": not self._strict}
        return f"%json {json.dumps(schema, ensure_ascii=False)}"

    def _pattern(self, pattern: str, **fields: str) -> str:
        parts = string.Formatter().parse(pattern)
        return " ".join(
            f"{self._text(literal)} {fields[field] if field else ''}"
            for literal, field, _, _ in parts
        )

    def _text_until(self, mark: str) -> str:
        """Any text, and the first mark after it."""
        if any(token in mark for token in self._special_tokens):
            return f"TEXT {self._text(mark)}"
        return self._rule("TEXT", f"[suffix={json.dumps(mark, ensure_ascii=False)}]")

    def _text(self, text: str) -> str:
        """A text with its special tokens as such."""
        tokens = sorted((t for t in self._special_tokens if t in text), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, tokens))})", text) if tokens else [text]
        return " ".join(
            f"<[{self._special_tokens[piece]}]>"
            if piece in self._special_tokens
            else json.dumps(piece, ensure_ascii=False)
            for piece in pieces
            if piece
        )

    def _rule(self, expression: str, options: str = "") -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {expression}")
        return name


def _choices(schema: Any) -> list[Any]:
    choices = schema.get("enum") if isinstance(schema, Mapping) else None
    return choices if isinstance(choices, list) else []
