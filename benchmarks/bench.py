"""Prefill and decode rates, each beside the limit of the same run.

  python benchmarks/bench.py --model=FILE.gguf -p 512,2048 -n 128 -d 0,4096
  python benchmarks/bench.py --random=llama-8b:Q4_K_M --split=none --split=graph@tensor:2 -b 1,8

`ppN` reads a prompt of N tokens, `tgN` generates N; `@ dN` is after N tokens of context. The limits
come from the bandwidth of a copy and the rate of a matrix product, measured first. Decoding: each
device reads its weights and the filled part of its cache once. Prefill: matmuls keep all devices
busy. Both ignore collectives; the time of one token's all-reduce is printed. `plan` is the
prediction of `jaxsplit.plan`.
"""

import functools
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import record
from absl import flags
from measure import WARM_UP, all_reduce_seconds, copy_bandwidth, markdown, matmul_rate
from random_gguf import model_and_type, model_file

import jaxsplit
from jaxsplit.cli import options
from jaxsplit.cli.program import run
from jaxsplit.config import LoadConfig
from jaxsplit.engine import compile_seconds
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile
from jaxsplit.llm import named_dtype
from jaxsplit.models import ModelConfig
from jaxsplit.ops.matmul import float8
from jaxsplit.plan import Plan, kind_of, make_plan, weight_bits
from jaxsplit.weights import Sources, parameter_sources

_MODEL = flags.DEFINE_string("model", None, "GGUF file or checkpoint")
_RANDOM = flags.DEFINE_string("random", None, "random weights instead, such as llama-8b:Q4_K_M")
_SPLIT = flags.DEFINE_multi_string(
    "split", [], "MODE or MODE@MESH, such as graph@stage:2,tensor:2 (default: graph, all devices)"
)
_PROMPT = flags.DEFINE_list("n_prompt", "512", "prompt lengths; 0: none", short_name="p")
_GENERATE = flags.DEFINE_list("n_gen", "128", "tokens to generate; 0: none", short_name="n")
_DEPTH = flags.DEFINE_list("n_depth", "0", "tokens of context before", short_name="d")
_BATCH = flags.DEFINE_list("batch", "1", "sequences that are decoded together", short_name="b")
_REPEAT = flags.DEFINE_integer("repetitions", 3, "how often to measure", 1, short_name="r")
_LOAD = options.define(
    LoadConfig,
    ["dtype", "activations", "prefill_dtype", "weights", "cache_dtype", "collectives", "kernels"],
)
_COMPILED = flags.DEFINE_string(
    "compilation_cache", None, "folder of compiled programs, for a warm start (default: none)"
)
_JSON = flags.DEFINE_string("json", None, "write the rows to this file too")

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


def _active_weights(sources: Sources, config: ModelConfig) -> float:
    """Weights that a token is multiplied with, without embedding and head."""
    active = 0.0
    for path, source in sources.items():
        if path.startswith("blocks.") and source.is_matrix:
            mlp = config.blocks[int(path.split(".")[1])].mlp
            moe = getattr(mlp, "moe", mlp)
            share = moe.top_k / moe.experts if len(source.shape) == 3 and ".mlp." in path else 1.0
            active += share * math.prod(source.shape)
    return active


def _prefill_flops(sources: Sources, config: ModelConfig, length: int, depth: int) -> float:
    """FLOPs of a prompt: matmuls with the weights, and causal attention."""
    pairs = length * depth + length**2 / 2
    heads = sum(
        block.mixer.heads * (block.mixer.head_dim + block.mixer.value_dim)
        for block in config.blocks
        if hasattr(block.mixer, "value_dim") and hasattr(block.mixer, "kv_heads")
    )
    return 2 * length * _active_weights(sources, config) + 2 * pairs * heads


class _Limits:
    """Measured limits of the devices."""

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        dtype: jax.numpy.dtype,
        prompt_dtype: jax.numpy.dtype,
        embed: int,
    ):
        device = mesh.devices.flat[0]
        self.bandwidth = copy_bandwidth(device)
        self.flops = matmul_rate(device, dtype)
        same = prompt_dtype == dtype
        self.prompt_flops = self.flops if same else matmul_rate(device, prompt_dtype)
        sums = [all_reduce_seconds(mesh, 4 * embed, kernels=kernels) for kernels in (False, True)]
        self.all_reduce = min(took for took in sums if took is not None)

    def __str__(self) -> str:
        reduced = f", all-reduce {self.all_reduce * 1e6:.1f} µs" if self.all_reduce else ""
        return (
            f"copy {self.bandwidth / 1e9:.1f} GB/s, products {self.flops / 1e12:.2f} TFLOP/s, "
            f"of prompts {self.prompt_flops / 1e12:.2f} TFLOP/s{reduced}"
        )


_limits = functools.cache(_Limits)  # measured once for all splits of the same devices
_GREEDY = jaxsplit.SamplingConfig(temperature=0.0)


def _read(lm: jaxsplit.LM, batch: int, length: int) -> float:
    """Seconds that reading random prompts of a length takes, with the first token of each."""
    rng, engine = np.random.default_rng(0), lm.engine
    prompts = {slot: rng.integers(0, lm.config.vocab, length).tolist() for slot in range(batch)}
    start = time.perf_counter()
    engine.start_all(prompts, _GREEDY)
    engine.read(engine.tokens())
    return time.perf_counter() - start


