"""Memory, cost and predicted speed of a model on a mesh."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jaxsplit.engine.chunked_prefill import CHUNKS, MAX_LOGITS, chunk_lengths
from jaxsplit.engine.runner import CacheSize, bytes_per_device, fitting_pages, peer_buffer_bytes
from jaxsplit.errors import JaxsplitError
from jaxsplit.models import ModelConfig
from jaxsplit.ops.attention.xla import MAX_SCORES
from jaxsplit.ops.matmul.xla import MAX_CONCAT_BYTES
from jaxsplit.ops.moe.spec import MoEConfig
from jaxsplit.plan.cost import ProgramCost, trace_decode, trace_prefill
from jaxsplit.plan.devices import KERNELS, DeviceKind, kind_of
from jaxsplit.plan.roofline import ChunkTime, decode_seconds, prefill_time, weight_bits
from jaxsplit.sharding import SPLIT_MODES, Partition, Stage, stage_memory
from jaxsplit.weights import Sources, abstract_parameters, parameter_bytes, split_model, stage_bytes

_RESERVED = 0.08
"""Fraction of a device's memory that its runtime needs."""


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage, on each of its devices.

    Attributes:
      stage: the layers and the mesh.
      weights, cache, scratch: bytes.
      padding: bytes of weights that are padding or replicas.
      read: bytes read in each decode step.
      decode: cost of a decode step.
      prefill: cost of a prefill chunk.
      decode_seconds: predicted time of a decode step.
      prefill_time: predicted time of a prefill chunk.
    """

    stage: Stage
    weights: int
    cache: int
    scratch: int
    padding: int
    read: int
    decode: ProgramCost
    prefill: ProgramCost
    decode_seconds: float
    prefill_time: ChunkTime


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model on a mesh.

    Attributes:
      partition: how it is split.
      stages: a plan for each stage.
      chunk: tokens in the longest prefill chunk.
      slots: sequences that are decoded together.
      transfers: stage transfers in a decode step, one for each stage boundary, and their bytes:
        activations, and each slot's token and position.
      kinds: of the devices, by rank.
      cache_tokens: tokens that the cache of each data replica would hold if it took the rest of the
        devices' memory.
    """

    partition: Partition
    stages: tuple[StagePlan, ...]
    chunk: int
    slots: int
    transfers: tuple[int, int]
    kinds: tuple[DeviceKind, ...]
    cache_tokens: int

    @property
    def name(self) -> str:
        """Split mode and mesh shape."""
        shape = ",".join(f"{axis}:{size}" for axis, size in self.partition.mesh.shape.items())
        return f"{self.partition.mode} {shape}"

    def on_device(self, rank: int) -> dict[str, int]:
        """Bytes of weights, cache, scratch and padding on the device of a rank."""
        mine = [s for s in self.stages if rank in s.stage.ranks]
        sums = {k: sum(getattr(s, k) for s in mine) for k in ("weights", "cache", "padding")}
        return sums | {"scratch": max((s.scratch for s in mine), default=0)}

    @property
    def fullest(self) -> dict[str, int]:
        """`on_device` of the device that holds most."""
        devices = [self.on_device(rank) for rank in range(self.partition.mesh.size)]
        return max(devices, key=lambda d: d["weights"] + d["cache"] + d["scratch"])

    @property
    def fits(self) -> bool:
        """Whether every device has enough memory besides what its runtime needs."""
        return all(
            sum(held.values()) - held["padding"] <= kind.memory * (1 - _RESERVED)
            for rank, kind in enumerate(self.kinds)
            for held in [self.on_device(rank)]
        )

    @property
    def collectives(self) -> Counter:
        """Collectives of a decode step, over all stages."""
        return sum((s.decode.collectives for s in self.stages), Counter())

    @property
    def collective_bytes(self) -> int:
        """Bytes of a decode step's collectives on each device, over all stages."""
        return sum(sum(s.decode.collective_bytes.values()) for s in self.stages)

    @property
    def decode_rate(self) -> float:
        """Predicted tokens/s, over all sequences."""
        seconds = [s.decode_seconds for s in self.stages]
        transfer = 2 * max(kind.collective_seconds for kind in self.kinds)
        latency = sum(seconds) + (len(seconds) - 1) * transfer
        micro_batches = min(self.slots, len(seconds))
        return self.slots / max(latency, micro_batches * max(seconds))

    def summary(self, prompt_tokens: int) -> dict[str, Any]:
        """The plan as plain values, for JSON.

        Args:
          prompt_tokens: length of the prompt whose prefill rate is predicted.
        """
        return {
            "split_mode": self.partition.mode,
            "mesh": dict(self.partition.mesh.shape),
            "fits": self.fits,
            "devices": [
                {"kind": kind.name, **self.on_device(rank)} for rank, kind in enumerate(self.kinds)
            ],
            "stages": [
                {
                    "layers": [s.stage.layers.start, s.stage.layers.stop],
                    "devices": s.stage.ranks.reshape(-1).tolist(),
                    "read_bytes": s.read,
                    "flops": s.decode.flops,
                    "collectives": dict(s.decode.collectives),
                    "collective_bytes": dict(s.decode.collective_bytes),
                }
                for s in self.stages
            ],
            "cache_tokens": self.cache_tokens,
            "transfers": self.transfers[0],
            "transfer_bytes": self.transfers[1],
            "decode_tokens_per_s": self.decode_rate,
            "prefill_tokens_per_s": self.prefill_rate(prompt_tokens),
        }

    def prefill_rate(self, length: int) -> float:
        """Predicted tokens/s of a prompt, whose chunks are pipelined over the stages."""
        first, *others = chunk_lengths(length, stages=len(self.stages))

        def seconds(tokens: int) -> list[float]:
            return [stage.prefill_time.seconds(tokens) for stage in self.stages]

        return length / (sum(seconds(first)) + sum(max(seconds(c)) for c in others))


