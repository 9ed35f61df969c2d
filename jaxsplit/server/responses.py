"""`/v1/responses`: OpenAI's newer endpoint, for text and function calls; nothing is stored."""

import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from jaxsplit.engine.stream import Event
from jaxsplit.server import schemas
from jaxsplit.server.chat import Chat, prepare
from jaxsplit.server.errors import ApiError
from jaxsplit.server.running import Running
from jaxsplit.server.schemas import ChatRequest, Json, Received, Sent
from jaxsplit.server.service import Service
from jaxsplit.server.streaming import Stream


class FunctionTool(Received, kw_only=True):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class NamedFunctionTool(Received, kw_only=True):
    type: Literal["function"]
    name: str


class TextFormat(Received, kw_only=True):
    """What the text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: Json | None = None
    description: str | None = None
    strict: bool | None = None


class TextOptions(Received, kw_only=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Received, kw_only=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class Part(msgspec.Struct, kw_only=True):
    """A part of a message or of reasoning."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Item(msgspec.Struct, kw_only=True):
    """An item of the input: a message, a call, or what a call gave. Other fields are let through,
    since clients send back items of the output with fields of their own."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    id: str | None = None
    status: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[schemas.ContentPart] | None = None
    summary: Any = None
    encrypted_content: Any = None
    phase: str | None = None


class ResponsesRequest(Received, kw_only=True):
    """Of `/v1/responses`."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    stream: bool | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream_options: Json | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    max_tool_calls: int | None = None


class OutputText(Sent, kw_only=True):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Json] = []
    logprobs: list[Json] = []


class ReasoningText(Sent, kw_only=True):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(Sent, kw_only=True):
    type: Literal["message"] = "message"
    id: str
    status: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class OutputCall(Sent, kw_only=True):
    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


class OutputReasoning(Sent, kw_only=True):
    type: Literal["reasoning"] = "reasoning"
    id: str
    summary: list[Json] = []
    content: list[ReasoningText]
    status: str


Output = OutputMessage | OutputCall | OutputReasoning


class InputDetails(Sent, kw_only=True):
    """Tokens of the input that were in the cache, and those that were read into it."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Sent, kw_only=True):
    reasoning_tokens: int = 0


class ResponseUsage(Sent, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseObject(Sent, kw_only=True):
    """A response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str
    model: str
    output: list[Any]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: Json | None = None
    instructions: str | None = None
    metadata: Json = {}
    parallel_tool_calls: bool = True
    temperature: float | None = None
    top_p: float | None = None
    tool_choice: Any = "auto"
    tools: list[Any] = []
    max_output_tokens: int | None = None
    previous_response_id: None = None
    store: bool = False
    truncation: str = "disabled"
    text: Any
    reasoning: Any


