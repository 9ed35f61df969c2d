"""What XLA makes of decode steps and prompts for GPUs, compiled without a GPU.

`make test` installs the compiler (`gpu/compile_programs.py` says what it is) and names its folder
in JAXSPLIT_GPU_COMPILER.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = os.environ.get("JAXSPLIT_GPU_COMPILER", "")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None
    and not Path(COMPILER, "jax_cuda13_plugin").is_dir(),
    reason="needs a compiler for GPUs: make test installs it",
)

MIB = 2**20
KERNELS = {"llama-8b": 8, "qwen3-30b-a3b": 10, "gpt-oss-20b": 12}
"""Kernels of a layer in a decode step."""


@pytest.fixture(scope="module")
def programs() -> dict[str, dict]:
    """By name, with one layer and with two."""
    paths = [COMPILER, str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / "gpu" / "compile_programs.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def of_a_layer(programs: dict[str, dict], name: str) -> tuple[int, dict[str, int]]:
    """Kernels, and collectives by kind: what a second layer adds."""
    one, two = (programs[f"{name} {layers}"] for layers in (1, 2))
    kinds = {**one["collectives"], **two["collectives"]}
    more = {k: two["collectives"].get(k, 0) - one["collectives"].get(k, 0) for k in kinds}
    kernels = len(two["kernels"]) - len(one["kernels"])
    return kernels, {kind: count for kind, count in more.items() if count}


@pytest.mark.parametrize(
    "name",
    [
        *("llama-8b H100 x1 decode", "llama-8b H100 x2 decode", "llama-8b A100 x1 decode"),
        *("qwen3-30b-a3b H100 x1 decode", "qwen3-30b-a3b H100 x2 decode"),
        *("llama-8b H100 x1 decode IQ4_KS", "llama-8b H100 x1 decode IQ2_KT"),
        *("qwen3-30b-a3b H100 x1 decode IQ2_KL", "gpt-oss-20b H100 x1 decode"),
    ],
)
def test_a_layer_of_a_decode_step_is_a_few_kernels(programs, name):
    """Devices exchange sums in kernels too."""
    assert of_a_layer(programs, name) == (KERNELS[name.split()[0]], {})
    assert not programs[f"{name} 1"]["collectives"]


def test_kernels_in_cuda_are_as_few(programs):
    """For many sequences, too. Without peers, devices exchange sums twice in a layer."""
    assert of_a_layer(programs, "llama-8b H100 x1 decode cuda") == (8, {})
    for sequences in (8, 128):
        assert of_a_layer(programs, f"llama-8b H100 x1 decode {sequences} cuda") == (8, {})
    mixture = of_a_layer(programs, "qwen3-30b-a3b H100 x1 decode cuda")
    assert mixture == (KERNELS["qwen3-30b-a3b"], {})
    kernels, collectives = of_a_layer(programs, "llama-8b H100 x2 decode cuda")
    assert collectives == {"all-reduce": 2}
    assert kernels <= 8 + 4  # start and end, in some versions


def test_many_sequences_take_as_few_kernels(programs):
    """Devices exchange sums without NCCL. Elsewhere, XLA dequantizes each matrix to memory."""
    assert of_a_layer(programs, "llama-8b H100 x1 decode 128") == (8, {})
    assert of_a_layer(programs, "llama-8b H100 x2 decode 128") == (14, {})


def test_devices_that_cannot_reach_one_another_meet_twice_in_a_layer(programs):
    for what in ("decode", "prefill"):
        _, collectives = of_a_layer(programs, f"llama-8b H100 x2 {what} nccl")
        assert collectives == {"all-reduce": 2}


def test_prompts_need_no_collectives_where_devices_reach_one_another(programs):
    assert not programs["llama-8b H100 x2 prefill 2"]["collectives"]


def test_a_decode_step_keeps_no_weights(programs):
    """The smallest matrix of a layer, of one of two devices, takes 1.1 MiB in 4 bits; of one
    device, which decodes many sequences, 8 MiB in bfloat16, and all of its matrices 436 MiB."""
    for name, program in programs.items():
        if "decode" in name:
            sequences = re.search(r"decode (\d+) ", name)
            limit = 0.5 * MIB * (int(sequences[1]) if sequences else 1)
            assert program["temporary"] < limit, name


@pytest.mark.parametrize(
    ("what", "expected"), [("x1 prefill", 10), ("x2 prefill", 16), ("x1 prefill cuda", 10)]
)
def test_prompts_are_multiplied_straight_from_the_weights(programs, what, expected):
    """Norms, four products, heads, attention to two parts of the keys, hidden units: nothing is
    XLA's. Activations take 46 MiB; gate and up would take 224 in bfloat16, 112 on each of two. A
    second layer keeps nothing."""
    assert of_a_layer(programs, f"llama-8b H100 {what}") == (expected, {})
    one, two = (programs[f"llama-8b H100 {what} {layers}"] for layers in (1, 2))
    assert two["temporary"] < 64 * MIB
    assert two["temporary"] - one["temporary"] < 8 * MIB
