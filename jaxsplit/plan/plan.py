"""Memory, work and predicted speed of a model on a mesh."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxsplit.engine.chunked_prefill import CHUNKS, chunk_lengths
from jaxsplit.engine.runner import cache_specs, mailbox_bytes, stage_cache
from jaxsplit.errors import JaxsplitError
from jaxsplit.models import ModelConfig
from jaxsplit.ops.attention.xla import SCORES
from jaxsplit.ops.matmul.xla import TOGETHER
from jaxsplit.plan.cost import Work, trace_decode, trace_prefill
from jaxsplit.plan.devices import DeviceKind, kind_of
from jaxsplit.plan.roofline import decode_seconds, prefill_seconds, weight_bits
from jaxsplit.sharding import SPLIT_MODES, Partition, Stage, stage_memory
from jaxsplit.weights import Sources, abstract_parameters, parameter_bytes, split_model, stage_bytes

_RESERVED = 0.08
"""Of a device's memory, for its runtime."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A run of layers, on each of its devices.

    Attributes:
      stage: the layers and the mesh.
      weights, cache, scratch: bytes.
      padding: bytes of weights that are padding or copies.
      read: bytes read for each decode step.
      decode: the work of a decode step.
      prefill: the work of reading a chunk.
      decode_seconds: predicted for a decode step.
      prefill_seconds: predicted for reading a piece of a prompt: whatever its length, and for each
        of its tokens.
    """

    stage: Stage
    weights: int
    cache: int
    scratch: int
    padding: int
    read: int
    decode: Work
    prefill: Work
    decode_seconds: float
    prefill_seconds: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model on a mesh.

    Attributes:
      partition: how it is split.
      stages: what each stage takes and does.
      chunk: tokens in the longest chunk of a prompt.
      slots: sequences that are decoded together.
      hand_overs: how often a device hands activations on in a decode step, once for each border
        of stages, and the bytes: with each slot's token and position.
      kinds: of the devices, in the mesh's order.
    """

    partition: Partition
    stages: tuple[StagePlan, ...]
    chunk: int
    slots: int
    hand_overs: tuple[int, int]
    kinds: tuple[DeviceKind, ...]

    @property
    def name(self) -> str:
        """The flags that ask for it."""
        shape = ",".join(f"{axis}:{size}" for axis, size in self.partition.mesh.shape.items())
        return f"{self.partition.mode} {shape}"

    def on_device(self, place: int) -> dict[str, int]:
        """Bytes of weights, cache, scratch and padding on one device, by its place in the mesh."""
        mine = [s for s in self.stages if place in s.stage.places]
        sums = {k: sum(getattr(s, k) for s in mine) for k in ("weights", "cache", "padding")}
        return sums | {"scratch": max((s.scratch for s in mine), default=0)}

    @property
    def fullest(self) -> dict[str, int]:
        """`on_device` of the device that holds most."""
        devices = [self.on_device(place) for place in range(self.partition.mesh.size)]
        return max(devices, key=lambda d: d["weights"] + d["cache"] + d["scratch"])

    @property
    def fits(self) -> bool:
        """Whether every device has the memory, less what its runtime needs."""
        return all(
            sum(held.values()) - held["padding"] <= kind.memory * (1 - _RESERVED)
            for place, kind in enumerate(self.kinds)
            for held in [self.on_device(place)]
        )

    @property
    def collectives(self) -> Counter:
        """Of a decode step, all stages together."""
        return sum((s.decode.collectives for s in self.stages), Counter())

    @property
    def collective_bytes(self) -> int:
        """Of a decode step, on each device, all stages together."""
        return sum(sum(s.decode.collective_bytes.values()) for s in self.stages)

    @property
    def decode_rate(self) -> float:
        """Predicted tokens/s of all sequences together."""
        seconds = [s.decode_seconds for s in self.stages]
        latency = sum(seconds) + (len(seconds) - 1) * 2 * max(k.meet_seconds for k in self.kinds)
        groups = min(self.slots, len(seconds))
        return self.slots / max(latency, groups * max(seconds))

    def summary(self, prompt_tokens: int) -> dict[str, Any]:
        """Everything as plain numbers, for JSON.

        Args:
          prompt_tokens: length of the prompt whose rate is predicted.
        """
        return {
            "split_mode": self.partition.mode,
            "mesh": dict(self.partition.mesh.shape),
            "fits": self.fits,
            "devices": [
                {"kind": kind.name, **self.on_device(place)}
                for place, kind in enumerate(self.kinds)
            ],
            "stages": [
                {
                    "layers": [s.stage.layers.start, s.stage.layers.stop],
                    "devices": s.stage.places.reshape(-1).tolist(),
                    "read_bytes": s.read,
                    "flops": s.decode.flops,
                    "collectives": dict(s.decode.collectives),
                    "collective_bytes": dict(s.decode.collective_bytes),
                }
                for s in self.stages
            ],
            "hand_overs": self.hand_overs[0],
            "hand_over_bytes": self.hand_overs[1],
            "decode_tokens_per_s": self.decode_rate,
            "prefill_tokens_per_s": self.prefill_rate(prompt_tokens),
        }

    def prefill_rate(self, length: int) -> float:
        """Predicted tokens/s of a prompt, whose chunks overlap in several stages."""
        first, *others = chunk_lengths(length, stages=len(self.stages))

        def of_stages(tokens: int) -> list[float]:
            return [
                fixed + each * tokens for fixed, each in (s.prefill_seconds for s in self.stages)
            ]

        return length / (sum(of_stages(first)) + sum(max(of_stages(c)) for c in others))


