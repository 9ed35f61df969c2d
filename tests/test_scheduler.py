"""Requests that run together: each has the tokens and log-probabilities that it has alone."""

import dataclasses
import functools
import itertools
import shutil
import zlib

import gguf
import jax
import numpy as np
import pytest
from helpers import FEW_LAYERS, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsplit.engine import Engine, Request, RequestSpec, SamplingConfig, Scheduler, scheduler
from jaxsplit.errors import JaxsplitError

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTEXT, PAGE, SLOTS, VOCAB, LOGPROBS = 64, 8, 4, 160, 3
GREEDY = SamplingConfig(temperature=0.0, logprobs=LOGPROBS)
ATOL = 1e-5
"""Of most log-probabilities, together and alone."""

ROUNDING = 3e-4
"""Of all, and of those of a model without cache: sums in float32 in another order."""

MESHES = {
    "none": {"split_mode": "none"},
    "graph:3": {"split_mode": "graph", "devices": 3},
    "stage:2,tensor:2": {"mesh": "stage:2,tensor:2"},
    "data:2,tensor:2": {"mesh": "data:2,tensor:2"},
}
TEXT = np.random.default_rng(0).integers(0, VOCAB, CONTEXT).tolist()
# Plain, windows, recurrent states of three kinds, latent attention, and mixtures.
NAMES = ("llama", "gemma3", "qwen35", "granitehybrid", "lfm2", "deepseek2", "qwen3moe")


class Player:
    """Hands requests to a scheduler, and takes what comes.

    Args:
      engine: whose sequences are dropped first.
    """

    def __init__(self, engine):
        engine.reset()
        self.scheduler = Scheduler(engine, measures=False)
        self.news, self._numbers = {}, itertools.count()

    def submit(self, spec):
        request = Request(spec, next(self._numbers), lambda one: self.scheduler.cancel(one.id))
        self.news[request] = []
        self.scheduler.check(spec)
        self.scheduler.add(request)
        return request

    def step(self):
        self.scheduler.step()
        self.scheduler.check_pages()
        for request, news in self.news.items():
            while not request._news.empty():
                news.append(request._news.get())

    def run(self):
        for _ in range(3000):
            if self.scheduler.idle:
                break
            self.step()
        self.step()
        assert self.scheduler.idle
        statistics = self.scheduler.statistics
        assert (statistics.waiting, statistics.running) == (0, 0)
        assert statistics.free_pages + statistics.cached_pages == statistics.pages
        assert statistics.counters.finished == len(self.news)

    def result(self, request):
        return Result.of(request, self.news[request])


@dataclasses.dataclass(frozen=True)
class Result:
    """What has come of a request."""

    tokens: list
    logprobs: list
    prompt_logprobs: list
    reason: str | None
    error: BaseException | None

    @classmethod
    def of(cls, request, news):
        assert [one.last for one in news] == [False] * (len(news) - 1) + [True]
        logprobs = [x for one in news for x in one.logprobs]
        tokens = [x for one in news for x in one.tokens]
        assert tokens == request.tokens
        last = news[-1]
        return cls(tokens, logprobs, request.prompt_logprobs, last.finish_reason, last.error)

    def check(self, alone):
        """Compares it with what the request has alone, or how that begins if it was cancelled;
        returns how far log-probabilities differ."""
        assert self.error is None
        if self.reason in ("cancelled", "deadline"):
            alone = dataclasses.replace(
                alone,
                tokens=alone.tokens[: len(self.tokens)],
                logprobs=alone.logprobs[: len(self.tokens)],
                prompt_logprobs=alone.prompt_logprobs[: len(self.prompt_logprobs)],
                reason=self.reason,
            )
        assert (self.tokens, self.reason) == (alone.tokens, alone.reason)
        found, expected = ([*one.logprobs, *one.prompt_logprobs] for one in (self, alone))
        assert [entry.token for entry in found] == [entry.token for entry in expected]
        values = [
            np.asarray([x for e in entries for x in (e.logprob, *(v for _, v in e.top))])
            for entries in (found, expected)
        ]
        np.testing.assert_allclose(*values, rtol=0, atol=ROUNDING)
        return np.abs(values[0] - values[1])


