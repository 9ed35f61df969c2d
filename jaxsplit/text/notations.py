"""Notations of arguments in tool calls, and the JSON texts that they stand for."""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

JSON_TYPES = {bool: "boolean", int: "number", float: "number", dict: "object", list: "array"}
JSON_TYPES |= {str: "string", type(None): "null"}
_PYTHON_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
_CONSTANTS = {"true": True, "false": False, "null": None}
_ESCAPES = re.compile(r'\\(["\\/bfnrtu])|\\|[\x00-\x1f]')
_GEMMA_CALL = re.compile(r"\s*call:([^\s{]+)\s*({.*})\s*", re.DOTALL)
_GEMMA_KEY = re.compile(r"([{,]\s*)([^\s{}\[\],:]+)\s*:")
GEMMA_QUOTE = '<|"|>'
"""Mark before and after strings of Gemma."""


def json_types(schema: Any) -> set[str]:
    """Types that a JSON schema permits, `integer` as `number`; none if it does not say so."""
    if not isinstance(schema, Mapping):
        return set()
    if types := schema.get("type"):
        types = types if isinstance(types, list) else [types]
        return {"number" if type == "integer" else str(type) for type in types}
    if "const" in schema:
        return {JSON_TYPES[type(schema["const"])]}
    if isinstance(schema.get("enum"), list):
        return {JSON_TYPES[type(value)] for value in schema["enum"]}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            choices = [json_types(choice) for choice in schema[key]]
            return set().union(*choices) if all(choices) else set()
    return set()


def loads(text: str, strict: bool = True) -> Any:
    """A JSON text's value.

    Raises:
      ValueError: it is no JSON text.
    """

    def reject(constant: str) -> None:
        raise ValueError(constant)

    try:
        return json.loads(text, strict=strict, parse_constant=reject)
    except RecursionError as error:
        raise ValueError("too deep") from error


def escaped(text: str) -> str:
    """Text of a JSON string, in which line ends and backslashes that JSON forbids are escaped."""
    return _ESCAPES.sub(lambda m: m[0] if m[1] else json.dumps(m[0])[1:-1], text)


def as_object(text: str) -> str | None:
    """The arguments that a JSON value stands for: an object, also one in a string, or none."""
    try:
        value = loads(text, strict=False)
        if isinstance(value, str):
            value = loads(value or "null", strict=False)
        if isinstance(value, dict):
            return json.dumps(value, allow_nan=False)
    except ValueError:
        return None
    return "{}" if value is None else None


def from_text(text: str, types: set[str]) -> str:
    """The JSON text of an argument that was written as plain text: a string, or of given types."""
    written = _PYTHON_CONSTANTS.get(text.strip(), text.strip())
    try:
        kind = JSON_TYPES[type(loads(written))]
    except ValueError:
        kind = "string"
    if kind != "string" and (kind in types or not types):
        return written
    return json.dumps(text, ensure_ascii=False)


def gemma_calls(text: str) -> list[tuple[str, str]]:
    """The call in a text such as `call:f{key:<|"|>text<|"|>,list:[1,2]}`.

    Returns:
      name, and JSON text of the arguments; empty if the text is no call.
    """
    call = _GEMMA_CALL.fullmatch(text)
    if not call:
        return []
    pieces = call[2].split(GEMMA_QUOTE)
    pieces[::2] = (_GEMMA_KEY.sub(r'\1"\2":', piece) for piece in pieces[::2])
    pieces[1::2] = (json.dumps(piece, ensure_ascii=False) for piece in pieces[1::2])
    arguments = "".join(pieces)
    try:
        return [(call[1], arguments)] if isinstance(loads(arguments), dict) else []
    except ValueError:
        return []


def python_calls(text: str) -> list[tuple[str, str]]:
    """The calls in a text such as `[f(key="text", list=[1, 2]), g()]`.

    Returns:
      for each, name and JSON text of the arguments; empty if the text is no list of calls.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            tree = ast.parse(text.strip(), mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [_python_call(call) for call in calls]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _python_call(call: ast.expr) -> tuple[str, str]:
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(call)
    arguments = {k.arg: _python_value(k.value) for k in call.keywords if k.arg}
    if len(arguments) < len(call.keywords):
        raise ValueError(call)
    return ast.unparse(call.func), json.dumps(arguments, allow_nan=False)


def _python_value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_python_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values):
            return {_python_value(k): _python_value(v) for k, v in zip(keys, values, strict=True)}
    raise ValueError(node)


DECODERS = {"gemma": gemma_calls, "python": python_calls}
"""By the fields of `ToolFormat`."""
