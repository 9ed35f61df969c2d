"""`/v1/chat/completions`, `/apply-template`."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from msgspec import UNSET

from jaxsplit.conversation import Prompt
from jaxsplit.engine.request import TokenLogprob
from jaxsplit.engine.stream import Event, Generation
from jaxsplit.errors import JaxsplitError
from jaxsplit.server import schemas
from jaxsplit.server.errors import ApiError
from jaxsplit.server.grammars import of_fields, of_tools
from jaxsplit.server.running import Running
from jaxsplit.server.schemas import (
    AnsweredCall,
    AnswerMessage,
    CallDelta,
    CallDeltaFunction,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatRequest,
    ContentLogprob,
    Message,
)
from jaxsplit.server.service import FINGERPRINT, Service
from jaxsplit.server.streaming import Stream
from jaxsplit.text.answer import AnswerParser, Delta
from jaxsplit.text.grammar import Grammar
from jaxsplit.text.reasoning import MARKS
from jaxsplit.text.tool_calls import after_reasoning, tool_format

FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", "deadline": "length"}
"""By the engine's."""

_REASONING_MARKS = tuple(opening for opening, closing in MARKS if closing)

_UNSUPPORTED = {
    "audio": "audio is not supported",
    "functions": "functions is deprecated; use tools",
    "function_call": "function_call is deprecated; use tool_choice",
    "web_search_options": "there is no web search",
    "prediction": "predicted outputs are not supported; leave it out",
}


async def chat_completions(service: Service, request: ChatRequest) -> ChatCompletion | Stream:
    """Answers a conversation."""
    chat = await prepare(service, request)
    wanted = None
    if request.logprobs or request.top_logprobs is not None:
        wanted = request.top_logprobs or 0
    running = service.begin(
        [chat.prompt.ids],
        request,
        n_predict=chat.n_predict,
        copies=request.n or 1,
        logprobs=wanted,
        grammar=await service.compiled(chat.grammar),
    )
    if request.stream:
        usage = request.stream_options is not None and bool(request.stream_options.include_usage)
        return Stream(service, running, _Chunks(service, running, chat, usage=usage))
    try:
        await running.finished()
        for generation in running.generations:
            service.texts.add(chat.prompt, generation.request.tokens)
        choices = [
            _choice(service, chat, index, generation, running.logprobs[index], wanted)
            for index, generation in enumerate(running.generations)
        ]
        return ChatCompletion(
            id=chat.id,
            created=int(time.time()),
            model=service.name,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=service.usage(running),
            timings=service.timings(running),
        )
    finally:
        service.end(running)


async def input_tokens(service: Service, request: ChatRequest) -> schemas.InputTokens:
    """Counts the tokens of a conversation."""
    return schemas.InputTokens(input_tokens=len((await prepare(service, request)).prompt.ids))


async def apply_template(service: Service, request: schemas.ApplyTemplateRequest) -> schemas.Prompt:
    """The prompt of a conversation, as text."""
    chat = Chat(service, request)
    return schemas.Prompt(prompt=await asyncio.to_thread(chat.render))


