"""`jaxsplit serve`: endpoints and fields, through OpenAI's client and as plain HTTP."""

import asyncio
import base64
import collections
import concurrent.futures
import gc
import json
import math
import socket
import time
import types

import httpx
import numpy as np
import openai
import pytest
from serving import serving
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.engine import Generation
from jaxsplit.engine.stream import Event
from jaxsplit.server.running import Running, Waker

USER = [{"role": "user", "content": "Hello there"}]


pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("server") / "tiny.gguf")
    return jaxsplit.load(path, devices=1, dtype="float32", slots=4, cache_tokens=2048)


@pytest.fixture(scope="module")
def server(lm):
    with serving(lm, max_queue=8, sse_ping_interval=0.05) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def post(http, path, **body):
    return http.post(path, json=body)


def events(response) -> list:
    """The objects of a stream, without pings and the end."""
    lines = [line for line in response.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def alone(lm, prompt, n_predict, **options) -> str:
    return lm.generate(prompt, n_predict, **options)


# Chat completions


def test_a_chat_is_what_the_engine_generates(lm, client):
    answer = client.chat.completions.create(
        model="any", messages=USER, max_tokens=12, temperature=0, stop=["never found"]
    )
    ids = lm.chat_prompt(USER)
    assert answer.choices[0].message.content == alone(lm, ids, 12, temperature=0.0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 12)
    assert usage.total_tokens == len(ids) + 12


def test_a_streamed_chat_is_the_same(client):
    options = {"model": "any", "messages": USER, "max_tokens": 20, "seed": 5, "temperature": 1.0}
    whole = client.chat.completions.create(**options)
    chunks = [
        *client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    ]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 20
    assert len({c.id for c in chunks}) == 1


def test_several_answers_have_seeds_that_differ(lm, client):
    answer = client.chat.completions.create(
        model="any", messages=USER, max_tokens=8, n=3, seed=7, temperature=1.0
    )
    texts = [choice.message.content for choice in answer.choices]
    ids = lm.chat_prompt(USER)
    expected = [alone(lm, ids, 8, seed=7 + i, temperature=1.0) for i in range(3)]
    assert texts == expected
    assert answer.usage.prompt_tokens == len(ids)
    streamed = client.chat.completions.create(
        model="any", messages=USER, max_tokens=8, n=3, seed=7, temperature=1.0, stream=True
    )
    found = ["", "", ""]
    for chunk in streamed:
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert found == expected


def test_requests_without_a_seed_differ(client):
    def ask():
        answer = client.chat.completions.create(model="-", messages=USER, max_tokens=24)
        return answer.choices[0].message.content

    assert ask() != ask()


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_logits(lm, client, stream):
    answer = client.chat.completions.create(
        model="-",
        messages=USER,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        stream=stream,
    )
    if stream:
        parts = [chunk.choices[0].logprobs for chunk in answer]
        found = [x for part in parts if part for x in part.content]
    else:
        found = answer.choices[0].logprobs.content
    ids = lm.chat_prompt(USER)
    generated = lm.submit(ids, 6, temperature=0.0).result().request.tokens
    logits = lm.logits(ids + generated)[len(ids) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    expected -= logits.max(1, keepdims=True)
    assert len(found) == 6
    for one, token, row in zip(found, generated, expected, strict=True):
        assert math.isclose(one.logprob, row[token], abs_tol=1e-4)
        assert bytes(one.bytes).decode() == one.token == lm.tokenizer.decode([token])
        best = np.sort(row)[::-1][:3]
        assert np.allclose([x.logprob for x in one.top_logprobs], best, atol=1e-4)


def test_the_next_turn_finds_its_prefix(client):
    messages = [{"role": "user", "content": "Tell me about it. " * 8}]
    first = client.chat.completions.create(model="-", messages=messages, max_tokens=5)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Go on"},
    ]
    second = client.chat.completions.create(model="-", messages=messages, max_tokens=5)
    read = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= read - 2
    again = client.chat.completions.create(
        model="-", messages=messages, max_tokens=1, extra_body={"cache_prompt": False}
    )
    assert again.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}], "Hello there"),
        ("Hello there", "Hello there"),
    ],
)
def test_contents_in_parts_are_joined(http, content, text):
    found = post(http, "/apply-template", messages=[{"role": "user", "content": content}]).json()
    assert found == {"prompt": f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"}


BEGUN = [*USER, {"role": "assistant", "content": "Well, "}]
TURN = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nWell, "


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, TURN),
        ({"continue_final_message": True, "add_generation_prompt": False}, TURN),
        ({"add_generation_prompt": False}, TURN + "<|im_end|>\n"),
        ({"continue_final_message": False}, TURN + "<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_an_answer_continues_the_assistants_last_message(lm, http, fields, prompt):
    found = post(http, "/apply-template", messages=BEGUN, **fields).json()
    assert found == {"prompt": prompt}
    options = {"messages": BEGUN, "max_tokens": 8, "temperature": 0}
    answer = post(http, "/v1/chat/completions", **options, **fields).json()
    expected = alone(lm, prompt, 8, temperature=0.0, parse_special=True)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("usage", [False, True])
def test_timings_are_in_the_last_chunk(http, usage):
    options = {"max_tokens": 4, "stream": True, "stream_options": {"include_usage": usage}}
    for path, prompt in [
        ("chat/completions", {"messages": USER}),
        ("completions", {"prompt": "x"}),
    ]:
        chunks = events(post(http, f"/v1/{path}", **prompt, **options))
        assert chunks[-1]["timings"]["predicted_n"] == 4
        assert (chunks[-1]["choices"] == []) is usage
        assert "timings" not in chunks[0]
        chunks = events(post(http, f"/v1/{path}", **prompt, **options, timings_per_token=True))
        assert all("timings" in chunk for chunk in chunks[1:])


# Completions


def test_completions_of_several_prompts(lm, client):
    prompts = ["The first", "A second"]
    answer = client.completions.create(model="-", prompt=prompts, max_tokens=6, temperature=0, n=1)
    assert [c.text for c in answer.choices] == [
        alone(lm, prompt, 6, temperature=0.0) for prompt in prompts
    ]
    ids = lm.tokenizer.encode("The first")
    by_ids = client.completions.create(model="-", prompt=ids, max_tokens=6, temperature=0)
    assert by_ids.choices[0].text == answer.choices[0].text


def test_echo_has_the_log_probabilities_of_the_prompt(lm, client):
    text = "Once upon a time"
    ids = lm.tokenizer.encode(text)
    answer = client.completions.create(
        model="-", prompt=text, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    [choice] = answer.choices
    assert choice.text == text
    found = choice.logprobs
    assert "".join(found.tokens) == text
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(ids))]
    assert found.token_logprobs[0] is None
    logits = lm.logits(ids).astype(np.float64)
    logits -= logits.max(1, keepdims=True)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = [expected[i, ids[i + 1]] for i in range(len(ids) - 1)]
    assert np.allclose(found.token_logprobs[1:], own, atol=1e-4)
    assert all(len(top) == 2 for top in found.top_logprobs[1:])
    streamed = client.completions.create(
        model="-", prompt=text, max_tokens=3, echo=True, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in streamed).startswith(text)