@dataclasses.dataclass(frozen=True)
class _Workload:
    """How a model is run on the devices of a stage.

    Attributes:
      weights: matrices are dequantized to this dtype; None: as in the file.
      dtype: dtype of activations.
      float8: prompts are multiplied with quantized matrices in 8-bit floating point.
      cache_dtype: dtype of keys and values.
      context: tokens of each slot.
      chunk: tokens in the longest prefill chunk.
      slots: sequences of a micro-batch.
      micro_batches: how many there are.
    """

    weights: jnp.dtype | None
    dtype: jnp.dtype
    float8: bool
    cache_dtype: jnp.dtype
    context: int
    chunk: int
    slots: int
    micro_batches: int


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
      kinds: of the devices, by rank.
      weights: dequantize matrices to this dtype; None: as in the file.
      dtype: dtype of activations.
      float8: prompts are multiplied with quantized matrices in 8-bit floating point.
      cache_dtype: dtype of keys and values; None: as the activations.
      context: tokens of each slot.
      slots: sequences that are decoded together.
      chunk: tokens in the longest prefill chunk.
    """
    if shares is None and shape.get("stage", 1) > 1:
        shares = stage_memory(shape, [kind.memory for kind in kinds])
    context, dtype = min(context, config.context), jnp.dtype(dtype)
    cache_dtype = jnp.dtype(dtype if cache_dtype is None else cache_dtype)
    partition = split_model(
        sources,
        config,
        mode,
        shape,
        None,
        shares=shares,
        weights=weights,
        cache_bytes_per_dim=context * cache_dtype.itemsize,
        reduce_dtype=reduce_dtype,
    )
    micro_batches = min(slots, len(partition.stages))
    batch_slots = math.ceil(slots / (micro_batches * partition.data)) * partition.data
    workload = _Workload(
        weights=weights,
        dtype=dtype,
        float8=float8,
        cache_dtype=cache_dtype,
        context=context,
        chunk=min(chunk, context),
        slots=batch_slots,
        micro_batches=math.ceil(slots / batch_slots),
    )
    stages = [
        _plan_stage(sources, config, stage, [kinds[rank] for rank in stage.ranks.flat], workload)
        for stage in partition.stages
    ]
    boundaries = len(partition.stages) - 1
    widths = [config.stream_layout(stage.layers.start).width for stage in partition.stages[1:]]
    size = batch_slots // partition.data * sum(width * dtype.itemsize + 8 for width in widths)
    transfers = (boundaries, size)
    free = [
        cache_room(min(kinds[rank].memory for rank in one.stage.ranks.flat), one.scratch, config)
        - one.weights
        for one in stages
    ]
    cache = CacheSize.of_slots(context, -(-slots // partition.data))
    pages = fitting_pages(config, partition.stages, free, cache, cache_dtype)
    tokens = pages * cache.page
    return Plan(partition, tuple(stages), workload.chunk, slots, transfers, tuple(kinds), tokens)


def _plan_stage(
    sources: Sources,
    config: ModelConfig,
    stage: Stage,
    kinds: Sequence[DeviceKind],
    w: _Workload,
) -> StagePlan:
    kind = _slowest(kinds)
    weights, padding = stage_bytes(sources, config, stage, w.weights)
    sizes = w.slots, w.context, w.cache_dtype
    cache = _cache_bytes(config, stage, *sizes)  # that a micro-batch reads
    held = _cache_bytes(config, stage, *sizes, checkpoints=True)
    decode = trace_decode(config, stage, w.dtype, w.context, w.slots)
    prefill = trace_prefill(config, stage, w.dtype, w.context, w.chunk)
    read_weights = weights - _unread(sources, config, stage, w.weights, w.slots)
    pairs = w.chunk * w.context
    score_bytes = 0 if kind.triton else 4 * _widest(config, stage, "heads")
    scratch = scratch_bytes(
        config, stage, w.dtype, chunk=w.chunk, context=w.context, kernels=kind.triton
    )
    bits = weight_bits(sources, w.weights)
    return StagePlan(
        stage=stage,
        weights=weights,
        cache=held * w.micro_batches,
        scratch=scratch,
        padding=padding,
        read=read_weights + cache,
        decode=decode,
        prefill=prefill,
        decode_seconds=decode_seconds(
            kind,
            stage,
            decode,
            read=read_weights + cache,
            weights=read_weights,
            bits=bits,
            rows=w.slots // stage.mesh.shape["data"],
            dtype=w.dtype,
        ),
        prefill_time=prefill_time(
            kind,
            stage,
            prefill,
            held=weights,
            bits=bits,
            scores=score_bytes * pairs,
            chunk=w.chunk,
            float8=w.float8,
        ),
    )


def _unread(
    sources: Sources, config: ModelConfig, stage: Stage, weights: jnp.dtype | None, tokens: int
) -> int:
    """Bytes of a stage's parameters on each device that a decode step does not read: embeddings of
    other tokens, and experts that no token is routed to, if the router spreads them evenly."""
    params = abstract_parameters(config, stage.layers)
    unread = 0.0
    for path, param in params.items():
        share = 0.0
        if path.endswith("embedding.table"):
            last = stage.layers.stop == config.layers
            share = 0.0 if config.tied and last and path == "embedding.table" else 1.0
        elif param.axes[0].name == "experts":
            mlp = config.blocks[int(path.split(".")[1])].mlp
            moe = cast(MoEConfig, getattr(mlp, "moe", mlp))
            share = (1 - moe.top_k / moe.experts) ** (tokens // stage.mesh.shape["data"])
        if share:
            unread += share * parameter_bytes(stage, sources[path], param.axes, weights)
    return round(unread)


def _cache_bytes(
    config: ModelConfig,
    stage: Stage,
    slots: int,
    context: int,
    dtype: jnp.dtype,
    *,
    checkpoints: bool = False,
) -> int:
    """Bytes of keys, values and states on each device of a stage; with a checkpoint of each state,
    or without."""
    size = CacheSize.of_slots(context, slots // stage.mesh.shape["data"])
    size = dataclasses.replace(size, states=size.states * (2 if checkpoints else 1))
    return bytes_per_device(config, stage, size, dtype)


def _widest(config: ModelConfig, stage: Stage, name: str) -> int:
    """Elements of an axis on each device, in the stage's widest layer."""
    axes = {
        axis
        for param in abstract_parameters(config, stage.layers).values()
        for axis in param.axes
        if axis.name == name
    }
    layouts = [layout for axis in axes if (layout := stage.layout(axis))]
    return max((layout.size // layout.devices for layout in layouts), default=0)


def _slowest(kinds: Sequence[DeviceKind]) -> DeviceKind:
    """A stage's devices wait for one another: each rate is the slowest device's."""
    worst = {"layer_seconds": max, "collective_seconds": max, "float8": all, "peer_access": all}
    worst["kernels"] = functools.partial(min, key=KERNELS.index)
    return DeviceKind(
        "+".join(dict.fromkeys(kind.name for kind in kinds)),
        **{
            field.name: worst.get(field.name, min)(getattr(kind, field.name) for kind in kinds)
            for field in dataclasses.fields(DeviceKind)
            if field.name != "name"
        },
    )


_MARGIN = 0.04
"""Share of a device's memory that stays free beside weights, cache and known temporaries."""


def cache_room(memory: float, scratch: float, config: ModelConfig) -> float:
    """Bytes of a device that are left for weights and cache.

    Args:
      memory: of the device.
      scratch: as of `scratch_bytes`.
      config: of the model, of whose tokens some logits are kept.
    """
    return memory * (1 - _MARGIN) - scratch - 2 * 4 * MAX_LOGITS * config.vocab


def scratch_bytes(
    config: ModelConfig,
    stage: Stage,
    dtype: jnp.dtype,
    *,
    chunk: int,
    context: int,
    kernels: bool,
) -> int:
    """Bytes of temporaries and of buffers for peers on each device of a stage.

    Args:
      config: the model.
      stage: of its layers.
      dtype: of activations.
      chunk: tokens in the longest prefill chunk.
      context: most tokens of a sequence.
      kernels: kernels compute, so that no scores reach memory.
    """
    pairs = min(chunk * context, MAX_SCORES)
    scores = 0 if kernels else 4 * _widest(config, stage, "heads") * pairs
    scratch = _scratch(config, stage, dtype, chunk, scores)
    devices = stage.mesh.size // stage.mesh.shape["data"]
    return scratch + (peer_buffer_bytes(config, context, devices) if kernels and devices > 1 else 0)


def _scratch(config: ModelConfig, stage: Stage, dtype: jnp.dtype, chunk: int, scores: int) -> int:
    """Bytes of the largest temporaries in prefill.

    In attention: scores and weights. In the MLP: hidden units, and a dequantized matrix, or two
    small ones.
    """
    size = jnp.dtype(dtype).itemsize
    units = _widest(config, stage, "mlp")
    stream = 3 * chunk * config.embed * 4
    hidden = chunk * units * (4 + 2 * size)
    matrix = units * config.embed * size
    matrices = 2 * matrix if 2 * matrix <= MAX_CONCAT_BYTES else matrix
    return stream + max(2 * scores, hidden + matrices)


def candidates(devices: int, *, experts: bool = False) -> list[tuple[str, dict[str, int]]]:
    """All split modes on `devices` devices, and all meshes of `stage` and `tensor`; with experts,
    also a mesh of `expert`."""
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
    sources: Sources, config: ModelConfig, devices: Sequence[jax.Device], **options: Any
) -> tuple[str, dict[str, int]]:
    """The split mode and mesh shape with the fastest predicted decode of those that fit.

    Args:
      sources, config: the model.
      devices: the devices to use.
      **options: as in `make_plan`.

    Raises:
      JaxsplitError: none fits; the message tells which comes closest.
    """
    plans = best_plans(sources, config, [kind_of(device) for device in devices], **options)
    best = plans[0]
    if not best.fits:
        near = min(plans, key=lambda plan: sum(plan.fullest.values()))
        need = sum(near.fullest.values()) - near.fullest["padding"]
        have = min(kind.memory for kind in near.kinds)
        raise JaxsplitError(
            f"the model does not fit: {near.name}, which comes closest, needs {need / 1e9:.1f} GB "
            f"on a device of {have / 1e9:.1f} GB; try a shorter ctx_size"
        )
    return best.partition.mode, dict(best.partition.mesh.shape)


def best_plans(
    sources: Sources, config: ModelConfig, kinds: Sequence[DeviceKind], **options: Any
) -> list[Plan]:
    """Plans of all split modes on the devices: fitting ones first, then sorted by decode rate.

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
