"""Grammars: masks against the definition, texts against `jsonschema` and Python's `re`."""

import asyncio
import dataclasses
import json
import re
import sys

import jsonschema
import numpy as np
import pytest
from tiny import fresh_rng, write_tiny_model

from jaxsplit import Grammar
from jaxsplit.engine import Engine, Request, RequestSpec, SamplingConfig, Scheduler, scheduler
from jaxsplit.engine.pace import Step
from jaxsplit.errors import JaxsplitError
from jaxsplit.llm import open_model
from jaxsplit.text import Grammars, Tokenizer, grammar

GREEDY = {"temperature": 0.0}
PROMPT = "Tell the"
DIGITS = Grammar("regex", "[0-9]{3,12}")
MESHES = {
    "none": {"split_mode": "none"},
    "graph:3": {"split_mode": "graph", "devices": 3},
    "stage:2": {"mesh": "stage:2"},
    "data:2,tensor:2": {"mesh": "data:2,tensor:2"},
}


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("grammar") / "tiny.gguf")


@pytest.fixture(autouse=True)
def _quick_compilation(request):
    """Of tiny models; the demo model runs longer than it compiles."""
    if "demo" not in request.fixturenames:
        request.getfixturevalue("quick_compilation")


@pytest.fixture(scope="module")
def lm(load, tiny_path):
    return load(tiny_path, slots=4, **MESHES["none"])


# Masks

CHOICES = ['{"name": "José"}', "hello  world\n\tx", "你好😀", "a\u2581b", "hell no", "hell", "0x"]


