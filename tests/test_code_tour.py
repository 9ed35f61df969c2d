"""docs/code.md: its names exist, and its call stack is that of a decode step."""

import importlib
import re
import traceback
from pathlib import Path

import jax
import pytest
from helpers import GREEDY, Q8_0, SHAPES

import jaxsplit
from jaxsplit.ops.matmul import triton_gemv_int8

TOUR = Path(__file__).parent.parent / "docs" / "code.md"
PACKAGE = Path(jaxsplit.__file__).parent
NAME, FILE = r"`([A-Za-z_][\w.]*)`", r"`((?:\w+/)*\w+\.py)`"


def rows():
    """`(name, file)` of each row of a table that has both."""
    for line in TOUR.read_text("utf-8").splitlines():
        found = re.search(rf"\| {NAME} \| {FILE} \|", line)
        if found:
            yield found.groups()


def test_the_names_exist():
    assert len(list(rows())) > 45
    for name, file in rows():
        module = file.removesuffix(".py").replace("/", ".")
        found = importlib.import_module(f"jaxsplit.{module}")
        for part in name.split("."):
            found = getattr(found, part)


@pytest.mark.usefixtures("quick_compilation")
def test_the_call_stack_is_that_of_a_decode_step(recipe_gguf, monkeypatch):
    stacks = []

    class Spy:
        def __getattr__(self, name):
            if name == "pallas_call":
                stacks.append(traceback.extract_stack())
            return getattr(pallas, name)

    pallas = triton_gemv_int8.pl
    monkeypatch.setattr(triton_gemv_int8, "pl", Spy())
    path = recipe_gguf(SHAPES["8-2"], Q8_0)
    options = {"dtype": "bfloat16", "activations": "int8", "kernels": "interpret"}
    lm = jaxsplit.load(path, split_mode="none", ctx_size=64, **options)
    lm.closed_batch.start([1, 2, 3], GREEDY)
    monkeypatch.setattr(lm.engine, "loops", True)  # as on GPUs
    jax.clear_caches()  # else the layers as they were traced for the prompt serve again
    lm.closed_batch.loop(2)
    found = next(s for s in stacks if "decode_loop" in {f.name for f in s})
    own = [f for f in found if PACKAGE in Path(f.filename).parents]
    start = next(i for i, f in enumerate(own) if Path(f.filename).name == "steps.py")
    called = [(f.name, str(Path(f.filename).relative_to(PACKAGE))) for f in own[start:]]
    table = list(rows())
    ends = ("decode_loop", "engine/steps.py"), ("gemv_int8", "ops/matmul/triton_gemv_int8.py")
    first, last = map(table.index, ends)
    told = [(name.split(".")[-1], file) for name, file in table[first : last + 1]]
    body = {"advance", "advance_micro_batch"}  # of the loop, inside `decode_loop`
    assert [step for step in called if step[0] not in body] == told
    assert len(called) <= 20
