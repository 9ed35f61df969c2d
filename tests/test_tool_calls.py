"""Answers of chat models: reasoning, content and tool calls, and grammars of the calls."""

import json
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_alphabet

from jaxsplit.errors import JaxsplitError
from jaxsplit.text import ChatTemplate, Grammar, Grammars, Tokenizer
from jaxsplit.text.answer import AnswerParser, Delta, ToolCall, ToolCallDelta
from jaxsplit.text.special import TokenType
from jaxsplit.text.tool_calls import FORMATS, after_reasoning, tool_format


def tool(name, required=(), **properties):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool(
        "weather",
        ["city"],
        city={"type": "string"},
        days={"type": "integer"},
        metric={"type": "boolean"},
        where={"type": "object", "properties": {"lat": {"type": "number"}}},
        tags={"type": "array", "items": {"type": "string"}},
        note={"type": ["string", "null"]},
        unit={"enum": ["C", "F"]},
        any={},
    ),
    tool("weather_now"),
    {"type": "function", "function": {"name": "time"}},
]
ARGUMENTS = '{"city": "Zürich, \\"x\\" [1}", "days": 2}'
CALLS = [("weather", {"city": 'Zürich, "x" [1}', "days": 2}), ("time", {})]

# Of each format: a piece of a chat template of a model that speaks it, and an answer with `CALLS`
# (or the first of them) as the template writes it.
EXAMPLES = {
    "hermes": (
        'XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n',
        f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>',
    ),
    "qwen3-coder": (
        "<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>\\n",
        '<tool_call>\n<function=weather>\n<parameter=city>\nZürich, "x" [1}\n</parameter>\n'
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=time>\n</function>\n</tool_call>",
    ),
    "glm": (
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>",
        '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zürich, "x" [1}</arg_value>\n'
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>\n"
        "<tool_call>time\n</tool_call>",
    ),
    "seed-oss": (
        "'<seed:tool_call>' ... <function=example_function_name>",
        '<seed:tool_call>\n<function=weather>\n<parameter=city>Zürich, "x" [1}</parameter>\n'
        "<parameter=days>2</parameter>\n</function>\n</seed:tool_call>\n"
        "<seed:tool_call>\n<function=time>\n</function>\n</seed:tool_call>",
    ),
    "minimax": (
        "toolcall_begin_token = '<minimax:tool_call>' ... '<invoke name=\"' + tool_call.name",
        '<minimax:tool_call>\n<invoke name="weather">\n'
        '<parameter name="city">Zürich, "x" [1}</parameter>\n<parameter name="days">2</parameter>\n'
        '</invoke>\n<invoke name="time">\n</invoke>\n</minimax:tool_call>',
    ),
    "lfm2": (
        "<|tool_list_start|>",
        "<|tool_call_start|>[weather(city='Zürich, \"x\" [1}', days=2), time()]<|tool_call_end|>",
    ),
    "lfm2.5": (
        '"<|tool_call_start|>[" + (tool_calls_ns.tool_calls | join(", ")) + "]<|tool_call_end|>"',
        "<|tool_call_start|>[weather(city='Zürich, \"x\" [1}', days=2), time()]<|tool_call_end|>",
    ),
    "gemma": (
        "'<|tool_call>call:' + function['name'] + '{'",
        '<|tool_call>call:weather{city:<|"|>Zürich, "x" [1}<|"|>,days:2}<tool_call|>'
        "<|tool_call>call:time{}<tool_call|>",
    ),
    "mistral": (
        "'[TOOL_CALLS]' + tool_call.function.name ... '[CALL_ID]' + tool_call.id ... '[ARGS]'",
        f"[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{ARGUMENTS}[TOOL_CALLS]time[ARGS]{{}}",
    ),
    "mistral-array": (
        "{{- '[TOOL_CALLS] [' }}",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}, "id": "a1b2c3d4e"}}, '
        '{"name": "time", "arguments": {}, "id": "a1b2c3d4f"}]',
    ),
    "deepseek-r1": (
        "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + '\\n' + '```json'",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>time\n"
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    ),
    "deepseek-v3.1": (
        "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['function']['name']",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}"
        "<｜tool▁call▁end｜><｜tool▁call▁begin｜>time<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
    ),
    "kimi-k2": (
        "<|tool_call_begin|>{{ tool_call['id'] }}<|tool_call_argument_begin|>",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
        f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>"
        "functions.time:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
    ),
    "gpt-oss": (
        '"<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>"',
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>" + ARGUMENTS,
    ),
    "command-r": (
        "write <|START_ACTION|> followed by a list of JSON-formatted tool calls",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "weather", "parameters": '
        f'{ARGUMENTS}}},\n    {{"tool_call_id": "1", "tool_name": "time", "parameters": {{}}}}\n'
        "]<|END_ACTION|>",
    ),
    "nemotron": (
        '<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}]</TOOLCALL>',
        f'<TOOLCALL>[{{"name": "weather", "arguments": {ARGUMENTS}}}, '
        '{"name": "time", "arguments": {}}]</TOOLCALL>',
    ),
    "phi-4-mini": (
        '<|tool_call|>{"name": "foo", "arguments": {"a": 1}}<|/tool_call|>',
        f'<|tool_call|>{{"name": "weather", "arguments": {ARGUMENTS}}}<|/tool_call|>'
        '<|tool_call|>{"name": "time", "arguments": {}}<|/tool_call|>',
    ),
    "granite": (
        "respond only with <|tool_call|> followed by a JSON list of tools used.",
        f'<|tool_call|>[{{"name": "weather", "arguments": {ARGUMENTS}}}, '
        '{"name": "time", "arguments": {}}]',
    ),
    "llama-3": (
        'Respond in the format {"name": function name, "parameters": dictionary of argument name',
        f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "time", "parameters": {{}}}}',
    ),
}
HERMES, QWEN_CODER, GLM, GPT_OSS = (
    EXAMPLES[name][0] for name in ("hermes", "qwen3-coder", "glm", "gpt-oss")
)
LLAMA = EXAMPLES["llama-3"][0]


