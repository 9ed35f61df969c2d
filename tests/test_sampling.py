"""The choice of the next token against llama.cpp's chain of samplers, written in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from tiny import fresh_rng

from jaxsplit.context import forward_context
from jaxsplit.engine import SamplingConfig
from jaxsplit.engine.sampling import (
    MAX_TOP_LOGPROBS,
    NOT_FINITE,
    SamplerParams,
    SamplerSpec,
    log_probabilities,
    penalize,
    sample,
)
from jaxsplit.errors import JaxsplitError
from jaxsplit.sharding import even
from jaxsplit.sharding.axes import AxisRules

VOCAB, DRAWS, WINDOW = 64, 4096, 8
ALL = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
PENALTIES = {"repeat_penalty": 1.7, "frequency_penalty": 0.6, "presence_penalty": -0.4}

# Compiling takes far longer here than running.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
sample_jit = jit(sample, static_argnums=4, static_argnames="vocab")


@pytest.fixture
def rng():
    return fresh_rng()


# The reference


def penalized(logits, recent, config):
    logits = np.array(logits, np.float64)
    for token in {t for t in recent if t >= 0}:
        if logits[token] > 0:
            logits[token] /= config.repeat_penalty
        else:
            logits[token] *= config.repeat_penalty
        logits[token] -= list(recent).count(token) * config.frequency_penalty
        logits[token] -= config.presence_penalty
    return logits


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def reference(logits, config, recent=()):
    """The probability of every token, and how near a token is to being kept or dropped."""
    logits = penalized(logits, recent, config)
    kept, margin = np.argsort(-logits, kind="stable"), math.inf
    if config.temperature == 0:
        kept = kept[:1]
    if config.top_k:
        kept = kept[: config.top_k]
    if config.top_p < 1:
        together = np.cumsum(softmax(logits[kept]))
        margin = min(margin, np.abs(together - config.top_p).min())
        kept = kept[: 1 + np.count_nonzero(together < config.top_p)]
    if config.min_p > 0:
        above = logits[kept] - (logits[kept[0]] + math.log(config.min_p))
        margin = min([margin, *np.abs(above[1:])])
        kept = kept[above >= 0]
    probabilities = np.zeros(len(logits))
    probabilities[kept] = softmax(logits[kept] / (config.temperature or 1))
    return probabilities, margin


def clear_logits(rng, config, recent=(), spread=3.0, vocab=VOCAB):
    """Random logits of which no token is within rounding of a threshold, and the reference."""
    while True:
        logits = rng.normal(scale=spread, size=vocab).astype(np.float32)
        expected, margin = reference(logits, config, recent)
        if margin > 1e-4:
            return logits, expected


def draw(logits, config, *, recent=(), vocab=None):
    """Choices from the same logits, at positions 0, 1, 2, ..."""
    # One window for all: without penalties it changes nothing.
    spec = dataclasses.replace(SamplerSpec.of(config, 4096), window=WINDOW)
    window = np.full(WINDOW, -1, np.int32)
    if SamplerSpec.of(config, 4096).window and len(recent):
        window[-len(recent) :] = recent
    tokens = sample_jit(
        np.broadcast_to(logits, (DRAWS, len(logits))),
        np.arange(DRAWS, dtype=np.int32),
        np.broadcast_to(window, (DRAWS, WINDOW)),
        jax.tree.map(lambda v: np.repeat(v, DRAWS), SamplerParams.of([config])),
        spec,
        vocab=vocab or len(logits),
    )
    assert (tokens.shape, tokens.dtype) == ((DRAWS,), jnp.int32)
    return np.asarray(tokens)


def random_config(rng, **fixed):
    """Any combination of the filters, and penalties half of the time."""
    config = dataclasses.replace(
        SamplingConfig(
            top_k=int(rng.choice([0, 5, 40])),
            top_p=float(rng.choice([0.0, 0.1, 0.5, 0.95, 1.0])),
            min_p=float(rng.choice([0.0, 0.02, 0.3, 1.0])),
            repeat_last_n=WINDOW,
            seed=int(rng.integers(2**32)),
        ),
        **fixed,
    )
    recent = ()
    if rng.integers(2):
        config = dataclasses.replace(config, **PENALTIES)
        # The last 8 of a text of 0 to 8 tokens, some more than once.
        recent = rng.integers(0, 12, rng.integers(0, WINDOW + 1)).tolist()
    return config, recent


# Which tokens, and how often


@pytest.mark.parametrize("case", range(8))
def test_the_tokens_that_can_be_drawn_are_those_of_the_chain(rng, case):
    for _ in range(6):
        # Hot, so that all candidates, at most 64, turn up among 4096 draws; they are chosen
        # before the temperature is applied.
        config, recent = random_config(rng, temperature=30.0)
        logits, expected = clear_logits(rng, config, recent)
        drawn = set(draw(logits, config, recent=recent).tolist())
        assert drawn == set(np.flatnonzero(expected).tolist()), config


@pytest.mark.parametrize("case", range(8))
def test_tokens_are_drawn_as_often_as_in_the_chain(rng, case):
    config, recent = random_config(rng, temperature=float(rng.uniform(0.3, 2)), top_p=0.95, min_p=0)
    logits, expected = clear_logits(rng, config, recent)
    counts = np.bincount(draw(logits, config, recent=recent), minlength=VOCAB)
    check_frequencies(counts, expected)


def test_seeds_are_as_good_as_positions(rng):
    """Draws at one position with many seeds follow the same distribution."""
    logits, expected = clear_logits(rng, ALL)
    params = SamplerParams.of([dataclasses.replace(ALL, seed=s) for s in range(DRAWS)])
    window = np.full((DRAWS, WINDOW), -1, np.int32)
    rows = np.broadcast_to(logits, (DRAWS, VOCAB))
    positions = np.full(DRAWS, 7, np.int32)
    tokens = sample_jit(rows, positions, window, params, SamplerSpec(0, WINDOW), vocab=VOCAB)
    check_frequencies(np.bincount(tokens, minlength=VOCAB), expected)


def check_frequencies(counts, expected):
    """Pearson's test, with a threshold that one run in millions exceeds by chance."""
    assert counts[expected == 0].sum() == 0
    expected = expected * counts.sum()
    common = expected >= 10
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], max(expected[~common].sum(), 1e-9))
    if expected[-1] < 10:  # too rare for the test
        assert counts[-1] < 45
        counts, expected = counts[:-1], expected[:-1]
    statistic, freedom = np.sum((counts - expected) ** 2 / expected), len(counts)
    assert statistic < freedom + 6 * math.sqrt(2 * freedom) + 15


