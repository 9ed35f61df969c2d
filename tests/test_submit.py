"""`LM.submit`: what a request ends with, its log-probabilities, and how it is cancelled."""

import asyncio
import gc
import threading
import time

import numpy as np
import pytest
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.errors import JaxsplitError

pytestmark = pytest.mark.usefixtures("quick_compilation")

GREEDY = {"temperature": 0.0}
PROMPT, COUNT = "Tell the", 24


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = write_tiny_model(tmp_path_factory.mktemp("submit") / "tiny.gguf")
    return jaxsplit.load(path, split_mode="none", dtype="float32", slots=3)


@pytest.fixture(scope="module")
def whole(lm):
    """The text of the prompt, alone."""
    return lm.submit(PROMPT, COUNT, **GREEDY).result()


@pytest.fixture(autouse=True)
def _nothing_is_left(lm):
    """Whatever a test does, in the end all is free, or kept for later prompts."""
    yield
    for _ in range(200):
        found = lm.statistics
        if not (found.running or found.waiting):
            break
        time.sleep(0.05)
    assert (found.running, found.waiting) == (0, 0)
    assert found.free_pages + found.cached_pages == found.pages
    lm._thread.run(lambda scheduler: scheduler.check_pages())


class Gate:
    """Holds the engine's thread before each unit of work of some kind, until it is let through."""

    def __init__(self, monkeypatch, lm, name):
        self.waits, self._open = threading.Event(), threading.Event()
        original = getattr(lm.engine, name)

        def held(*arguments, **options):
            self.waits.set()
            assert self._open.wait(60)
            return original(*arguments, **options)

        monkeypatch.setattr(lm.engine, name, held)

    def open(self):
        self._open.set()


# Log-probabilities


def log_softmax(logits):
    logits = np.float64(logits)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check_entry(entry, expected, count):
    np.testing.assert_allclose(entry.logprob, expected[entry.token], rtol=0, atol=1e-4)
    assert len(entry.top) == count
    for rank, (token, value) in enumerate(entry.top):
        np.testing.assert_allclose(value, expected[token], rtol=0, atol=1e-4)
        np.testing.assert_allclose(value, np.sort(expected)[::-1][rank], rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 33, 100])
def test_log_probabilities_are_those_of_the_logits(lm, length):
    """Before penalties, biases and temperature."""
    prompt = fresh_rng().integers(0, 200, length).tolist()
    options = {"temperature": 1.5, "repeat_penalty": 1.5, "logit_bias": {65: 3.0}, "seed": 5}
    found = lm.submit(prompt, 12, logprobs=4, prompt_logprobs=True, ignore_eos=True, **options)
    events = list(found)
    entries = [entry for event in events for entry in event.logprobs]
    tokens = [token for event in events for token in event.tokens]
    assert [entry.token for entry in entries] == tokens == found.request.tokens
    assert len(tokens) == 12
    expected = log_softmax(lm.logits([*prompt, *tokens]))
    for i, entry in enumerate(entries):
        check_entry(entry, expected[length - 1 + i], 4)
    of_prompt = found.request.prompt_logprobs
    assert [entry.token for entry in of_prompt] == prompt[1:]
    for i, entry in enumerate(of_prompt):
        check_entry(entry, expected[i], 4)


def test_log_probabilities_of_a_prompt_only(lm):
    found = lm.submit(list(range(10)), 0, prompt_logprobs=True, logprobs=0)
    (event,) = found
    assert (event.text, [*event.tokens], event.finish_reason) == ("", [], "length")
    expected = log_softmax(lm.logits(list(range(10))))
    for i, entry in enumerate(found.request.prompt_logprobs):
        check_entry(entry, expected[i], 0)
    assert len(found.request.prompt_logprobs) == 9


def test_without_options_there_are_no_log_probabilities(lm):
    found = lm.submit(PROMPT, 3, **GREEDY)
    assert not any(event.logprobs for event in found)
    assert found.request.prompt_logprobs == []


# How it ends


def test_the_reason_is_what_ended_it(lm, whole):
    assert whole.finish_reason == "length"
    token = whole.request.tokens[7]
    end = whole.request.tokens.index(token)
    stopped = lm.submit(PROMPT, COUNT, stop_ids=[token], **GREEDY).result()
    assert (stopped.finish_reason, stopped.request.tokens) == (
        "stop",
        whole.request.tokens[: end + 1],
    )
    assert whole.text.startswith(stopped.text)
    full = lm.submit([5] * 250, ignore_eos=True, **GREEDY).result()
    assert (full.finish_reason, len(full.request.tokens)) == ("context", 7)
    none = lm.submit(PROMPT, 0, **GREEDY).result()
    assert (none.finish_reason, none.text, none.request.tokens) == ("length", "", [])


