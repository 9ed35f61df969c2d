"""Prefill and decode rates of a model on a mesh, each beside its limit and the plan.

The limits come from the bandwidth of a copy and the rate of a matrix product, measured first.
Decoding: each device reads its weights and the filled part of its cache once. Prefill: matmuls keep
all devices busy. Both ignore collectives.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

import jaxsplit
from jaxsplit.bench import record
from jaxsplit.bench.measure import WARM_UP, all_reduce_seconds, copy_bandwidth, matmul_rate
from jaxsplit.bench.random_model import model_and_type
from jaxsplit.config import LoadConfig
from jaxsplit.engine import compile_seconds
from jaxsplit.engine.runner import CacheSize
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile
from jaxsplit.llm import named_dtype
from jaxsplit.models import (
    AttentionConfig,
    DenseMoEConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
)
from jaxsplit.ops.matmul import float8
from jaxsplit.plan import Plan, kind_of, make_plan, weight_bits
from jaxsplit.weights import Sources, parameter_sources


@dataclasses.dataclass(frozen=True)
class Tests:
    """What is measured, each combination of length and depth; a length of 0 is left out.

    Attributes:
      prompts: lengths of prompts, in tokens.
      generated: tokens to decode.
      depths: tokens of context before.
      repetitions: how often each is measured.
    """

    prompts: Sequence[int]
    generated: Sequence[int]
    depths: Sequence[int]
    repetitions: int

    @property
    def context(self) -> int:
        """Tokens of context that all of them fit in."""
        return max(self.depths) + max(*self.prompts, *self.generated) + 1


def _active_weights(sources: Sources, config: ModelConfig) -> float:
    """Weights that a token is multiplied with, without embedding and head."""
    active = 0.0
    for path, source in sources.items():
        if path.startswith("blocks.") and source.is_matrix:
            mlp = config.blocks[int(path.split(".")[1])].mlp
            moe = mlp.moe if isinstance(mlp, DenseMoEConfig) else mlp
            share = 1.0
            if isinstance(moe, MoEConfig) and len(source.shape) == 3 and ".mlp." in path:
                share = moe.top_k / moe.experts
            active += share * math.prod(source.shape)
    return active


def _prefill_flops(sources: Sources, config: ModelConfig, length: int, depth: int) -> float:
    """FLOPs of a prompt: matmuls with the weights, and causal attention."""
    pairs = length * depth + length**2 / 2
    heads = 0
    for mixer in (block.mixer for block in config.blocks):
        if isinstance(mixer, AttentionConfig | LatentAttentionConfig):
            heads += mixer.heads * (mixer.head_dim + mixer.value_dim)
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


def load(
    file: ModelFile,
    mode: str,
    mesh: str | None,
    batch: int,
    tests: Tests,
    options: Mapping[str, Any],
) -> jaxsplit.LM:
    """A model with a cache for the tests of `batch` sequences, arguments as of `Benchmark`."""
    cache = CacheSize.of_slots(tests.context, batch)
    return jaxsplit.load(
        file,
        split_mode=mode,
        mesh=mesh,
        **options,
        ctx_size=tests.context,
        slots=batch,
        cache_tokens=cache.pages * cache.page,
    )


_limits = functools.cache(_Limits)  # measured once for all splits of the same devices
_GREEDY = jaxsplit.SamplingConfig(temperature=0.0)


def _read(lm: jaxsplit.LM, batch: int, length: int) -> float:
    """Seconds that reading random prompts of a length takes, with the first token of each."""
    rng, engine = np.random.default_rng(0), lm.closed_batch
    prompts = {slot: rng.integers(0, lm.config.vocab, length).tolist() for slot in range(batch)}
    start = time.perf_counter()
    engine.start_all(prompts, _GREEDY)
    engine.read(engine.tokens())
    return time.perf_counter() - start


def _decode_limit(plan: Plan, limits: _Limits, batch: int, filled: float) -> float:
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


class Benchmark:
    """A loaded model on a mesh, and its tests.

    Args:
      file: the model.
      mode: split mode.
      mesh: such as `stage:2,tensor:4`; None: all devices.
      batch: sequences that are decoded together.
      tests: what is measured.
      options: fields of `LoadConfig` by name, others than these.

    Attributes:
      lm: the loaded model.
      plan: its plan.
    """

    def __init__(
        self,
        file: ModelFile,
        mode: str,
        mesh: str | None,
        batch: int,
        tests: Tests,
        options: Mapping[str, Any] = MappingProxyType({}),
    ):
        config = LoadConfig(**options)
        self._file, self._mode, self._batch, self._tests = file, mode, batch, tests
        self._options = options
        start, self._compiled_before = time.perf_counter(), compile_seconds()
        self.lm = load(file, mode, mesh, batch, tests, options)
        self._load_seconds = time.perf_counter() - start
        self._shortest = min(filter(None, tests.prompts), default=1)
        self._first_token_seconds = self._load_seconds + _read(self.lm, batch, self._shortest)
        self._compile_seconds = compile_seconds() - self._compiled_before
        lm, dtype = self.lm, self.lm.models[0].dtype
        self._sources = parameter_sources(file, lm.config)
        stored = named_dtype(config.weights)
        in_float8 = config.prefill_dtype == "float8" and weight_bits(self._sources, stored) < 16
        devices = jax.sharding.Mesh(lm.mesh.devices.reshape(-1), "tensor")
        of_prompts = jax.numpy.dtype(float8.DTYPE) if in_float8 else dtype
        self._limits = _limits(devices, dtype, of_prompts, lm.config.embed * batch)
        self.plan = make_plan(
            self._sources,
            lm.config,
            mode,
            dict(lm.mesh.shape),
            [kind_of(device) for device in lm.mesh.devices.flat],
            weights=stored,
            dtype=dtype,
            float8=in_float8,
            cache_dtype=lm.engine.runners[0].cache_dtype,
            context=lm.engine.context,
            slots=batch,
        )

    def describe(self) -> str:
        """The split, the limits, and the seconds until the first token."""
        return (
            f"{self.plan.name}, batch {self._batch}: {self._limits}\n"
            f"loaded in {self._load_seconds:.1f} s, {self._shortest} tokens read after "
            f"{self._first_token_seconds:.1f} s in all, of which {self._compile_seconds:.1f} s to "
            "trace and compile"
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Runs the tests; yields a row for each.

        Raises:
          JaxsplitError: a prompt is too short for its time to be told from that of its context.
        """
        for kind, count, depth, times in self._times():
            if min(times) <= 0:
                raise JaxsplitError(
                    f"n_prompt={count}: after {depth} tokens, its time cannot be told from theirs; "
                    "measure a longer prompt"
                )
            yield self._row(kind, count, depth, [self._batch * count / took for took in times])

    def _times(self) -> Iterator[tuple[str, int, int, list[float]]]:
        """Each test: its kind, tokens, depth and times in seconds."""
        lm, tests = self.lm, self._tests
        read = functools.partial(_read, lm, self._batch)

        def decode(count: int, depth: int) -> float:
            read(max(depth, 1))
            start = time.perf_counter()
            lm.closed_batch.loop(count, count)
            return time.perf_counter() - start

        def repeated(test: Callable[..., float], *arguments: int) -> list[float]:
            return [test(*arguments) for _ in range(WARM_UP + tests.repetitions)][WARM_UP:]

        for depth in tests.depths:
            for length in filter(None, tests.prompts):
                times = repeated(read, depth + length)
                before = statistics.median(repeated(read, depth)) if depth else 0.0
                yield "pp", length, depth, [took - before for took in times]
            for count in filter(None, tests.generated):
                yield "tg", count, depth, repeated(decode, count, depth)

    def _row(self, kind: str, count: int, depth: int, rates: list[float]) -> dict[str, Any]:
        lm, plan, limits = self.lm, self.plan, self._limits
        if kind == "tg":
            filled = (max(depth, 1) + count / 2) / lm.engine.context
            limit = _decode_limit(plan, limits, self._batch, filled)
            planned = plan.decode_rate
        else:
            needed = _prefill_flops(self._sources, lm.config, count, depth)
            limit = count * lm.mesh.size * limits.prompt_flops / needed
            planned = plan.prefill_rate(count)
        after = f" after {depth}" if depth else ""
        return {
            "model": self._file.metadata.get("general.name", self._file.path.name),
            "gb": sum(source.nbytes for source in self._sources.values()) / 1e9,
            "split": plan.name,
            "batch": self._batch,
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
            "load_seconds": self._load_seconds,
            "first_token_seconds": self._first_token_seconds,
            "compile_seconds": compile_seconds() - self._compiled_before,
            "record": record.make_row(
                lm.mesh.shape,
                ("decode" if kind == "tg" else f"prefill {count}") + after,
                rates,
                "tokens/s",
                **model_and_type(self._file),
                mode=self._mode,
                sequences=self._batch,
                options=self._changed_options(),
                limit=limit,
                plan=planned,
            ),
        }

    def _changed_options(self) -> dict[str, Any]:
        """Options of loading that are not the default."""
        default = LoadConfig()
        return {k: value for k, value in self._options.items() if value != getattr(default, k)}