def spm_metadata():
    """Bytes, characters that are bytes, too, and pieces."""
    special = ["<unk>", "<s>", "</s>"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [*'abcdehlorwx{}:"0', "\u2581", "\u2581hello", "hell", "\u2581\u2581", '":', "你好"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *bytes_, *pieces],
        "tokenizer.ggml.scores": [-float(i) for i in range(259 + len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
    }


@pytest.fixture(scope="module", params=["spm", "gemma4", "smollm2", "tiny"])
def tokenizer(request, tiny_path, smollm2_path):
    if request.param in ("spm", "gemma4"):
        metadata = spm_metadata() | {"tokenizer.ggml.merges": ["h e", "l l", "he ll"]}
        if request.param == "gemma4":
            metadata["tokenizer.ggml.model"] = "gemma4"
            metadata["tokenizer.ggml.eos_token_id"] = 2
        return Tokenizer.from_metadata(metadata)
    path = tiny_path if request.param == "tiny" else smollm2_path
    return Tokenizer.from_metadata(open_model(path).metadata)


def permitted(masks, vocab):
    """A mask as bool `[data, rows, vocab]`."""
    return np.unpackbits(masks.view(np.uint8), axis=-1, bitorder="little")[..., :vocab] > 0


def test_masks_have_the_tokens_that_continue_a_choice(tokenizer):
    """All of them and no others, for every token of the vocabulary, also where the tokenizer would
    take another one."""
    grammars, vocab, rng = Grammars(tokenizer), tokenizer.vocab_size, fresh_rng()
    pieces = [tokenizer.decode_bytes([i], continuation=True) for i in range(vocab)]
    texts = [choice.encode() for choice in CHOICES]
    ends = sorted(tokenizer.end_ids)
    for _ in range(12):
        matcher = grammars.matcher(Grammar("choice", json.dumps(CHOICES)), tokenizer.end_ids)
        prefix, complete = b"", False
        while not complete:
            left = [text[len(prefix) :] for text in texts if text.startswith(prefix)]
            expected = np.asarray([bool(p) and any(x.startswith(p) for x in left) for p in pieces])
            expected[ends] = prefix in texts
            none, found = permitted(grammars.masks([[None, matcher]]), vocab)[0]
            assert none.all()
            np.testing.assert_array_equal(found, expected)
            expected[ends] = False
            token = int(rng.choice(np.flatnonzero(expected)))
            prefix += pieces[token]
            complete = matcher.accept(token)
            assert complete == (prefix in texts and prefix != b"hell")
    assert grammars.error(grammars.matcher(DIGITS, ())) is None


def test_tokens_that_end_the_text_are_permitted_where_the_grammar_ends(tokenizer):
    """Even if they are part of it otherwise; without any, the text ends by itself only."""
    grammars, vocab = Grammars(tokenizer), tokenizer.vocab_size
    digits = [tokenizer.encode(x, add_special=False)[-1] for x in "123"]
    matcher = grammars.matcher(Grammar("regex", "[0-9]{2,3}"), digits[2:])
    for count in range(3):
        found = permitted(grammars.masks([[matcher]]), vocab)[0, 0]
        assert found[digits[:2]].all() and found[digits[2]] == (count == 2)
        assert not found[sorted(tokenizer.end_ids)].any()
        assert matcher.accept(digits[0]) == (count == 2)


def test_control_tokens_are_no_text(lm):
    """Their names are spelled with other tokens; Lark may name them."""
    grammars, vocab = Grammars(lm.tokenizer), lm.tokenizer.vocab_size
    control = lm.tokenizer.encode("<|im_start|>", parse_special=True)
    assert len(control) == 1
    for kind, text, expected in (
        ("regex", r"(?s:.*)", False),
        ("lark", 'start: "<|im_start|>"', False),
        ("lark", "start: <|im_start|>", True),
    ):
        matcher = grammars.matcher(Grammar(kind, text), ())
        found = permitted(grammars.masks([[matcher]]), vocab)[0, 0]
        assert found[control[0]] == expected
        assert found.sum() == 1 if kind == "lark" else found[:256].sum() > 100


# Texts

TEXT = {"type": "string", "maxLength": 6}
SCHEMAS = [
    {"type": "boolean"},
    {"type": "null"},
    {"const": {"a": [1, "é", None]}},
    {"enum": ["red", "green", 3, None, {"x": 1}]},
    {"type": "integer", "minimum": -5, "maximum": 120},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 7},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    TEXT,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "uuid"},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [TEXT, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "array", "items": {"enum": [1, 2]}, "maxItems": 0},
    {
        "type": "object",
        "properties": {"name": TEXT, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"enum": [0]}},
        "required": ["b"],
        "additionalProperties": False,
    },
    {
        "type": "object",
        "properties": {"at": {"type": "object", "properties": {"x": {"enum": [1, 2]}}}},
        "required": ["at"],
        "additionalProperties": False,
        "maxProperties": 1,
    },
    {"type": "object", "additionalProperties": {"enum": [7]}, "maxProperties": 1},
    {
        "type": "object",
        "patternProperties": {"^[ab]$": {"type": "boolean"}},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {"anyOf": [{"type": "boolean"}, {"type": "string", "pattern": "^x{1,3}$"}]},
    {"oneOf": [{"type": "integer", "minimum": 10, "maximum": 12}, {"type": "null"}]},
    {
        "oneOf": [
            {"properties": {"kind": {"const": kind}, "value": value}, "required": ["kind", "value"]}
            | {"type": "object", "additionalProperties": False}
            for kind, value in (("t", TEXT), ("b", {"type": "boolean"}))
        ]
    },
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {
        "$defs": {
            "point": {"type": "array", "items": {"enum": [0, 1]}, "minItems": 2, "maxItems": 2}
        },
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
                "required": ["left"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "object", "properties": {"tool": {"const": "f"}, "arguments": {"type": "object"}}},
]


def check_schemas(lm, schemas, n_predict, finished, **options):
    """All at once; what has ended by itself is valid, the others were on their way."""
    running = [
        lm.submit(PROMPT, n_predict, grammar=Grammar("json_schema", json.dumps(schema)), **options)
        for schema in schemas
    ]
    count = 0
    for schema, one in zip(schemas, running, strict=True):
        one.result()
        if one.finish_reason == "stop":
            validator = jsonschema.validators.validator_for(
                schema, default=jsonschema.Draft202012Validator
            )
            check = validator.FORMAT_CHECKER
            jsonschema.validate(json.loads(one.text), schema, validator, format_checker=check)
            count += 1
        else:
            assert one.finish_reason == "length" and len(one.request.tokens) == n_predict
    assert count >= finished, [(x.text, x.finish_reason) for x in running]


def test_texts_are_valid_by_their_schemas(lm):
    assert len(SCHEMAS) == 30
    seed = int(fresh_rng().integers(2**32))
    check_schemas(lm, SCHEMAS, 80, 20, temperature=1.0, top_k=0, seed=seed)


def random_schema(rng, depth=0):
    """A schema whose parts are nested at random."""

    def some(low, high):
        return int(rng.integers(low, high + 1))

    def parts(least):
        return [random_schema(rng, depth + 1) for _ in range(some(least, 3))]

    def number():
        low, kind = some(-50, 50), str(rng.choice(["integer", "number"]))
        return {"type": kind, "minimum": low, "maximum": low + some(0, 40)}

    def text():
        low = some(0, 4)
        return {"type": "string", "minLength": low, "maxLength": low + some(0, 6)}

    def pattern():
        return {"type": "string", "pattern": f"^[a-f]{{1,{some(1, 4)}}}(-[0-9]+)?$", "maxLength": 9}

    def choice():
        return {"enum": [some(0, 9), f"x{some(0, 99)}", None, [some(0, 3)], {"k": True}]}

    def array():
        low = some(0, 2)
        item = random_schema(rng, depth + 1)
        return {"type": "array", "items": item, "minItems": low, "maxItems": low + some(0, 2)}

    def fixed_array():
        return {"type": "array", "prefixItems": parts(1), "items": False}

    def record():
        fields = {f"field {i}": part for i, part in enumerate(parts(0))}
        wanted = [name for name in fields if rng.random() < 0.7]
        closed = {"additionalProperties": False}
        return {"type": "object", "properties": fields, "required": wanted, **closed}

    def union():
        return {"anyOf": parts(2)}

    def reference():
        shared = random_schema(rng, 2)
        fields = {"first": {"$ref": "#/$defs/shared"}, "second": {"$ref": "#/$defs/shared"}}
        closed = {"required": ["first"], "additionalProperties": False}
        return {"$defs": {"shared": shared}, "type": "object", "properties": fields, **closed}

    leaves = [number, text, pattern, choice, lambda: {"type": ["boolean", "null"]}]
    nested = [array, fixed_array, record, record, union]
    kinds = leaves if depth > 1 else [*leaves, *nested] if depth else [*leaves, *nested, reference]
    return kinds[some(0, len(kinds) - 1)]()


def test_texts_are_valid_by_random_schemas(lm):
    rng = fresh_rng()
    schemas = [random_schema(rng) for _ in range(100)]
    seed = int(rng.integers(2**32))
    check_schemas(lm, schemas, 120, 50, temperature=1.0, top_k=0, seed=seed)


@pytest.fixture(scope="module")
def demo(load, smollm2_path):
    return load(smollm2_path, split_mode="none")


@pytest.mark.parametrize("some", [slice(0, 30, 5), pytest.param(slice(30), marks=pytest.mark.full)])
def test_texts_of_the_demo_model_are_valid_by_their_schemas(demo, some):
    seed = int(fresh_rng().integers(2**32))
    schemas = SCHEMAS[some]
    check_schemas(demo, schemas, 60, len(schemas) // 2, temperature=1.0, seed=seed)


def test_a_json_object_that_the_demo_model_writes_is_the_same_with_the_grammar(demo):
    examples = ('{"name": "Ann", "age": 31}', '{"name": "Bob", "age": 27}', "")
    prompt = "\n```\n".join(f"```json\n{example}" for example in examples)
    plain = demo.generate(prompt, 40, stop="\n", **GREEDY)
    assert json.loads(plain)  # it satisfies the grammar by itself
    assert demo.generate(prompt, 40, grammar=Grammar("json_object"), **GREEDY) == plain


@pytest.mark.parametrize("kind", ["regex", "lark", "gbnf", "choice", "json_object"])
def test_texts_of_all_kinds(lm, kind):
    pattern = {
        "regex": r"[a-c]{2}/\d{1,3}( (\w|é){2})?",
        "lark": "(hi |ho )[a-z]{2,5}!",
        "gbnf": r"(yes|no)[ \t]{0,2}(, [0-9]+;){1,2}",
        "choice": '(maybe|may|"q"\\\\|é)',
        "json_object": r"\{.*\}",
    }[kind]
    text = {
        "regex": pattern,
        "lark": 'start: ("hi " | "ho ") WORD "!"\nWORD: /[a-z]{2,5}/',
        "gbnf": 'root ::= ("yes" | "no") [ \\t]{0,2} num num?\nnum ::= ", " [0-9]+ ";"',
        "choice": json.dumps(["maybe", "may", '"q"\\', "é"]),
        "json_object": "",
    }[kind]
    found = [
        lm.submit(PROMPT, 60, grammar=Grammar(kind, text), temperature=1.0, top_k=0, seed=seed)
        for seed in range(6)
    ]
    ended = [one for one in found if one.result().finish_reason == "stop"]
    assert ended or kind == "json_object"
    for one in ended:
        assert re.fullmatch(pattern, one.text, re.DOTALL), one.text


def test_a_text_that_satisfies_the_grammar_is_the_same_with_it(lm):
    plain = lm.submit(PROMPT, 24, **GREEDY).result()
    for kind, text, ended in (
        ("regex", r"(?s:.)*", False),
        ("choice", json.dumps(["x", plain.text, plain.text + "\n\n\n"]), False),
        ("choice", json.dumps(["x", plain.text]), True),
    ):
        found = lm.submit(PROMPT, 24, grammar=Grammar(kind, text), **GREEDY).result()
        assert found.request.tokens == plain.request.tokens
        assert (found.text, found.finish_reason) == (plain.text, "stop" if ended else "length")


def test_options_beside_a_grammar(lm):
    """Log-probabilities are those of the model; biases and penalties choose among what is
    permitted; the text ends where it is complete, even if the model's end is ignored."""
    options = {"grammar": DIGITS, "logprobs": 2, "repeat_penalty": 1.4, "logit_bias": {55: 50.0}}
    found = lm.submit(PROMPT, 30, ignore_eos=True, **options, **GREEDY).result()
    assert (found.finish_reason, len(found.text)) == ("stop", 12)
    assert re.fullmatch("[0-9]{12}", found.text) and "7" in found.text
    assert lm.generate(PROMPT, 5, grammar=DIGITS, **GREEDY) == "".join(
        lm.stream(PROMPT, 5, grammar=DIGITS, **GREEDY)
    )
    events = list(lm.submit(PROMPT, 30, **options, **GREEDY))
    entries = [entry for event in events for entry in event.logprobs]
    tokens = [entry.token for entry in entries]
    logits = np.float64(lm.logits([*lm.tokenizer.encode(PROMPT), *tokens]))[-len(tokens) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for entry, row in zip(entries, expected, strict=True):
        np.testing.assert_allclose(entry.logprob, row[entry.token], rtol=0, atol=1e-4)
        np.testing.assert_allclose(entry.top[0][1], row.max(), rtol=0, atol=1e-4)


# Scheduling


class RandomGrammars:
    """In place of `Grammars`: a few random tokens are permitted at a time, and no text ends."""

    def __init__(self, rng, vocab):
        self._rng, self._vocab = rng, vocab
        self.matchers = []

    def matcher(self, _, end_ids):
        self.matchers.append(RandomMatcher(self._rng, self._vocab))
        return self.matchers[-1]

    def masks(self, matchers):
        words = -(-self._vocab // 32)
        found = np.full((len(matchers), max(map(len, matchers)), words), 2**32 - 1, np.uint32)
        for replica, own in enumerate(matchers):
            for row, matcher in enumerate(own):
                if matcher is not None:
                    found[replica, row] = matcher.mask
        return found


class RandomMatcher:
    """Attributes:
    permitted: the masks of the tokens so far, and of the next one.
    """

    def __init__(self, rng, vocab):
        self._rng, self._vocab, self.permitted = rng, vocab, []
        self.accept(None)

    def accept(self, _):
        few, fewer = self._rng.integers(0, 2**32, (2, -(-self._vocab // 32)), np.uint32)
        self.mask = few & fewer
        self.permitted.append(permitted(self.mask, self._vocab))
        return False


class Driver:
    """A scheduler with a small cache, and its requests.

    Args:
      lm: whose parameters it uses.
      grammars: of the scheduler.
      pages: of 8 tokens, of the cache.
      loops: decode as where the host runs ahead of the devices.
    """

    def __init__(self, lm, grammars, pages=40, *, loops=False):
        engine = Engine(
            lm.models,
            lm.engine.partition,
            context=64,
            cache_dtype=np.dtype("float32"),
            slots=4,
            cache_tokens=8 * pages,
            page=8,
            vocab=lm.engine.vocab,
            chunks=(8, 32),
        )
        engine.loops = loops
        self.scheduler = Scheduler(engine, measures=False, grammars=grammars)
        self._requests = []

    def submit(self, spec):
        cancel = self.scheduler.cancel
        request = Request(spec, len(self._requests), lambda one: cancel(one.id))
        self._requests.append(request)
        self.scheduler.check(spec)
        self.scheduler.add(request)
        return request

    def run(self):
        for _ in range(2000):
            if self.scheduler.idle:
                break
            self.scheduler.step()
            self.scheduler.check_pages()
            steps = [u for u in self.scheduler._units if isinstance(u.work, Step)]
            masked = [u for u in steps if u.work.sampler.mask]
            assert len(masked) <= 1
            for unit in masked:
                assert unit.steps == 1
                assert all(s.request.spec.grammar for _, s in unit.rows())
        assert self.scheduler.idle
        for request in self._requests:
            while request.next_now():  # raises what it failed with
                pass
            assert request.done


def spec_of(prompt, max_tokens, *, grammar=DIGITS, **options):
    sampling = SamplingConfig(**GREEDY | options)
    return RequestSpec(prompt, sampling, max_tokens=max_tokens, grammar=grammar)


PLACES = [*((mesh, False) for mesh in MESHES), ("none", True), ("data:2,tensor:2", True)]


@pytest.mark.parametrize(("mesh", "loops"), PLACES)
def test_devices_take_the_likeliest_permitted_token(load, tiny_path, lm, mesh, loops):
    """The 263 tokens split into shards of which some begin within a word of the mask."""
    rng, vocab = fresh_rng(), lm.engine.vocab
    grammars = RandomGrammars(rng, vocab)
    driver = Driver(load(tiny_path, slots=4, **MESHES[mesh]), grammars, loops=loops)
    prompts = [rng.integers(0, 200, n).tolist() for n in (1, 5, 12, 20, 3, 3)]
    running = [driver.submit(spec_of(prompt, 6)) for prompt in prompts]
    plain = driver.submit(spec_of(prompts[0], 6, grammar=None))
    driver.run()
    for prompt, request, matcher in zip(prompts, running, grammars.matchers, strict=True):
        assert len(request.tokens) == 6
        logits = np.float64(lm.logits([*prompt, *request.tokens]))[len(prompt) - 1 : -1]
        for token, row, mask in zip(request.tokens, logits, matcher.permitted[:-1], strict=True):
            assert mask[token]
            assert row[token] >= row[:vocab][mask].max() - 1e-4
    assert plain.tokens == lm.submit(prompts[0], 6, **GREEDY).result().request.tokens


def test_layers_that_run_ahead_run_once(load, tiny_path, lm, monkeypatch):
    """But where pages are added: their table is another then, and the layers run again."""
    driver = Driver(load(tiny_path, slots=4, **MESHES["none"]), Grammars(lm.tokenizer), loops=True)
    engine, runs = driver.scheduler.engine, []
    original = engine._masked_layers
    monkeypatch.setattr(engine, "_masked_layers", lambda rows: runs.append(original(rows)))
    assert engine.runs_ahead
    request = driver.submit(spec_of([1, 2, 3], 40, grammar=Grammar("regex", "[a-z]{60}")))
    driver.run()
    assert len(request.tokens) == 40
    pages = -(-(3 + 40) // 8)
    assert len(runs) <= 40 + pages
    assert (
        request.tokens
        == lm.submit([1, 2, 3], 40, grammar=request.spec.grammar, **GREEDY).result().request.tokens
    )


def test_requests_with_and_without_grammars_have_what_they_have_alone(lm):
    rng = fresh_rng()
    grammars = [None, DIGITS, Grammar("regex", "(ab|cd|e ){2,20}"), Grammar("json_object"), None]
    options = [
        {
            "grammar": grammars[i % 5],
            "temperature": float(i % 3),
            "seed": int(rng.integers(2**32)),
            "repeat_penalty": 1.0 + 0.1 * (i % 2),
        }
        for i in range(15)
    ]
    prompts = [[*b"Tell the", *rng.integers(60, 90, i).tolist()] for i in range(15)]
    lengths = rng.integers(1, 40, 15).tolist()
    arguments = list(zip(prompts, lengths, options, strict=True))
    alone = [lm.submit(p, n, **o).result() for p, n, o in arguments]
    together = [lm.submit(p, n, **o) for p, n, o in arguments]
    for one, other in zip(alone, together, strict=True):
        assert other.result().request.tokens == one.request.tokens
        assert (other.text, other.finish_reason) == (one.text, one.finish_reason)


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("mesh", ["none", "data:2,tensor:2"])
def test_a_preempted_text_goes_on_where_it_was(load, tiny_path, lm, mesh, loops, monkeypatch):
    """Each of the three needs 8 pages at the end; there are 10, on each data replica."""
    monkeypatch.setattr(scheduler, "_RESERVE", 8)
    rng, grammars = fresh_rng(), Grammars(lm.tokenizer)
    driver = Driver(load(tiny_path, slots=4, **MESHES[mesh]), grammars, pages=10, loops=loops)
    rule = Grammar("regex", "([a-z]{3} ){14}")
    specs = [spec_of(rng.integers(0, 200, 8).tolist(), 60, grammar=rule) for _ in range(6)]
    specs[2] = dataclasses.replace(specs[2], grammar=None, max_tokens=50)
    running = [driver.submit(spec) for spec in specs]
    driver.run()
    assert driver.scheduler.counters.preemptions
    for spec, request in zip(specs, running, strict=True):
        alone = lm.submit(spec.prompt, int(spec.max_tokens), grammar=spec.grammar, **GREEDY)
        assert request.tokens == alone.result().request.tokens
        if spec.grammar:
            text = lm.tokenizer.decode(request.tokens)
            assert re.fullmatch("([a-z]{3} ){14}", text)


def test_requests_under_a_grammar_are_cancelled(lm):
    endless = Grammar("regex", "[0-9 ]*")
    running = [
        lm.submit(PROMPT, grammar=endless, logit_bias={54: -2.0 * i}, **GREEDY) for i in range(6)
    ]
    other = lm.submit(PROMPT, 24, **GREEDY)
    for _ in running[0]:
        if len(running[0].request.tokens) > 4:
            running[0].cancel()
    assert running[0].finish_reason == "cancelled"
    running[5].cancel()  # it waits for a slot
    assert running[5].result().finish_reason == "cancelled"

    async def awaited():
        async for _ in running[1]:
            if len(running[1].request.tokens) > 4:
                running[1].cancel()

    asyncio.run(awaited())
    for one in running[2:5]:
        one.cancel()
        assert re.fullmatch("[0-9 ]*", one.result().text)
    assert other.result().text == lm.generate(PROMPT, 24, **GREEDY)


def test_processes_are_told_the_grammar():
    spec = RequestSpec([1, 2], max_tokens=5, grammar=DIGITS)
    assert RequestSpec.from_json(json.loads(json.dumps(spec.to_json()))) == dataclasses.replace(
        spec, stop_ids=[]
    )
    spec = RequestSpec([1, 2], max_tokens=5)
    assert RequestSpec.from_json(json.loads(json.dumps(spec.to_json()))).grammar is None


# Errors


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json", "{}", "grammar.kind=json is not supported; supported are json_object, json_sch"),
        ("json_schema", {"type": "object"}, "grammar.text={'type': 'object'} must be a string"),
        ("regex", "a\ud800", "grammar.text has half a character at 1: "),
        ("json_object", "{}", "json_object takes no text, not '{}'; a schema's kind is json_s"),
        ("json_schema", '{"type":', "the json_schema is not JSON: .* line 1 column 9"),
        ("json_schema", "[1]", "a json_schema that permits any text is a JSON object, not '.1.'"),
        ("json_schema", "false", "a json_schema that permits any text is"),
        (
            "json_schema",
            '{"properties": {"a": {"items": {"type": "strong"}}}}',
            "the json_schema is invalid at #/properties/a/items: Invalid type: strong",
        ),
        (
            "json_schema",
            '{"anyOf": [{"type": "null"}, {"type": "string", "pattern": "(a"}]}',
            "the json_schema is invalid at #/anyOf/1: unclosed group",
        ),
        (
            "json_schema",
            '{"$defs": {"a": {"type": "array", "uniqueItems": true}}, "$ref": "#/$defs/a"}',
            r"invalid at #/\$defs/a: Unimplemented keys: .\"uniqueItems\".",
        ),
        ("json_schema", '{"$ref": "#/$defs/a"}', "invalid at #: Pointer '/[$]defs/a' does not ex"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "the json_schema is"),
        ("choice", "[]", "a choice is a JSON array of strings, not '..'"),
        ("choice", '["a", 1]', "a choice is a JSON array of strings"),
        ("regex", "[a-", "the regex is invalid: unclosed character class"),
        ("regex", "a(?=b)", "the regex is invalid: look-around"),
        ("regex", "(" * 10**5 + ")" * 10**5, "the regex is invalid: "),
        ("lark", "start: foo", 'the lark is invalid: at 1.8.: unknown name: "foo"'),
        ("lark", "", "the lark is invalid: "),
        ("gbnf", 'root ::= "a', "the gbnf is invalid: Unexpected end of input at line 1"),
        ("gbnf", "root ::= other", "the gbnf is invalid: Rule 'other' not found"),
        ("gbnf", 'start ::= "a"', "the gbnf is invalid: No 'root' rule found"),
        ("gbnf", "(" * 10**5, "the gbnf is invalid: "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_invalid_is_refused_in_one_line(lm, kind, text, message):
    with pytest.raises(JaxsplitError, match=message) as error:
        lm.submit(PROMPT, 5, grammar=Grammar(kind, text))
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 300
    assert lm.generate(PROMPT, 3, grammar=DIGITS, **GREEDY).isdigit()


def test_a_grammar_of_another_type_is_refused(lm):
    with pytest.raises(JaxsplitError, match="grammar='root' must be a jaxsplit.Grammar"):
        lm.submit(PROMPT, 5, grammar="root")


def test_a_text_that_cannot_go_on_fails_alone(lm):
    """All digits end the text, so none may be part of it; or they have no probability."""
    digits = list(range(48, 58))
    stuck = lm.submit(PROMPT, 5, grammar=DIGITS, stop_ids=digits)
    biased = lm.submit(PROMPT, 5, grammar=DIGITS, logit_bias=dict.fromkeys(digits, -np.inf))
    other = lm.submit(PROMPT, 5, grammar=DIGITS, **GREEDY)
    with pytest.raises(JaxsplitError, match="grammar: the text cannot go on: no token is permi"):
        stuck.result()
    with pytest.raises(JaxsplitError, match="logits are not finite"):
        biased.result()
    assert other.result().text.isdigit()


def test_a_grammar_that_becomes_too_complex_fails_alone(lm, monkeypatch):
    original = Grammars._matcher

    def limited(self, lark):
        import llguidance

        limits = llguidance.LLParserLimits(step_max_items=30)
        if "wide" not in lark:
            return original(self, lark)
        return llguidance.LLMatcher(self._vocabulary, lark, limits=limits, log_level=0)

    monkeypatch.setattr(Grammars, "_matcher", limited)
    wide = 'start: "wide" (a | b | c)*\na: "x" a? b?\nb: "x" a? c? | "xx" b?\nc: "x" b? a? | "y"'
    found = lm.submit(PROMPT, 200, grammar=Grammar("lark", wide), **GREEDY)
    other = lm.submit(PROMPT, 5, grammar=DIGITS, **GREEDY)
    with pytest.raises(
        JaxsplitError, match="grammar: the text cannot go on: .*; try a simpler"
    ) as e:
        found.result()
    assert len(str(e.value).splitlines()) == 1
    assert other.result().text.isdigit()


def test_without_llguidance_its_extra_is_named(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammar._llguidance.cache_clear()
    with pytest.raises(JaxsplitError, match=r"pip install 'jaxsplit\[grammar\]'"):
        lm.submit(PROMPT, 5, grammar=Grammar("regex", "a new one"))
    assert lm.generate(PROMPT, 3, **GREEDY)
