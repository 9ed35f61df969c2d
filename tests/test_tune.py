"""Tilings that are found on a machine, with kernels in CUDA C++ on the CPU."""

import dataclasses
import json
import re

import cuda_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cuda_emulation import emulate_gpu, matrix, rounded_rows, values_of
from helpers import nmse
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.bench import tune
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.errors import JaxsplitError
from jaxsplit.ops import tilings
from jaxsplit.ops.matmul import cuda_gemv_int8
from jaxsplit.ops.matmul.cuda_gemv_int8 import Tiling
from jaxsplit.quant import dequantize

pytestmark = [
    pytest.mark.usefixtures("quick_module"),
    pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++"),
]

POLICY = MatmulPolicy(cuda=8.0, int8_activations=True)
FAST = Tiling(128, 1, 2)


@pytest.fixture(autouse=True)
def table(monkeypatch, tmp_path):
    """An empty table; the path of its file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tilings.table.cache_clear()
    yield tilings.path_of_tables()
    tilings.table.cache_clear()


@pytest.fixture
def launches(monkeypatch):
    """The launches of matmuls of one row."""
    emulate_gpu(monkeypatch, 8.0)
    emulated, found = cuda_gemv_int8.cuda_call, []

    def call(launch, **options):
        found.append(launch)
        return emulated(launch, **options)

    monkeypatch.setattr(cuda_gemv_int8, "cuda_call", call)
    return found


def product(x, w):
    with forward_context(policy=POLICY):
        return cuda_gemv_int8.gemv_int8(x, [w])[0]


def problem_of(x, w):
    with tilings.collected() as problems:
        jax.eval_shape(lambda *arrays: product(*arrays), x, w)  # not traced before
    [problem] = problems
    return problem


def test_the_fastest_tiling_is_kept_and_taken(monkeypatch, table, launches):
    rng = fresh_rng()
    x, w = rounded_rows(rng, 1, 512), matrix(rng, "Q4_K", 24, 512)
    problem, tried, time = problem_of(x, w), [], {FAST: 1.0, Tiling(32, 1, 1): None}

    def programs(problem, tilings, inputs, *_):
        tried.extend(tilings)
        times = [time.get(tiling, 1.5) for tiling in tilings]
        return [t and t * len(inputs) for t in times]

    monkeypatch.setattr(tune, "_compiled", programs)
    monkeypatch.setattr(tune, "seconds", lambda program: program)
    [found] = tune.tune([problem], POLICY, jax.devices()[0])
    assert (found.usual, found.best, found.tiling) == (1.5, 1.0, FAST)
    assert tried == [None, *problem.candidates]
    time[FAST] = 1.49  # one percent may be chance
    other = problem_of(x, matrix(rng, "Q6_K", 24, 512))
    assert [one.tiling for one in tune.tune([other], POLICY, jax.devices()[0])] == [None]
    time[None] = None  # what runs is better than what does not
    assert [one.tiling for one in tune.tune([other], POLICY, jax.devices()[0])] == [FAST]

    assert [*map(len, json.loads(table.read_text())["8.0"].values())] == [2]
    launches.clear()
    y = product(x, w)
    expected = cuda_gemv_int8.launch_of(x, [w], jnp.float32, tiling=FAST)
    assert launches[0].source == expected.source
    assert nmse(y, np.float64(values_of(x)) @ np.float64(dequantize(w)).T) <= 1e-10


def test_what_does_not_fit_is_not_taken(table, launches):
    """A tiling of another version, a file that is none, and another GPU."""
    rng = fresh_rng()
    x, w = rounded_rows(rng, 1, 512), matrix(rng, "Q4_K", 24, 512)
    usual = cuda_gemv_int8.launch_of(x, [w], jnp.float32).source

    def source():
        tilings.table.cache_clear()
        product(x, w)
        return launches[-1].source

    problem = problem_of(x, w)
    tilings.write(8.0, problem, FAST)
    assert source() != usual
    tilings.write(8.0, problem, None)
    assert source() == usual
    tilings.write(8.0, problem, FAST)
    kept = table.read_text()
    for fields in ('{"lanes": 7, "rows": 1, "steps": 1}', '{"threads": 3}', "1"):
        table.write_text(re.sub(r"\{[^{}]*\}", fields, kept))
        assert source() == usual
    for text in ("{", "[]", '{"9.0": {}}', '{"8.0": []}', '{"8.0": {"cuda_gemv_int8": 1}}'):
        table.write_text(text)
        assert source() == usual


def test_a_table_that_cannot_be_written_is_named(table, launches):
    rng = fresh_rng()
    problem = problem_of(rounded_rows(rng, 1, 512), matrix(rng, "Q4_K", 24, 512))
    table.parent.parent.mkdir(exist_ok=True)
    table.parent.write_text("a file")
    with pytest.raises(JaxsplitError, match=r"tilings.json cannot be written: "):
        tilings.write(8.0, problem, FAST)


def test_products_are_timed(launches):
    rng = fresh_rng()
    problem = problem_of(rounded_rows(rng, 1, 512), matrix(rng, "Q4_K", 24, 512))
    few = dataclasses.replace(problem, candidates=[FAST])
    [found] = tune.tune([few], POLICY, jax.devices()[0])
    assert 0 < found.best <= found.usual


def test_the_problems_of_a_model_are_those_it_meets(monkeypatch, tmp_path, launches):
    """Decode steps of one sequence and of several, and prompts; each once."""
    sizes = {"embed": 128, "heads": 4, "kv_heads": 2, "mlp": 256, "layers": 2}
    path = write_tiny_model(tmp_path / "tiny.gguf", kind="Q8_0", seed=1, **sizes)
    options = {"devices": 1, "ctx_size": 128, "slots": 5, "cache_tokens": 5 * 128}
    lm = jaxsplit.load(path, dtype="bfloat16", activations="int8", **options)
    problems = tune.problems_of(lm, 128)
    kernels = [problem.kernel for problem in problems]
    assert {*kernels} == {"cuda_gemv_int8", "cuda_gemm_int8", "cuda_gemm_bf16", "cuda_flash"}
    assert len({(p.kernel, p.key) for p in problems}) == len(problems)
    [flash] = [p for p in problems if p.kernel == "cuda_flash"]
    (queries, kv, positions), filled = tune._inputs(flash, jax.devices()[0])[0]
    assert positions[0, -1] == kv.length * filled["pages"].shape[1] - 1
