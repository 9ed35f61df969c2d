"""A model over a list of mesh shapes: load, prefill, decode, memory, collectives, beside the plan.

  JAX_NUM_CPU_DEVICES=4 python benchmarks/mesh_shapes.py --model=FILE.gguf --out=DIR
  python benchmarks/mesh_shapes.py --model=FILE.gguf --out=DIR --split=none --split=graph@tensor:2

Runs on the devices present; without --split, on all of them in every split mode. Writes
mesh_shapes.md, mesh_shapes.json and mesh_shapes.png to the directory.
"""

import gc
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import plots
from absl import flags

import jaxsplit
from jaxsplit.bench import record
from jaxsplit.bench.measure import WARM_UP, markdown
from jaxsplit.bench.random_model import model_and_type, model_file
from jaxsplit.cli import options
from jaxsplit.cli.program import run
from jaxsplit.formats import ModelFile
from jaxsplit.plan import candidates, collectives, kind_of, make_plan
from jaxsplit.sharding import choose_devices
from jaxsplit.weights import parameter_sources

_MODEL = flags.DEFINE_string("model", None, "GGUF file")
_RANDOM = flags.DEFINE_string("random", None, "random weights instead, such as llama-8b:Q4_K_M")
_OUT = flags.DEFINE_string("out", None, "directory for the results", required=True)
_SPLIT = flags.DEFINE_multi_string(
    "split", [], "MODE or MODE@MESH, such as graph@stage:2,tensor:2 (default: every mode)"
)
_PROMPT = flags.DEFINE_integer("prompt_tokens", 512, "length of the prompt", lower_bound=1)
_GENERATE = flags.DEFINE_integer("n_predict", 32, "tokens to decode", lower_bound=1)
_CTX = flags.DEFINE_integer("ctx_size", 1024, "tokens of context", lower_bound=2)
_SLOTS = flags.DEFINE_integer("slots", 1, "sequences that are decoded together", lower_bound=1)
_DTYPE = flags.DEFINE_string("dtype", "auto", "of activations")
_JSON_DIR = options.define_json_dir()
_REPEAT = flags.DEFINE_integer(
    "repeat", 3, "how often to measure; the median counts", lower_bound=1
)

_COLUMNS = {
    "split": "split",
    "devices": "devices",
    "load_s": "load s",
    "compile_s": "compile s",
    "prefill": "prefill tok/s",
    "prefill_plan": "plan",
    "decode": "decode tok/s",
    "decode_plan": "plan",
    "held_mb": "held MB",
    "held_mb_plan": "plan",
    "scratch_mb": "scratch MB",
    "scratch_mb_plan": "plan",
    "collectives": "collectives a step",
    "collectives_plan": "plan",
    "collective_kb": "kB",
    "collective_kb_plan": "plan",
}