def test_top_p_of_one_keeps_all_tokens():
    """Also those so unlikely that the others add up to 1 in float32, as in llama.cpp."""
    logits = np.where(np.arange(VOCAB) < 20, 0, -25).astype(np.float32)
    config = dataclasses.replace(ALL, temperature=1000.0)
    assert set(draw(logits, config)) == set(range(VOCAB))


@pytest.mark.parametrize("top_k", [0, 20])
def test_rounding_that_changes_the_order_changes_no_choice(rng, top_k):
    """But where a sum is as near to another: once in a million draws."""
    logits = rng.normal(size=VOCAB).astype(np.float32)
    likely = np.argsort(-logits)[5:7]
    logits[likely] = logits[likely[0]] + np.array([0, 1e-6], np.float32)
    other = logits.copy()
    other[likely] = logits[likely[::-1]]
    assert (logits != other).sum() == 2
    config = dataclasses.replace(ALL, top_k=top_k, seed=int(rng.integers(2**32)))
    first, second = draw(logits, config), draw(other, config)
    assert np.isin(likely, first).all()
    assert (first != second).sum() <= 1


def test_top_p_of_zero_keeps_one_token(rng):
    logits = rng.normal(size=VOCAB).astype(np.float32)
    config = dataclasses.replace(ALL, top_p=0.0, temperature=1000.0)
    assert set(draw(logits, config)) == {int(logits.argmax())}


def test_min_p_of_one_keeps_the_likeliest_and_its_equals():
    logits = np.zeros(VOCAB, np.float32)
    logits[[5, 40]] = 2.0
    config = dataclasses.replace(ALL, min_p=1.0, temperature=1000.0)
    assert set(draw(logits, config)) == {5, 40}


def test_tokens_with_logits_of_minus_infinity_are_never_drawn():
    logits = np.where(np.arange(VOCAB) % 3 == 0, 0, -np.inf).astype(np.float32)
    config = dataclasses.replace(ALL, temperature=1000.0)
    assert set(draw(logits, config)) == set(range(0, VOCAB, 3))


# Greedy