class Model:
    """An engine with a small cache, and what requests have alone."""

    def __init__(self, lm, reference, *, pages, checkpoints=2):
        policy = lm.engine.runners[0].policy
        self.engine = Engine(
            lm.models,
            lm.engine.partition,
            context=CONTEXT,
            cache_dtype=np.dtype("float32"),
            slots=SLOTS,
            cache_tokens=pages * PAGE,
            checkpoints=checkpoints,
            page=PAGE,
            vocab=lm.engine.vocab,
            chunks=(8, 32),
            policy=policy,
        )
        self._forward = quick_jit(lambda tokens: reference.model(tokens)[0])
        self._alone = {}

    def log_probabilities(self, tokens):
        """Float64 `[time, vocab]` of a model without cache, from logits in float32."""
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = np.asarray(self._forward(padded)[0], np.float64)[: len(tokens)]
        largest = logits.max(axis=-1, keepdims=True)
        return logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))

    def alone(self, spec):
        """What a request has alone, in an empty cache."""
        key = dataclasses.replace(spec, prompt=tuple(spec.prompt), priority=0)
        if key not in self._alone:
            player = Player(self.engine)
            request = player.submit(spec)
            player.run()
            self._alone[key] = player.result(request)
            self.check_reference(spec, self._alone[key])
        return self._alone[key]

    def check_reference(self, spec, result):
        tokens = [*spec.prompt, *result.tokens]  # the last one may have no embedding
        expected = self.log_probabilities(tokens[:-1])
        entries = [(len(spec.prompt) - 1 + i, x) for i, x in enumerate(result.logprobs)]
        entries += [*enumerate(result.prompt_logprobs)]
        assert len(result.prompt_logprobs) == (len(spec.prompt) - 1) * spec.prompt_logprobs
        for at, entry in entries:
            assert entry.token == tokens[at + 1]
            np.testing.assert_allclose(
                entry.logprob, expected[at, entry.token], rtol=0, atol=ROUNDING
            )
            for rank, (token, value) in enumerate(entry.top):
                np.testing.assert_allclose(value, expected[at, token], rtol=0, atol=ROUNDING)
                best = np.sort(expected[at])[::-1][rank]
                np.testing.assert_allclose(value, best, rtol=0, atol=ROUNDING)
        if spec.sampling == GREEDY:
            for i, token in enumerate(result.tokens):
                row = expected[len(spec.prompt) - 1 + i]
                assert row[token] >= row.max() - ROUNDING


def random_spec(rng, base, *, rich=True):
    """A request whose prompt may begin as others do."""
    shared = base[: rng.choice([0, 5, 18, 18, 18, 34, 60])]
    own = rng.integers(0, VOCAB, rng.integers(0, 12)).tolist()
    prompt = [*shared, *own][:CONTEXT] or [int(rng.integers(VOCAB))]
    sampling = GREEDY
    if rich and rng.random() < 0.5:
        sampling = SamplingConfig(
            temperature=float(rng.uniform(0.3, 1.5)),
            top_k=int(rng.choice([0, 70])),
            top_p=float(rng.choice([0.7, 0.95, 1.0])),
            repeat_penalty=float(rng.uniform(1.05, 1.5)),
            presence_penalty=float(rng.uniform(0, 1)),
            repeat_last_n=int(rng.choice([3, 20, 64, -1])),
            logit_bias={int(token): 2.0 for token in rng.integers(0, VOCAB, 3)},
            logprobs=int(rng.integers(0, LOGPROBS + 1)),
            seed=int(rng.integers(2**32)),
        )
    return RequestSpec(
        prompt,
        sampling,
        max_tokens=float("inf") if rng.random() < 0.2 else int(rng.integers(0, CONTEXT)),
        stop_ids=tuple(rng.integers(0, VOCAB, rng.choice([0, 4, 20])).tolist()),
        priority=int(rng.integers(0, 2)),
        prompt_logprobs=bool(rng.random() < 0.15),
        share_prefix=bool(rng.random() < 0.9),
    )