def parse(text, template, *, cuts=(), tools=TOOLS, **options):
    """Reasoning, content and calls of an answer that comes in pieces; and its deltas."""
    parser = AnswerParser(template=template, tools=tools, **options)
    ends = [*sorted(cuts), len(text)]
    deltas = [
        delta
        for start, end in zip([0, *ends], ends, strict=False)
        for delta in parser.push(text[start:end])
    ] + parser.finish()
    assert parser.finish() == []
    check_deltas(deltas, parser)
    return (parser.reasoning, parser.content, parser.calls), deltas


def check_deltas(deltas, parser):
    """Deltas have one meaning each, and add up to the parser's attributes."""
    assert all(sum(map(bool, (d.reasoning, d.content, d.call))) == 1 for d in deltas)
    assert "".join(d.reasoning for d in deltas) == parser.reasoning
    assert "".join(d.content for d in deltas) == parser.content
    calls = []
    for delta in deltas:
        if delta.call and delta.call.name is not None:
            calls.append((delta.call.name, ""))
        if delta.call:
            assert delta.call.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.call.arguments)
    assert [ToolCall(*call) for call in calls] == parser.calls


def values(calls):
    return [(call.name, json.loads(call.arguments)) for call in calls]


# Formats


def test_every_format_has_an_example():
    assert list(EXAMPLES) != [] and set(EXAMPLES) == {format.name for format in FORMATS}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("before", ["", "I look.\n\n"])
def test_calls_are_parsed_as_the_template_writes_them(name, before):
    template, text = EXAMPLES[name]
    assert tool_format(template).name == name
    if before and name == "llama-3":
        text = "<|python_tag|>" + text
    if before and name == "gpt-oss":
        before = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    (reasoning, content, calls), _ = parse(before + text, template)
    assert (reasoning, content) == ("", "I look." if before else "")
    assert values(calls) == CALLS[: len(calls)] and len(calls) == (1 if name == "gpt-oss" else 2)


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_tools_or_a_known_format_all_is_content(name):
    template, text = EXAMPLES[name]
    for result, _ in (parse(text, template, tools=()), parse(text, "{{ messages }}")):
        assert result == ("", text, [])