def _tests(lm: jaxsplit.LM, batch: int) -> Iterator[tuple[str, int, int, list[float]]]:
    """Each test: its kind, tokens, depth and times in seconds."""
    read = functools.partial(_read, lm, batch)

    def decode(count: int, depth: int) -> float:
        read(max(depth, 1))
        start = time.perf_counter()
        lm.closed_batch.loop(count, count)
        return time.perf_counter() - start

    def repeated(test: Callable[..., float], *arguments: int) -> list[float]:
        return [test(*arguments) for _ in range(WARM_UP + _REPEAT.value)][WARM_UP:]

    for depth in _numbers(_DEPTH):
        for length in filter(None, _numbers(_PROMPT)):
            times = repeated(read, depth + length)
            before = statistics.median(repeated(read, depth)) if depth else 0.0
            yield "pp", length, depth, [took - before for took in times]
        for count in filter(None, _numbers(_GENERATE)):
            yield "tg", count, depth, repeated(decode, count, depth)


def _changed_options() -> dict[str, Any]:
    """Options of loading that are not the default."""
    return {name: flag.value for name, flag in _LOAD.items() if flag.value != flag.default}


def _decode_limit(plan: Plan, limits: "_Limits", batch: int, filled: float) -> float:
    """Tokens/s of all sequences at the devices' limits, with a fraction of the cache filled."""
    micro_batches = min(batch, len(plan.stages))
    stages = [
        max(
            (s.read - s.cache / micro_batches * (1 - filled)) / limits.bandwidth,
            s.decode.flops / limits.flops,
        )
        for s in plan.stages
    ]
    return batch / max(sum(stages), micro_batches * max(stages))


def measure(
    file: ModelFile, mode: str, mesh: str | None, batch: int = 1
) -> Iterator[dict[str, Any]]:
    """The rows of a split, beside limits and plan; loads the model once for all tests."""
    longest = max(_numbers(_DEPTH)) + max(*_numbers(_PROMPT), *_numbers(_GENERATE)) + 1
    loading, compiling = time.perf_counter(), compile_seconds()
    lm = jaxsplit.load(
        file,
        split_mode=mode,
        mesh=mesh,
        **options.values(_LOAD),
        ctx_size=longest,
        slots=batch,
    )
    loading = time.perf_counter() - loading
    shortest = min(filter(None, _numbers(_PROMPT)), default=1)
    first_token = loading + _read(lm, batch, shortest)
    config, engine, dtype = lm.config, lm.engine, lm.models[0].dtype
    sources = parameter_sources(file, config)
    stored = named_dtype(_LOAD["weights"].value)
    in_float8 = _LOAD["prefill_dtype"].value == "float8" and weight_bits(sources, stored) < 16
    devices = jax.sharding.Mesh(lm.mesh.devices.reshape(-1), "tensor")
    of_prompts = jax.numpy.dtype(float8.DTYPE) if in_float8 else dtype
    limits = _limits(devices, dtype, of_prompts, config.embed * batch)
    plan = make_plan(
        sources,
        config,
        mode,
        dict(lm.mesh.shape),
        [kind_of(device) for device in lm.mesh.devices.flat],
        weights=stored,
        dtype=dtype,
        float8=in_float8,
        cache_dtype=engine.runners[0].cache_dtype,
        context=engine.context,
        slots=batch,
    )
    print(f"\n{plan.name}, batch {batch}: {limits}")
    compiled = compile_seconds() - compiling
    print(
        f"loaded in {loading:.1f} s, {shortest} tokens read after {first_token:.1f} s in all,"
        f" of which {compiled:.1f} s to trace and compile",
        flush=True,
    )
    for kind, count, depth, times in _tests(lm, batch):
        rates = [batch * count / t for t in times]
        if kind == "tg":
            filled = (max(depth, 1) + count / 2) / engine.context
            limit, planned = _decode_limit(plan, limits, batch, filled), plan.decode_rate
        else:
            needed = _prefill_flops(sources, config, count, depth)
            limit = count * lm.mesh.size * limits.prompt_flops / needed
            planned = plan.prefill_rate(count)
        after = f" after {depth}" if depth else ""
        yield {
            "model": file.metadata.get("general.name", file.path.name),
            "gb": sum(source.nbytes for source in sources.values()) / 1e9,
            "split": plan.name,
            "batch": batch,
            "test": f"{kind}{count}" + (f" @ d{depth}" if depth else ""),
            "rate": statistics.median(rates),
            "spread": float(np.std(rates)),
            "limit": limit,
            "ratio": statistics.median(rates) / limit,
            "plan": planned,
            "bandwidth": limits.bandwidth,
            "flops": limits.flops,
            "prompt_flops": limits.prompt_flops,
            "all_reduce_seconds": limits.all_reduce,
            "weight_bytes": lm.weight_bytes,
            "load_seconds": loading,
            "first_token_seconds": first_token,
            "compile_seconds": compile_seconds() - compiling,
            "record": record.make_row(
                lm.mesh.shape,
                ("decode" if kind == "tg" else f"prefill {count}") + after,
                rates,
                "tokens/s",
                **model_and_type(file),
                mode=mode,
                sequences=batch,
                options=_changed_options(),
                limit=limit,
                plan=planned,
            ),
        }


def main(_: list[str]) -> None:
    """Measures each split and batch size; the table grows as it goes."""
    file = model_file(_MODEL.value, _RANDOM.value)
    if _COMPILED.value:
        jax.config.update("jax_compilation_cache_dir", _COMPILED.value)
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}")
    rows: list[dict[str, Any]] = []
    for split in _SPLIT.value or ["graph"]:
        mode, _, mesh = split.partition("@")
        for batch in _numbers(_BATCH):
            for row in measure(file, mode, mesh or None, batch):
                rows.append(row)
                print(f"{row['test']}: {row['rate']:.1f} tokens/s", flush=True)
                if _JSON.value:
                    Path(_JSON.value).write_text(json.dumps(rows, indent=1))
                record.save([row["record"] for row in rows])
            gc.collect()
    print(f"\n{markdown(rows, _COLUMNS)}")


if __name__ == "__main__":
    run(main)