def play(model, specs, rng, *, cancels=0.03):
    """Runs requests that arrive at random and may be cancelled; checks all."""
    player, waiting, running = Player(model.engine), [*specs], {}
    while waiting or not player.scheduler.idle:
        what = rng.random()
        if waiting and what < 0.35:
            spec = waiting.pop()
            running[player.submit(spec)] = spec
        elif running and what < 0.35 + cancels:
            [*running][rng.integers(len(running))].cancel()
        else:
            player.step()
        assert len(player.scheduler._units) <= 1 + len(model.engine.runners)
    player.run()
    results = [(spec, player.result(request)) for request, spec in running.items()]
    counters = player.scheduler.counters
    differences = [result.check(model.alone(spec)) for spec, result in results]
    assert np.quantile(np.concatenate(differences), 0.9) <= ATOL
    return counters


@functools.cache
def seed_of(*names):
    return zlib.crc32(repr(names).encode())


@pytest.fixture(scope="module")
def model(load, recipe_gguf):
    """`model(name, mesh, loops)`: made once. With `loops`, devices decode by themselves."""

    @functools.lru_cache(maxsize=3)  # each program takes memory maps
    def make(name, mesh, *, loops=False):
        path = recipe_gguf(FEW_LAYERS.get(name, name))
        reference = load(path, ctx_size=CONTEXT, **MESHES["none"])
        found = Model(load(path, ctx_size=CONTEXT, **MESHES[mesh]), reference, pages=10)
        found.engine.loops = loops
        return found

    return make


def check_together(model, name, mesh, monkeypatch, count=16, **options):
    monkeypatch.setattr(scheduler, "_RESERVE", PAGE)
    rng = np.random.default_rng(seed_of(name, mesh))
    base = rng.integers(0, VOCAB, CONTEXT).tolist()
    found, specs = model(name, mesh, **options), [random_spec(rng, base) for _ in range(count)]
    counters = play(found, specs, rng)
    assert counters.preemptions
    assert counters.cached_tokens


# Every kind of layer, and every mesh; all pairs are in `test_every_kind_of_layer_on_every_mesh`.
PLACES = [
    *((name, "none") for name in ("llama", "lfm2", "deepseek2", "qwen3moe")),
    ("llama", "stage:2,tensor:2"),
    ("gemma3", "graph:3"),
    ("qwen35", "stage:2,tensor:2"),
    ("granitehybrid", "data:2,tensor:2"),
]


@pytest.mark.parametrize(("name", "mesh"), PLACES)
def test_requests_together_have_what_they_have_alone(model, name, mesh, monkeypatch):
    check_together(model, name, mesh, monkeypatch)


@pytest.mark.parametrize("mesh", ["none", "data:2,tensor:2"])
def test_devices_that_decode_by_themselves(model, mesh, monkeypatch):
    check_together(model, "llama", mesh, monkeypatch, loops=True)


@pytest.mark.full
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer_on_every_mesh(model, name, mesh, monkeypatch):
    check_together(model, name, mesh, monkeypatch, count=60)


RICH = SamplingConfig(
    temperature=1.0, top_k=0, repeat_penalty=1.2, logit_bias={3: 2.0}, logprobs=1, seed=11
)
REQUESTS = st.builds(
    lambda cut, own, **options: RequestSpec([*TEXT[:cut], *own], **options),
    st.sampled_from([1, 5, 8, 17, 40, 61]),
    st.lists(st.integers(0, 1), max_size=3),
    sampling=st.sampled_from([GREEDY, RICH]),
    max_tokens=st.sampled_from([0, 1, 9, 30, float("inf")]),
    priority=st.integers(0, 1),
    prompt_logprobs=st.sampled_from([False, False, False, True]),
    share_prefix=st.sampled_from([True, True, False]),
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), REQUESTS),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("step"), st.integers(1, 8)),
    ),
    min_size=1,
    max_size=24,
)