def test_the_end_of_text_may_be_ignored(tmp_path):
    """A model that always says the end of the text."""
    embedding = np.ones((263, 64), np.float32)
    head = np.zeros((263, 64), np.float32)
    head[260] = 1  # <|endoftext|>
    tensors = {"token_embd.weight": embedding, "output.weight": head}
    lm = jaxsplit.load(write_tiny_model(tmp_path / "end.gguf", tensors=tensors), ctx_size=64)
    found = lm.submit([1, 2], 5, **GREEDY).result()
    assert (found.finish_reason, found.request.tokens) == ("stop", [260])
    found = lm.submit([1, 2], 5, ignore_eos=True, **GREEDY).result()
    assert (found.finish_reason, found.request.tokens) == ("length", [260] * 5)
    found = lm.submit([1, 2], 5, ignore_eos=True, stop_ids=[260], **GREEDY).result()
    assert (found.finish_reason, found.request.tokens) == ("stop", [260])


@pytest.mark.parametrize("block", [1, 2, 5, None])
def test_stop_strings_across_blocks(lm, whole, block):
    for start in range(1, len(whole.text) - 4):
        stop = whole.text[start : start + 4]
        end = whole.text.index(stop)
        found = lm.submit(PROMPT, COUNT, stop=["never", stop], block=block, **GREEDY)
        texts = [event.text for event in found]
        assert "".join(texts) == found.text == whole.text[:end]
        assert (found.finish_reason, found.stop_string) == ("stop", stop)


def test_more_stop_ids_than_the_devices_look_for(lm, whole):
    token = whole.request.tokens[9]
    others = [i for i in range(100, 256) if i not in whole.request.tokens][:30]
    found = lm.submit(PROMPT, COUNT, stop_ids=[*others, token], **GREEDY).result()
    end = whole.request.tokens.index(token)
    assert found.request.tokens == whole.request.tokens[: end + 1]
    assert lm.submit(PROMPT, COUNT, **GREEDY).result().text == whole.text


def test_events_that_are_awaited(lm, whole):
    async def one():
        events = [event async for event in lm.submit(PROMPT, COUNT, block=3, **GREEDY)]
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert len(events) > 3
        return "".join(event.text for event in events)

    async def several():
        return await asyncio.gather(*(one() for _ in range(5)))

    assert asyncio.run(several()) == [whole.text] * 5


def test_a_failure_is_raised_once_and_then_nothing_follows(lm, monkeypatch):
    error = RuntimeError("broken")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(lm.engine, "read_prompts", fail)
    found = lm.submit(PROMPT, COUNT, **GREEDY)
    with pytest.raises(RuntimeError, match="broken"):
        found.result()
    assert found.finish_reason == "error"
    assert [*found] == []
    assert found.result() is found

    async def awaited():
        other = lm.submit(PROMPT, COUNT, **GREEDY)
        with pytest.raises(RuntimeError, match="broken"):
            [event async for event in other]
        assert [event async for event in other] == []

    asyncio.run(awaited())


# Cancelling


def test_a_request_that_waits_is_cancelled(lm, monkeypatch, whole):
    gate = Gate(monkeypatch, lm, "read_prompts")
    running = lm.submit(PROMPT, COUNT, **GREEDY)
    assert gate.waits.wait(60)
    waiting = [lm.submit([i, i], 5, **GREEDY) for i in range(4)]
    for one in waiting:
        one.cancel()
        one.cancel()
    gate.open()
    assert [one.result().finish_reason for one in waiting] == ["cancelled"] * 4
    assert [one.request.tokens for one in waiting] == [[]] * 4
    assert running.result().text == whole.text


def test_a_request_whose_prompt_is_read_is_cancelled(lm, monkeypatch, whole):
    monkeypatch.setattr(lm.engine, "chunks", (8,))
    gate = Gate(monkeypatch, lm, "read_prompts")
    found = lm.submit([7] * 200, COUNT, **GREEDY)
    assert gate.waits.wait(60)
    found.cancel()
    gate.open()
    assert found.result().finish_reason == "cancelled"
    assert found.text == ""
    assert lm.submit(PROMPT, COUNT, **GREEDY).result().text == whole.text


def test_a_request_that_decodes_is_cancelled(lm, whole):
    found, text = lm.submit(PROMPT, COUNT, block=1, **GREEDY), ""
    for event in found:
        text += event.text
        if len(text) >= 5:
            found.cancel()
    assert found.finish_reason in ("cancelled", "length")
    assert whole.text.startswith(text)
    assert found.text == text


