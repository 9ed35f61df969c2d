"""`jaxsplit serve` against its OpenAPI document, with requests that hypothesis makes of it, and
against the types of OpenAI's client. docs/conformance.md lists the suites of others."""

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from serving import serving
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.server.app import ENDPOINTS
from jaxsplit.server.openapi import document

DOCUMENT = json.loads(json.dumps(document(ENDPOINTS)))
POSTS = [one.path for one in ENDPOINTS if one.method == "POST"]
GETS = [one.path for one in ENDPOINTS if one.method == "GET" and "{" not in one.path]
USER = [{"role": "user", "content": "Hello"}]


pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("conformance") / "tiny.gguf")
    lm = jaxsplit.load(path, devices=1, dtype="float32", slots=4, cache_tokens=1024)
    with serving(lm, max_queue=4) as server:
        yield server.url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as http:
        yield http


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of the document that stands alone."""
    return {**schema, "components": DOCUMENT["components"]}


# The document


def test_references_in_the_document_lead_somewhere():
    schemas = DOCUMENT["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(.*?)"', json.dumps(DOCUMENT)):
        assert name in schemas
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(resolved(schema))
    ids = [one["operationId"] for path in DOCUMENT["paths"].values() for one in path.values()]
    assert len(set(ids)) == len(ids)


# Requests that hypothesis makes of the document

TEXT = st.text(max_size=12)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def values(schema: dict[str, Any]) -> st.SearchStrategy:
    """Values that a schema permits."""
    if reference := schema.get("$ref"):
        found = DOCUMENT["components"]["schemas"][reference.rpartition("/")[2]]
        return st.deferred(lambda: values(found))
    if options := schema.get("anyOf"):
        return st.one_of([values(option) for option in options])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=12)
        case "integer":
            low, high = schema.get("minimum"), schema.get("maximum")
            return st.integers(0 if low is None else low, 300 if high is None else high)
        case "number":
            low, high = schema.get("minimum"), schema.get("maximum")
            return st.floats(-2 if low is None else low, 3 if high is None else high)
        case "array":
            if items := schema.get("prefixItems"):
                return st.tuples(*map(values, items)).map(list)
            least = schema.get("minItems", 0)
            return st.lists(values(schema.get("items", {})), min_size=least, max_size=least + 2)
        case "object":
            return objects(schema)
    return ANYTHING


@st.composite
def objects(draw, schema: dict[str, Any]) -> dict[str, Any]:
    """Objects with what a schema requires, and few of their other fields."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    rest = [name for name in properties if name not in required]
    names = [*required]
    if rest:
        names += draw(st.lists(st.sampled_from(rest), max_size=2, unique=True))
    found = {name: draw(values(properties[name])) for name in names}
    if isinstance(more := schema.get("additionalProperties"), dict):
        found |= draw(st.dictionaries(TEXT, values(more), max_size=2))
    return found


PLAIN = {"messages": USER, "prompt": "Hello", "input": "Hello", "tools": [], "model": "-"}


@st.composite
def requests(draw) -> tuple[str, Any]:
    """A path and a body: of most, the text is plain; some are not as the document says."""
    path = draw(st.sampled_from(POSTS))
    content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]
    body = draw(values(content["application/json"]["schema"]))
    if isinstance(body, list):
        return path, body + draw(st.just([]) | st.lists(ANYTHING, min_size=1))
    if draw(st.integers(0, 3)):
        body |= {name: PLAIN[name] for name in body if name in PLAIN}
    if draw(st.integers(0, 3)) == 0:
        body[draw(st.sampled_from([*body, "other"]))] = draw(ANYTHING)
    return path, body


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(request=requests())
def test_responses_are_as_the_document_says(http, request):
    path, body = request
    check("post", path, http.post(path, json=body))


@pytest.mark.parametrize("path", GETS)
def test_what_is_read_is_as_the_document_says(http, path):
    check("get", path, http.get(path))


def check(method: str, path: str, response: httpx.Response) -> None:
    """A response has a status and a body of the document."""
    described = DOCUMENT["paths"][path][method]["responses"].get(str(response.status_code))
    assert described is not None, response.text
    kind = response.headers["content-type"].partition(";")[0]
    schema = described["content"][kind]["schema"]
    if kind == "application/json":
        jsonschema.validate(response.json(), resolved(schema))
    elif kind == "text/event-stream":
        name = schema["description"].rpartition(" ")[2]
        chunk = resolved({"$ref": f"#/components/schemas/{name}"})
        for line in response.text.split("\n"):
            if line.startswith("data: {"):
                jsonschema.validate(json.loads(line[6:]), chunk)


# OpenAI's client, which checks every response by its types


@pytest.fixture(scope="module")
def client(url):
    options: dict[str, Any] = {"_strict_response_validation": True, "max_retries": 0}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", **options) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_chats_have_the_clients_types(client, stream):
    options = {"stream_options": {"include_usage": True}} if stream else {}
    answer = client.chat.completions.create(
        model="-",
        messages=[{"role": "developer", "content": "Be brief."}, *USER],
        max_completion_tokens=8,
        n=2,
        logprobs=True,
        top_logprobs=2,
        frequency_penalty=-2,
        presence_penalty=2,
        logit_bias={"5": 1},
        stop="\n",
        metadata={"a": "b"},
        store=True,
        user="me",
        stream=stream,
        **options,
    )
    assert {c.index for part in (answer if stream else [answer]) for c in part.choices} == {0, 1}


def test_responses_have_the_clients_types(client):
    options = {
        "model": "-",
        "input": "Hello",
        "instructions": "Be brief.",
        "max_output_tokens": 8,
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
    }
    assert client.responses.create(**options).usage.output_tokens == 8
    events = [*client.responses.create(**options, stream=True)]
    assert all(type(event).__name__.startswith("Response") for event in events)
    assert events[-1].response.usage.output_tokens == 8
    assert client.responses.input_tokens.count(model="-", input="Hello").input_tokens > 5


def test_the_rest_has_the_clients_types(client):
    answer = client.completions.create(model="-", prompt="Hello", max_tokens=4, logprobs=2)
    assert len(answer.choices[0].logprobs.tokens) == 4
    found = client.embeddings.create(model="-", input=["a", "b"], encoding_format="float")
    assert len(found.data) == 2
    [model] = client.models.list().data
    assert client.models.retrieve(model.id) == model


class Found(BaseModel):
    """What an answer is parsed as."""

    yes: bool


def test_answers_in_the_callers_types(client):
    options = {"model": "-", "max_tokens": 60, "messages": USER}
    answer = client.chat.completions.parse(**options, response_format=Found)
    assert isinstance(answer.choices[0].message.parsed, Found)
    answer = client.responses.parse(
        model="-", input="Hello", text_format=Found, max_output_tokens=60
    )
    assert isinstance(answer.output_parsed, Found)