@pytest.mark.parametrize("name", ["llama", "qwen35"])
def test_any_schedule_gives_what_requests_have_alone(model, name, monkeypatch):
    monkeypatch.setattr(scheduler, "_RESERVE", PAGE)
    found = model(name, "none")

    @settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @given(ACTIONS)
    def check(actions):
        player, running = Player(found.engine), {}
        for what, value in actions:
            if what == "submit":
                running[player.submit(value)] = value
            elif what == "cancel" and running:
                [*running][value % len(running)].cancel()
            elif what == "step":
                for _ in range(value):
                    player.step()
        player.run()
        results = {request: player.result(request) for request in running}
        for request, spec in running.items():
            results[request].check(found.alone(spec))

    check()


def test_what_can_never_fit_is_refused_with_the_numbers(load, recipe_gguf):
    """Before it is queued; logits need room for the prompt only."""
    lm = load(recipe_gguf("llama"), ctx_size=CONTEXT, **MESHES["none"])
    small = Scheduler(Model(lm, lm, pages=4).engine)
    small.check(RequestSpec([1] * 20, max_tokens=13))
    small.check(RequestSpec([1] * 32, max_tokens=0))
    small.check(RequestSpec([1] * 32, outputs="logits"))
    for prompt, most, message in (
        (20, 14, "20 tokens and may generate 13; the cache has room for 32: .* cache_tokens"),
        (20, float("inf"), "20 tokens and may generate 44; the cache has room for 32"),
        (33, 0, "33 tokens"),
    ):
        with pytest.raises(JaxsplitError, match=message):
            small.check(RequestSpec([1] * prompt, max_tokens=most))


def test_samplers_of_all_kinds_together(model):
    """Each as alone, though one program chooses the tokens of all."""
    found, rng = model("llama", "none"), np.random.default_rng(1)
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repeat_penalty": 1.3, "repeat_last_n": 7},
        {"temperature": 1.5, "top_k": 5, "seed": 3},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.1, "seed": 4},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 5},
        {"temperature": 1.0, "top_k": 5, "presence_penalty": 1.0, "seed": 6},
        {"temperature": 0.0, "logit_bias": {7: 100.0, 9: -float("inf")}},
        {"temperature": 1.0, "seed": 8, "logprobs": 0},
    ]
    specs = [
        RequestSpec(
            rng.integers(0, VOCAB, rng.integers(1, 20)).tolist(),
            SamplingConfig(**kind),
            max_tokens=int(rng.integers(1, 20)),
        )
        for kind in kinds * 2
    ]
    play(found, specs, rng, cancels=0.0)
    (biased,) = {found.alone(s).tokens[0] for s in specs if s.sampling.logit_bias}
    assert biased == 7


@pytest.mark.parametrize("options", [{"outputs": "logits"}, {"prompt_logprobs": True}], ids=str)
def test_a_preempted_request_has_the_details_of_its_prompt_once(model, monkeypatch, options):
    """The cache has 10 pages; the older one needs 8, the younger one 6 and then more."""
    found, rng = model("llama", "none"), np.random.default_rng(4)
    monkeypatch.setattr(found.engine, "chunks", (8,))
    monkeypatch.setattr(scheduler, "_RESERVE", PAGE)
    older = RequestSpec(rng.integers(0, VOCAB, 10).tolist(), GREEDY)
    younger = RequestSpec(rng.integers(0, VOCAB, 47).tolist(), GREEDY, **options)
    expected = None if younger.reads_only else found.alone(younger)
    player = Player(found.engine)
    requests = [player.submit(older), player.submit(younger)]
    player.run()
    assert player.scheduler.counters.preemptions
    player.result(requests[0]).check(found.alone(older))
    if expected is not None:
        player.result(requests[1]).check(expected)
        return
    logits = np.asarray(requests[1].outputs, np.float64)
    assert logits.shape == (47, len(found.log_probabilities(younger.prompt)[0]))
    log_sums = np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(
        logits - log_sums, found.log_probabilities(younger.prompt), rtol=0, atol=ROUNDING
    )


