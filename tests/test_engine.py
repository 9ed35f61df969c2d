"""The engine: chunked prefill, the cache, slots, loops, stopping."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import GREEDY, continuation, last_tokens, make_recipe, nmse
from tiny import fresh_rng

import jaxsplit
from jaxsplit.engine import ClosedBatch, Engine, SamplingConfig, compile_seconds, compile_timer
from jaxsplit.engine.chunked_prefill import CHUNKS, chunk_lengths
from jaxsplit.errors import JaxsplitError

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module", params=[("graph", False), ("layer", False), ("layer", True)], ids=str
)
def lm(request, load, recipe_gguf):
    """One stage, and two, with transfers by the host or in kernels."""
    mode, kernels = request.param
    return load(recipe_gguf("llama"), split_mode=mode, devices=2, kernels=kernels)


@pytest.fixture
def tokens():
    return fresh_rng().integers(0, 160, 61).tolist()


def engine_like(lm, **options):
    policy = lm.engine.runners[0].policy
    options = {"context": 64, "cache_dtype": np.float32, "policy": policy, **options}
    return ClosedBatch(Engine(lm.models, lm.engine.partition, **options))


def test_chunks_do_not_change_logits(lm, tokens):
    """Also where the last, padded chunk would reach past the end of the context."""
    whole = lm.logits(tokens)
    for chunks in ((8,), (5, 16), (64,)):
        assert nmse(engine_like(lm, chunks=chunks).logits(tokens), whole) <= 1e-10


def test_prompts_are_cut_into_few_chunks_without_much_padding():
    lengths = {20: [32], 40: [32, 32], 65: [128], 200: [256], 512: [512], 600: [512, 128]}
    lengths |= {1000: [1024], 1500: [1024, 512], 2048: [2048], 2049: [2048, 32], 6000: [2048] * 3}
    assert {prompt: chunk_lengths(prompt) for prompt in lengths} == lengths
    assert chunk_lengths(0) == []
    assert chunk_lengths(3, [1]) == [1, 1, 1]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_several_stages_read_chunks_at_the_same_time(stages):
    """No other length of equal chunks is faster, where each takes what 300 tokens take."""
    for prompt in (512, 2048, 4096, 16384):
        lengths = chunk_lengths(prompt, stages=stages)
        assert sum(lengths) == prompt
        taken = {c: (prompt / c + stages - 1) * (c + 300) for c in CHUNKS if c <= prompt}
        assert taken[lengths[0]] == min(taken.values())


def test_queued_prompts_fill_the_pipeline_too():
    assert chunk_lengths(2048, stages=4) == [512] * 4
    assert chunk_lengths(2048, stages=4, queued=16) == [2048]


def test_prompt_lengths_share_compiled_programs(lm):
    engine = engine_like(lm, chunks=(8, 16))
    for length in (1, 3, 7, 8, 9, 15, 16, 17, 30, 64):
        engine.start([5] * length, GREEDY)
        engine.step()
    for runner in engine.engine.runners:
        prefills = [program for key, program in runner._programs.items() if key[0] == "prefill"]
        assert len(prefills) == 2
        for program in runner._programs.values():
            assert program.function._cache_size() == (0 if program.executable else 1)


@pytest.fixture(params=[False, True])
def loops(request, lm):
    """Whether devices decode several tokens by themselves."""
    if request.param and len(lm.models) > 1 and not lm.engine.loops:
        pytest.skip("stages without peer access decode step by step")
    return request.param


def test_steps_and_loops_choose_the_same_tokens(lm, tokens, monkeypatch, loops):
    monkeypatch.setattr(lm.engine, "loops", loops)
    for sampling in (GREEDY, SamplingConfig(seed=7), SamplingConfig(repeat_penalty=1.3, seed=8)):
        lm.closed_batch.start(tokens, sampling)
        stepped = last_tokens(lm.closed_batch)
        for _ in range(20):
            lm.closed_batch.step()
            stepped += last_tokens(lm.closed_batch)
        lm.closed_batch.start(tokens, sampling)
        looped = last_tokens(lm.closed_batch)
        for limit in (8, 0, 12):
            looped += lm.closed_batch.loop(limit, 16)[0].tolist()
        assert looped == stepped


def test_tokens_can_be_read_late_and_more_than_once(lm, tokens):
    lm.closed_batch.start(tokens, GREEDY)
    coming = [lm.closed_batch.tokens()]
    for _ in range(5):
        lm.closed_batch.step()
        coming.append(lm.closed_batch.tokens())
    texts = [[int(lm.closed_batch.read(part)[0][0]) for part in coming] for _ in range(2)]
    assert texts == [continuation(lm.closed_batch, tokens, count=5)] * 2
    assert all(lm.closed_batch.read(part)[1] for part in coming)


def test_slots_are_independent(lm, tokens):
    prompts = [tokens[:20], tokens[20:25], tokens[25:60]]
    engine = engine_like(lm)
    alone = [continuation(engine, prompt, count=10) for prompt in prompts]
    engine = engine_like(lm, slots=3)
    for slot, prompt in enumerate(prompts):
        engine.start(prompt, GREEDY, slot=slot)
    first = np.asarray(last_tokens(engine))[:, None]
    # The third slot's context ends before the others'.
    together = np.concatenate([first, engine.loop(10, 10)], axis=1)
    assert together.tolist() == alone


def test_a_slot_can_be_used_again(lm, tokens):
    engine = engine_like(lm)
    engine.start(tokens, GREEDY)
    engine.loop(3, 4)
    engine.start(tokens[:10], GREEDY)
    again = engine.loop(8, 8)
    fresh = engine_like(lm)
    fresh.start(tokens[:10], GREEDY)
    assert np.array_equal(again, fresh.loop(8, 8))


def test_loop_ends_at_an_end_token_and_at_the_context(lm, tokens, loops):
    def engine_with(**options):
        engine = engine_like(lm, **options)
        engine.engine.loops = loops
        return engine

    sampling = SamplingConfig(temperature=2.0)  # so that tokens are not always the same few
    engine = engine_with()
    engine.start(tokens[:10], sampling)
    earlier = last_tokens(engine)
    chosen = engine.loop(30, 30)[0].tolist()
    for end in chosen:
        if len(earlier) > 3 and end not in earlier:
            break
        earlier.append(end)
    engine = engine_with(stop_ids=[end])
    engine.start(tokens[:10], sampling)
    ended = engine.loop(30, 30)[0].tolist()
    at = chosen.index(end)
    assert ended == chosen[: at + 1] + [-1] * (29 - at)
    engine = engine_with(context=16)
    engine.start(tokens[:10], sampling)
    assert engine.loop(30, 30)[0].tolist() == chosen[:6] + [-1] * 24


def test_steps_end_with_the_last_text(lm, tokens):
    if len(lm.models) > 1:
        pytest.skip("several stages go on: steps are on their way before one has ended")
    engine, count = engine_like(lm, context=16), 0
    step = engine.engine._step

    def counted(*arguments):
        nonlocal count
        count += 1
        return step(*arguments)

    engine.engine._step = counted
    engine.start(tokens[:10], GREEDY)
    assert (engine.loop(30, 30)[0] >= 0).sum() == count == 6


def test_loops_donate_their_buffers(lm, tokens):
    """New addresses would force XLA to re-instantiate the CUDA graph."""
    if len(lm.models) > 1 and not lm.engine.loops:
        pytest.skip("stages without peer access decode step by step")
    engine = engine_like(lm)
    engine.engine.loops = True
    engine.start(tokens[:4], GREEDY)
    engine.loop(5, 8)
    inner = engine.engine
    donated = inner._caches, inner._state, inner._decode_loops._outputs

    def kept():
        return jax.tree.leaves((inner._params, [held for _, held in inner._rows.values()]))

    before, arguments = jax.tree.leaves(donated), kept()
    engine.loop(8, 8)
    assert [x.shape for x in before if not x.is_deleted()] == []
    assert all(one is other for one, other in zip(arguments, kept(), strict=True))


def test_other_rows_take_the_buffers_of_those_before(lm, tokens):
    engine = engine_like(lm, slots=2, page=16)
    engine.start_all({0: tokens[:4], 1: tokens[:9]}, GREEDY)
    rows = engine._rows()
    engine.engine.decode(rows, engine._spec(), 2)
    before = jax.tree.leaves([held for _, held in engine.engine._rows.values()])
    rows[0][0] = rows[0][0]._replace(pages=[1, 3])
    engine.engine.decode(rows, engine._spec(), 2)
    assert any(x.is_deleted() for x in before)


def test_the_cache_is_donated(lm, tokens):
    engine = engine_like(lm)
    engine.start(tokens[:4], GREEDY)
    before = [cache[0].keys for cache in engine.engine._caches]
    engine.step()
    assert all(keys.is_deleted() for keys in before)


def test_logits_of_ids_outside_the_vocabulary_are_refused(lm):
    with pytest.raises(JaxsplitError, match="between 0 and 159"):
        lm.logits([3, 160])
    with pytest.raises(JaxsplitError, match="257 tokens, the context 256"):
        lm.logits([3] * 257)


def test_float16_activations(load, recipe_gguf, tokens):
    exact = load(recipe_gguf("llama"), split_mode="none")
    half = load(recipe_gguf("llama"), split_mode="none", dtype="float16")
    assert nmse(half.logits(tokens), exact.logits(tokens)) <= 1e-4


def test_host_memory_while_loading_is_bounded(recipe_gguf, tmp_path):
    """Beside the parameters, which are in host memory on a CPU, little may be held at a time."""
    import subprocess
    import sys

    recipe = make_recipe("large", heads=4, kv_heads=4, head_dim=64, mlp=16384, layers=24)
    path = recipe_gguf(recipe)  # 24 x 24 MB in tensors of 8 MB
    code = f"""