class StreamEvent(Sent, kw_only=True):
    """An event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    item: Any = UNSET
    item_id: str | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: Any = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Json] | UnsetType = UNSET


async def create(service: Service, request: ResponsesRequest) -> ResponseObject | Stream:
    """Answers a conversation, as a list of items."""
    chat = await prepare(service, _as_chat(request))
    running = service.begin(
        [chat.prompt.ids],
        chat.request,
        n_predict=chat.n_predict,
        grammar=await service.compiled(chat.grammar),
    )
    maker = _Items(service, running, chat, request)
    if request.stream:
        return Stream(service, running, maker)
    try:
        await running.finished()
        generation = running.generations[0]
        # Without a stream, the same items come of one event with all of the text.
        event = Event(generation.text, (), (), generation.finish_reason)
        for _ in (*maker.start(), *maker.event(0, event), *maker.end()):
            pass
        return maker.response
    finally:
        service.end(running)


async def input_tokens(service: Service, request: ResponsesRequest) -> schemas.InputTokens:
    """Counts the tokens of a conversation."""
    chat = await prepare(service, _as_chat(request))
    return schemas.InputTokens(input_tokens=len(chat.prompt.ids))


def _as_chat(request: ResponsesRequest) -> ChatRequest:
    """The same as a request of chat completions.

    Raises:
      ApiError: it asks for what is not supported.
    """
    for name in ("previous_response_id", "conversation", "prompt", "background", "max_tool_calls"):
        if getattr(request, name):
            raise ApiError(
                400,
                f"{name} is not supported: this server stores nothing; send all items",
                param=name,
            )
    if request.truncation == "auto":
        raise ApiError(400, "truncation=auto is not supported", param="truncation")
    if request.top_logprobs:
        raise ApiError(
            400,
            "top_logprobs is not supported here; use /v1/chat/completions",
            param="top_logprobs",
        )
    messages: list[schemas.Message] = []
    if request.instructions:
        messages.append(schemas.Message(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(schemas.Message(role="user", content=request.input))
    else:
        for item in request.input:
            _add(messages, item)
    if not messages:
        raise ApiError(400, "input is empty", param="input")
    tools = [
        schemas.Tool(
            type="function",
            function=schemas.Function(
                name=tool.name,
                description=tool.description,
                parameters=tool.parameters,
                strict=tool.strict,
            ),
        )
        for tool in request.tools or ()
    ]
    choice: Any = request.tool_choice
    if isinstance(choice, NamedFunctionTool):
        choice = schemas.NamedTool(
            type="function", function=schemas.NamedFunction(name=choice.name)
        )
    format = None
    if request.text is not None and request.text.format is not None:
        given = request.text.format
        format = schemas.ResponseFormat(
            type=given.type,
            json_schema=schemas.JsonSchema(schema=given.schema) if given.schema else None,
        )
    return ChatRequest(
        messages=messages,
        model=request.model,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=request.parallel_tool_calls,
        response_format=format,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
    )


def _add(messages: list[schemas.Message], item: Item) -> None:
    """Adds an item of the input to messages."""
    if item.type == "message":
        if item.role is None or item.content is None:
            raise ApiError(400, "a message of input has no role or content", param="input")
        content = item.content
        if isinstance(content, list):
            content = [
                schemas.ContentPart(type=part.type, text=part.text, refusal=part.refusal)
                for part in content
            ]
        messages.append(schemas.Message(role=item.role, content=content))
    elif item.type == "function_call":
        function = schemas.FunctionCall(name=item.name or "", arguments=item.arguments or "{}")
        call = schemas.ToolCall(id=item.call_id, function=function)
        if messages and messages[-1].role == "assistant":
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        else:
            messages.append(schemas.Message(role="assistant", tool_calls=[call]))
    elif item.type == "function_call_output":
        messages.append(
            schemas.Message(role="tool", content=item.output or "", tool_call_id=item.call_id)
        )


class _Items:
    """Makes the items of a response, and the events of its stream."""

    done = b""

    def __init__(self, service: Service, running: Running, chat: Chat, request: ResponsesRequest):
        self._service, self._running, self._chat = service, running, chat
        self._parser = chat.parser()
        self._number = 0
        self._item: Any = None  # the last item, while it goes on
        sampling = running.generations[0].request.spec.sampling
        choice = request.tool_choice or "auto"
        format: Any = request.text.format if request.text else None
        effort = request.reasoning.effort if request.reasoning else None
        self.response = ResponseObject(
            id=f"resp_{secrets.token_hex(12)}",
            created_at=int(time.time()),
            status="in_progress",
            model=service.name,
            output=[],
            instructions=request.instructions,
            metadata=dict(request.metadata or {}),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            tool_choice=choice,
            tools=[msgspec.to_builtins(tool) for tool in request.tools or ()],
            max_output_tokens=request.max_output_tokens,
            text={"format": msgspec.to_builtins(format) or {"type": "text"}},
            reasoning={"effort": effort, "summary": None},
        )

    def start(self) -> Iterator[StreamEvent]:
        yield self._event("response.created", response=self.response)
        yield self._event("response.in_progress", response=self.response)

    def event(self, index: int, event: Event) -> Iterator[StreamEvent]:
        deltas = self._parser.push(event.text)
        if event.finish_reason is not None:
            deltas += self._parser.finish()
        for delta in deltas:
            if delta.reasoning:
                yield from self._text("reasoning", delta.reasoning)
            if delta.content:
                yield from self._text("message", delta.content)
            if delta.call is not None:
                yield from self._call(delta.call.name, delta.call.arguments)

    def end(self) -> Iterator[StreamEvent]:
        generation = self._running.generations[0]
        self._service.texts.add(self._chat.prompt, generation.request.tokens)
        complete = generation.finish_reason == "stop"
        yield from self._close("completed" if complete else "incomplete")
        usage = self._service.usage(self._running)
        cached = usage.prompt_tokens_details.cached_tokens
        self.response.status = "completed" if complete else "incomplete"
        if not complete:
            self.response.incomplete_details = {"reason": "max_output_tokens"}
        self.response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(
                cached_tokens=cached, cache_write_tokens=usage.prompt_tokens - cached
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(),
            total_tokens=usage.total_tokens,
        )
        kind = "response.completed" if complete else "response.incomplete"
        yield self._event(kind, response=self.response)

    def _event(self, type: str, **fields: Any) -> StreamEvent:
        self._number += 1
        return StreamEvent(type=type, sequence_number=self._number - 1, **fields)

    def _at(self) -> dict[str, Any]:
        """Which item, in an event."""
        return {
            "output_index": len(self.response.output) - 1,
            "item_id": self._item.id,
        }

    def _begin(self, item: Output) -> StreamEvent:
        self.response.output.append(item)
        self._item = item
        at = len(self.response.output) - 1
        return self._event("response.output_item.added", output_index=at, item=item)

    _TEXTS: dict[str, tuple[Any, str, Any, str]] = {
        "message": (OutputMessage, "msg", OutputText, "response.output_text"),
        "reasoning": (OutputReasoning, "rs", ReasoningText, "response.reasoning_text"),
    }
    """Items with text: their types, prefixes of ids, types of their content, and its events."""

    def _text(self, kind: str, text: str) -> Iterator[StreamEvent]:
        """More of a message or of reasoning."""
        make, prefix, part, name = self._TEXTS[kind]
        if self._item is None or self._item.type != kind:
            yield from self._close("completed")
            number = secrets.token_hex(12)
            item = make(id=f"{prefix}_{number}", status="in_progress", content=[])
            yield self._begin(item)
            item.content.append(part(text=""))
            yield self._event(
                "response.content_part.added", **self._at(), content_index=0, part=part(text="")
            )
        self.response.output[-1].content[0].text += text
        extra = {"logprobs": []} if kind == "message" else {}
        yield self._event(f"{name}.delta", **self._at(), content_index=0, delta=text, **extra)

    def _call(self, name: str | None, arguments: str) -> Iterator[StreamEvent]:
        """A new call, or more of its arguments."""
        if name is not None:
            yield from self._close("completed")
            number = secrets.token_hex(12)
            yield self._begin(
                OutputCall(
                    id=f"fc_{number}",
                    call_id=f"call_{number}",
                    name=name,
                    arguments="",
                    status="in_progress",
                )
            )
        if arguments:
            self._item.arguments += arguments
            kind = "response.function_call_arguments.delta"
            yield self._event(kind, **self._at(), delta=arguments)

    def _close(self, status: str) -> Iterator[StreamEvent]:
        """Ends the item that goes on, if there is one."""
        if self._item is None:
            return
        item, at, kind = self._item, self._at(), self._item.type
        item.status = status
        if kind == "function_call":
            yield self._event(
                "response.function_call_arguments.done",
                **at,
                name=item.name,
                arguments=item.arguments,
            )
        else:
            name, text = self._TEXTS[kind][-1], item.content[0].text
            extra = {"logprobs": []} if kind == "message" else {}
            yield self._event(f"{name}.done", **at, content_index=0, text=text, **extra)
            yield self._event(
                "response.content_part.done", **at, content_index=0, part=item.content[0]
            )
        yield self._event("response.output_item.done", output_index=at["output_index"], item=item)
        self._item = None
