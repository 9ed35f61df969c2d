"""Plans: memory, collectives and their bytes against what the devices and the compiled text say."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, make_recipe
from jax.sharding import PartitionSpec

import jaxsplit
from jaxsplit.architectures import model_config
from jaxsplit.engine import SamplingConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.llm import open_model
from jaxsplit.plan import best_plans, best_split, collectives, device_kind, make_plan
from jaxsplit.sharding import parse_mesh
from jaxsplit.weights import parameter_sources

SPLITS = ["none", "layer@stage:3", "row@tensor:3", "graph@tensor:3", "graph@stage:2,tensor:2"]


@pytest.fixture(scope="module")
def models(recipe_gguf):
    norms = {"norm.weight": "F32"}
    wide = make_recipe("plan", heads=9, kv_heads=3, layers=3)
    return {
        "Q8_0": recipe_gguf(wide, norms | {".weight": "Q8_0"}),
        "Q4_K_M": DATA / "quant" / "quant-mix-Q4_K_M.gguf",
        "tied": recipe_gguf("llama-tied-ropefreqs"),
        "experts": DATA / "quant" / "quant-moe-Q4_K_M.gguf",
        "windows": recipe_gguf("gemma4"),
        "hybrid": recipe_gguf("qwen35moe"),
    }


def plan_of(path, split, kind="CPU", **options):
    file = open_model(path)
    config = model_config(file)
    mode, _, mesh = split.partition("@")
    shape = parse_mesh(mesh or "tensor:1")
    kind = device_kind(kind) if isinstance(kind, str) else kind
    kinds = [kind] * math.prod(shape.values())
    options = {"dtype": jnp.dtype(jnp.float32), "context": 64, **options}
    return make_plan(parameter_sources(file, config), config, mode, shape, kinds, **options)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "split"),
    [
        *itertools.product(["Q8_0", "Q4_K_M", "tied"], SPLITS),
        *(("experts", f"graph@{mesh}") for mesh in ("tensor:3", "expert:3", "expert:2,tensor:2")),
        *(("experts", "row@tensor:2"), ("windows", "layer@stage:3"), ("windows", "graph@tensor:3")),
        *(("hybrid", "row@tensor:3"), ("hybrid", "graph@stage:2,tensor:2")),
    ],
)
def test_plans_match_the_devices_memory_and_collectives(models, name, split):
    mode, _, mesh = split.partition("@")
    lm = jaxsplit.load(
        models[name], split_mode=mode, mesh=mesh or None, dtype="float32", ctx_size=64, slots=1
    )
    plan = plan_of(models[name], split)
    held: Counter = Counter()
    arrays = [[r.params for r in lm.engine.runners], lm.engine._caches]
    for leaf in jax.tree.leaves(arrays):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    for rank, device in enumerate(lm.mesh.devices.flat):
        planned = plan.on_device(rank)
        assert planned["weights"] + planned["cache"] == held[device]
    texts = [step.lower().compile().as_text() for step in lm.engine.trace_step(SamplingConfig(0.0))]
    for stage, text in zip(plan.stages, texts, strict=True):
        count, size = collectives(text)
        assert stage.decode.collectives == count
        assert stage.decode.collective_bytes == size
    assert plan.transfers[0] == len(texts) - 1


def test_work_of_many_layers_is_extrapolated_exactly(recipe_gguf):
    """Two layers are traced; products of all are counted in plain NumPy here."""
    path = recipe_gguf(make_recipe("deep", heads=4, kv_heads=2, layers=7))
    file = open_model(path)
    matrices = [t for t in file.tensors.values() if len(t.shape) == 2]
    weights = sum(math.prod(t.shape) for t in matrices if t.name != "token_embd.weight")
    (stage,) = plan_of(path, "none").stages
    attention = 7 * 2 * 4 * 32 * 64  # layers, scores and sums, heads, head_dim, context
    assert stage.decode.flops == 2 * (weights + attention)
    split = plan_of(path, "layer@stage:3")
    assert sum(s.decode.flops for s in split.stages) == stage.decode.flops


def test_int8_cache_and_slots(models):
    plain = plan_of(models["Q8_0"], "graph@tensor:3", slots=4)
    small = plan_of(models["Q8_0"], "graph@tensor:3", slots=4, cache_dtype=jnp.dtype(jnp.int8))
    assert plain.fullest["cache"] == 3 * 2 * 4 * 64 * 32 * 4  # layers, k and v, slots, context
    assert small.fullest["cache"] == 3 * 2 * 4 * 64 * (32 + 4)


def test_more_sequences_are_faster_together_but_not_so_many_times(models):
    slots = [1, 2, 3, 16, 64, 96]
    options = {"kind": "H100", "dtype": jnp.dtype(jnp.bfloat16)}
    rates = [plan_of(models["Q8_0"], "none", slots=n, **options).decode_rate for n in slots]
    assert rates == sorted(rates)
    assert all(rate < n * rates[0] for n, rate in zip(slots[1:], rates[1:], strict=True))


def test_stages_read_chunks_of_a_prompt_at_the_same_time(models):
    """Two chunks of 1024, each of which enters a stage when the one before leaves it."""
    plan = plan_of(models["Q8_0"], "layer@stage:2", kind="H100")
    first, second = (s.prefill_time.seconds(1024) for s in plan.stages)
    seconds = first + second + max(first, second)
    assert plan.prefill_rate(2048) == pytest.approx(2048 / seconds)
    # The last chunk of a prompt is as long as its program.
    assert plan.prefill_rate(100) == pytest.approx(plan.prefill_rate(128) * 100 / 128)


def test_prompts_in_8_bits_are_faster(models):
    """Long ones: on Hopper, chunks of up to 256 tokens are multiplied as they are."""
    plain, float8 = (
        plan_of(models["Q8_0"], "none", kind="H100", float8=float8) for float8 in (False, True)
    )
    assert plain.prefill_rate(2048) < float8.prefill_rate(2048) < 2 * plain.prefill_rate(2048)
    assert plain.prefill_rate(100) == float8.prefill_rate(100)


def test_more_rows_than_tiles_take_dequantize_the_weights(models):
    slow = dataclasses.replace(device_kind("H100"), bandwidth=1e6)
    few, many = (
        plan_of(models["Q8_0"], "none", kind=slow, slots=n, dtype=jnp.bfloat16).decode_rate / n
        for n in (64, 65)
    )
    assert many < few


@pytest.mark.parametrize(("peer_access", "gather"), [(True, 2 * (26 / 24) / (25 / 24)), (False, 1)])
def test_a_gather_takes_longer_than_two_sums_over_peer_access(models, peer_access, gather):
    """The step's time is nearly all latency of collectives here."""
    kind = dataclasses.replace(device_kind("H100"), peer_access=peer_access, collective_seconds=100)
    times = []
    for split in ("graph@tensor:2", "row@tensor:2"):
        plan = plan_of(models["Q8_0"], split, kind=kind)
        latencies = plan.collectives["all-reduce"] + gather * plan.collectives["all-gather"]
        times.append(1 / plan.decode_rate / latencies)
    assert times[0] == pytest.approx(times[1], rel=1e-4)