class Chat:
    """A conversation that is to be answered.

    Attributes:
      request: what the client sent.
      id: of the answer.
      prompt: its text and ids.
      grammar: which the answer has to obey; None: none.
      n_predict: tokens of the answer at most; None: the server's default.
    """

    def __init__(self, service: Service, request: ChatRequest):
        for name, message in _UNSUPPORTED.items():
            if getattr(request, name) is not None:
                raise ApiError(400, message, param=name)
        if request.modalities not in (None, ["text"]):
            raise ApiError(400, f"modalities={request.modalities}: only text is supported")
        self._service, self.request = service, request
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.template = service.template
        choice = request.tool_choice
        used = [] if choice == "none" else (request.tools or [])
        self.tools = [_as_json(tool) for tool in used]
        if choice == "required" and not used:
            raise ApiError(400, "tool_choice=required needs tools", param="tool_choice")
        if isinstance(choice, schemas.NamedTool):
            names = [tool.function.name for tool in used]
            if choice.function.name not in names:
                raise ApiError(
                    400,
                    f"tool_choice names {choice.function.name!r}; the tools are "
                    f"{', '.join(names) or 'none'}",
                    param="tool_choice",
                )
        self.prompt = Prompt("", [])
        self.n_predict = request.max_completion_tokens
        for other in (request.max_tokens, request.n_predict):
            self.n_predict = other if self.n_predict is None else self.n_predict
        self.grammar = of_fields(request, request.response_format)
        self._required = choice == "required" or isinstance(choice, schemas.NamedTool)
        if self._required and self.grammar is not None:
            raise ApiError(400, "tool_choice and a grammar contradict each other")

    def use(self, prompt: Prompt) -> None:
        """Takes the prompt. Grammars go on from the reasoning that it has begun."""
        self.prompt = prompt
        source, tokenizer = self.template.source, self._service.lm.tokenizer
        special_tokens = {tokenizer.token_text(id): id for id in tokenizer.markup_ids}

        def calls(name: str | None) -> Grammar:
            parallel = self.request.parallel_tool_calls is not False
            return of_tools(
                source,
                self.tools,
                name,
                parallel=parallel,
                prompt=prompt.text,
                special_tokens=special_tokens,
            )

        choice = self.request.tool_choice
        if self._required:
            self.grammar = calls(
                choice.function.name if isinstance(choice, schemas.NamedTool) else None
            )
        elif self.grammar is not None:
            lark = after_reasoning(self.grammar.lark, source, prompt.text, special_tokens)
            if self.tools and tool_format(source):  # either
                lark = f"start: %lark {{\n{calls(None).lark}\n}} | %lark {{\n{lark}\n}}"
            if lark != self.grammar.lark:
                self._service.lm.check_grammar(self.grammar)  # errors are about the client's text
                self.grammar = Grammar("lark", lark)

    def render(self) -> str:
        """The prompt's text.

        Raises:
          JaxsplitError: the template refuses the messages.
        """
        request, service = self.request, self._service
        variables: dict[str, Any] = dict(service.variables)
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        variables |= request.chat_template_kwargs or {}
        if self.tools:
            variables["tools"] = self.tools
        given, begun = request.messages, ""
        if continued := self._continues():
            given, begun = given[:-1], _content(given[-1])
        add = continued or request.add_generation_prompt is not False
        developer = "developer" in self.template.source
        # Most templates write a call's arguments as JSON; some take them as text.
        for as_text in (False, True):
            messages = [_message(m, as_text, developer) for m in given]
            try:
                text = self.template.render(messages, add, **variables)
                break
            except JaxsplitError as error:
                if as_text or not any(m.tool_calls for m in given):
                    raise ApiError(400, str(error), param="messages") from None
        else:
            raise AssertionError
        if begun and text.rstrip().endswith(_REASONING_MARKS):
            raise ApiError(
                400,
                "the last message is the assistant's, and the template begins with reasoning: an "
                "answer without its reasoning cannot be continued; switch reasoning off, as by "
                'chat_template_kwargs={"enable_thinking": false}',
                param="messages",
            )
        return text + begun

    def _continues(self) -> bool:
        """Whether the answer continues the last message: an assistant's text, if the request does
        not say otherwise.

        Raises:
          ApiError: it says so, but there is no such message.
        """
        request, last = self.request, self.request.messages[-1]
        possible = last.role == "assistant" and not last.tool_calls
        if request.continue_final_message:
            if request.add_generation_prompt:
                raise ApiError(
                    400,
                    "continue_final_message and add_generation_prompt exclude each other",
                    param="continue_final_message",
                )
            if not possible:
                raise ApiError(
                    400,
                    "continue_final_message: the last message is not an assistant's text",
                    param="continue_final_message",
                )
            return True
        return (
            possible
            and request.continue_final_message is None
            and request.add_generation_prompt is not False
        )

    def parser(self) -> AnswerParser:
        """What takes an answer apart."""
        request, config = self.request, self._service.config
        reasoning = (request.reasoning_format or config.reasoning_format) != "none"
        return AnswerParser(
            prompt=self.prompt.text,
            template=self.template.source,
            tools=self.tools,
            parse_reasoning=reasoning,
        )


async def prepare(service: Service, request: ChatRequest) -> Chat:
    """A conversation with its prompt rendered and encoded."""
    _ = service.lm  # ready
    chat = Chat(service, request)
    text = await asyncio.to_thread(chat.render)
    ids = await asyncio.to_thread(service.texts.encode, text)
    await asyncio.to_thread(chat.use, Prompt(text, ids))  # compiles grammars
    return chat


