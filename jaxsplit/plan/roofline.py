"""Predicted times of decode and prefill: a roofline with measured efficiencies."""

import dataclasses
import math

import jax.numpy as jnp

from jaxsplit.comm import one_shot
from jaxsplit.ops.matmul.api import MAX_EXACT_ROWS, MAX_INT8_ROWS, MAX_SMALL_M_ROWS
from jaxsplit.plan.cost import ProgramCost
from jaxsplit.plan.devices import DeviceKind
from jaxsplit.sharding import Stage
from jaxsplit.weights import Sources


@dataclasses.dataclass(frozen=True)
class _Efficiency:
    """Measured fractions of a device's peak rates (docs/plan.md).

    Attributes:
      memory: of the bandwidth, in matmuls of a few rows.
      few_bits: the same for weights of less than 8 bits.
      matmul: of the FLOP/s, in matmuls of many rows.
      score_passes: how often prefill attention streams its scores through memory.
      weight: seconds that matmuls of one or two rows take for each weight besides reading it. GPUs
        with few multiprocessors take longer, but have less bandwidth, too.
      small_m_weight: the same for matmuls of some tens of rows, whatever their number.
      small_m_flops: of the FLOP/s, in matmuls of some tens of rows. None: no such kernels.
      gemm_rows: most rows of other kernels that multiply straight from quantized weights. 0: there
        are none.
      gemm_flops: of the FLOP/s, in their matmuls of a decode step.
      gemm_weight: seconds that they take for each weight, whatever the number of rows.
      gemm_chunk_flops: of the FLOP/s, for each token of a chunk of a prompt.
      float8: speedup of matmuls of many rows by 8-bit floating point, casts included.
    """

    memory: float
    few_bits: float
    matmul: float
    score_passes: int
    weight: float = 0.0
    small_m_weight: float = 0.0
    small_m_flops: float | None = None
    gemm_rows: int = 0
    gemm_flops: float = 1.0
    gemm_weight: float = 0.0
    gemm_chunk_flops: float = 1.0
    float8: float = 1.44


_XLA = _Efficiency(memory=0.88, few_bits=0.36, matmul=0.5, score_passes=6)
_DP4A = dataclasses.replace(_XLA, memory=0.97, few_bits=0.97, weight=4.3e-14)
_TRITON = dataclasses.replace(
    _DP4A, matmul=0.68, score_passes=0, small_m_weight=1.1e-13, small_m_flops=0.36
)
_EFFICIENCY = {
    "xla": _XLA,
    "dp4a": _DP4A,
    "cuda": dataclasses.replace(_DP4A, small_m_weight=5e-13, small_m_flops=0.62),
    "triton": _TRITON,
    "both": dataclasses.replace(
        _TRITON, gemm_rows=512, gemm_flops=0.39, gemm_weight=4.8e-13, gemm_chunk_flops=0.6
    ),
}
"""By the kernels of a device kind."""

_GEMM_ROWS = 33  # sequences from which these kernels multiply
_COPY_EFFICIENCY = 0.9
_LINK_EFFICIENCY = 0.6


def weight_bits(sources: Sources, weights: jnp.dtype | None = None) -> float:
    """Average bits of a weight.

    Args:
      sources: the tensors of a model's parameters.
      weights: matrices are dequantized to this dtype; None: as in the file.
    """
    if weights is not None:
        return 8 * weights.itemsize
    count = sum(math.prod(source.shape) for source in sources.values())
    return 8 * sum(source.nbytes for source in sources.values()) / count