def make_plan(
    sources: Sources,
    config: ModelConfig,
    mode: str,
    shape: dict[str, int],
    kinds: Sequence[DeviceKind],
    *,
    shares: Sequence[float] | None = None,
    weights: jnp.dtype | None = None,
    dtype: jnp.dtype = jnp.bfloat16,
    float8: bool = False,
    cache_dtype: jnp.dtype | None = None,
    reduce_dtype: jnp.dtype | None = None,
    context: int = 4096,
    slots: int = 1,
    chunk: int = CHUNKS[-1],
) -> Plan:
    """Plans a model on a mesh.

    Args:
      sources: the tensors of its parameters.
      config: the model.
      mode, shape, shares, reduce_dtype: as in `split_model`.
      kinds: of the devices, in the mesh's order.
      weights: dequantized to this dtype; None: as in the file.
      dtype: of activations.
      float8: prompts are multiplied with quantized matrices in 8-bit floating point.
      cache_dtype: of keys and values; None: as the activations.
      context: tokens of each slot.
      slots: sequences that are decoded together.
      chunk: tokens of a prompt that are read together at most.
    """
    if shares is None and shape.get("stage", 1) > 1:
        shares = stage_memory(shape, [kind.memory for kind in kinds])
    context = min(context, config.context)
    cache_dtype = jnp.dtype(dtype if cache_dtype is None else cache_dtype)
    partition = split_model(
        sources,
        config,
        mode,
        shape,
        None,
        shares=shares,
        weights=weights,
        cache_row=context * cache_dtype.itemsize,
        reduce_dtype=reduce_dtype,
    )
    chunk = min(chunk, context)
    groups = min(slots, len(partition.stages))
    group_slots = math.ceil(slots / (groups * partition.data)) * partition.data
    groups, rows = math.ceil(slots / group_slots), group_slots // partition.data
    bits = weight_bits(sources, weights)
    plans = []
    for stage in partition.stages:
        kind = _slowest([kinds[place] for place in stage.places.flat])
        held, padding = stage_bytes(sources, config, stage, weights)
        cache = _cache_bytes(config, stage, group_slots, context, cache_dtype)
        decode = trace_decode(config, stage, dtype, context, group_slots)
        prefill = trace_prefill(config, stage, dtype, context, chunk)
        read = held - _unread(sources, config, stage, weights, group_slots) + cache
        pairs = chunk * context
        scores = 0 if kind.kernels else 4 * _widest(config, stage, "heads")
        scratch = _scratch(config, stage, dtype, chunk, scores * min(pairs, SCORES))
        meeting = stage.mesh.size // stage.mesh.shape["data"]
        if kind.kernels and meeting > 1:
            scratch += mailbox_bytes(config, context, meeting)
        plans.append(
            StagePlan(
                stage,
                held,
                cache * groups,
                scratch,
                padding,
                read,
                decode,
                prefill,
                decode_seconds(
                    kind, stage, decode, read, read - cache, bits, rows, jnp.dtype(dtype)
                ),
                prefill_seconds(
                    kind, stage, prefill, held, bits, scores * pairs, chunk, float8=float8
                ),
            )
        )
    borders = len(partition.stages) - 1
    itemsize = jnp.dtype(dtype).itemsize
    widths = [config.stream_width(stage.layers.start) for stage in partition.stages[1:]]
    size = group_slots // partition.data * sum(width * itemsize + 8 for width in widths)
    return Plan(partition, tuple(plans), chunk, slots, (borders, size), tuple(kinds))