def test_best_of_returns_the_likeliest(client):
    options = {"model": "-", "prompt": "Well", "max_tokens": 8, "seed": 3, "temperature": 1.5}
    every = client.completions.create(**options, n=4, logprobs=0)
    [best] = client.completions.create(**options, best_of=4).choices
    scores = {c.text: np.mean(c.logprobs.token_logprobs) for c in every.choices}
    assert best.text == max(scores, key=scores.get)


def test_a_stop_string_ends_a_text(lm, client):
    text = alone(lm, "Stop", 30, seed=3, temperature=1.0)
    stop = text[7:10]
    options = {"model": "-", "prompt": "Stop", "max_tokens": 30, "seed": 3, "temperature": 1.0}
    whole = client.completions.create(**options, stop=stop).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = [*client.completions.create(**options, stop=[stop], stream=True)]
    assert "".join(c.choices[0].text for c in chunks) == whole.text


# Responses


def test_responses(lm, client):
    found = client.responses.create(
        model="-", input="Hello there", max_output_tokens=12, temperature=0
    )
    assert found.output_text == alone(lm, lm.chat_prompt(USER), 12, temperature=0.0)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"
    events = [
        *client.responses.create(
            model="-",
            input=[{"role": "user", "content": [{"type": "input_text", "text": "Hello there"}]}],
            max_output_tokens=12,
            temperature=0,
            stream=True,
        )
    ]
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-1] == "response.incomplete"
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == found.output_text
    assert events[-1].response.output_text == found.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))


# llama.cpp's endpoints


def test_llama_completion(lm, http):
    found = post(http, "/completion", prompt="One two", n_predict=5, temperature=0, n_probs=2)
    found = found.json()
    assert found["content"] == alone(lm, "One two", 5, temperature=0.0)
    assert (found["stop_type"], found["tokens_predicted"]) == ("limit", 5)
    assert len(found["completion_probabilities"]) == 5
    assert found["timings"]["predicted_n"] == 5
    chunks = events(
        post(http, "/completion", prompt="One two", n_predict=5, temperature=0, stream=True)
    )
    assert "".join(chunk["content"] for chunk in chunks) == found["content"]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    several = post(http, "/completion", prompt=["One two", "Three"], n_predict=2, temperature=0)
    assert [one["index"] for one in several.json()] == [0, 1]
    mixed = [*lm.tokenizer.encode("One"), " two"]
    assert post(http, "/completion", prompt=mixed, n_predict=5, temperature=0).json()[
        "content"
    ] == alone(
        lm, lm.tokenizer.encode("One") + lm.tokenizer.encode(" two", False), 5, temperature=0.0
    )


