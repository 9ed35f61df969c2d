"""A model split over devices computes what one device computes, with the promised collectives."""

import os
import re
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from helpers import (
    DATA,
    GREEDY,
    Q8_0,
    SHAPES,
    continuation,
    make_recipe,
    nmse,
    quick_environment,
    quick_jit,
)
from tiny import fresh_rng

import jaxsplit
from jaxsplit.engine import SamplingConfig

MODES = ("graph", "row", "layer")
DEVICES = (2, 3, 4, 8)
AXES = {"graph": "tensor", "row": "tensor", "layer": "stage"}


def full(*case):
    """One of the cases that `-m full` adds."""
    return pytest.param(*case, marks=pytest.mark.full)


@pytest.fixture
def tokens():
    return fresh_rng().integers(0, 160, 37).tolist()


def load_once(path, mode, **options):
    """A model for a single test: kept no longer, since compiled programs take memory."""
    return jaxsplit.load(path, split_mode=mode, dtype="float32", ctx_size=256, **options)


def check_equal(split, one, tokens):
    """Logits of whole prompts, in two chunks, and of single tokens; and the likeliest text."""
    expected = one.logits(tokens)
    assert nmse(split.logits(tokens), expected) <= 1e-9
    assert nmse(split.logits(tokens[:7], one_by_one=True), expected[:7]) <= 1e-9
    assert continuation(split.closed_batch, tokens) == continuation(one.closed_batch, tokens)


# Results


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "devices", "shape"),
    [
        # Both modes with each number of devices and with each shape; the rest is in `full`.
        *(
            pytest.param(mode, devices, shape, marks=[pytest.mark.full] * (k != (j + 2 * i) % 4))
            for i, mode in enumerate(("graph", "row"))
            for j, devices in enumerate(DEVICES)
            for k, shape in enumerate(SHAPES)
        ),
        # Where layers are whole, the number of heads does not matter.
        *(("layer", *case) for case in zip(DEVICES, SHAPES, strict=True)),
    ],
)
def test_every_mode_computes_what_one_device_computes(
    load, recipe_gguf, tokens, mode, devices, shape
):
    path = recipe_gguf(SHAPES[shape])
    split = load_once(path, mode, devices=devices)
    assert split.mesh.shape == {AXES[mode]: devices}
    check_equal(split, load(path, split_mode="none"), tokens)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "mesh", "shape"),
    [
        # Each mesh, and both modes with each axis, alone and beside others.
        *(
            ("graph", "tensor:1", "9-3"),
            full("row", "tensor:1", "8-2"),
            ("layer", "stage:1", "6-1"),
        ),
        *(("graph", "tensor:5", "8-2"), full("graph", "tensor:6", "14-2")),
        *(("row", "tensor:6", "9-3"), ("graph", "data:3", "6-1")),
        *(("graph", "stage:2,tensor:2", "9-3"), full("row", "stage:2,tensor:2", "14-2")),
        *(full("graph", "data:2,tensor:2", "6-1"), ("row", "data:2,tensor:2", "8-2")),
        ("graph", "data:2,stage:2,tensor:2", "8-2"),
        full("row", "data:2,stage:2,tensor:2", "6-1"),
        *(full("graph", "tensor:3,stage:2", "14-2"), ("row", "tensor:3,stage:2", "9-3")),
        ("layer", "tensor:2,data:2,stage:2", "9-3"),
    ],
)
def test_every_mesh_computes_what_one_device_computes(load, recipe_gguf, tokens, mode, mesh, shape):
    path = recipe_gguf(SHAPES[shape])
    check_equal(load_once(path, mode, mesh=mesh), load(path, split_mode="none"), tokens)


def test_each_device_can_run_one_layer(load, recipe_gguf, tokens, quick_compilation):
    path = recipe_gguf(make_recipe("deep", heads=2, kv_heads=1, layers=8))
    split = load_once(path, "layer", devices=8)
    runs = [stage.layers for stage in split.engine.partition.stages]
    assert runs == [range(i, i + 1) for i in range(8)]
    check_equal(split, load(path, split_mode="none"), tokens)