def test_small_all_reduces_go_to_every_peer_over_peer_access(models):
    """The step's time is nearly all bytes over the link here."""
    times = []
    for peer_access in (True, False):
        kind = dataclasses.replace(device_kind("H100"), peer_access=peer_access, link=1.0)
        plan = plan_of(models["Q8_0"], "graph@tensor:3", kind=kind)
        times.append(1 / plan.decode_rate)
    [stage] = plan.stages
    carried = stage.decode.collective_bytes
    summed, gathered = carried["all-reduce"], carried["all-gather"]
    # 8 bytes for each float32, to two others.
    expected = (summed / 4 * 8 * 2 + gathered / 2) / (summed + gathered / 2)
    assert times[0] / times[1] == pytest.approx(expected, rel=1e-4)


def test_the_best_plan_fits(models):
    file = open_model(models["Q8_0"])
    config = model_config(file)
    sources = parameter_sources(file, config)
    plans = best_plans(sources, config, [device_kind("T4")] * 4, context=64)
    assert {plan.partition.mode for plan in plans} == {"none", "layer", "row", "graph"}
    rates = [plan.decode_rate for plan in plans]
    assert rates == sorted(rates, reverse=True)
    whole = next(plan for plan in plans if plan.partition.mode == "none").fullest
    tiny = dataclasses.replace(device_kind("T4"), memory=0.8 * sum(whole.values()))
    plans = best_plans(sources, config, [tiny] * 4, context=64)
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True)
    assert not all(fits)


def test_auto_picks_a_split_that_runs(models):
    lm = jaxsplit.load(models["Q8_0"], split_mode="auto", devices=2, dtype="float32", ctx_size=64)
    assert lm.logits([1, 2, 3]).shape == (3, lm.config.vocab)
    with pytest.raises(JaxsplitError, match="split_mode=auto chooses the mesh"):
        jaxsplit.load(models["Q8_0"], split_mode="auto", mesh="tensor:2")


def test_what_does_not_fit_is_refused(models, monkeypatch):
    file = open_model(models["Q8_0"])
    config = model_config(file)
    sources = parameter_sources(file, config)
    monkeypatch.setattr("os.sysconf", lambda name: 1 if "PAGE_SIZE" in name else 800_000)
    with pytest.raises(JaxsplitError, match="does not fit: .* needs .* GB on a device of"):
        best_split(sources, config, jax.devices()[:2], context=64)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("NVIDIA H200", "H200"), ("3090", "RTX 3090"), ("Tesla T4", "T4"), ("rtx 4090", "RTX 4090")],
)
def test_device_names(name, kind):
    assert device_kind(name).name == kind


def test_unknown_device_is_refused_with_the_list():
    with pytest.raises(JaxsplitError, match="unknown device 'Abacus'; known are T4, .*, CPU"):
        device_kind("Abacus")