def _unread(
    sources: Sources, config: ModelConfig, stage: Stage, weights: jnp.dtype | None, tokens: int
) -> int:
    """Bytes of a stage's parameters on each device that a decode step does not need: embeddings of
    other tokens, and experts that are not chosen, if tokens choose evenly."""
    params = abstract_parameters(config, stage.layers)
    unread = 0.0
    for path, param in params.items():
        share = 0.0
        if path.endswith("embedding.table"):
            last = stage.layers.stop == config.layers
            share = 0.0 if config.tied and last and path == "embedding.table" else 1.0
        elif param.axes[0].name == "experts":
            mlp = config.blocks[int(path.split(".")[1])].mlp
            moe = getattr(mlp, "moe", mlp)
            share = (1 - moe.top_k / moe.experts) ** (tokens // stage.mesh.shape["data"])
        if share:
            unread += share * parameter_bytes(stage, sources[path], param.axes, weights)
    return round(unread)


def _cache_bytes(
    config: ModelConfig, stage: Stage, slots: int, context: int, dtype: jnp.dtype
) -> int:
    """Bytes of keys and values on each device of a stage."""
    cache = jax.eval_shape(lambda: stage_cache(config, stage, slots, context, dtype))
    specs = cache_specs(config, stage, context, dtype)
    sizes = jax.tree.map(
        lambda x, spec: (
            math.prod(NamedSharding(stage.mesh, spec).shard_shape(x.shape)) * x.dtype.itemsize
        ),
        cache,
        specs,
    )
    return sum(jax.tree.leaves(sizes))


def _widest(config: ModelConfig, stage: Stage, name: str) -> int:
    """Units of an axis on each device, in the stage's layer that has most of them."""
    axes = {
        axis
        for param in abstract_parameters(config, stage.layers).values()
        for axis in param.axes
        if axis.name == name
    }
    layouts = [stage.layout(axis) for axis in axes]
    return max((layout.size // layout.devices for layout in layouts), default=0)


def _slowest(kinds: Sequence[DeviceKind]) -> DeviceKind:
    """Devices that work together are as fast as the slowest of them at each task."""
    worst = {"layer_seconds": max, "meet_seconds": max}
    worst |= dict.fromkeys(("kernels", "float8", "exchanges"), all)
    return DeviceKind(
        "+".join(dict.fromkeys(kind.name for kind in kinds)),
        **{
            field.name: worst.get(field.name, min)(getattr(kind, field.name) for kind in kinds)
            for field in dataclasses.fields(DeviceKind)
            if field.name != "name"
        },
    )


def _scratch(config: ModelConfig, stage: Stage, dtype: jnp.dtype, chunk: int, scores: int) -> int:
    """Bytes of the largest temporaries while a chunk of a prompt is read.

    In attention: scores and weights. In the MLP: a dequantized matrix, or two small ones, beside
    the hidden units.
    """
    size = jnp.dtype(dtype).itemsize
    units = _widest(config, stage, "mlp")
    stream = 3 * chunk * config.embed * 4
    hidden = chunk * units * (4 + 2 * size)
    matrix = units * config.embed * size
    matrices = 2 * matrix if 2 * matrix <= TOGETHER else matrix
    return stream + max(2 * scores, hidden + matrices)


def candidates(devices: int, *, experts: bool = False) -> list[tuple[str, dict[str, int]]]:
    """Every split mode on so many devices, and every mesh of stages and parts of layers; with
    experts, a mesh of them."""
    found: list[tuple[str, dict[str, int]]] = [("none", {"tensor": 1})]
    if devices > 1:
        found += [(mode, {s.axis: devices}) for mode, s in SPLIT_MODES.items() if s.axis]
        found += [("graph", {"expert": devices})] * experts
        found += [
            ("graph", {"stage": stages, "tensor": devices // stages})
            for stages in range(2, devices)
            if devices % stages == 0
        ]
    return found


def best_split(
    sources: Sources, config: ModelConfig, devices: Sequence[jax.Device], **options: object
) -> tuple[str, dict[str, int]]:
    """The split mode and mesh shape that fit these devices and should decode fastest.

    Args:
      sources, config: the model.
      devices: that there are.
      **options: as in `make_plan`.

    Raises:
      JaxsplitError: nothing fits; the message says what comes nearest.
    """
    plans = best_plans(sources, config, [kind_of(device) for device in devices], **options)
    best = plans[0]
    if not best.fits:
        near = min(plans, key=lambda plan: sum(plan.fullest.values()))
        need = sum(near.fullest.values()) - near.fullest["padding"]
        have = min(kind.memory for kind in near.kinds)
        raise JaxsplitError(
            f"the model does not fit: {near.name}, which comes nearest, needs {need / 1e9:.1f} GB "
            f"on a device of {have / 1e9:.1f} GB; try a shorter ctx_size"
        )
    return best.partition.mode, dict(best.partition.mesh.shape)


def best_plans(
    sources: Sources, config: ModelConfig, kinds: Sequence[DeviceKind], **options: object
) -> list[Plan]:
    """Plans of all split modes on so many devices: those that fit first, the fastest decode first.

    Args:
      sources, config: the model.
      kinds: of the devices.
      **options: as in `make_plan`.
    """
    has_experts = any("experts" in path for path in sources)
    plans = [
        make_plan(sources, config, mode, shape, kinds[: math.prod(shape.values())], **options)
        for mode, shape in candidates(len(kinds), experts=has_experts)
    ]
    return sorted(plans, key=lambda plan: (not plan.fits, -plan.decode_rate))