def test_sixteen_devices_compute_what_one_computes(recipe_gguf, tokens):
    program = f"""
import sys
import jaxsplit
from helpers import nmse
from test_split import check_equal
one, split = (
    jaxsplit.load(sys.argv[1], split_mode=mode, dtype="float32", ctx_size=64)
    for mode in ("none", "graph")
)
assert split.mesh.shape == {{"tensor": 16}}
check_equal(split, one, {tokens})
"""
    path = recipe_gguf(make_recipe("sixteen", heads=9, kv_heads=3))
    run = [sys.executable, "-c", program, str(path)]
    paths = os.pathsep.join([os.path.dirname(__file__), os.path.dirname(jaxsplit.__path__[0])])
    environment = quick_environment() | {"JAX_NUM_CPU_DEVICES": "16", "PYTHONPATH": paths}
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "mesh", "shape"),
    [
        *(("graph", "tensor:3", "9-3"), ("graph", "tensor:8", "8-2"), ("row", "tensor:3", "8-2")),
    ],
)
def test_quantized_weights_are_split_alike(load, recipe_gguf, tokens, mode, mesh, shape):
    path = recipe_gguf(SHAPES[shape], Q8_0)
    check_equal(load_once(path, mode, mesh=mesh), load(path, split_mode="none"), tokens)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "devices"),
    [("graph", 3), ("graph", 5), ("graph", 8), ("row", 3)],
)
def test_k_quants_are_cut_inside_their_blocks(load, tokens, mode, devices):
    """Heads of 64 weights in blocks of 256, and 2 blocks of hidden units."""
    path = DATA / "quant" / "quant-mix-Q4_K_M.gguf"
    expected = load(path, split_mode="none").logits(tokens)
    split = load_once(path, mode, devices=devices)
    assert nmse(split.logits(tokens), expected) <= 1e-9
    assert nmse(split.logits(tokens[:9], one_by_one=True), expected[:9]) <= 1e-9


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "mesh", "name"),
    [
        *(("graph", "tensor:3", "llama-bias"), full("graph", "tensor:3", "llama-tied-ropefreqs")),
        *(full("graph", "tensor:8", "llama-bias"), ("graph", "tensor:8", "llama-tied-ropefreqs")),
        *(("row", "tensor:3", "llama-bias"), ("row", "tensor:3", "llama-tied-ropefreqs")),
        full("graph", "tensor:2,stage:2", "llama-bias"),
        ("graph", "tensor:2,stage:2", "llama-tied-ropefreqs"),
    ],
)
def test_biases_and_tied_heads_are_split(load, recipe_gguf, tokens, mode, mesh, name):
    expected = load(recipe_gguf(name), split_mode="none").logits(tokens)
    split = load_once(recipe_gguf(name), mode, mesh=mesh)
    assert nmse(split.logits(tokens), expected) <= 1e-9


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("shape", "weights"),
    [("9-3", "float32"), ("8-2", "bfloat16"), ("6-1", "bfloat16"), ("14-2", "float32")],
)
def test_dequantized_weights_are_split_alike(load, recipe_gguf, tokens, shape, weights):
    path = recipe_gguf(SHAPES[shape], Q8_0)
    one = load(path, split_mode="none", weights=weights)
    split = load(path, split_mode="graph", devices=4, weights=weights)
    assert nmse(split.logits(tokens), one.logits(tokens)) <= 1e-9


@pytest.mark.usefixtures("quick_compilation")
def test_same_seed_same_text_on_any_mesh(load, recipe_gguf, tokens):
    path = recipe_gguf(SHAPES["9-3"])
    sampling = SamplingConfig(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=1234)
    texts = [
        continuation(load_once(path, mode, devices=devices).closed_batch, tokens, sampling, 24)
        for mode, devices in (("graph", 1), ("graph", 2), ("graph", 8), ("row", 3), ("layer", 2))
    ]
    assert texts[1:] == texts[:1] * 4


# Collectives


def collectives(lowered) -> Counter:
    """Collective operations in a compiled program, by name."""
    names = (
        "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
        "collective-broadcast|send|recv"
    )
    return Counter(re.findall(rf"\b({names})(?:-start)?\(", lowered.compile().as_text()))


def promised(mode, stage, model) -> Counter:
    """Collectives of a decode step in a stage."""
    if stage.mesh.shape["tensor"] == 1:
        return Counter()
    layers = len(stage.layers)
    per_layer = {"graph": {"all-reduce": 2 * layers}, "row": {"all-gather": 4 * layers}}
    # The head exchanges the best candidate: its value with its id.
    return Counter(per_layer[mode]) + Counter(
        {"all-reduce": int(model.first), "all-gather": model.last}
    )