def test_compiled_collectives_are_parsed():
    """Against a program whose collectives are known."""
    mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def body(a, b):
        return jax.lax.psum(a, "x"), jax.lax.all_gather(b, "x")

    split = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec("x"), PartitionSpec("x")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    text = jax.jit(split).lower(np.ones((8, 5), np.float32), np.ones(4, np.int32)).compile()
    count, size = collectives(text.as_text())
    assert count == {"all-reduce": 1, "all-gather": 1}
    assert size == {"all-reduce": 2 * 5 * 4, "all-gather": 4 * 4}


def plan_cli(*flags):
    command = [sys.executable, "-m", "jaxsplit.plan", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_line(models):
    out = plan_cli(f"--model={models['Q8_0']}", "--devices=2", "--device_kind=3090", "--json")
    plans = json.loads(out.stdout)
    assert {p["split_mode"] for p in plans} == {"none", "layer", "row", "graph"}
    assert all(len(p["devices"]) == math.prod(p["mesh"].values()) for p in plans)
    out = plan_cli(
        f"--model={models['Q8_0']}", "--device_kind=T4", "--device_kind=3090", "--split_mode=layer"
    )
    assert out.returncode == 0, out.stderr
    assert "layer stage:2" in out.stdout and "T4" in out.stdout and "RTX 3090" in out.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device_kind=Abacus"], "unknown device 'Abacus'"),
        (["--mesh=tensor:2", "--devices=3"], "--mesh=tensor:2 has 2 devices, --devices=3"),
        (["--devices=0"], "--devices=0 must be at least 1"),
        (["--split_mode=sideways"], "--split_mode=sideways is not supported"),
        (["--cache_dtype=int3"], "--cache_dtype=int3 is not supported"),
        (["--device_kind=T4", "--device_kind=T4", "--devices=3"], "2 times for 3 devices"),
        (["--bandwidth=-1"], "must be above 0 and finite"),
        (
            ["--prefill_dtype=float8", "--device_kind=A100"],
            "--prefill_dtype=float8 does not suit A100",
        ),
        (["--prefill_dtype=int8"], "--prefill_dtype=int8 is not supported"),
    ],
)
def test_what_cannot_be_planned_is_one_line(models, flags, message):
    out = plan_cli(f"--model={models['Q8_0']}", *flags)
    assert out.returncode == 2
    assert message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1


REFUSED = {
    "--memory=nan": "must be above 0 and finite",
    "--link=inf": "must be above 0 and finite",
    "--tflops=1e308": "must be above 0 and finite",
    "--memory=0": "must be above 0 and finite",
    "--devices=100000": "100,000 devices are too many; plan at most 512",
    "--mesh=stage:1000,tensor:1000": "1,000,000 devices are too many",
    "--mesh=tensor:" + "9" * 5000: "is not of the form axis:size",
    "--slots=0": "--slots=0",
    "--slots=1000000000": "--slots=1000000000",
    "--prompt_tokens=0": "--prompt_tokens=0",
    "--prompt_tokens=1000000000000": "--prompt_tokens=1000000000000 is longer than the context",
    "--ctx_size=-1": "--ctx_size=-1 is not a whole number of at least 0",
    "--ctx_size=nan": "--ctx_size=nan",
    "--tensor_split=nan,1": "--tensor_split=nan,1 is not a list of shares",
    "--tensor_split=1e308,1e308": "--tensor_split=1e308,1e308 is not a list of shares",
    "--tensor_split=1e-320,1": "over a million times another",
    "--model=": "--model is empty",
    "--model=~/no such file.gguf": "no such file: /",
}
REFUSE = """
import sys
from absl import flags
from jaxsplit.errors import JaxsplitError
from jaxsplit.cli.plan import main
from jaxsplit.cli.program import with_flags
for flag in sys.argv[2:]:
    for name in flags.FLAGS:
        flags.FLAGS[name].unparse()
    try:
        main(flags.FLAGS(["plan", sys.argv[1], flag]))
    except (JaxsplitError, flags.Error) as error:
        print(" ".join(with_flags(str(error)).splitlines()))
    else:
        print("planned")
"""


def test_numbers_that_mean_nothing_are_refused(models):
    """All in one process."""
    command = [sys.executable, "-c", REFUSE, f"--model={models['Q8_0']}", *REFUSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.stderr
    for message, (flag, expected) in zip(done.stdout.splitlines(), REFUSED.items(), strict=True):
        assert expected in message, flag


def test_huge_numbers_that_mean_something_are_planned(models):
    """The most devices and slots, a context that is cut to the model's; JSON of finite numbers."""
    for flags in (["--devices=512"], ["--slots=65536"], ["--ctx_size=1" + 30 * "0"]):
        out = plan_cli(f"--model={models['Q8_0']}", "--json", *flags)
        assert out.returncode == 0 and not out.stderr, out.stderr
        plans = json.loads(out.stdout, parse_constant=lambda name: pytest.fail(name))
        assert all(plan["decode_tokens_per_s"] > 0 for plan in plans)