def _as_json(tool: schemas.Tool) -> dict[str, Any]:
    """A tool as templates expect it: without fields that were not given."""
    f = tool.function
    function: dict[str, Any] = {"name": f.name}
    if f.description is not None:
        function["description"] = f.description
    function["parameters"] = f.parameters or {"type": "object", "properties": {}}
    if f.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _message(message: Message, as_text: bool, developer: bool) -> dict[str, Any]:
    """A message as templates expect it."""
    role = message.role
    if role == "developer" and not developer:
        role = "system"
    if role == "function":
        role = "tool"
    if message.audio is not None or message.function_call is not None:
        raise ApiError(400, "audio and function_call in messages are not supported")
    found: dict[str, Any] = {"role": role, "content": _content(message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [_call(call, as_text) for call in message.tool_calls]
    return found


def _content(message: Message) -> str:
    if isinstance(message.content, list):
        for part in message.content:
            if part.type not in ("text", "refusal", "input_text", "output_text"):
                raise ApiError(
                    400,
                    f"content of type {part.type!r} is not supported; only text is",
                    param="messages",
                )
        return "".join(part.text or part.refusal or "" for part in message.content)
    if message.content is None and message.role not in ("assistant", "function"):
        raise ApiError(400, f"a message of role {message.role} has no content", param="messages")
    return message.content or message.refusal or ""


def _call(call: schemas.ToolCall, as_text: bool) -> dict[str, Any]:
    arguments: Any = call.function.arguments
    if not as_text:
        # Those of a call that was cut off are no JSON: the model sees them as they are.
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": "function", "function": function}


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def finish_reason(event_reason: str | None, calls: int) -> str:
    """OpenAI's word for why an answer ended."""
    if calls and event_reason == "stop":
        return "tool_calls"
    return FINISH_REASONS.get(event_reason or "", "stop")


def _choice(
    service: Service,
    chat: Chat,
    index: int,
    generation: Generation,
    logprobs: Sequence[TokenLogprob],
    wanted: int | None,
) -> ChatChoice:
    parser = chat.parser()
    parser.push(generation.text)
    parser.finish()
    calls = [
        AnsweredCall(
            id=_call_id(), function=CalledFunction(name=call.name, arguments=call.arguments)
        )
        for call in parser.calls
    ]
    message = AnswerMessage(
        content=parser.content if parser.content or not calls else None,
        reasoning_content=parser.reasoning or UNSET,
        tool_calls=calls or UNSET,
    )
    return ChatChoice(
        index=index,
        message=message,
        logprobs=None if wanted is None else content_logprobs(service, logprobs),
        finish_reason=finish_reason(generation.finish_reason, len(calls)),
    )


def content_logprobs(service: Service, found: Sequence[TokenLogprob]) -> ChatLogprobs:
    """OpenAI's object of log-probabilities."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = service.token_bytes(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    return ChatLogprobs(
        content=[
            ContentLogprob(
                **one(x.token, x.logprob),
                top_logprobs=[schemas.TokenLogprob(**one(*alternative)) for alternative in x.top],
            )
            for x in found
        ]
    )


class _Chunks:
    """The chunks of a streamed answer."""

    done = b"data: [DONE]\n\n"

    def __init__(self, service: Service, running: Running, chat: Chat, *, usage: bool):
        self._service, self._running, self._chat = service, running, chat
        self._usage = usage
        self._created = int(time.time())
        count = len(running.generations)
        self._parsers = [chat.parser() for _ in range(count)]
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
        self._wanted = running.generations[0].request.spec.sampling.logprobs is not None

    def start(self) -> Iterator[ChatChunk]:
        for index in range(len(self._parsers)):
            yield self._chunk(index, ChatDelta(role="assistant", content=""))

    def event(self, index: int, event: Event) -> Iterator[ChatChunk]:
        parser = self._parsers[index]
        self._logprobs[index] += event.logprobs
        deltas = parser.push(event.text)
        if event.finish_reason is not None:
            deltas += parser.finish()
        for delta in deltas:
            chunk = self._chunk(index, _delta(delta), logprobs=self._take(index))
            if self._chat.request.timings_per_token:
                chunk.timings = self._service.timings(self._running, index)
            yield chunk
        if event.finish_reason is not None:
            generation = self._running.generations[index]
            self._service.texts.add(self._chat.prompt, generation.request.tokens)
            reason = finish_reason(event.finish_reason, len(parser.calls))
            last = self._chunk(index, ChatDelta(), reason, logprobs=self._take(index))
            last.timings = self._service.timings(self._running, index)
            yield last

    def end(self) -> Iterator[ChatChunk]:
        if self._usage:
            last = self._chunk(0, ChatDelta())
            last.choices, last.usage = [], self._service.usage(self._running)
            last.timings = self._service.timings(self._running)
            yield last

    def _take(self, index: int) -> ChatLogprobs | None:
        """Log-probabilities of tokens since the last chunk."""
        found, self._logprobs[index] = self._logprobs[index], []
        return content_logprobs(self._service, found) if self._wanted else None

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        reason: str | None = None,
        logprobs: ChatLogprobs | None = None,
    ) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=logprobs)
        return ChatChunk(
            id=self._chat.id,
            created=self._created,
            model=self._service.name,
            system_fingerprint=FINGERPRINT,
            choices=[choice],
            usage=None if self._usage else UNSET,
        )


def _delta(delta: Delta) -> ChatDelta:
    found = ChatDelta()
    if delta.reasoning:
        found.reasoning_content = delta.reasoning
    if delta.content:
        found.content = delta.content
    if delta.call is not None:
        call = delta.call
        begins = call.name is not None
        found.tool_calls = [
            CallDelta(
                index=call.index,
                id=_call_id() if begins else UNSET,
                type="function" if begins else UNSET,
                function=CallDeltaFunction(
                    name=call.name if call.name is not None else UNSET, arguments=call.arguments
                ),
            )
        ]
    return found