def test_tokenize_and_back(lm, http):
    text = "Grüße <|im_end|> 🙂"
    ids = post(http, "/tokenize", content=text).json()["tokens"]
    assert ids == lm.tokenizer.encode(text, False, parse_special=True)
    assert post(http, "/detokenize", tokens=ids).json() == {"content": text, "prompt": text}
    found = post(http, "/tokenize", prompt=text, add_special_tokens=False).json()
    assert found["tokens"] == ids
    assert http.get("/tokenizer_info").json()["eos_token"] == "<|endoftext|>"
    pieces = post(http, "/tokenize", content="ü", with_pieces=True).json()["tokens"]
    assert [piece["piece"] for piece in pieces] == [[0xC3], [0xBC]]


def test_properties_models_and_metrics(lm, client, http):
    found = http.get("/props").json()
    assert found["total_slots"] == 4
    assert found["default_generation_settings"]["n_ctx"] == lm.engine.context
    assert "im_start" in found["chat_template"]
    [model] = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")
    text = http.get("/metrics").text
    for name in (
        "llamacpp:tokens_predicted_total",
        "llamacpp:requests_processing",
        "vllm:time_to_first_token_seconds_bucket",
        'vllm:request_success_total{finished_reason="length"}',
    ):
        assert f"\n{name}" in text
    assert [slot["is_processing"] for slot in http.get("/slots").json()] == [False] * 4
    assert http.get("/health").json() == {"status": "ok"}
    assert "<title>" in http.get("/").text


def test_embeddings(lm, client):
    texts = ["first text", "another"]
    found = client.embeddings.create(model="-", input=texts)  # as base64
    for text, one in zip(texts, found.data, strict=True):
        hidden = lm.hidden(lm.tokenizer.encode(text, parse_special=True)).astype(np.float64)
        expected = hidden.mean(0) / np.linalg.norm(hidden.mean(0))
        assert np.allclose(one.embedding, expected, atol=1e-5)
    last = client.embeddings.create(
        model="-", input=texts[:1], encoding_format="float", extra_body={"pooling": "last"}
    )
    hidden = lm.hidden(lm.tokenizer.encode(texts[0], parse_special=True))
    assert np.allclose(last.data[0].embedding, hidden[-1] / np.linalg.norm(hidden[-1]), atol=1e-5)


def test_hidden_states_give_the_logits(lm):
    tokens = fresh_rng().integers(0, lm.config.vocab, 70).tolist()
    head = lm.model.embedding if lm.model.head is None else lm.model.head
    table = np.asarray((head.table if lm.model.head is None else head.kernel).get_value())
    logits = lm.hidden(tokens).astype(np.float64) @ table.T.astype(np.float64)
    assert np.allclose(logits[:, : lm.config.vocab], lm.logits(tokens), atol=1e-3)


# What is refused