def test_without_temperature_the_likeliest_token_is_chosen(rng):
    logits = rng.normal(size=VOCAB).astype(np.float32)
    for others in ({}, {"top_k": 0}, {"top_k": 5, "top_p": 0.1, "min_p": 0.5}):
        config = SamplingConfig(temperature=0.0, **others)
        assert SamplerSpec.of(config, 4096).candidates == 1
        assert set(draw(logits, config)) == {int(logits.argmax())}
    config = SamplingConfig(temperature=1.0, top_k=1)
    assert set(draw(logits, config)) == {int(logits.argmax())}


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30])
def test_a_low_temperature_is_nearly_greedy(rng, temperature):
    config = dataclasses.replace(ALL, temperature=temperature)
    logits = np.float32(rng.permutation(VOCAB) / 10)
    assert set(draw(logits, config)) == {int(logits.argmax())}


def test_of_equal_logits_the_lowest_token_is_chosen():
    config = SamplingConfig(temperature=0.0)
    logits = np.zeros(VOCAB, np.float32)
    assert set(draw(logits, config)) == {0}
    logits[[60, 17, 33]] = 1
    assert set(draw(logits, config)) == {17}


def test_penalties_come_before_the_choice():
    logits = np.zeros(VOCAB, np.float32)
    logits[[3, 4]] = 2.0, 1.5
    config = SamplingConfig(temperature=0.0, repeat_penalty=2.0, repeat_last_n=WINDOW)
    assert set(draw(logits, config, recent=[9])) == {3}
    assert set(draw(logits, config, recent=[3])) == {4}
    without = dataclasses.replace(config, repeat_last_n=0)
    assert set(draw(logits, without)) == {3}


# Penalties