@pytest.mark.parametrize("name", EXAMPLES)
def test_calls_of_other_functions_are_content(name):
    template, text = EXAMPLES[name]
    text = text.replace("weather", "launch").replace("time", "launch_now")
    assert parse(text, template)[0] == ("", text, [])


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("hermes", {"<tool_call>", "</tool_call>"}),
        ("glm", {"<tool_call>", "<arg_key>", "</arg_value>"}),
        ("command-r", {"<|START_ACTION|>", "<|END_ACTION|>"}),
        ("mistral", {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"}),
        ("deepseek-r1", {"<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"}),
        ("kimi-k2", {"<|tool_calls_section_begin|>", "<|tool_call_argument_begin|>"}),
        ("gemma", {"<|tool_call>", "<tool_call|>", '<|"|>'}),
        ("lfm2", {"<|tool_list_start|>", "<|tool_call_start|>"}),
    ],
)
def test_marks_that_are_control_tokens_are_in_the_text(name, tokens):
    template = ChatTemplate(EXAMPLES[name][0].replace("{{", "").replace("{%", ""))
    assert template.find_markup(tokens | {"<s>", "<|im_end|>", "<unused1>"}) == tokens


@pytest.mark.parametrize(
    ("name", "call", "arguments"),
    [
        (
            "lfm2",
            "weather(city=\"it's\", days=-2, metric=True, where={'lat': 1.5}, tags=['a'])",
            '{"city": "it\'s", "days": -2, "metric": true, "where": {"lat": 1.5}, "tags": ["a"]}',
        ),
        ("lfm2", "weather('Zürich')", None),
        ("lfm2", "weather(city=open('f'))", None),
        ("lfm2", "weather(**{})", None),
        ("lfm2", "weather(days=1e999)", None),
        ("lfm2", "weather(city='\\d')", '{"city": "\\\\d"}'),
        ("lfm2", "weather(days=" + "[" * 9999, None),
        (
            "gemma",
            'call:weather{city:<|"|>a "b", {c:1}<|"|>,where:{lat:1.5},tags:[<|"|>x<|"|>]}',
            '{"city":"a \\"b\\", {c:1}","where":{"lat":1.5},"tags":["x"]}',
        ),
        ("gemma", 'call:weather{city:<|"|>a}', None),
        ("gemma", "call:weather{city:a}", None),
        ("gemma", "call:weather[1]", None),
    ],
)
def test_other_notations_become_json(name, call, arguments):
    begin, end = {
        "lfm2": ("<|tool_call_start|>[", "]<|tool_call_end|>"),
        "gemma": ("<|tool_call>", "<tool_call|>"),
    }[name]
    text = begin + call + end
    (_, content, calls), _ = parse(text, EXAMPLES[name][0])
    if arguments is None:
        assert (content, calls) == (text, [])
    else:
        assert (content, calls) == ("", [ToolCall("weather", arguments)])


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        (["f"], r"tools\[0\] is 'f', but must be like"),
        ([{"type": "function", "function": {}}], r"tools\[0\] is .* but must be like"),
        ([{"function": {"name": "a b"}}], r"name of tools\[0\] is 'a b'"),
        ([{"function": {"name": "f", "parameters": "x"}}], "parameters of tool 'f' are 'x'"),
        ([{"function": {"name": "f", "parameters": {"properties": [1]}}}], "parameters of tool"),
        ([{"function": {"name": "f", "parameters": {"required": "x"}}}], "parameters of tool"),
    ],
)
def test_invalid_tools_are_refused(tools, error):
    for make in (
        lambda: AnswerParser(template=HERMES, tools=tools),
        lambda: tool_format(HERMES).grammar(tools, required=True),
    ):
        with pytest.raises(JaxsplitError, match=error):
            make()