def _measure(
    file: ModelFile, mode: str, mesh: str | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One row of the table, and rows of the record."""
    options = {"split_mode": mode, "mesh": mesh, "ctx_size": _CTX.value, "slots": _SLOTS.value}
    options["cache_tokens"] = _SLOTS.value * _CTX.value
    lm = jaxsplit.load(file, dtype=_DTYPE.value, **options)
    engine, batch, config = lm.engine, lm.closed_batch, lm.config
    greedy = jaxsplit.SamplingConfig(temperature=0.0)
    rng = np.random.default_rng(0)
    length = min(_PROMPT.value, engine.context - 1)
    count = min(_GENERATE.value, engine.context - length)
    prompts = {s: rng.integers(0, config.vocab, length).tolist() for s in range(engine.slots)}
    prefills, decodes = [], []
    for _ in range(WARM_UP + _REPEAT.value):
        begin = time.perf_counter()
        batch.start_all(prompts, greedy)
        batch.read(batch.tokens())
        middle = time.perf_counter()
        batch.loop(count, count)
        prefills.append(middle - begin)
        decodes.append(time.perf_counter() - middle)
    compiling = prefills[0] + decodes[0]
    prefills, decodes = prefills[WARM_UP:], decodes[WARM_UP:]
    chunk = min(max(engine.chunks), engine.context)
    scratch: Counter = Counter()
    for stage, program in zip(engine.partition.stages, engine.trace_prefill(chunk), strict=True):
        compiled = program.lower().compile()
        for rank in stage.ranks.flat:
            size = compiled.memory_analysis().temp_size_in_bytes
            scratch[rank] = max(scratch[rank], size)
    found = [collectives(step.lower().compile().as_text()) for step in engine.trace_step(greedy)]
    counts = sum((count for count, _ in found), Counter())
    carried = sum(sum(size.values()) for _, size in found)
    shape, devices = choose_devices(mode, None, mesh)
    plan = make_plan(
        parameter_sources(file, config),
        config,
        mode,
        shape,
        [kind_of(device) for device in devices],
        dtype=lm.models[0].dtype,
        context=engine.context,
        slots=engine.slots,
        chunk=chunk,
    )
    full = plan.fullest
    tokens = {f"prefill {length}": (length, prefills), f"decode after {length}": (count, decodes)}
    records = [
        record.make_row(
            lm.mesh.shape,
            metric,
            [engine.slots * number / took for took in times],
            "tokens/s",
            **model_and_type(file),
            mode=mode,
            sequences=engine.slots,
            options={} if _DTYPE.value == "auto" else {"dtype": _DTYPE.value},
            plan=plan.prefill_rate(length) if times is prefills else plan.decode_rate,
        )
        for metric, (number, times) in tokens.items()
    ]
    row = {
        "split": plan.name,
        "devices": lm.mesh.size,
        "load_s": lm.load_seconds,
        "compile_s": compiling,
        "prefill": engine.slots * length / statistics.median(prefills),
        "prefill_plan": plan.prefill_rate(length),
        "decode": engine.slots * count / statistics.median(decodes),
        "decode_plan": plan.decode_rate,
        "held_mb": (lm.weight_bytes + lm.cache_bytes) / 1e6,
        "held_mb_plan": (full["weights"] + full["cache"]) / 1e6,
        "scratch_mb": max(scratch.values()) / 1e6,
        "scratch_mb_plan": full["scratch"] / 1e6,
        "collectives": sum(counts.values()),
        "collectives_plan": sum(plan.collectives.values()),
        "collective_kb": carried / 1e3,
        "collective_kb_plan": plan.collective_bytes / 1e3,
    }
    return row, records


_PANELS = {
    "decode": "decode, tokens/s",
    "prefill": "prefill, tokens/s",
    "held_mb": "MB of weights and cache on the fullest device",
}


def main(_: list[str]) -> None:
    """Measures every mesh, and writes after each, so that nothing is lost."""
    file = model_file(_MODEL.value, _RANDOM.value)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    devices = jax.devices()
    splits = [tuple(split.split("@", 1)) for split in _SPLIT.value] or [
        (mode, ",".join(f"{axis}:{size}" for axis, size in shape.items()))
        for mode, shape in candidates(len(devices))
    ]
    where = f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    together = f", {_SLOTS.value} sequences" if _SLOTS.value > 1 else ""
    title = f"{_RANDOM.value or Path(_MODEL.value).name} on {where}{together}"
    rows: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for mode, *mesh in splits:
        shape = mesh[0] if mesh and mode != "none" else None
        print(f"{mode} {shape or ''}", flush=True)
        row, measured = _measure(file, mode, shape)
        rows.append(row)
        records += measured
        record.save(records, _JSON_DIR.value)
        gc.collect()
        (out / "mesh_shapes.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))
        (out / "mesh_shapes.md").write_text(f"{title}\n\n{markdown(rows, _COLUMNS)}")
        plots.meshes(rows, _PANELS, title, out / "mesh_shapes.png")
    print(f"{title}\n\n{markdown(rows, _COLUMNS)}")


if __name__ == "__main__":
    run(main)
