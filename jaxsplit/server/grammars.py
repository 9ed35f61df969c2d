"""Grammars that requests ask for."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsplit.server.errors import ApiError
from jaxsplit.server.schemas import ResponseFormat, SamplingFields
from jaxsplit.text.answer import tool_format
from jaxsplit.text.grammar import Grammar


def of_fields(fields: SamplingFields, format: ResponseFormat | None = None) -> Grammar | None:
    """The grammar of `grammar`, `json_schema` or `response_format`.

    Raises:
      ApiError: there are several, or one lacks its schema.
    """
    found: list[Grammar] = []
    if fields.grammar:
        found.append(Grammar("gbnf", fields.grammar))
    if fields.json_schema is not None:
        found.append(Grammar("json_schema", json.dumps(fields.json_schema)))
    if format is not None and format.type != "text":
        schema = format.schema
        if format.json_schema is not None:
            schema = format.json_schema.schema
        if schema is not None:
            found.append(Grammar("json_schema", json.dumps(schema)))
        elif format.type == "json_object":
            found.append(Grammar("json_object"))
        else:
            raise ApiError(
                400, "response_format has no json_schema.schema", param="response_format"
            )
    if len(found) > 1:
        raise ApiError(400, "grammar, json_schema and response_format exclude one another")
    return found[0] if found else None


def of_tools(
    template: str,
    tools: Sequence[Mapping[str, Any]],
    name: str | None,
    *,
    parallel: bool,
    prompt: str,
    special_tokens: Mapping[str, int],
) -> Grammar:
    """The grammar of an answer that has to call a tool.

    Args:
      template: source of the chat template.
      tools: as it is given them.
      name: of the function that has to be called; None: any.
      parallel: several calls may follow one another.
      prompt: its text, which may have begun the reasoning.
      special_tokens: ids of the control tokens that mark reasoning and calls, by their text.

    Raises:
      ApiError: the template's tool calls have no known format.
    """
    format = tool_format(template)
    text = format and format.grammar(
        tools,
        required=True,
        parallel=parallel,
        name=name,
        prompt=prompt,
        special_tokens=special_tokens,
    )
    if not text:
        raise ApiError(
            400,
            "tool_choice: the format of this model's tool calls is not known, so that none can be "
            "forced; use tool_choice=auto",
            param="tool_choice",
        )
    return Grammar("lark", text)
