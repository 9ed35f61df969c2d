"""Endpoints, and the OpenAPI document that describes them."""

import dataclasses
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec

from jaxsplit import __version__
from jaxsplit.server.errors import ErrorResponse


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """An entry of the table of endpoints.

    Attributes:
      method, path: of HTTP.
      handler: takes the `Service`, what is in the path, and the decoded body.
      received: the type of the body; None: there is none.
      sent: the type of the response; a string: its media type.
      chunks: the types of the objects of a stream.
      others: more paths of the same.
    """

    method: str
    path: str
    handler: Callable[..., Awaitable[Any]]
    received: Any = None
    sent: Any = None
    chunks: Any = None
    others: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring."""
        return (self.handler.__doc__ or "").strip().splitlines()[0]


_ERRORS = {
    "400": "the request is not valid",
    "401": "the API key is missing or wrong",
    "403": "the server does not answer to this name",
    "413": "the body is too large",
    "429": "too many requests wait",
    "503": "the model is being loaded, or the server is ending",
}


def document(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The document, OpenAPI 3.1."""
    endpoints = list(endpoints)
    types: list[Any] = [ErrorResponse]
    for one in endpoints:
        types += [t for t in (one.received, one.sent, one.chunks) if t and not isinstance(t, str)]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    by_type = {repr(t): schema for t, schema in zip(types, schemas, strict=True)}
    paths: dict[str, Any] = {}
    for one in endpoints:
        for path in (one.path, *one.others):
            operation = _operation(one, by_type, path)
            paths.setdefault(path.replace(":path}", "}"), {})[one.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxsplit", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(one: Endpoint, by_type: dict[str, Any], path: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(one.sent, str):
        content[one.sent.partition(";")[0]] = {"schema": {}}
    elif one.sent is not None:
        content["application/json"] = {"schema": by_type[repr(one.sent)]}
    if one.chunks is not None:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    failed = {"application/json": {"schema": by_type[repr(ErrorResponse)]}}
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content}}
    errors = dict(_ERRORS)
    if one.received is not None:
        errors |= {"408": "the body came too slowly", "415": "the body is not JSON by its type"}
    if "{" in path:
        errors["404"] = "there is no such thing"
    if one.path in ("/metrics", "/slots"):
        errors["404"] = "it is switched off"
    for status, description in errors.items():
        responses[status] = {"description": description, "content": failed}
    if one.path == "/health":
        responses["503"]["content"] = content
    operation: dict[str, Any] = {
        "summary": one.summary.rstrip("."),
        "operationId": f"{one.method}{path}",
        "responses": responses,
    }
    if one.received is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": by_type[repr(one.received)]}},
        }
    names = re.findall(r"{(\w+)", path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    return operation
