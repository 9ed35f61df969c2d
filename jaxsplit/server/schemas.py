"""What clients send and get, as JSON: OpenAI's objects, and llama.cpp's.

A field that is not here is refused by its name.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

Json = dict[str, Any]
Count = Annotated[int, Meta(ge=0)]
Stop = str | list[str]


class Received(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of what clients send."""


class Sent(msgspec.Struct, kw_only=True):
    """Base of what clients get."""


# Fields of requests that several endpoints have in common


class LoraScale(Received, kw_only=True):
    """An adapter of `/lora-adapters`, and its scale."""

    id: Count
    scale: float


class SamplingFields(Received, kw_only=True):
    """How tokens are chosen: the options of `jaxsplit.config.SamplingConfig`, null: the server's
    default. Fields of llama.cpp that change nothing at their neutral value may have that value."""

    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, float] | list[tuple[int | str, float | bool]] | None = None
    ignore_eos: bool | None = None
    stop: Stop | None = None
    stop_token_ids: list[int] | None = None
    stream: bool | None = None
    cache_prompt: bool | None = None
    priority: int | None = None
    t_max_predict_ms: Annotated[float, Meta(gt=0)] | None = None
    grammar: str | None = None
    json_schema: Json | None = None
    lora: list[LoraScale] | None = None
    timings_per_token: bool | None = None
    return_tokens: bool | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    min_keep: int | None = None
    n_keep: int | None = None
    n_discard: int | None = None
    n_indent: int | None = None
    id_slot: Annotated[int, Meta(ge=-1)] | None = None  # of no effect: any slot finds prefixes
    samplers: list[str] | None = None
    post_sampling_probs: bool | None = None


class StreamOptions(Received, kw_only=True):
    """`include_usage`: a last chunk has the usage."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class OpenAIFields(SamplingFields, kw_only=True):
    """Fields of OpenAI that say who asks, or how to bill it: without effect."""

    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


# Chat completions


class FunctionCall(Received, kw_only=True):
    """A call's function; `arguments` is JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Received, kw_only=True):
    """A call of a tool, in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class ContentPart(Received, kw_only=True):
    """A part of a message; only text is supported."""

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: Any = None
    input_audio: Any = None
    file: Any = None


class Message(Received, kw_only=True):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    function_call: Any = None
    audio: Any = None
    annotations: Any = None


class Function(Received, kw_only=True):
    """A function that a model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Meta(min_length=1)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Received, kw_only=True):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: Function


class NamedFunction(Received, kw_only=True):
    name: str


class NamedTool(Received, kw_only=True):
    """The tool that has to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Received, kw_only=True):
    """A schema that an answer has to obey."""

    name: str | None = None
    schema: Json | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Received, kw_only=True):
    """What an answer has to be. `schema` with `json_object` is llama.cpp's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema: Json | None = None


class ChatRequest(OpenAIFields, kw_only=True):
    """Of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=-1)] | None = None
    n_predict: Annotated[int, Meta(ge=-1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    reasoning_format: Literal["auto", "none", "deepseek"] | None = None
    chat_template_kwargs: Json | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None
    verbosity: str | None = None
    prediction: Any = None
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None


class TokenLogprob(Sent, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class ContentLogprob(TokenLogprob, kw_only=True):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Sent, kw_only=True):
    content: list[ContentLogprob] | None
    refusal: None = None


class CalledFunction(Sent, kw_only=True):
    name: str
    arguments: str


class AnsweredCall(Sent, kw_only=True):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AnswerMessage(Sent, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(Sent, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class PromptDetails(Sent, kw_only=True):
    cached_tokens: int


class Usage(Sent, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Sent, kw_only=True):
    """llama.cpp's, milliseconds; a request of several texts has those of the first."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_token_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_token_ms: float
    predicted_per_second: float