def decode_seconds(
    kind: DeviceKind,
    stage: Stage,
    cost: ProgramCost,
    *,
    read: int,
    weights: int,
    bits: float,
    rows: int,
    dtype: jnp.dtype,
) -> float:
    """Seconds of a decode step.

    Args:
      kind, stage, cost: the devices, their layers, and the step's cost on each of them.
      read: bytes read.
      weights: bytes of weights among them.
      bits: bits of a weight.
      rows: sequences on each device.
      dtype: dtype of activations.
    """
    e, count = _EFFICIENCY[kind.kernels], weights * 8 / bits
    reading = read / (kind.bandwidth * (e.few_bits if bits < 8 else e.memory))
    suits = dtype == jnp.bfloat16 or (dtype == jnp.float16 and not kind.triton)
    small_m = e.small_m_flops if suits and rows <= MAX_SMALL_M_ROWS else None
    few = 1 if kind.kernels == "xla" else MAX_INT8_ROWS
    if bits < 16 and suits and _GEMM_ROWS <= rows <= e.gemm_rows:
        matmuls = max(reading, count * e.gemm_weight, cost.flops / (kind.flops * e.gemm_flops))
    elif bits < 16 and small_m is not None and rows > few:
        matmuls = reading + count * e.small_m_weight + cost.flops / (kind.flops * small_m)
    elif bits < 16 and rows > few:
        moved = read + 2 * weights * 16 / bits
        matmuls = moved / (kind.bandwidth * _COPY_EFFICIENCY)
        matmuls += cost.flops / (kind.flops * e.matmul)
    else:
        matmuls = max(reading + count * e.weight, cost.flops / (kind.flops * e.matmul))
    return matmuls + len(stage.layers) * kind.layer_seconds + _collective_seconds(kind, stage, cost)


@dataclasses.dataclass(frozen=True)
class ChunkTime:
    """Predicted time of a prefill chunk: with dequantized matrices, or of few tokens, which are
    multiplied straight from quantized ones. Each is a fixed time, and one for each token, in
    seconds.

    Attributes:
      many: of any number of tokens.
      few: of up to `most_few` of them.
    """

    many: tuple[float, float]
    few: tuple[float, float] = (0.0, 0.0)
    most_few: int = 0

    def seconds(self, tokens: int) -> float:
        fixed, each = self.few if tokens <= self.most_few else self.many
        return fixed + each * tokens


def prefill_time(
    kind: DeviceKind,
    stage: Stage,
    cost: ProgramCost,
    *,
    held: int,
    bits: float,
    scores: int,
    chunk: int,
    float8: bool,
) -> ChunkTime:
    """Time of a prefill chunk. Fixed: writing and reading dequantized weights once, or dequantizing
    them on the way. For each token: matmuls, attention scores and collectives.

    Args:
      kind, stage, cost: the devices, their layers, and the chunk's cost on each of them.
      held: bytes of weights.
      bits: bits of a weight.
      scores: bytes of a layer's attention scores.
      chunk: tokens.
      float8: quantized matrices are multiplied in 8-bit floating point.
    """
    e, quantized = _EFFICIENCY[kind.kernels], bits < 16
    bandwidth = kind.bandwidth * _COPY_EFFICIENCY
    dequantized = held * (8 if float8 else 16) / bits if quantized else 0
    layers = len(stage.layers) * kind.layer_seconds
    traffic = e.score_passes * scores * len(stage.layers) / bandwidth
    traffic += _collective_seconds(kind, stage, cost)

    def each(efficiency: float) -> float:
        return (cost.flops / (kind.flops * efficiency) + traffic) / chunk

    faster = e.float8 if float8 and quantized else 1
    many = (held + 2 * dequantized) / bandwidth + layers, each(e.matmul * faster)
    if not quantized or not e.gemm_rows:
        return ChunkTime(many)
    few = held / bandwidth + layers + held * 8 / bits * e.gemm_weight, each(e.gemm_chunk_flops)
    return ChunkTime(many, few, MAX_EXACT_ROWS if float8 else e.gemm_rows)


def _collective_seconds(kind: DeviceKind, stage: Stage, cost: ProgramCost) -> float:
    """Latency and transfer time of all collectives. An all-reduce sends its bytes about twice, an
    all-gather once; a small all-reduce over peer access sends 8 bytes an element to every peer."""
    others = stage.mesh.size // stage.mesh.shape["data"] - 1
    reduces, gathers = cost.collectives["all-reduce"], cost.collectives["all-gather"]
    latencies = reduces + gathers
    if kind.peer_access:  # matmuls send for all-reduces, but an all-gather is a kernel of its own
        latencies = reduces * (1 + others / 24) + 2 * gathers * (1 + others / 12)
    reduced, gathered = cost.collective_bytes["all-reduce"], cost.collective_bytes["all-gather"]
    elements = reduced // 4  # float32
    if kind.peer_access and reduces and one_shot.supports(elements // reduces):
        sent = 8 * elements * others
    else:
        sent = reduced
    rate = kind.link * _LINK_EFFICIENCY
    return latencies * kind.collective_seconds + (sent + gathered / 2) / rate