import resource, jaxsplit
small = {str(recipe_gguf("llama"))!r}
jaxsplit.load(small, dtype="float32")
def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3
peaks = []
base = anonymous()
lm = jaxsplit.load({str(path)!r}, dtype="float32", devices=2,
                   progress=lambda done, total: peaks.append(anonymous() - base - done / 1e6))
print(max(peaks), 2 * lm.weight_bytes / 1e6)
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra, size = map(float, out.stdout.split())
    assert size > 600
    assert extra < 8 * 3 + 100, out.stdout


def test_a_model_in_several_files_is_one_model(load, recipe_gguf, tmp_path, tokens):
    import gguf
    from helpers import recipe, recipe_values

    source = recipe("llama")
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", source["arch"], split_max_tensors=6)
    for key, kinds, value in source["metadata"]:
        writer.add_key_value(key, value, gguf.GGUFValueType[kinds[0]])
    for spec in source["tensors"]:
        writer.add_tensor(spec["name"], recipe_values(source["seed"], spec))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    paths = sorted(tmp_path.glob("*-of-*.gguf"))
    assert len(paths) > 2
    lm = jaxsplit.load(paths[1], split_mode="none", dtype="float32", ctx_size=256)
    assert np.array_equal(
        lm.logits(tokens), load(recipe_gguf("llama"), split_mode="none").logits(tokens)
    )


def test_what_compiles_at_the_same_time_is_counted_once(monkeypatch):
    ends, before = iter([1000, 1001, 1010, 1012, 1013]), compile_seconds()
    monkeypatch.setattr(compile_timer, "_spans", [])
    monkeypatch.setattr(compile_timer, "time", SimpleNamespace(perf_counter=lambda: next(ends)))
    # Alone, overlapping, alone, around two others, and overlapping these.
    for took, total in [(10, 10), (3, 11), (1, 12), (12, 22), (9, 23)]:
        compile_timer._listen("/jax/core/compile/backend_compile_duration", took)
        compile_timer._listen("/jax/another", 5)
        assert compile_seconds() - before == pytest.approx(total)
