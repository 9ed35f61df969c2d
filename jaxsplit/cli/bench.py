"""Measure prefill and decode rates, each beside the limit of the same run.

  jaxsplit bench --model=FILE.gguf -p 512,2048 -n 128 -d 0,4096
  jaxsplit bench --random=llama-8b:Q4_K_M --split=none --split=graph@tensor:2

`ppN` reads a prompt of N tokens, `tgN` generates N; `@ dN`: after N tokens of
context. `limit` follows from the bandwidth of a copy and the rate of a matrix
product, measured first, without collectives; `plan` is what jaxsplit plan
predicts.
"""

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxsplit.cli import options
from jaxsplit.config import LoadConfig
from jaxsplit.errors import JaxsplitError

if TYPE_CHECKING:
    from jaxsplit.bench.rates import Tests
    from jaxsplit.formats import ModelFile

GROUPS = {
    "model": "Model and split",
    "n_prompt": "Tests",
    "weights": "Precision and execution",
    "json": "Results",
}

_MODEL = flags.DEFINE_string("model", None, "GGUF file or checkpoint directory")
_RANDOM = flags.DEFINE_string(
    "random", None, "random weights instead, as SHAPE:TYPE, such as llama-8b:Q4_K_M"
)
_SPLIT = flags.DEFINE_multi_string(
    "split",
    [],
    "MODE or MODE@MESH, such as graph@stage:2,tensor:2 (can be repeated; default: graph, all "
    "devices)",
)
_PROMPT = flags.DEFINE_list("n_prompt", "512", "prompt lengths; 0: none", short_name="p")
_GENERATE = flags.DEFINE_list("n_gen", "128", "tokens to generate; 0: none", short_name="n")
_DEPTH = flags.DEFINE_list("n_depth", "0", "tokens of context before", short_name="d")
_BATCH = flags.DEFINE_list("batch", "1", "sequences that are decoded together", short_name="b")
_REPEAT = flags.DEFINE_integer("repetitions", 3, "how often to measure", 1, short_name="r")
_TUNE = flags.DEFINE_boolean(
    "tune",
    False,
    "first find the fastest tilings of kernels for these tests, and keep them for this machine",
)
_LOAD = options.define(
    LoadConfig,
    ["dtype", "activations", "prefill_dtype", "weights", "cache_dtype", "collectives", "kernels"],
)
_COMPILED = flags.DEFINE_string(
    "compilation_cache", None, "folder of compiled programs, for a warm start (default: none)"
)
_JSON = flags.DEFINE_string("json", None, "write the rows to this file too")
_JSON_DIR = options.define_json_dir()

_COLUMNS = {
    "model": "model",
    "gb": "GB",
    "split": "split",
    "batch": "batch",
    "test": "test",
    "rate": "tokens/s",
    "spread": "±",
    "limit": "limit",
    "ratio": "ratio",
    "plan": "plan",
}


def _numbers(flag: flags.FlagHolder) -> list[int]:
    try:
        return [int(value) for value in flag.value]
    except ValueError:
        raise JaxsplitError(
            f"--{flag.name}={','.join(flag.value)} is not a list of integers"
        ) from None


def _tune(file: "ModelFile", mode: str, mesh: str | None, tests: "Tests") -> None:
    """Tunes the kernels of a split, and says what it gains."""
    import jax

    from jaxsplit.bench.rates import load
    from jaxsplit.bench.tune import problems_of, tune
    from jaxsplit.ops.tilings import path_of_tables

    lm = load(file, mode, mesh, max(_numbers(_BATCH)), tests, options.values(_LOAD))
    problems = problems_of(lm, max(tests.prompts))
    policy, device = lm.engine.runners[0].policy, lm.mesh.devices.flat[0]
    if not problems:
        raise JaxsplitError(
            f"--tune: no kernel that has tilings runs on {device.device_kind} with "
            f"--kernels={options.values(_LOAD)['kernels']}"
        )
    del lm
    gc.collect()
    print(f"\nTuning {len(problems)} products and attentions: µs, usual and fastest")
    for one in tune(problems, policy, device):
        what = f"{one.problem.kernel} {one.problem.key}"
        print(f"{one.usual * 1e6:.1f} {one.best * 1e6:.1f} {one.tiling or ''} {what}", flush=True)
    print(f"Kept in {path_of_tables()}")
    jax.clear_caches()  # of programs with the usual tilings


def main(_: list[str]) -> None:
    """Measures each split and batch size; the table grows as it goes."""
    import jax

    from jaxsplit.bench import record
    from jaxsplit.bench.measure import markdown
    from jaxsplit.bench.random_model import model_file
    from jaxsplit.bench.rates import Benchmark, Tests

    tests = Tests(_numbers(_PROMPT), _numbers(_GENERATE), _numbers(_DEPTH), _REPEAT.value)
    file = model_file(_MODEL.value, _RANDOM.value)
    if _COMPILED.value:
        jax.config.update("jax_compilation_cache_dir", _COMPILED.value)
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    rows: list[dict[str, Any]] = []
    for split in _SPLIT.value or ["graph"]:
        mode, mesh = split.partition("@")[::2]
        if _TUNE.value:
            _tune(file, mode, mesh or None, tests)
        for batch in _numbers(_BATCH):
            benchmark = Benchmark(file, mode, mesh or None, batch, tests, options.values(_LOAD))
            print(f"\n{benchmark.describe()}", flush=True)
            for row in benchmark.rows():
                rows.append(row)
                reached = f"{row['ratio']:.0%} of {row['limit']:.4g}"
                print(f"{row['test']}: {row['rate']:.1f} tokens/s, {reached}", flush=True)
                if _JSON.value:
                    Path(_JSON.value).write_text(json.dumps(rows, indent=1), "utf-8")
                record.save([row["record"] for row in rows], _JSON_DIR.value)
            del benchmark
            gc.collect()
    print(f"\n{markdown(rows, _COLUMNS)}")