BAD = {
    "unknown field": ({"mesages": USER}, "mesages is not a field"),
    "no messages": ({}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "a role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "image_url",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "no content"),
    "a temperature": ({"messages": USER, "temperature": -1}, "temperature"),
    "a text as number": ({"messages": USER, "temperature": "hot"}, "temperature"),
    "top_p": ({"messages": USER, "top_p": 2}, "top_p"),
    "a sampler": ({"messages": USER, "mirostat": 2}, "mirostat=2 is not supported"),
    "an order": ({"messages": USER, "samplers": ["top_p", "top_k"]}, "samplers"),
    "audio": ({"messages": USER, "modalities": ["audio"]}, "modalities"),
    "functions": ({"messages": USER, "functions": []}, "use tools"),
    "n": ({"messages": USER, "n": 0}, "n"),
    "a token": ({"messages": USER, "logit_bias": {"99999": 1}}, "token ids"),
    "a stop": ({"messages": USER, "stop": [""]}, "stop"),
    "too long": (
        {"messages": [{"role": "user", "content": "long " * 300}]},
        "exceeds the available context size of 256 tokens, which must hold",
    ),
    "no tool": ({"messages": USER, "tool_choice": "required"}, "needs tools"),
    "nothing to go on with": (
        {"messages": USER, "continue_final_message": True},
        "not an assistant's text",
    ),
    "both": (
        {"messages": USER, "continue_final_message": True, "add_generation_prompt": True},
        "exclude each other",
    ),
}


@pytest.mark.parametrize("body, message", BAD.values(), ids=BAD)
def test_what_is_refused_says_why(http, body, message):
    response = post(http, "/v1/chat/completions", **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] in ("invalid_request_error", "exceed_context_size_error")
    assert post(http, "/v1/chat/completions", messages=USER, max_tokens=1).status_code == 200


def test_a_prompt_that_is_too_long_has_llamas_fields(http):
    error = post(http, "/completion", prompt=[5] * 300).json()["error"]
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (300, 256)
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "exceed_context_size_error"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[" * 10000, {}, 400),
        (b'{"prompt": "\xff"}', {}, 400),
        (b'{"prompt": "\\ud800"}', {}, 400),
        (b'{"prompt": "x", "n_predict": 1e400}', {}, 400),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
    ],
)
def test_bodies_that_are_not_json(http, content, headers, status):
    headers = {"content-type": "application/json"} | headers
    response = http.post("/completion", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def test_paths_and_methods_that_there_are_not(http):
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert "/openapi.json" in http.get("/v1/nothing").json()["error"]["message"]


# Load


def test_many_at_once_get_their_own_texts(lm, http):
    rng = fresh_rng()
    prompts = [rng.integers(0, lm.config.vocab, rng.integers(1, 60)).tolist() for _ in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda prompt: post(
                http, "/completion", prompt=prompt, n_predict=12, temperature=1, seed=9
            ).json()["content"],
            prompts,
        )
    assert [*found] == [alone(lm, p, 12, temperature=1.0, seed=9) for p in prompts]


def test_a_full_queue_refuses(lm, http):
    def ask(i):
        body = {"prompt": [[i + 1] * 4] * 4, "n_predict": 200, "n_probs": 1, "ignore_eos": True}
        return http.post("/completion", json=body).status_code

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = [*pool.map(ask, range(8))]
    assert set(found) == {200, 429}
    assert ask(0) == 200
    many = post(http, "/completion", prompt=["x"] * 9, n_predict=1)
    assert (many.status_code, "9 texts" in many.text) == (400, True)
    assert wait_for(lambda: lm.statistics.running + lm.statistics.waiting == 0)


def wait_for(condition, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_pages(lm, server, stream):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"prompt": "Hang up", "n_predict": 240, "ignore_eos": True, "stream": stream, "n_probs": 1}
    ).encode()
    head = (
        f"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        assert wait_for(lambda: lm.statistics.running == 1)
        if stream:
            assert b"data:" in connection.recv(4096) + connection.recv(4096)
        generated = lm.statistics.counters.generated_tokens
    assert wait_for(lambda: lm.statistics.running == 0)
    assert lm.statistics.counters.generated_tokens - generated < 200
    lm.run(lambda: None)
    assert wait_for(lambda: not server._service.active)


def test_nothing_is_kept_of_a_request_that_has_ended(lm, http):
    for stream in (False, True):
        post(http, "/completion", prompt="Forget", n_predict=4, stream=stream)
    lm.run(lambda: None)

    def left() -> int:
        gc.collect()
        return sum(isinstance(x, Generation) for x in gc.get_objects())

    assert wait_for(lambda: left() == 0), left()


def test_pings_fill_silence_and_nothing_else():
    """Gaps in seconds between the events of a generation, of which some are longer than a ping."""
    gaps = [0.01] * 20 + [1.0] + [0.01] * 20

    async def run():
        news, listeners = collections.deque(), []

        def next_now():
            event = news.popleft() if news else None
            generation.finish_reason = event and event.finish_reason
            return event

        generation = types.SimpleNamespace(
            request=types.SimpleNamespace(listen=listeners.append),
            next_now=next_now,
            finish_reason=None,
            cancel=lambda: None,
        )
        running = Running([generation], Waker(asyncio.get_running_loop()))

        async def produce():
            for number, gap in enumerate(gaps):
                await asyncio.sleep(gap)
                last = number == len(gaps) - 1
                news.append(Event(str(number), finish_reason="stop" if last else None))
                listeners[0]()

        task = asyncio.ensure_future(produce())
        found = [None if event is None else event[1].text async for event in running.events(0.6)]
        await task
        return found

    found = asyncio.run(run())
    assert [text for text in found if text] == [*map(str, range(len(gaps)))]
    assert found.count(None) == 1 and found[found.index("20") - 1] is None


# Grammars


def test_a_json_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"enum": ["x", "y"]},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="-",
        messages=USER,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        max_tokens=80,
    )
    found = json.loads(answer.choices[0].message.content)
    assert found["a"] <= 99
    assert found["b"] in ("x", "y")
    assert answer.choices[0].finish_reason == "stop"


def test_base64_is_little_endian_float32(http):
    found = post(http, "/v1/embeddings", input="x", encoding_format="base64").json()
    vector = np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), "<f4")
    assert math.isclose(np.linalg.norm(vector), 1, rel_tol=1e-5)
