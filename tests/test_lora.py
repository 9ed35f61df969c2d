"""LoRA adapters against the same models with the adapters merged into their weights."""

import re

import gguf
import httpx
import numpy as np
import pytest
from adapter_files import RANK, random_factors, shapes_of, write_adapter, write_merged
from helpers import nmse, recipe
from serving import serving
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.cache.prefixes import PrefixCache
from jaxsplit.errors import JaxsplitError
from jaxsplit.weights.adapters import parse_adapters

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Matrices that are no projections: tables, experts, convolutions, the latent up-projections.
NO_PROJECTION = re.compile(r"token_embd|position_embd|_exps|conv|attn_(k|v|kv)_b\.|ssm_(a|d)$")
TOLERANCE = 1e-9  # of float32, twice: the order of sums differs


@pytest.fixture(scope="module")
def adapted(recipe_gguf, tmp_path_factory):
    """`adapted(name)`: a recipe's file, an adapter of all its projections, and the merged file."""
    folder, made = tmp_path_factory.mktemp("lora"), {}

    def get(name):
        if name not in made:
            base, arch = recipe_gguf(name), recipe(name)["arch"]
            shapes = {n: s for n, s in shapes_of(base).items() if not NO_PROJECTION.search(n)}
            factors = random_factors(shapes, 1)
            adapter = write_adapter(folder / f"{name}-adapter.gguf", factors, arch)
            merged = write_merged(folder / f"{name}.gguf", base, (factors, 0.5))
            made[name] = base, adapter, merged
        return made[name]

    return get


SPLITS = {
    "none": {"split_mode": "none"},
    "graph": {"mesh": "tensor:3"},
    "stages": {"mesh": "stage:2,tensor:2"},
    "row": {"split_mode": "row", "devices": 2},
}


@pytest.mark.parametrize(
    ("name", "split"),
    [("llama", split) for split in SPLITS]
    + [("phi3", split) for split in ("graph", "row")]
    + [
        (name, "graph")
        for name in (
            "command-r",
            "deepseek2",
            "granitehybrid",
            "llama-bias",
            "qwen2moe",
            "qwen3next",
        )
    ],
)
def test_equals_merged_weights(adapted, load, name, split):
    base, adapter, merged = adapted(name)
    tokens = recipe(name)["tokens"][:24]
    expected = load(merged, split_mode="none").logits(tokens)
    lm = load(base, lora=f"{adapter}:0.5", **SPLITS[split])
    assert nmse(lm.logits(tokens), expected) < TOLERANCE
    if name == "llama":
        assert nmse(lm.logits(tokens, one_by_one=True), expected) < TOLERANCE
    assert nmse(load(base, split_mode="none").logits(tokens), expected) > 1e-2


# Requests

