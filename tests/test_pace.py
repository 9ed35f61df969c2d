"""Lengths of chunks and blocks, for an engine whose times are given."""

import types

import pytest

from jaxsplit.config import SamplingConfig
from jaxsplit.engine.pace import MAX_BLOCK, Chunk, Pace, Step
from jaxsplit.engine.sampling import SamplerSpec

SAMPLER = SamplerSpec.of(SamplingConfig(temperature=0.0), 4096)


def make_pace(itl_budget=0.1, measures=True, ready=lambda *_: True):
    engine = types.SimpleNamespace(
        chunks=(32, 128, 512, 2048),
        runners=[None],
        slots_per_replica=32,
        compiled_at=0.0,
        is_ready=ready,
        ready_chunks=lambda wanted: [512, 128],
    )
    return Pace(engine, itl_budget, measures), engine


def measured(pace, work, seconds, steps=1):
    """Tells it that the next unit of work takes so long for each step."""
    start = pace._last_done + 1
    pace.done(work, steps, start, start + steps * seconds)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"alone": True}, 32),  # at most
        ({}, 20),  # 40 ms
        ({"busy": True}, 10),
        ({"alone": True, "busy": True}, 10),
        ({"beside_grammars": True}, 5),
    ],
)
def test_blocks_take_as_long_as_they_may(options, steps):
    pace, _ = make_pace()
    options = {"alone": False, "busy": False, "beside_grammars": False} | options
    assert pace.block(4, SAMPLER, **options) < steps  # their speed is not known yet
    measured(pace, Step.of(4, SAMPLER), 0.00199, steps=8)
    assert pace.block(4, SAMPLER, **options) == steps
    assert pace.block(3, SAMPLER, **options) == steps  # by the same program
    assert pace.block(8, SAMPLER, **options) < steps


def test_the_least_time_counts_and_compilation_does_not():
    pace, engine = make_pace()

    def steps():
        return pace.block(1, SAMPLER, alone=False, busy=False, beside_grammars=False)

    for seconds in (0.0099, 0.004, 0.0095):
        measured(pace, Step.of(1, SAMPLER), seconds)
    assert steps() == int(0.04 / (1.05 * 0.004))
    for _ in range(30):  # which is forgotten slowly
        measured(pace, Step.of(1, SAMPLER), 0.0095)
    assert steps() == 4
    engine.compiled_at = pace._last_done + 2
    measured(pace, Step.of(1, SAMPLER), 0.0001)
    assert steps() == 4


@pytest.mark.parametrize(
    ("seconds", "decoding", "length"),
    [(0.05, True, 512), (0.05, False, 2048), (0.03, True, 2048), (1.0, True, 32)],
)
def test_a_chunk_delays_others_by_no_more_than_the_budget(seconds, decoding, length):
    pace, _ = make_pace()
    assert pace.chunk(5000, "last", decoding=True) <= 512  # nothing is known yet
    measured(pace, Chunk(1, 512, "last"), seconds)
    assert pace.chunk(5000, "last", decoding=decoding) == length


def test_chunks_whose_logits_are_wanted_are_short():
    pace, _ = make_pace()
    assert pace.chunk(5000, "logits", decoding=False) == 512


def test_as_many_prompts_are_read_together_as_pay():
    pace, engine = make_pace()
    assert pace.rows(1, 128, decoding=False) == 1
    assert pace.rows(3, 128, decoding=False) == 4
    assert pace.rows(16, 128, decoding=False) == 16  # 2048 tokens, the longest chunk
    assert pace.rows(16, 512, decoding=False) == 4
    assert pace.rows(16, 128, decoding=True) == 4  # at most 512 tokens, until times are known
    engine.slots_per_replica = 8
    assert pace.rows(16, 32, decoding=False) == 4


def test_prompts_wait_for_others_only_where_many_come(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    pace, _ = make_pace()
    assert not pace.waits_for_more(32, now)
    for _ in range(40):
        now += 0.01
        pace.arrived()
    assert pace.waits_for_more(32, now - 0.05)
    assert not pace.waits_for_more(32, now - 0.11)  # the oldest has waited long enough
    assert not pace.waits_for_more(600, now)  # worth a chunk of their own


def test_while_a_program_is_compiled_another_one_runs():
    pace, _ = make_pace(ready=lambda rows, length, *_: (rows, length) == (4, 128))
    assert pace.compiled(Chunk(4, 128, "last"), SAMPLER, 100) == (4, 128, "last")
    assert pace.compiled(Chunk(16, 128, "last"), SAMPLER, 100) == (1, 128, "last")
    assert pace.compiled(Chunk(16, 128, "last"), SAMPLER, 300) == (1, 512, "last")
    assert pace.compiled(Chunk(1, 2048, "last"), SAMPLER, 5000) == (1, 512, "last")


def test_without_measuring_lengths_are_fixed():
    pace, _ = make_pace(measures=False, ready=lambda *_: False)
    measured(pace, Step.of(1, SAMPLER), 1.0)
    measured(pace, Chunk(1, 512, "last"), 10.0)
    assert pace.block(1, SAMPLER, alone=True, busy=False, beside_grammars=False) == MAX_BLOCK // 4
    assert pace.chunk(5000, "last", decoding=True) == 512
    assert pace.compiled(Chunk(16, 128, "last"), SAMPLER, 9) == (16, 128, "last")