class ChatCompletion(Sent, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class CallDeltaFunction(Sent, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(Sent, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CallDeltaFunction


class ChatDelta(Sent, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | None | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(Sent, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None


class ChatChunk(Sent, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


# Completions


class CompletionRequest(OpenAIFields, kw_only=True):
    """Of `/v1/completions`."""

    prompt: str | list[Any]
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    n_predict: Annotated[int, Meta(ge=-1)] | None = None
    best_of: Annotated[int, Meta(ge=1, le=128)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    suffix: str | None = None


class CompletionLogprobs(Sent, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(Sent, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None


class Completion(Sent, kw_only=True):
    """Whole, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None | UnsetType = UNSET
    timings: Timings | UnsetType = UNSET


class InputTokens(Sent, kw_only=True):
    """Tokens of a prompt."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


# llama.cpp's endpoints


class LlamaRequest(SamplingFields, kw_only=True):
    """Of `/completion`."""

    prompt: str | list[Any]
    n_predict: Annotated[int, Meta(ge=-1)] | None = None
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    n_probs: Annotated[int, Meta(ge=0, le=20)] | None = None
    model: str | None = None


class Candidate(Sent, kw_only=True):
    id: int
    token: str
    bytes: list[int]
    logprob: float


class Probability(Candidate, kw_only=True):
    top_logprobs: list[Candidate]


class LlamaCompletion(Sent, kw_only=True):
    """Whole, or the last chunk of a stream."""

    index: int
    content: str
    tokens: list[int]
    id_slot: int
    stop: bool
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    generation_settings: Json
    prompt: str
    has_new_line: bool
    truncated: bool = False
    stop_type: Literal["eos", "limit", "word", "none"]
    stopping_word: str
    tokens_cached: int
    timings: Timings
    completion_probabilities: list[Probability] | UnsetType = UNSET


class LlamaChunk(Sent, kw_only=True):
    index: int
    content: str
    tokens: list[int]
    stop: bool
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int
    timings: Timings | UnsetType = UNSET
    completion_probabilities: list[Probability] | UnsetType = UNSET


class TokenizeRequest(Received, kw_only=True):
    """llama.cpp's `content` with `add_special`, or vLLM's `prompt` with `add_special_tokens`."""

    content: str | None = None
    add_special: bool = False
    prompt: str | None = None
    add_special_tokens: bool = True
    model: str | None = None
    parse_special: bool = True
    with_pieces: bool = False


class TokenPiece(Sent, kw_only=True):
    id: int
    piece: str | list[int]


class Tokens(Sent, kw_only=True):
    tokens: list[int | TokenPiece]


class DetokenizeRequest(Received, kw_only=True):
    tokens: list[int]
    model: str | None = None


class Text(Sent, kw_only=True):
    """The same text by llama.cpp's name, `content`, and by vLLM's, `prompt`."""

    content: str
    prompt: str


class TokenizerInfo(Sent, kw_only=True):
    bos_token: str | None
    eos_token: str | None
    chat_template: str | None


class ApplyTemplateRequest(ChatRequest, kw_only=True):
    """Of `/apply-template`: what `/v1/chat/completions` takes."""


class Prompt(Sent, kw_only=True):
    prompt: str


class Health(Sent, kw_only=True):
    status: Literal["ok", "loading", "draining"]


class Props(Sent, kw_only=True):
    default_generation_settings: Json
    total_slots: int
    model_alias: str
    model_path: str
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str
    modalities: dict[str, bool]
    mesh: str
    devices: list[Json]


class Slot(Sent, kw_only=True):
    """A place for a request, and the one that runs there (`id_task`; -1: none)."""

    id: int
    id_task: int
    n_ctx: int
    speculative: bool = False
    is_processing: bool
    n_prompt_tokens: int = 0
    n_decoded: int = 0


# Models and embeddings


class ModelMeta(Sent, kw_only=True):
    """llama.cpp's: of the vocabulary, the context, the embedding, parameters and bytes."""

    n_vocab: int
    n_ctx_train: int
    n_ctx: int
    n_embd: int
    n_params: int
    size: int


class Model(Sent, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxsplit"
    meta: ModelMeta


class Models(Sent, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Model]


class LoraAdapter(Sent, kw_only=True):
    """A LoRA adapter, and the scale that it has in requests that do not choose."""

    id: int
    name: str
    path: str
    scale: float


class Success(Sent, kw_only=True):
    """What was asked for is done."""

    success: bool = True


class EmbeddingRequest(Received, kw_only=True):
    """Of `/v1/embeddings`."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    pooling: Literal["mean", "last", "cls"] | None = None
    user: str | None = None


class Embedding(Sent, kw_only=True):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Sent, kw_only=True):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Sent, kw_only=True):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