PROMPT, COUNT = [*b"Tell the tale of the sea, and of those who sail it."], 12
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A tiny model, two adapters as `(file, factors)`, and the model with both."""
    folder = tmp_path_factory.mktemp("two")
    base = write_tiny_model(folder / "tiny.gguf")
    shapes = {n: s for n, s in shapes_of(base).items() if n != "token_embd.weight"}
    some = {n: s for n, s in shapes.items() if re.search(r"attn_q|ffn_down", n)}
    factors = random_factors(shapes, 2), random_factors(some, 3, rank=5)
    a, b = (write_adapter(folder / f"{n}.gguf", f) for n, f in zip("ab", factors, strict=True))
    options = {"dtype": "float32", "slots": 4, "cache_tokens": 2048}
    lm = jaxsplit.load(base, mesh="tensor:2", lora=f"{a},bee={b}:0.25", **options)
    return base, (a, factors[0]), (b, factors[1]), lm


CHOICES = (None, {}, {"a": 1.0}, {"bee": 2}, {"a": 0.5, "bee": -0.5})


@pytest.fixture(scope="module")
def expected(two, tmp_path_factory):
    """For each choice, the log-probabilities and the continuation by merged weights."""
    base, (_, a), (_, b), _ = two
    folder, found = tmp_path_factory.mktemp("merged"), []
    for i, chosen in enumerate(CHOICES):
        scales = {"a": 1.0, "bee": 0.25} if chosen is None else chosen
        changes = [(f, scales.get(name, 0)) for name, f in (("a", a), ("bee", b))]
        path = write_merged(folder / f"{i}.gguf", base, *changes)
        lm = jaxsplit.load(path, split_mode="none", dtype="float32", slots=1)
        found.append(outcome(lm.submit(PROMPT, COUNT, prompt_logprobs=True, **GREEDY)))
    return found


def outcome(generation):
    tokens = [token for event in generation for token in event.tokens]
    return tokens, [entry.logprob for entry in generation.request.prompt_logprobs]


def check(found, wanted):
    assert found[0] == wanted[0]
    np.testing.assert_allclose(found[1], wanted[1], rtol=0, atol=2e-4)


def test_requests_choose_adapters(two, expected):
    """One after the other, and without compiling again."""
    lm = two[-1]
    for chosen, scale in (("a", 0.3), ("bee", 0.4)):
        lm.submit(PROMPT, COUNT, prompt_logprobs=True, lora={chosen: scale}, **GREEDY).result()
    compiled_at = lm.engine.compiled_at
    for chosen, wanted in zip(CHOICES, expected, strict=True):
        check(
            outcome(lm.submit(PROMPT, COUNT, prompt_logprobs=True, lora=chosen, **GREEDY)), wanted
        )
    assert lm.engine.compiled_at == compiled_at
    different = [expected[i][1] for i in range(len(CHOICES))]
    assert all(
        np.abs(np.subtract(x, y)).max() > 0.1
        for i, x in enumerate(different)
        for y in different[:i]
    )


def test_requests_with_other_adapters_run_together(two, expected):
    lm = two[-1]
    running = [lm.submit(PROMPT, COUNT, lora=chosen, **GREEDY) for chosen in CHOICES]
    for one, wanted in zip(running, expected, strict=True):
        assert outcome(one)[0] == wanted[0]


def test_prefixes_of_other_adapters_are_not_shared(two):
    lm, prompt = two[-1], PROMPT[::-1] * 4

    def cached(chosen):
        generation = lm.submit(prompt, 2, lora=chosen, **GREEDY)
        generation.result()
        return generation.request.cached_tokens

    # A choice of its own for each; None is that of the last.
    choices = {"a": 0.75}, {"a": 0.75, "bee": 1}, {"bee": 0.75}, {"a": 1, "bee": 0.25}
    assert [cached(chosen) for chosen in choices] == [0] * 4
    assert [cached(chosen) for chosen in (*choices, None)] == [len(prompt) - 1] * 5
    lm._thread.run(lambda scheduler: scheduler.check_pages())


def test_scale_without_alpha(two, load, tmp_path):
    """As llama.cpp: the factor is the scale alone, not divided by the rank."""
    base, (_, factors), *_ = two
    tokens = PROMPT[:16]
    with_alpha = write_adapter(tmp_path / "one.gguf", factors, alpha=float(RANK))
    expected = load(base, lora=str(with_alpha), split_mode="none").logits(tokens)
    for i, alpha in enumerate((None, 0.0)):
        path = write_adapter(tmp_path / f"{i}.gguf", factors, alpha=alpha)
        found = load(base, lora=[path], split_mode="none").logits(tokens)
        assert nmse(found, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_types_of_tensors(two, load, tmp_path, kind):
    base = two[0]
    factors = random_factors({"blk.1.ffn_up.weight": (96, 64)}, 4, rank=32)
    path = write_adapter(tmp_path / "a.gguf", factors, kind=kind)
    kind = gguf.GGMLQuantizationType[kind]
    exact = {
        name: tuple(gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind) for x in pair)
        for name, pair in factors.items()
    }
    merged = write_merged(tmp_path / "merged.gguf", base, (exact, 1))
    expected = load(merged, split_mode="none").logits(PROMPT[:16])
    found = load(base, lora=[path], split_mode="none").logits(PROMPT[:16])
    assert nmse(found, expected) < TOLERANCE


@pytest.mark.parametrize("weights", ["quantized", "bfloat16"])
def test_kernels(load, tmp_path, weights):
    """Interpreted kernels, some of which read the adapters, too."""
    quantized = write_tiny_model(tmp_path / "q8.gguf", kind="Q8_0", layers=1)
    plain = write_tiny_model(tmp_path / "f32.gguf", layers=1)
    shapes = {n: s for n, s in shapes_of(plain).items() if n != "token_embd.weight"}
    adapter = write_adapter(tmp_path / "a.gguf", random_factors(shapes, 5, rank=32))
    options = {"dtype": "bfloat16", "weights": weights, "mesh": "tensor:2", "ctx_size": 64}
    found, expected = (
        load(quantized, lora=f"{adapter}:0.2", kernels=kernels, activations="float", **options)
        for kernels in (True, False)
    )
    for one_by_one in (False, True):
        logits = [lm.logits(PROMPT[:8], one_by_one=one_by_one) for lm in (found, expected)]
        assert nmse(*logits) < 1e-3


# Errors


ONE = {"blk.0.attn_q.weight": (np.zeros((2, 64), np.float32), np.zeros((64, 2), np.float32))}


def of(rank, columns, out, up_rank=None):
    pair = np.zeros((rank, columns), np.float32), np.zeros((out, up_rank or rank), np.float32)
    return {"factors": {"blk.0.attn_q.weight": pair}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general__type": "model"}, "general.type is 'model', expected 'adapter'"),
        ({"general__type": None}, "general.type is None, expected 'adapter'"),
        ({"adapter__type": "control"}, "adapter.type is 'control', expected 'lora'"),
        ({"architecture": "qwen3"}, "general.architecture is 'qwen3', expected 'llama'"),
        ({"alpha": float("nan")}, "adapter.lora.alpha is nan, expected a finite number"),
        ({"adapter__alora__invocation_tokens": "1"}, "adapter.alora.invocation_tokens is not supp"),
        ({"factors": {}}, "has no tensors"),
        ({"factors": {"blk.7.attn_q.weight": ONE["blk.0.attn_q.weight"]}}, "another model"),
        ({"factors": {"token_embd.weight": ONE["blk.0.attn_q.weight"]}}, "projections only"),
        ({"factors": {"blk.0.attn_norm.weight": ONE["blk.0.attn_q.weight"]}}, "projections only"),
        (
            {"factors": {"blk.0.attn_q.weight": (np.zeros((2, 64), "f"), None)}},
            "lora_b' is missing",
        ),
        (of(2, 63, 64), r"shapes \(2, 63\) and \(64, 2\), expected \(rank, 64\) and \(64, rank\)"),
        (of(2, 64, 96), r"shapes \(2, 64\) and \(96, 2\)"),
        (of(2, 64, 64, 3), r"shapes \(2, 64\) and \(64, 3\)"),
    ],
)
def test_files_that_do_not_fit_are_refused(two, tmp_path, change, message):
    change = {"factors": ONE} | change
    path = write_adapter(tmp_path / "bad.gguf", **change)
    with pytest.raises(JaxsplitError, match=message) as error:
        jaxsplit.load(two[0], lora=[path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a.gguf:x", "lora=a.gguf:x is not an adapter such as"),
        ("a.gguf:nan", "lora=a.gguf:nan is not an adapter such as"),
        ("a.gguf:1e40", "with a finite scale"),
        ("a.gguf,", "lora= is not an adapter such as"),
        (
            "a.gguf,b/a.gguf",
            "lora=b/a.gguf is the second adapter named 'a'; name it as in other=b/a.gguf",
        ),
        ({"a": 1}, "must be text such as"),
        (3, "lora=3 must be text such as"),
        ([3], "lora=3 is not an adapter such as"),
        ("missing.gguf", "no such file: missing.gguf"),
    ],
)
def test_malformed_options_are_refused(two, given, message):
    with pytest.raises(JaxsplitError, match=message):
        jaxsplit.load(two[0], lora=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"c": 1}, "there is no adapter 'c'; loaded are a, bee"),
        ({"a": "1"}, r"lora\['a'\]='1' is not a number"),
        ({"a": float("inf")}, r"lora\['a'\]=inf is not a number"),
        ("a", "lora='a' must map names of adapters to scales"),
    ],
)
def test_malformed_choices_are_refused(two, given, message):
    with pytest.raises(JaxsplitError, match=message):
        two[-1].submit(PROMPT, lora=given)


def test_choices_without_adapters_are_refused(two, load):
    lm = load(two[0], split_mode="none")
    with pytest.raises(JaxsplitError, match="there is no adapter 'a'; none is loaded"):
        lm.submit(PROMPT, lora={"a": 1})
    assert lm.submit(PROMPT, 2, lora={}, **GREEDY).result().text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("dir/poet.gguf", [("poet", "dir/poet.gguf", 1.0)]),
        ("x=poet.gguf:-0.5,b.gguf:2", [("x", "poet.gguf", -0.5), ("b", "b.gguf", 2.0)]),
        ("./lr=1e-4/a.gguf", [("a", "lr=1e-4/a.gguf", 1.0)]),
        (["a,b.gguf:1e-3"], [("a,b", "a,b.gguf", 1e-3)]),
    ],
)
def test_entries(given, expected):
    assert [(n, str(p), s) for n, p, s in parse_adapters(given)] == expected


# Server


def test_the_server_chooses_adapters(two, expected):
    _, (a, _), (b, _), lm = two
    with serving(lm) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/lora-adapters").json() == [
            {"id": 0, "name": "a", "path": str(a), "scale": 1.0},
            {"id": 1, "name": "bee", "path": str(b), "scale": 0.25},
        ]
        names = [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert names == ["tiny", "a", "bee"]
        assert http.get("/v1/models/bee").json()["id"] == "bee"
        body = {"prompt": PROMPT, "temperature": 0, "n_predict": COUNT}

        def text(path, **fields):
            found = http.post(path, json=body | fields).json()
            return found.get("content") or found["choices"][0]["text"]

        wanted = [lm.tokenizer.decode(tokens) for tokens, _ in expected]
        assert text("/completion") == wanted[0]
        assert text("/completion", lora=[]) == wanted[1]
        assert text("/completion", lora=[{"id": 1, "scale": 2}]) == wanted[3]
        assert text("/v1/completions", model="a") == wanted[2]
        assert text("/v1/completions", model="tiny") == wanted[0]
        refused = http.post("/completion", json=body | {"lora": [{"id": 2, "scale": 1}]})
        assert refused.status_code == 400
        assert "lora has the id 2; the server has 2 adapters" in refused.text

        def choose(*scales):
            return http.post("/lora-adapters", json=[{"id": i, "scale": x} for i, x in scales])

        assert choose((1, 2)).json() == {"success": True}
        assert [one["scale"] for one in http.get("/lora-adapters").json()] == [0, 2]
        assert text("/completion") == wanted[3]
        assert text("/v1/completions", model="a") == wanted[2]
        assert text("/completion", lora=[]) == wanted[1]
        for refused in (choose((2, 1)), choose((0, "1")), http.post("/lora-adapters", json={})):
            assert refused.status_code == 400
        assert text("/completion") == wanted[3]
        choose()
        assert text("/completion") == wanted[1]


# Prefixes


def test_each_model_has_prefixes_of_its_own():
    cache, text = PrefixCache(4, 2, 2, stateful=False), [1, 2, 3, 4, 5]
    one = cache.begin(text, "a").allocation
    cache.release(one, text)
    assert [cache.match(text, model) for model in ("a", "b", None)] == [4, 0, 0]
    other = cache.begin(text, "b").allocation  # in two pages of the first
    assert other.cached == 0
    cache.check()
    cache.release(other, text)
    assert [cache.match(text, model) for model in ("a", "b")] == [2, 4]
    cache.check()