# Failures


def broken_model(load, recipe_gguf, tmp_path, name, token):
    """A model in which the embedding of a token is not a number."""
    path = shutil.copy(recipe_gguf(FEW_LAYERS.get(name, name)), tmp_path / f"{name}.gguf")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.name == "token_embd.weight").data[token] = np.nan
    reader.data.flush()
    lm = load(path, ctx_size=CONTEXT, **MESHES["none"])
    return Model(lm, lm, pages=10)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen35", "deepseek2", "qwen3moe"])
def test_a_request_whose_logits_are_not_finite_harms_no_other(load, recipe_gguf, tmp_path, name):
    rng, bad = np.random.default_rng(2), 100
    found = broken_model(load, recipe_gguf, tmp_path, name, bad)
    texts = [rng.integers(0, bad, rng.integers(1, 40)).tolist() for _ in range(6)]
    good = [RequestSpec(text, GREEDY, max_tokens=8, stop_ids=range(bad, VOCAB)) for text in texts]
    spoiled = [[*text[:20], bad, *text[20:30]] for text in texts[:4]]
    expected = [found.alone(spec) for spec in good]
    player = Player(found.engine)
    failing, running = [], []
    # What a prompt that was not read to its end has left is not trusted.
    begun = player.submit(RequestSpec(spoiled[0], GREEDY))
    player.step()
    begun.cancel()
    for i, spec in enumerate(good):
        if i < len(spoiled):
            failing.append(player.submit(RequestSpec(spoiled[i], GREEDY, max_tokens=8)))
        running.append(player.submit(spec))
        for _ in range(3):
            player.step()
    player.run()
    for request in failing:
        with pytest.raises(JaxsplitError, match=rf"not finite after {len(request.spec.prompt)} t"):
            raise player.result(request).error
    for request, alone in zip(running, expected, strict=True):
        player.result(request).check(alone)


def failing_once(monkeypatch, target, name):
    """Makes the next call of a method fail as when a device's memory is full."""
    original, error = getattr(target, name), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    def fail(*_, **__):
        monkeypatch.setattr(target, name, original)
        raise error

    monkeypatch.setattr(target, name, fail)
    return error


@pytest.mark.parametrize("what", ["assign", "copy", "read_prompts", "decode", "fetch", "reset"])
def test_a_failure_ends_the_requests_that_it_concerns(model, monkeypatch, what):
    """The others begin again; if the cache cannot be allocated, all end, and later ones run."""
    monkeypatch.setattr(scheduler, "_RESERVE", PAGE)
    found, rng = model("llama", "none"), np.random.default_rng(3)
    texts = [rng.integers(0, VOCAB, 12).tolist() for _ in range(3)]
    texts.append([*texts[2], 5, 6, 7])
    specs = [RequestSpec(text, GREEDY, max_tokens=12) for text in texts]
    expected = {id(spec): found.alone(spec) for spec in specs}
    player = Player(found.engine)
    player.submit(dataclasses.replace(specs[2], max_tokens=1))
    player.run()
    first = [player.submit(spec) for spec in specs[:2]]
    while not all(request.tokens for request in first):
        player.step()
    if what == "reset":
        error = failing_once(monkeypatch, found.engine, "reset")
        failing_once(monkeypatch, found.engine, "decode")
    else:
        error = failing_once(monkeypatch, found.engine, what)
    requests = [*first, *(player.submit(spec) for spec in specs[2:])]
    player.run()
    failed = []
    for request, spec in zip(requests, specs, strict=True):
        result = player.result(request)
        if result.error is None:
            result.check(expected[id(spec)])
        else:
            assert result.error is error
            failed.append(request)
    assert failed
    if what in ("assign", "copy", "read_prompts"):
        assert len(failed) == 1 or what == "read_prompts"
        assert not {*failed} & {*first}
    later = player.submit(specs[0])
    player.run()
    if what == "reset":
        later = player.submit(specs[0])
        player.run()
    player.result(later).check(found.alone(specs[0]))