# Streaming


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(EXAMPLES)), st.data())
def test_cuts_do_not_matter(name, data):
    """Whole and broken answers: pieces of the example are left out or doubled."""
    template, call = EXAMPLES[name]
    text = f"<think>\n<tool_call>\n</think>\n\nI look. {call}\n{{[ \n{call} <tool_call> end \n"
    for _ in range(data.draw(st.integers(0, 3))):
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        text = text[:start] + text[start:end] * data.draw(st.sampled_from((0, 0, 2))) + text[end:]
    cuts = data.draw(st.sets(st.integers(0, len(text)), max_size=10))
    options = {
        "parse_reasoning": data.draw(st.booleans()),
        "prompt": data.draw(st.sampled_from(("", "<|start|>assistant", "<think>\n"))),
    }
    whole, _ = parse(text, template, **options)
    assert parse(text, template, cuts=cuts, **options)[0] == whole
    assert parse(text, template, cuts=range(len(text)), **options)[0] == whole
    if not whole[2] and not options["prompt"] and not options["parse_reasoning"]:
        assert name == "gpt-oss" or whole[1] == text


def test_arguments_are_streamed_once_the_name_is_known():
    parser = AnswerParser(template=HERMES, tools=TOOLS)
    call = lambda *piece: [Delta(call=ToolCallDelta(0, *piece))]  # noqa: E731
    assert parser.push("Hello <") == [Delta(content="Hello")]
    assert parser.push("b> ") == [Delta(content=" <b>")]
    assert parser.push('<tool_call>\n{"name": "weather", "arguments": ') == []
    assert parser.push('{"city": "Zü') == call("weather", '{"city": "Zü')
    assert parser.push("rich\\") == call(None, "rich")
    assert parser.push('n"') == call(None, '\\n"')
    assert parser.push("}") == call(None, "}")
    assert parser.push("}\n</tool_call>") == []
    assert parser.push("\n") == parser.finish() == []


def test_parameters_are_streamed():
    """Strings as they come, other types one by one."""
    parser = AnswerParser(template=QWEN_CODER, tools=TOOLS)
    parser.push("<tool_call>\n<function=weather>\n<parameter=city>\n")
    assert parser.calls == [ToolCall("weather", '{"city": "')]
    parser.push('Zü"\n')
    assert parser.calls == [ToolCall("weather", '{"city": "Zü\\"')]
    parser.push("rich\n</param")
    assert parser.calls == [ToolCall("weather", '{"city": "Zü\\"\\nrich')]
    parser.push("eter>\n<parameter=days>\n1")
    assert parser.calls == [ToolCall("weather", '{"city": "Zü\\"\\nrich", "days": ')]
    parser.push("2\n</parameter>\n</function>")
    assert parser.calls == [ToolCall("weather", '{"city": "Zü\\"\\nrich", "days": 12}')]


def test_only_what_may_become_a_mark_is_held_back():
    parser = AnswerParser(template=HERMES, tools=TOOLS)
    for piece in ("a", "<tool", "_box>", "<too", "l_call>{", "}"):
        parser.push(piece)
    assert parser.content == "a<tool_box><tool_call>{}"


# What does not parse