@pytest.mark.parametrize(
    ("mode", "mesh", "shape"),
    [
        # Each mode, shape and axis, and the modes that have collectives with few and many devices.
        *(("none", "tensor:1", "9-3"), ("layer", "stage:2", "14-2")),
        *(full("layer", "stage:8", "6-1"), ("graph", "tensor:2", "8-2")),
        *(full("graph", "tensor:3", "6-1"), ("graph", "tensor:8", "9-3")),
        *(full("row", "tensor:2", "6-1"), ("row", "tensor:3", "14-2")),
        *(("row", "tensor:8", "8-2"), ("graph", "stage:2,tensor:2", "9-3")),
        *(full("row", "tensor:3,stage:2", "14-2"), full("graph", "data:2,tensor:2", "6-1")),
        *(full("graph", "data:2,stage:2,tensor:2", "8-2"), full("graph", "tensor:1", "8-2")),
        *(("row", "data:2,stage:2,tensor:2", "6-1"), full("layer", "data:2,stage:2", "8-2")),
        ("graph", "data:2", "14-2"),
    ],
)
def test_a_decode_step_has_the_promised_collectives(recipe_gguf, mode, mesh, shape):
    lm = load_once(recipe_gguf(SHAPES[shape]), mode, mesh=mesh, slots=2)
    stages = lm.engine.partition.stages
    found = [collectives(step.lower()) for step in lm.engine.trace_step(GREEDY)]
    assert found == [promised(mode, *each) for each in zip(stages, lm.models, strict=True)]


def test_weights_of_8_bits_need_no_more_collectives(recipe_gguf):
    lm = load_once(recipe_gguf(SHAPES["9-3"], Q8_0), "graph", devices=3)
    (step,) = lm.engine.trace_step(GREEDY)
    assert collectives(step.lower()) == {"all-reduce": 2 * lm.config.layers + 1, "all-gather": 1}


def test_reduce_dtype_is_used_between_devices(load, recipe_gguf, tokens):
    path = recipe_gguf(SHAPES["8-2"])
    exact = load(path, split_mode="graph", devices=2)
    rough = load(path, split_mode="graph", devices=2, all_reduce_dtype="bfloat16")
    error = nmse(rough.logits(tokens), exact.logits(tokens))
    assert 1e-8 < error < 1e-3


# Devices and modules


def test_the_module_works_on_sharded_parameters(load, recipe_gguf, tokens):
    """`lm.model` called directly: the compiler finds the collectives itself."""
    lm = load(recipe_gguf(SHAPES["8-2"]), split_mode="graph", devices=4)
    logits, _ = quick_jit(lambda tokens: lm.model(tokens))(np.asarray([tokens]))
    vocab = lm.config.vocab
    assert nmse(np.asarray(logits)[0, :, :vocab], lm.logits(tokens)) <= 1e-9


@pytest.mark.usefixtures("quick_compilation")
def test_modules_of_stages_make_up_the_model(load, recipe_gguf, tokens):
    lm = load(recipe_gguf(SHAPES["8-2"]), split_mode="layer", devices=2)
    with pytest.raises(jaxsplit.JaxsplitError, match=r"2 stages; use lm\.models"):
        _ = lm.model
    x, _ = lm.models[0].hidden(np.asarray([tokens]))
    logits, _ = lm.models[1](jax.device_put(x, lm.engine.partition.stages[1].mesh.devices.flat[0]))
    assert nmse(np.asarray(logits)[0], lm.logits(tokens)) <= 1e-9


@pytest.mark.usefixtures("quick_compilation")
def test_devices_can_be_given_as_a_list(recipe_gguf):
    chosen = jax.devices()[3:5]
    for mode in MODES:
        lm = jaxsplit.load(recipe_gguf("llama"), split_mode=mode, devices=chosen)
        assert lm.mesh.devices.flatten().tolist() == chosen
    lm = jaxsplit.load(recipe_gguf("llama"), split_mode="none", main_device=2)
    assert lm.mesh.devices.flatten().tolist() == [jax.devices()[2]]
