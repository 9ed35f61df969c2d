"""Calls that share a loaded model: taking turns, from threads, after interrupts and failures."""

import itertools
import signal
import threading
import time

import jax
import numpy as np
import pytest
from tiny import byte_alphabet, fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.engine import Request
from jaxsplit.errors import JaxsplitError

pytestmark = pytest.mark.usefixtures("quick_compilation")

GREEDY = {"temperature": 0.0}
PROMPTS = ("hello", "Tell the", "the l")
COUNT = 24


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("request") / "tiny.gguf", kind="Q8_0")


@pytest.fixture(
    scope="module",
    params=[("none", False), ("graph", False), ("layer", False), ("none", True)],
    ids=str,
)
def lm(request, path):
    """On one device, and on two at once and in turn; with steps, and with loops on the devices."""
    mode, loops = request.param
    found = jaxsplit.load(path, split_mode=mode, devices=2)
    found.engine.loops = loops
    return found


@pytest.fixture(scope="module")
def alone(lm):
    """The text of each prompt when nothing else happens."""
    return {prompt: lm.generate(prompt, COUNT, **GREEDY) for prompt in PROMPTS}


def test_streams_that_take_turns_give_their_own_texts(lm, alone):
    for block in (1, 3):
        streams = [lm.stream(prompt, COUNT, block=block, **GREEDY) for prompt in PROMPTS]
        texts = [
            "".join(t) for t in zip(*itertools.zip_longest(*streams, fillvalue=""), strict=True)
        ]
        assert texts == list(alone.values())


@pytest.mark.parametrize(
    "between",
    [
        lambda lm: lm.logits([1, 2, 3]),
        lambda lm: lm.generate(PROMPTS[1], 4, **GREEDY),
        lambda lm: lm.generate(PROMPTS[1], 4, temperature=1.0, top_k=5, repeat_penalty=1.5),
        lambda lm: next(lm.stream(PROMPTS[0], 4, **GREEDY)),
    ],
)
def test_calls_between_two_pieces_of_a_stream_do_not_change_it(lm, alone, between):
    stream = lm.stream(PROMPTS[0], COUNT, block=2, **GREEDY)
    text = next(stream)
    for _ in range(2):
        between(lm)
        text += next(stream, "")
    assert text + "".join(stream) == alone[PROMPTS[0]]


def test_several_prompts_give_their_texts_in_order(lm, alone):
    assert lm.generate([*PROMPTS, *PROMPTS[:2]], COUNT, **GREEDY) == [
        alone[prompt] for prompt in (*PROMPTS, *PROMPTS[:2])
    ]
    ids = [lm.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert lm.generate(ids, COUNT, **GREEDY) == [*alone.values()]


def test_threads_get_the_texts_of_calls_alone(lm, alone):
    found = {}

    def call(number):
        prompt = PROMPTS[number % len(PROMPTS)]
        if number % 2:
            found[number] = lm.generate(prompt, COUNT, **GREEDY) == alone[prompt]
        else:
            stream = lm.stream(prompt, COUNT, block=5, **GREEDY)
            found[number] = "".join(stream) == alone[prompt]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(12), True)


def test_calls_after_interrupts_give_the_texts_they_should(lm, alone):
    rng, interrupted = fresh_rng(), 0

    def stop(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(0.0005, 0.05)))
                lm.generate(PROMPTS[0], 200, **GREEDY)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert lm.generate(PROMPTS[1], COUNT, **GREEDY) == alone[PROMPTS[1]]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupted


def test_an_interrupt_drops_the_call(lm, alone, monkeypatch):
    """The engine's thread reads no further chunk of a prompt for which nobody waits."""
    read, release, chunks = threading.Event(), threading.Event(), []
    monkeypatch.setattr(lm.engine, "chunks", (8,))
    prefill = lm.engine.runners[0].prefill

    def wait(*arguments, **options):
        chunks.append(arguments)
        read.set()
        release.wait(10)
        return prefill(*arguments, **options)

    monkeypatch.setattr(lm.engine.runners[0], "prefill", wait)

    def stop(*_):
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        alarm = threading.Thread(
            target=lambda: (
                read.wait(60),
                time.sleep(0.1),
                signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM),
            )
        )
        alarm.start()
        with pytest.raises(KeyboardInterrupt):
            lm.generate([1] * 100, 2, **GREEDY)
        alarm.join()
    finally:
        signal.signal(signal.SIGALRM, handler)
        release.set()
    monkeypatch.undo()
    assert lm.generate(PROMPTS[1], COUNT, **GREEDY) == alone[PROMPTS[1]]
    assert len(chunks) == 1