def test_cancelling_what_has_ended_changes_nothing(lm, whole):
    found = lm.submit(PROMPT, COUNT, **GREEDY).result()
    found.cancel()
    assert (found.finish_reason, found.text) == ("length", whole.text)
    assert [*found] == []


def test_a_generation_that_is_dropped_is_cancelled(lm):
    finished = lm.statistics.counters.generated_tokens
    for _ in range(6):
        next(iter(lm.submit([3, 4], ignore_eos=True, block=1, **GREEDY)))
    gc.collect()
    for _ in range(200):
        if not lm.statistics.running:
            break
        time.sleep(0.05)
    assert lm.statistics.counters.generated_tokens - finished < 6 * 250


def test_a_deadline_ends_a_request_that_waits_or_decodes(lm, monkeypatch):
    gate = Gate(monkeypatch, lm, "decode")
    running = lm.submit([9] * 10, ignore_eos=True, timeout=0.3, **GREEDY)
    waiting = [lm.submit([9] * 10, ignore_eos=True, timeout=0.3, **GREEDY) for _ in range(4)]
    assert gate.waits.wait(60)
    time.sleep(0.3)
    gate.open()
    assert running.result().finish_reason == "deadline"
    assert {one.result().finish_reason for one in waiting} == {"deadline"}


# Order


def test_a_higher_priority_goes_first(lm, monkeypatch):
    gate = Gate(monkeypatch, lm, "read_prompts")
    first = [lm.submit([1, 2, 3], 2, **GREEDY)]
    assert gate.waits.wait(60)
    first += [lm.submit([1, 2, i], 2, **GREEDY) for i in range(2)]  # as many as slots
    low = [lm.submit([2, i], 4, ignore_eos=True, **GREEDY) for i in range(5)]
    high = [lm.submit([3, i], 4, ignore_eos=True, priority=1, **GREEDY) for i in range(3)]
    gate.open()
    for one in (*first, *low, *high):
        one.result()
    started = [[one.request.timings.started for one in some] for some in (high, low)]
    assert max(started[0][:2]) < min(started[1])
    assert sorted(started[1]) == started[1]


def test_what_can_never_fit_is_refused_with_the_numbers(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    lm = jaxsplit.load(path, split_mode="none", ctx_size=64, slots=2)
    pages = lm.engine.size.pages * lm.engine.size.page
    assert pages >= 64
    with pytest.raises(JaxsplitError, match="the prompt has 65 tokens, the context 64"):
        lm.submit([1] * 65)
    with pytest.raises(JaxsplitError, match="the prompt has 65 tokens, the context 64"):
        lm.logits([1] * 65)


# Statistics and timings


def test_statistics_add_up(lm):
    before = lm.statistics.counters
    prompts = [[60, 61, 62, *range(i)] for i in range(8)]
    found = [lm.submit(prompt, 4, ignore_eos=True, **GREEDY) for prompt in prompts]
    for one in found:
        one.result()
    after = lm.statistics.counters
    assert after.finished - before.finished == 8
    assert after.generated_tokens - before.generated_tokens == 32
    assert after.prompt_tokens - before.prompt_tokens == sum(map(len, prompts))
    cached = sum(one.request.cached_tokens for one in found)
    assert after.cached_tokens - before.cached_tokens == cached
    for one in found:
        t = one.request.timings
        assert 0 < t.submitted <= t.started <= t.first_token <= t.last_token


def test_the_second_turn_of_a_chat_reads_only_what_is_new(lm):
    first = lm.submit([80, 81, *range(40)], 6, ignore_eos=True, **GREEDY).result()
    history = [80, 81, *range(40), *first.request.tokens]
    second = lm.submit([*history, 1, 2, 3], 6, **GREEDY).result()
    assert second.request.cached_tokens == len(history) - 1


def test_an_error_of_the_scheduler_ends_all_requests_and_no_later_ones(lm, monkeypatch):
    expected = lm.generate("hello", 8, temperature=0.0)
    scheduler = lm._thread._scheduler

    def fail(*_):
        monkeypatch.undo()
        raise ZeroDivisionError("of the scheduler")

    monkeypatch.setattr(scheduler, "_guarded", fail)
    with pytest.raises(ZeroDivisionError, match="of the scheduler"):
        lm.generate("hello", 8, temperature=0.0)
    assert lm.generate("hello", 8, temperature=0.0) == expected


def test_sizes_may_be_asked_for_while_a_step_has_the_cache(lm):
    """Programs take the cache's arrays and give back others."""
    expected = lm.cache_bytes
    request = lm.submit(PROMPT, 200, ignore_eos=True, **GREEDY)
    reader = threading.Thread(target=request.result)
    reader.start()
    asked = 0
    while reader.is_alive():
        assert lm.cache_bytes == expected > 0
        asked += 1
    assert asked > 100
