"""A pytest plugin: the tests of OpenAI's Python client, without what this server refuses by name.

docs/conformance.md says how to run it. The tests send every documented field at once, or none; this
leaves out those that the server refuses, and adds those that it needs.
"""

from collections.abc import Callable
from typing import Any

import openai._base_client as base

REFUSED = {
    *("audio", "function_call", "functions", "prediction", "suffix", "web_search_options"),
    *("background", "conversation", "max_tool_calls", "previous_response_id", "truncation"),
    *("access_programs", "background_options", "context_management", "image", "moderation"),
    *("dimensions", "personality", "prompt_cache_options"),
}
REFUSED_OF_TOOLS = {"allowed_callers", "async", "defer_loading", "output_schema"}
REFUSED_OF_REASONING = {"context", "mode"}


def without(fields: dict[str, Any], refused: set[str]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in refused}


def adapted(path: str, body: Any) -> Any:
    """The body of a request as this server takes it."""
    if not isinstance(body, dict):
        return body
    body = without(body, REFUSED)
    if path.startswith("/responses"):
        body = {"input": "Hello"} | without(body, {"prompt"})
        if "tools" in body:
            body["tools"] = [without(tool, REFUSED_OF_TOOLS) for tool in body["tools"]]
        if "reasoning" in body:
            body["reasoning"] = without(body["reasoning"], REFUSED_OF_REASONING)
    if path == "/embeddings":
        body["encoding_format"] = "float"  # of base64, the client checks the text as a list
    if body.get("best_of") == 0:
        body["best_of"] = 1
    return body


def adapting(post: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, path: str, *args: Any, body: Any = None, **options: Any) -> Any:
        return post(self, path, *args, body=adapted(path, body), **options)

    return call


for client in (base.SyncAPIClient, base.AsyncAPIClient):
    client.post = adapting(client.post)  # pyright: ignore[reportAttributeAccessIssue]