def test_an_interrupted_stream_says_so(lm, monkeypatch):
    stream = lm.stream(PROMPTS[0], COUNT, block=1, **GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(Request, "next", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert stream.stop_reason == "interrupted"
    assert list(stream) == []


@pytest.mark.parametrize("call", ["generate", "logits"])
def test_calls_after_a_program_that_failed_give_the_texts_they_should(lm, alone, monkeypatch, call):
    """As when a device's memory is full: what the program was to update is gone."""
    stream = lm.stream(PROMPTS[0], COUNT, block=1, **GREEDY)
    text = next(stream)
    runner = lm.engine.runners[-1]
    prefill = runner.prefill

    def fail(_, cache, *arguments):
        patch.setattr(runner, "prefill", prefill)  # the stream, if it still runs, begins again
        for leaf in jax.tree.leaves(cache):
            leaf.delete()
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    fail.ready = True
    with monkeypatch.context() as patch:
        patch.setattr(runner, "prefill", lambda *_, **__: fail)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
            getattr(lm, call)([1, 2, 3])
    assert lm.generate(PROMPTS[1], COUNT, **GREEDY) == alone[PROMPTS[1]]
    assert text + "".join(stream) == alone[PROMPTS[0]]


# Logits that are not numbers


def load_with_broken_embedding(folder, token, value, **options):
    """A tiny model in which one token's embedding is not finite: texts without it are as ever."""
    embedding = np.random.default_rng(1).normal(size=(263, 64)).astype(np.float32)
    embedding[token] = value
    path = folder / f"{token}-{value}.gguf"
    return jaxsplit.load(
        write_tiny_model(path, tensors={"token_embd.weight": embedding}), devices=2, **options
    )


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize("mode", ["none", "graph", "layer"])
def test_logits_that_are_not_finite_end_the_text_and_harm_no_later_call(tmp_path, mode, value):
    lm = load_with_broken_embedding(tmp_path, ord("Z"), value, split_mode=mode)
    # The next prompt is shorter: what is left of this one beyond it is masked.
    broken = "a" * 40 + "Z" + "a" * 40
    for options in (GREEDY, {}, {"top_k": 0, "seed": 3}):
        before = lm.generate("hello", 2, **options)
        with pytest.raises(JaxsplitError, match=r"not finite after 81 tokens: try dtype=float32"):
            lm.generate(broken, COUNT, **options)
        assert lm.generate("hello", 2, **options) == before
    assert not np.isfinite(lm.logits(lm.tokenizer.encode(broken))).all()
    assert lm.generate("hello", 2, **options) == before


@pytest.mark.parametrize("loops", [False, True])
def test_logits_that_stop_being_finite_end_the_text_there(tmp_path, loops):
    varied = {"temperature": 3.0, "seed": 1}
    options = {"split_mode": "none", "ctx_size": 64}
    whole = load_with_broken_embedding(tmp_path, 0, 0.0, **options)
    stream = whole.stream("hello", COUNT, **varied)
    text = "".join(stream)
    index = next(
        i for i, token in enumerate(stream.tokens) if i > 3 and i == stream.tokens.index(token)
    )
    lm = load_with_broken_embedding(tmp_path, stream.tokens[index], np.nan, **options)
    lm.engine.loops = loops
    stream, found = lm.stream("hello", COUNT, block=1, **varied), ""
    with pytest.raises(JaxsplitError, match=rf"not finite after {3 + index + 1} tokens"):
        for piece in stream:
            found += piece
    assert found == text[: index + 1]
    assert stream.stop_reason == "interrupted"


def test_rows_beyond_the_vocabulary_are_never_chosen(tmp_path):
    rng, rows = fresh_rng(), 320
    head = rng.normal(size=(rows, 64)).astype(np.float32)
    head[263:] *= 5
    tensors = {"token_embd.weight": rng.normal(size=(rows, 64)), "output.weight": head}
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    lm = jaxsplit.load(write_tiny_model(tmp_path / "rows.gguf", tensors=tensors), devices=2)
    assert lm.logits([1, 2]).shape == (2, rows)
    for options in (GREEDY, {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}):
        for seed in range(4):
            stream = lm.stream("hello", 40, seed=seed, **options)
            for _ in stream:  # a random head may end the text with its first token
                pass
            assert stream.tokens
            assert max(stream.tokens) < 263


def test_fewer_rows_than_tokens_are_refused(tmp_path):
    tensors = dict.fromkeys(("token_embd.weight", "output.weight"), np.ones((200, 64), np.float32))
    path = write_tiny_model(tmp_path / "rows.gguf", tensors=tensors)
    with pytest.raises(JaxsplitError, match=r"263 tokens, .*token_embd.weight.* 200 rows"):
        jaxsplit.load(path)


# Special tokens that a text shows


def test_texts_show_the_markers_of_thoughts_that_the_template_spells(tmp_path):
    """`[THINK]` is in the template of the file, `<secret>` is not."""
    tokens, names = byte_alphabet(), {0: "[THINK]", 1: "[/THINK]", 2: "<secret>"}
    tokens = [names.get(i, c) for i, c in enumerate(tokens)] + ["x"] * 7
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in names else 1 for i in range(len(tokens))],
        "tokenizer.chat_template": "{{ messages[0].content }}{{ '[THINK]x[/THINK]' if thoughts }}",
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    # Whatever is read, the next token is the last one read plus one: 255, 0, 1, 2, 3.
    embedding = np.eye(263, 264, dtype=np.float32) * 100
    tensors = {"token_embd.weight": embedding, "output.weight": np.roll(embedding, 1, axis=0)}
    path = write_tiny_model(
        tmp_path / "think.gguf", embed=264, heads=4, kv_heads=4, metadata=metadata, tensors=tensors
    )
    lm = jaxsplit.load(path, split_mode="none", ctx_size=64)
    texts = {
        show: lm.generate([262], 6, show_special=show, temperature=0.0)
        for show in ("none", "template", "all")
    }
    stream = lm.stream([262], 6, temperature=0.0)
    assert "".join(stream) == texts["template"]
    assert stream.tokens == [0, 1, 2, 3, 4, 5]
    assert texts == {
        "none": "\3\4\5",
        "template": "[THINK][/THINK]\3\4\5",
        "all": "[THINK][/THINK]<secret>\3\4\5",
    }


def test_token_ids_work_without_a_supported_tokenizer(path, tmp_path):
    metadata = {"tokenizer.ggml.model": "bert"}
    unsupported = write_tiny_model(tmp_path / "bert.gguf", kind="Q8_0", metadata=metadata)
    lm, other = (jaxsplit.load(file, devices=1) for file in (path, unsupported))
    ids = lm.tokenizer.encode(PROMPTS[0])
    expected, found = (each.stream(ids, 4, **GREEDY) for each in (lm, other))
    assert "".join(expected) and not "".join(found)
    assert found.tokens == expected.tokens and len(found.tokens) == 4
    with pytest.raises(JaxsplitError, match="'bert', which is unknown; supported: gpt2"):
        other.generate("hello", 4)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hello", 3.0), "n_predict=3.0 is not a whole number"),
        (("hello", None), "n_predict=None"),
        (("hello", "3"), "n_predict='3'"),
        (("hello", True), "n_predict=True"),
        ((b"hello",), r"text or a list of token ids.* bytes"),
        ((None,), r"text or a list of token ids.* NoneType"),
        (([104.0, 101.0],), r"text or a list of token ids"),
        (([["a"]],), r"text or a list of token ids"),
        (([None],), r"text or a list of token ids"),
        (({1: 2},), r"text or a list of token ids.* dict"),
        ((memoryview(b"hi"),), r"text or a list of token ids.* memoryview"),
        (([],), "the prompt is empty"),
    ],
)
def test_a_wrong_prompt_is_refused_by_name(lm, arguments, message):
    with pytest.raises(JaxsplitError, match=message):
        lm.generate(*arguments)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"top_k": 40.0}, "top_k=40.0"),
        ({"sampling": {"temperature": 0}}, "a SamplingConfig is needed, not dict"),
        ({"repeat_penalty": 1e300}, "repeat_penalty=1e"),
        ({"seed": np.array([1, 2])}, "seed="),
        ({"top_k": "40"}, "top_k='40'"),
        ({"repeat_last_n": 64.0}, "repeat_last_n=64.0"),
        ({"temperature": "0.5"}, "temperature='0.5'"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": [0.5]}, "top_p="),
        ({"seed": 1.5}, "seed=1.5"),
        ({"block": 0}, "block=0"),
        ({"block": 2.0}, "block=2.0"),
        ({"stop": b"a"}, "stop="),
        ({"stop": ["a", 1]}, "stop="),
        ({"stop": [""]}, "stop="),
        ({"stop": 5}, "stop=5"),
        ({"show_special": "some"}, "show_special=some"),
        ({"stop_ids": [1.5]}, "stop_ids is a list of token ids"),
        ({"stop_ids": [263]}, "token ids must lie between 0 and 262"),
        ({"logit_bias": {5000: 1.0}}, "token ids must lie between"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias"),
        ({"logit_bias": "5=3"}, "logit_bias='5=3' must be"),
        ({"logprobs": 21}, "logprobs=21"),
        ({"priority": 1.5}, "priority=1.5"),
        ({"timeout": -1}, "timeout=-1"),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_refused_and_leaves_nothing_behind(lm, alone, options, name):
    with pytest.raises(JaxsplitError, match=name):
        lm.generate("hello", 4, **options)
    assert lm.generate("hello", 4, top_k=40, repeat_last_n=64, repeat_penalty=1.1, seed=1)
    assert lm.generate("hello", COUNT, **GREEDY) == alone["hello"]


def test_one_stop_string_need_not_be_in_a_list(lm, alone):
    text = alone["hello"]
    end = text.index(text[5:8])
    for stop in (text[5:8], [text[5:8]], (text[5:8], "not in the text")):
        assert lm.generate("hello", COUNT, stop=stop, **GREEDY) == text[:end]
    assert lm.generate("hello", COUNT, stop=None, **GREEDY) == text


def test_seeds_may_be_left_to_chance(lm):
    for seed in (None, -1):
        texts = {lm.generate("hello", COUNT, temperature=2.0, seed=seed) for _ in range(4)}
        assert len(texts) > 1
    assert len({lm.generate("hello", COUNT, temperature=2.0) for _ in range(2)}) == 1


def test_penalties_over_a_window_longer_than_the_context_see_all_of_it(lm):
    options = {**GREEDY, "presence_penalty": 2.0}
    texts = [
        lm.generate("hello", COUNT, repeat_last_n=last, **options) for last in (256, 10**9, -1)
    ]
    assert len(set(texts)) == 1
    assert lm.generate("hello", COUNT, repeat_last_n=1, **options) != texts[0]


@pytest.mark.parametrize(
    "messages", ["hello", b"hello", ["hello"], [None], [{"role": "user"}, "hello"]], ids=str
)
def test_messages_of_another_form_are_refused(lm, messages):
    with pytest.raises(JaxsplitError, match="messages is .*must be a list such as"):
        lm.chat_prompt(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ctx_size": 64.0}, "ctx_size=64.0 is not a whole number"),
        ({"ctx_size": "64"}, "ctx_size='64'"),
        ({"slots": 0}, "slots=0"),
        ({"slots": 1.0}, "slots=1.0"),
        ({"main_device": "0"}, "main_device='0'"),
        ({"devices": [0, 1]}, r"devices=\[0, 1\]"),
        ({"devices": "2"}, "devices='2'"),
        ({"devices": 2.0}, "devices=2.0"),
        ({"devices": True}, "devices=True"),
        ({"mesh": {"tensor": 2}}, "mesh="),
        ({"mesh": ""}, "mesh=''"),
        ({"tensor_split": 3}, "tensor_split=3"),
        ({"split_mode": None}, "split_mode=None.*auto"),
        ({"split_mode": "diagonal"}, "split_mode=diagonal.*graph, auto"),
        ({"weights": 8}, "weights=8"),
        ({"dtype": np.float32}, "dtype="),
        ({"cache_dtype": None}, "cache_dtype=None"),
    ],
    ids=str,
)
def test_loading_refuses_a_value_of_another_type_by_name(path, options, message):
    with pytest.raises(JaxsplitError, match=message):
        jaxsplit.load(path, **options)


def test_a_context_beyond_the_trained_one_is_cut_and_said(path):
    lm = jaxsplit.load(path, devices=1, ctx_size=1024)
    assert lm.engine.context == 256
    assert "context 256 (all that it was trained for; ctx_size=1024 is more)" in lm.describe()
    assert "1024" not in jaxsplit.load(path, devices=1).describe()
