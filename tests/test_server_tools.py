"""`jaxsplit serve`: tools, reasoning and grammars in chat completions and responses."""

import json

import jsonschema
import openai
import pytest
from serving import serving
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.config import SamplingConfig

# As Qwen's: tools are listed, calls are between marks, thinking can be switched on.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}"
)
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {
    "type": "function",
    "function": {"name": "time_of_day", "description": "The time."},
}
USER = [{"role": "user", "content": "Hello"}]


pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("tools") / "tiny.gguf", context=1024)
    return jaxsplit.load(path, devices=1, dtype="float32", slots=4, cache_tokens=4096)


@pytest.fixture(scope="module")
def url(lm, tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    sampling = SamplingConfig(seed=1, temperature=1.0)
    with serving(lm, sampling=sampling, chat_template_file=str(template)) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        yield client


def ask(client, **options):
    options = {"model": "-", "messages": USER, "max_tokens": 300} | options
    return client.chat.completions.create(**options)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_is_required(client, choice):
    options = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "seed": 5}
    answer = ask(client, **options).choices[0]
    [call] = answer.message.tool_calls
    assert (answer.finish_reason, call.function.name) == ("tool_calls", "weather")
    assert answer.message.content is None
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    names, arguments, reasons, ids = [], "", [], set()
    for chunk in ask(client, **options, stream=True):
        [one] = chunk.choices
        reasons.append(one.finish_reason)
        for delta in one.delta.tool_calls or ():
            names += [delta.function.name] if delta.function.name else []
            ids |= {delta.id} - {None}
            arguments += delta.function.arguments
    assert (names, arguments, reasons[-1]) == (
        ["weather"],
        call.function.arguments,
        "tool_calls",
    )
    assert len(ids) == 1


def test_what_a_tool_gave_joins_the_conversation(client, url):
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'},
    }
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    answer = ask(client, messages=messages, tools=[WEATHER, TIME], max_tokens=5)
    assert answer.usage.completion_tokens == 5
    prompt = client.post(
        f"{url}/apply-template",
        cast_to=object,
        body={"messages": messages, "tools": [WEATHER, TIME]},
    )["prompt"]
    assert '"arguments": {"city": "Rome", "days": 2}}\n</tool_call>' in prompt
    assert "<|im_start|>tool\nsunny<|im_end|>" in prompt
    assert '"description": "The time."' in prompt


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_a_field_of_its_own(client, stream):
    options = {"max_tokens": 12, "seed": 3, "stream": stream}
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}

    def text(name, **extra):
        answer = ask(client, **options, extra_body=thinking | extra)
        if not stream:
            return getattr(answer.choices[0].message, name, None) or ""
        return "".join(getattr(c.choices[0].delta, name, None) or "" for c in answer)

    reasoning = text("reasoning_content")
    assert len(reasoning) >= 8
    assert text("content") == ""
    assert text("content", reasoning_format="none").strip("\n") == reasoning.strip("\n")


def test_a_grammar_holds_only_after_reasoning(client):
    answer = ask(
        client,
        response_format={"type": "json_object"},
        extra_body={"chat_template_kwargs": {"enable_thinking": True}},
        max_tokens=20,
    )
    assert len(answer.choices[0].message.reasoning_content) >= 12
    assert not answer.choices[0].message.content


def test_regular_expressions_and_gbnf(client):
    answer = ask(client, extra_body={"grammar": 'root ::= "yes" | "no" [0-9] [0-9]'})
    assert answer.choices[0].message.content[:2] in ("ye", "no")
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "x"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "contradict",
        ),
        ({"response_format": {"type": "json_schema"}}, "no json_schema.schema"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": {"type": "nothing"}},
                }
            },
            "nothing",
        ),
        ({"extra_body": {"grammar": "root ::= ("}}, "gbnf"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "name"),
        (
            {
                "messages": [*USER, {"role": "assistant", "content": "Well"}],
                "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
            },
            "begins with reasoning",
        ),
    ],
)
def test_what_is_refused_says_why(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **options)


def test_a_call_that_broke_off_stays_text(client, url):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    failed = {"role": "tool", "tool_call_id": "1", "content": "not JSON"}
    messages = [*USER, {"role": "assistant", "tool_calls": [call]}, failed]
    prompt = client.post(f"{url}/apply-template", cast_to=object, body={"messages": messages})
    assert '{"name": "f", "arguments": "{\\"a\\": "}\n</tool_call>' in prompt["prompt"]


def test_a_format_leaves_tools_their_calls(client):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": PARAMETERS}}
    reasons = set()
    for seed in range(8):
        options = {"tools": [WEATHER], "response_format": schema, "seed": seed}
        answer = ask(client, **options, logit_bias={"h": -100}).choices[0]  # no <think>
        calls = answer.message.tool_calls
        text = calls[0].function.arguments if calls else answer.message.content
        jsonschema.validate(json.loads(text), PARAMETERS)
        reasons.add(answer.finish_reason)
    assert reasons == {"stop", "tool_calls"}


def test_responses_with_tools(client):
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
    options = {
        "model": "-",
        "input": "Hello",
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_output_tokens": 300,
    }
    found = client.responses.create(**options)
    [call] = found.output
    assert (call.type, call.name, found.status) == ("function_call", "weather", "completed")
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
    events = [*client.responses.create(**options, stream=True)]
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == json.loads(events[-1].response.output[0].arguments)
    back = client.responses.create(
        model="-",
        input=[
            {"role": "user", "content": "Hello"},
            call.model_dump(exclude={"status"}),
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ],
        max_output_tokens=4,
    )
    assert back.usage.output_tokens == 4


def test_responses_in_a_schema(client):
    text = {"format": {"type": "json_schema", "name": "s", "schema": PARAMETERS, "strict": True}}
    found = client.responses.create(
        model="-", input="Hello", text=text, max_output_tokens=200, temperature=0
    )
    jsonschema.validate(json.loads(found.output_text), PARAMETERS)