@pytest.mark.parametrize("offset", [0, 20, 60])
def test_penalties_are_those_of_llama_cpp(rng, offset):
    """For rows from `offset` on, as on a device that holds a part of the vocabulary."""
    slots = 5
    configs = [
        SamplingConfig(
            repeat_penalty=float(rng.uniform(0.5, 2)),
            frequency_penalty=float(rng.uniform(-1, 1)),
            presence_penalty=float(rng.uniform(-1, 1)),
        )
        for _ in range(slots)
    ]
    logits = rng.normal(size=(slots, 100)).astype(np.float32)
    logits[:, ::9] = 0
    recent = rng.integers(-1, 100, (slots, 32)).astype(np.int32)
    recent[0] = -1
    recent[1] = 21
    part = logits[:, offset : offset + 30]
    actual = jax.jit(penalize)(part, recent, SamplerParams.of(configs), offset)
    for slot, config in enumerate(configs):
        expected = penalized(logits[slot], recent[slot], config)[offset : offset + 30]
        np.testing.assert_allclose(actual[slot], expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(actual[0], part[0])


# Seeds


def test_a_choice_depends_on_seed_and_position_only(rng):
    """Not on the slot, nor on the other slots."""
    count = 32
    configs = [
        SamplingConfig(seed=int(rng.integers(2**32)), temperature=float(rng.uniform(0.5, 2)))
        for _ in range(count)
    ]
    logits = rng.normal(size=(count, VOCAB)).astype(np.float32)
    positions = rng.integers(0, 1000, count).astype(np.int32)
    window = np.zeros((count, 0), np.int32)
    spec = SamplerSpec.of(configs[0], 4096)

    def choose(order):
        params = SamplerParams.of([configs[i] for i in order])
        return np.asarray(
            sample_jit(logits[order], positions[order], window[order], params, spec, vocab=VOCAB)
        )

    tokens, order = choose(np.arange(count)), rng.permutation(count)
    assert np.array_equal(tokens[order], choose(order))
    assert choose(np.array([3])) == tokens[3]
    positions += 1
    assert not np.array_equal(tokens, choose(np.arange(count)))


def test_another_seed_gives_other_tokens(rng):
    logits = np.zeros(VOCAB, np.float32)
    seeds = (0, 1, 2**31, 2**32 - 1)
    draws = [draw(logits, dataclasses.replace(ALL, seed=seed)) for seed in seeds]
    for i, tokens in enumerate(draws):
        for others in draws[:i]:
            # Two draws of 64 tokens agree once in 64 times by chance.
            assert np.mean(tokens == others) < 0.05
    assert np.array_equal(draws[0], draw(logits, dataclasses.replace(ALL, seed=0)))


def test_any_integer_is_a_seed():
    for seed in (-1, 2**63, -(2**70)):
        draw(np.zeros(VOCAB, np.float32), dataclasses.replace(ALL, seed=seed))


# Vocabularies that are split over devices

SPECS = [(0, WINDOW), (5, 0), (1, 0), (1, WINDOW)]


@functools.cache
def sampler(devices, vocab):
    """Samples by each spec from `[slots, padded vocab]`, split over so many devices."""
    mesh = jax.make_mesh((devices,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:devices])
    rules = AxisRules({"vocab": ("tensor",)} if devices > 1 else {})

    def local(logits, positions, recent, params):
        with forward_context(rules=rules):
            return [
                sample(logits, positions, recent[:, :w], params, SamplerSpec(k, w), vocab=vocab)
                for k, w in SPECS
            ]

    specs = (PartitionSpec(None, "tensor"), *[PartitionSpec()] * 3)
    return jit(
        jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    )


# Of 9 tokens on 8 devices, two to a device, the last three hold nothing but padding.
@pytest.mark.parametrize(("devices", "vocab"), [(2, 101), (3, 101), (8, 9)])
def test_a_split_vocabulary_gives_the_same_tokens(rng, devices, vocab):
    slots = 256
    config = SamplingConfig(temperature=5.0, top_p=0.98, min_p=0.01, **PENALTIES)
    params = SamplerParams.of(
        [dataclasses.replace(config, seed=int(s)) for s in rng.integers(0, 2**32, slots)]
    )
    # Halves, so that many tokens are equally likely.
    logits = np.float32(rng.integers(-8, 9, (slots, vocab)) / 2)
    positions = rng.integers(0, 100, slots).astype(np.int32)
    recent = rng.integers(-1, vocab, (slots, WINDOW)).astype(np.int32)

    def tokens(devices):
        # Padding that would win, were it a token.
        padding = even(vocab, 1, devices).size - vocab
        padded = np.pad(logits, ((0, 0), (0, padding)), constant_values=100)
        return sampler(devices, vocab)(padded, positions, recent, params)

    for spec, split, whole in zip(SPECS, tokens(devices), tokens(1), strict=True):
        assert np.array_equal(split, whole), spec
        assert (np.asarray(split) < vocab).all(), spec
        for shard in split.addressable_shards:
            assert np.array_equal(shard.data, split), "devices disagree"
    greedy = np.asarray(tokens(devices)[SPECS.index((1, 0))])
    assert np.array_equal(greedy, logits.argmax(axis=1))


def test_padding_is_never_drawn_on_one_device(rng):
    logits = np.full(VOCAB, 100, np.float32)
    logits[:50] = rng.normal(size=50)
    for config in (dataclasses.replace(ALL, temperature=1000.0), SamplingConfig(temperature=0.0)):
        assert max(draw(logits, config, vocab=50)) < 50


# Logits that are not numbers


@pytest.mark.parametrize("devices", [1, 3])
def test_slots_whose_logits_are_not_finite_choose_no_token(rng, devices):
    """Whatever the sign bit and wherever they are; padding rows and other slots do not matter."""
    vocab, slots = 101, 8
    padding = even(vocab, 1, devices).size - vocab
    logits = rng.normal(size=(slots, vocab)).astype(np.float32)
    values = (np.nan, np.copysign(np.float32(np.nan), np.float32(-1)), np.inf)
    for slot, value in enumerate(values):
        logits[slot, rng.integers(vocab)] = value
    logits[3] = rng.choice([np.nan, np.inf], vocab)
    logits[4] = -np.inf
    only = rng.integers(vocab)
    logits[6, np.arange(vocab) != only] = -np.inf
    padded = np.pad(logits, ((0, 0), (0, padding)), constant_values=np.nan)
    config = dataclasses.replace(ALL, temperature=5.0, **PENALTIES)
    recent = rng.integers(-1, vocab, (slots, WINDOW)).astype(np.int32)
    positions, params = np.arange(slots, dtype=np.int32), SamplerParams.of([config] * slots)
    for tokens in sampler(devices, vocab)(padded, positions, recent, params):
        assert np.asarray(tokens)[:5].tolist() == [NOT_FINITE] * 5
        assert tokens[6] == only
        assert ((tokens[5:] >= 0) & (tokens[5:] < vocab)).all()


# Slots of one program


def test_a_joined_spec_chooses_what_each_slot_chooses_alone(rng):
    configs = [
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=0.0, repeat_last_n=WINDOW, **PENALTIES),
        SamplingConfig(temperature=2.0, top_k=5, top_p=1.0, min_p=0.0),
        SamplingConfig(temperature=2.0, top_k=5, repeat_last_n=3, **PENALTIES),
        SamplingConfig(temperature=2.0, top_k=40, top_p=0.7),
        SamplingConfig(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0),
        SamplingConfig(temperature=2.0, top_k=0, logit_bias={3: 4.0, 9: -math.inf}),
    ]
    count = 64 * len(configs)
    configs = [dataclasses.replace(c, seed=i) for i, c in enumerate(configs * 64)]
    logits = np.stack([clear_logits(rng, dataclasses.replace(c))[0] for c in configs])
    recent = rng.integers(0, VOCAB, (count, WINDOW)).astype(np.int32)
    positions = rng.integers(0, 100, count).astype(np.int32)

    def choose(rows, spec):
        return sample_jit(
            logits[rows],
            positions[rows],
            recent[rows, WINDOW - spec.window :],
            SamplerParams.of([configs[i] for i in rows], WINDOW),
            spec,
            vocab=VOCAB,
        )

    specs = [SamplerSpec.of(config, WINDOW) for config in configs]
    joined = SamplerSpec.join(specs)
    assert joined == SamplerSpec(0, WINDOW, bias=True)
    together = np.asarray(choose(np.arange(count), joined))
    for spec in {*specs}:
        rows = np.asarray([i for i, one in enumerate(specs) if one == spec])
        assert np.array_equal(choose(rows, spec), together[rows]), spec
    assert not (together[6::7] == 9).any()