@pytest.mark.parametrize(
    ("template", "text", "content", "calls"),
    [
        (HERMES, '<tool_call>{"name": "weather"', None, []),
        (HERMES, "<tool_call>{}</tool_call>", None, []),
        (HERMES, "Say <tool_call> and </tool_call>.", None, []),
        (HERMES, '<tool_call>{"name": "weather", "arguments": 5}</tool_call>', None, []),
        (HERMES, '<tool_call>{"name": "weather", "arguments": [1]}</tool_call>', None, []),
        (HERMES, '<tool_call>{"name": "weathe", "arguments": {}}</tool_call>', None, []),
        (LLAMA, '{"city": "Zürich"}', None, []),
        (LLAMA, 'So: {"name": "time", "parameters": {}}', None, []),
        (GLM, "<tool_call>weather_nowhere\n</tool_call>", None, []),
        # What is missing or too much at the end does not matter.
        (HERMES, '<tool_call>{"name": "time", "arguments": {}}', "", ["{}"]),
        (HERMES, '<tool_call>{"name": "time", "arguments": {}</tool_call>', "", ["{}"]),
        (HERMES, '<tool_call>{"name": "time", "arguments": {}}}</tool_call>', "", ["{}"]),
        (HERMES, '<tool_call>{"name": "time"}</tool_call> So.', " So.", ["{}"]),
        (HERMES, '<tool_call>{"name": "time", "arguments": null}</tool_call>', "", ["{}"]),
        (HERMES, '<tool_call>{"arguments": {"a": 1}, "name": "time"}', "", ['{"a": 1}']),
        (HERMES, '<tool_call>{"name": "time", "arguments": "{\\"a\\": 1}"}', "", ['{"a": 1}']),
        (
            HERMES,
            '<tool_call>{"name": "time", "arguments": {"a":\n"1\n\\n\\d\\\\d\\u00e9"}}</tool_call>',
            "",
            ['{"a":\n"1\\n\\n\\\\d\\\\d\\u00e9"}'],
        ),
        (QWEN_CODER, "<function=time></function>\n</tool_call>", "", ["{}"]),
        (LLAMA, '<|python_tag|>{"type": "function", "name": "time"}', "", ["{}"]),
        (GPT_OSS, " to=functions.time<|channel|>commentary json<|message|>{}<|call|>", "", ["{}"]),
        # A call that breaks off stays, and the rest is content.
        (HERMES, '<tool_call>{"name": "weather", "arguments": {"a": [1', "", ['{"a": [1']),
        (
            HERMES,
            '<tool_call>{"name": "weather", "arguments": {"a": ]}</tool_call>',
            "]}</tool_call>",
            ['{"a": '],
        ),
        (
            QWEN_CODER,
            "<tool_call><function=weather><parameter=city>A</parameter> or </tool_call>",
            " or </tool_call>",
            ['{"city": "A"'],
        ),
        (QWEN_CODER, "<tool_call><function=weather><parameter=city>A</", "", ['{"city": "A</']),
        (QWEN_CODER, "<tool_call><function=weather><parameter=days>1", "1", ['{"days": ']),
        (
            QWEN_CODER,
            "<tool_call><function=weather><parameter=city>A</parameter>\n<parameter=da",
            "\n<parameter=da",
            ['{"city": "A"'],
        ),
    ],
)
def test_what_does_not_parse_is_content(template, text, content, calls):
    prompt = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
    for cuts in ((), range(len(text))):
        result, _ = parse(text, template, cuts=cuts, prompt=prompt)
        assert result[1] == (text if content is None else content)
        assert [call.arguments for call in result[2]] == calls


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "5", "5"),
        ("city", "", ""),
        ("city", "\n", "\n"),
        ("city", 'a\n"\\</p>', 'a\n"\\</p>'),
        ("city", "\n true \n", "\n true \n"),
        ("days", "5", 5),
        ("days", " -1.5e3 ", -1500.0),
        ("days", "five", "five"),
        ("days", "NaN", "NaN"),
        ("metric", "true", True),
        ("metric", "False", False),
        ("metric", "yes", "yes"),
        ("where", '{"lat": [1, {"a": "</parameter>"}]}', {"lat": [1, {"a": "</parameter>"}]}),
        ("where", '{"lat": ', '{"lat": '),
        ("tags", '["a", "b"]', ["a", "b"]),
        ("note", "null", None),
        ("note", "5", "5"),
        ("note", '"quoted"', '"quoted"'),
        ("unit", "C", "C"),
        ("any", "[1, 2]", [1, 2]),
        ("any", "text", "text"),
        ("unknown", "5", 5),
        ("unknown", "[" * 5000, "[" * 5000),
    ],
)
def test_parameters_have_the_type_of_their_schema(key, text, value):
    text = f"<function=weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    for cuts in ((), range(0, len(text), 7)):
        (_, content, calls), _ = parse(text, QWEN_CODER, cuts=cuts)
        assert (content, values(calls)) == ("", [("weather", {key: value})])


# Reasoning