@functools.cache
def log_probabilities_of(devices, vocab):
    """`log_probabilities` of `[slots, padded vocab]`, split over so many devices."""
    mesh = jax.make_mesh((devices,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:devices])
    rules = AxisRules({"vocab": ("tensor",)} if devices > 1 else {})

    def local(logits, tokens):
        with forward_context(rules=rules):
            return log_probabilities(logits, tokens, vocab=vocab)

    specs, out = (PartitionSpec(None, None, "tensor"), PartitionSpec()), PartitionSpec()
    return jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False))


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("vocab", [101, 9])
def test_log_probabilities_are_those_of_numpy(rng, devices, vocab):
    """In float64; alternatives in the order of their ids where they are equally likely."""
    shape = (4, 6, vocab)
    logits = rng.normal(scale=6, size=shape).astype(np.float32)
    logits[1] = np.float32(rng.integers(-8, 9, shape[1:]) / 2)
    logits[2, :, ::2] = -np.inf
    logits[3] += 50
    tokens = rng.integers(0, vocab, shape[:2]).astype(np.int32)
    padding = even(vocab, 1, devices).size - vocab
    padded = np.pad(logits, ((0, 0), (0, 0), (0, padding)), constant_values=1000)
    own, ids, values = map(np.asarray, log_probabilities_of(devices, vocab)(padded, tokens))

    exact = np.float64(logits)
    exact -= exact.max(axis=-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    order = np.argsort(-exact, axis=-1, kind="stable")[..., :MAX_TOP_LOGPROBS]
    assert np.array_equal(ids, order)
    options = {"rtol": 1e-6, "atol": 1e-5}
    np.testing.assert_allclose(values, np.take_along_axis(exact, order, axis=-1), **options)
    expected = np.take_along_axis(exact, tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(own, expected, **options)


# Refusals


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, math.nan, -math.inf)),
        ("top_k", (-1,)),
        ("top_p", (-0.01, 1.01, math.nan)),
        ("min_p", (-0.01, 1.01, math.nan)),
        ("repeat_last_n", (-2,)),
        ("repeat_penalty", (0.0, -1.0, math.nan)),
        ("frequency_penalty", (math.nan, math.inf)),
        ("presence_penalty", (math.nan, math.inf)),
    ],
)
def test_values_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(JaxsplitError, match=rf"{name}={value}") as error:
            SamplingConfig(**{name: value})
        assert "\n" not in str(error.value)


def test_the_ends_of_the_ranges_are_accepted():
    SamplingConfig(temperature=0.0, top_k=0, top_p=0.0, min_p=0.0, repeat_last_n=0)
    SamplingConfig(top_p=1.0, min_p=1.0, repeat_penalty=0.01, frequency_penalty=-2.0)
    SamplingConfig(repeat_last_n=-1, seed=-1)


def test_numbers_of_numpy_are_numbers():
    config = SamplingConfig(temperature=np.float32(0.5), top_k=np.int64(5), seed=np.uint32(7))
    assert config == SamplingConfig(temperature=0.5, top_k=5, seed=7)
    assert (type(config.top_k), type(config.temperature)) == (int, float)


def test_a_plan_compiles_penalties_only_where_there_are_some():
    assert SamplerSpec.of(SamplingConfig(repeat_last_n=64), 4096).window == 0
    for penalty in ("repeat_penalty", "frequency_penalty", "presence_penalty"):
        config = SamplingConfig(repeat_last_n=64, **{penalty: 0.5})
        assert [SamplerSpec.of(config, size).window for size in (4096, 32)] == [64, 32]
        every = dataclasses.replace(config, repeat_last_n=-1)
        assert SamplerSpec.of(every, 32).window == 32