@pytest.mark.parametrize(
    ("template", "prompt", "text", "expected"),
    [
        (HERMES, "", "<think>\nso\n\n</think>\n\nHi", ("so", "Hi")),
        (HERMES, "<think>\n", "so\n</think>\n\nHi\n", ("so", "Hi\n")),
        (HERMES, "<think>\n", "so", ("so", "")),
        (HERMES, "", "<think></think>\n\n<tool_", ("", "<tool_")),
        (GPT_OSS, "<|start|>assistant", "<|channel|>analysis<|message|>so<|end|>", ("so", "")),
        (
            GPT_OSS,
            "<|start|>assistant",
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>Hi",
            ("so", "Hi"),
        ),
        (GPT_OSS, "<|start|>assistant<|channel|>analysis<|message|>", "so<|end|>", ("so", "")),
        (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>", "Hi <|x|>", ("", "Hi <|x|>")),
        (GPT_OSS, "<|start|>assistant", "Hi <|channel|> there", ("", "Hi <|channel|> there")),
    ],
)
@pytest.mark.parametrize("tools", [(), TOOLS])
def test_reasoning_is_no_content(template, prompt, text, expected, tools):
    for cuts in ((), range(len(text))):
        result, _ = parse(text, template, cuts=cuts, prompt=prompt, tools=tools)
        assert result == (*expected, [])


def test_marks_in_reasoning_are_reasoning():
    text = f"<think>{EXAMPLES['hermes'][1]}</think>\n{EXAMPLES['hermes'][1]}"
    (reasoning, content, calls), _ = parse(text, HERMES)
    assert (reasoning, content, values(calls)) == (EXAMPLES["hermes"][1], "", CALLS)
    (reasoning, content, calls), _ = parse(text, HERMES, parse_reasoning=False)
    assert (reasoning, content) == ("", f"<think>{EXAMPLES['hermes'][1]}</think>")
    assert values(calls) == CALLS


def test_reasoning_of_gpt_oss_can_stay_in_the_content():
    text = "<|channel|>analysis<|message|>so<|end|>"
    result, _ = parse(text + "<|start|>assistant", GPT_OSS, parse_reasoning=False)
    assert result == ("", text + "<|start|>assistant", [])


# Grammars

# Their templates write calls exactly as the grammar does.
EXACT = sorted(
    EXAMPLES.keys() - {"lfm2", "lfm2.5", "mistral", "mistral-array", "command-r", "phi-4-mini"}
)
# Of some formats, marks that are tokens of the vocabulary.
TOKENS = {
    "hermes": ("<tool_call>", "</tool_call>", "<think>", "</think>"),
    "glm": ("<tool_call>", "</tool_call>", "<arg_key>", "<arg_value>", "</arg_value>"),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "deepseek-r1": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    "gpt-oss": ("<|channel|>", "<|message|>", "<|start|>", "<|end|>"),
    "gemma": ("<|tool_call>", "<tool_call|>", '<|"|>'),
}


class Vocabulary:
    """llguidance's vocabulary of bytes, in which the tokens from 256 on stand for marks."""

    def __init__(self, marks=()):
        self._llguidance = pytest.importorskip("llguidance")
        self._tokenizer = self._llguidance.LLTokenizer("byte")
        self.marks = marks
        self.special_tokens = {mark: 256 + i for i, mark in enumerate(marks)}
        self.end = self._tokenizer.eos_token
        assert 256 + len(marks) <= self.end

    def matcher(self, grammar):
        matcher = self._llguidance.LLMatcher(self._tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def encode(self, text):
        pieces = re.split(f"({'|'.join(map(re.escape, self.marks)) or '(?!)'})", text)
        tokens = ([self.special_tokens[p]] if p in self.marks else p.encode() for p in pieces)
        return [token for piece in tokens for token in piece]

    def decode(self, tokens):
        return b"".join(
            bytes([t]) if t < 256 else self.marks[t - 256].encode() for t in tokens
        ).decode()

    def generate(self, grammar, rng):
        """A random text that the grammar permits."""
        matcher, tokens = self.matcher(grammar), []
        closings = [self.encode(c) for c in ("</think>", "</parameter>", "</arg_value>", '<|"|>')]
        closings.append(self.encode("<|end|><|start|>assistant"))
        while len(tokens) < 2000:
            permitted = np.flatnonzero(np.frombuffer(matcher.compute_logit_bias(), np.uint8))
            if self.end in permitted and (len(permitted) == 1 or rng.random() < 0.3):
                return self.decode(tokens)
            if tokens and tokens[-1] in range(48, 58):  # 1e999 is JSON, but no number of Python.
                permitted = permitted[~np.isin(permitted, list(b"eE"))]
            # Random texts do not end by themselves.
            closing = rng.choice(closings)
            if rng.random() < 0.8 or matcher.validate_tokens(closing) < len(closing):
                ends = [t for t in permitted if t < 256 and chr(t) in '"}],']
                choice = ends if ends and rng.random() < 0.4 else permitted[permitted != self.end]
                closing = [int(rng.choice(list(choice)))]
            assert matcher.consume_tokens(closing), matcher.get_error()
            tokens += closing
        raise AssertionError(self.decode(tokens))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("tokens", [False, True])
def test_grammars_permit_the_calls_of_the_template(name, tokens):
    template, text = EXAMPLES[name]
    vocabulary = Vocabulary(TOKENS.get(name, ()) if tokens else ())
    grammar = tool_format(template).grammar(
        TOOLS, required=True, special_tokens=vocabulary.special_tokens
    )
    matcher = vocabulary.matcher(grammar)
    assert matcher.consume_tokens(vocabulary.encode(text)), matcher.get_error()
    assert matcher.is_accepting()


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("prompt", ["", "<think>\n"])
@pytest.mark.parametrize("parallel", [True, False])
def test_what_a_grammar_permits_is_parsed(name, prompt, parallel):
    validate = pytest.importorskip("jsonschema").validate
    template = EXAMPLES[name][0] + "<think></think>"
    schemas = {t["function"]["name"]: t["function"].get("parameters", {}) for t in TOOLS}
    vocabulary = Vocabulary(TOKENS.get(name, ()) if parallel else ())
    grammar = tool_format(template).grammar(
        TOOLS,
        required=True,
        parallel=parallel,
        prompt=prompt,
        special_tokens=vocabulary.special_tokens,
    )
    rng, counts = random.Random(name), []
    for _ in range(8):
        text = vocabulary.generate(grammar, rng)
        (_, content, calls), _ = parse(text, template, prompt=prompt)
        assert content == "" and calls, text
        for call, arguments in values(calls):
            validate(arguments, schemas[call])
        counts.append(len(calls))
    assert (max(counts) > 1) == (parallel and name != "gpt-oss")


@pytest.mark.parametrize(
    ("name", "prompt", "reasoning", "permitted"),
    [
        ("hermes", "assistant\n", "<think>\nso\n</think>\n\n", True),
        ("hermes", "assistant\n", "", True),
        ("hermes", "assistant\n<think>\n", "so\n</think>\n\n", True),
        ("hermes", "assistant\n<think>\n", "", False),
        ("hermes", "assistant\n<think>\n\n</think>\n\n", "", True),
        ("hermes", "assistant\n<think>\n\n</think>\n\n", "<think>so</think>", False),
        (
            "gpt-oss",
            "<|start|>user<|message|>Hi<|end|><|start|>assistant",
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant",
            True,
        ),
        ("gpt-oss", "<|start|>user<|message|>Hi<|end|><|start|>assistant", "", True),
        ("hermes", "assistant\n", "I look. ", False),
    ],
)
def test_reasoning_precedes_a_required_call(name, prompt, reasoning, permitted):
    template, call = EXAMPLES[name]
    vocabulary = Vocabulary()
    format = tool_format(template + "<think></think>")
    matcher = vocabulary.matcher(format.grammar(TOOLS, required=True, prompt=prompt))
    consumed = matcher.consume_tokens(vocabulary.encode(reasoning + call))
    assert (consumed and matcher.is_accepting()) == permitted
    if permitted:
        (_, content, calls), _ = parse(reasoning + call, template, prompt=prompt)
        assert content == "" and calls


def test_a_grammar_can_be_of_one_function():
    vocabulary = Vocabulary()
    grammar = tool_format(HERMES).grammar(TOOLS, required=False, name="weather_now")
    for name in ("time", "weather", "weather_now"):
        text = f'<tool_call>\n{{"name": "{name}", "arguments": {{}}}}\n</tool_call>'
        assert vocabulary.matcher(grammar).consume_tokens(vocabulary.encode(text)) == (
            name == "weather_now"
        )
    with pytest.raises(JaxsplitError, match="there are no tools"):
        tool_format(HERMES).grammar([], required=True)
    with pytest.raises(JaxsplitError, match="'launch'.*weather, weather_now, time"):
        tool_format(HERMES).grammar(TOOLS, required=False, name="launch")


def test_nothing_is_constrained_unless_a_call_is_required():
    assert tool_format(HERMES).grammar(TOOLS, required=False) is None


@pytest.mark.parametrize("strict", [False, True])
def test_only_strict_functions_need_a_schema_that_is_known_in_full(strict):
    function = tool("f", x={"type": "string", "format": "no-such-format"})
    function["function"]["strict"] = strict
    grammar = tool_format(HERMES).grammar([function], required=True)
    matcher = Vocabulary()._llguidance.LLMatcher.validate_grammar(grammar)
    assert ("no-such-format" in matcher) == strict


@pytest.mark.parametrize("type", ["CONTROL", "USER_DEFINED"])
def test_marks_can_be_tokens_of_either_type(type):
    pytest.importorskip("llguidance")
    marks = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
    tokens = [*byte_alphabet(), *marks, "<|im_end|>"]
    types = [1] * 256 + [TokenType[type].value] * len(marks) + [3]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.chat_template": EXAMPLES["hermes"][0].replace("{", "") + "<think></think>",
    }
    tokenizer = Tokenizer.from_metadata(metadata)
    assert len(tokenizer.markup_ids) == (len(marks) if type == "CONTROL" else 0)
    grammar = tool_format(metadata["tokenizer.chat_template"]).grammar(
        TOOLS,
        required=True,
        special_tokens={tokenizer.token_text(id): id for id in tokenizer.markup_ids},
    )
    matcher = Grammars(tokenizer).matcher(Grammar("lark", grammar), tokenizer.end_ids)
    text = "<think>\nso\n</think>\n\n" + EXAMPLES["hermes"][1]
    ids = tokenizer.encode(text, parse_special=True)
    assert sum(id in range(256, 260) for id in ids) == 6
    for id in ids:
        matcher.accept(id)
    assert matcher.state.is_accepting(), matcher.state.get_error()
    assert tokenizer.decode(ids, show_special="template") == text


@pytest.mark.parametrize("marks", [(), ("<think>", "</think>")])
@pytest.mark.parametrize(
    "prompt, answers, others",
    [
        ("<|im_start|>assistant\n<think>\n", ['so {\n</think>\n\n{"a": 1}'], ['{"a": 1}']),
        ("<|im_start|>assistant\n", ["<think>\nso\n</think>\n{}", "{}"], ["so {}"]),
        ("<think>\n\n</think>\n\n", ["{}"], ["<think></think>{}"]),
    ],
)
def test_a_grammar_holds_after_reasoning(marks, prompt, answers, others):
    vocabulary = Vocabulary(marks)
    template = "… <think>\n …"
    content = Grammar("json_object").lark
    grammar = after_reasoning(content, template, prompt, vocabulary.special_tokens)
    for text in answers:
        matcher = vocabulary.matcher(grammar)
        assert matcher.consume_tokens(vocabulary.encode(text)), text
        assert matcher.is_accepting(), text
    for text in others:
        matcher = vocabulary.matcher(grammar)
        consumed = matcher.consume_tokens(vocabulary.encode(text))
        assert not (consumed and matcher.is_accepting()), text
    assert after_reasoning(content, "no marks", "", {}) == content
