"""How fast devices should be: a roofline with measured efficiencies."""

import dataclasses
import math

import jax.numpy as jnp

from jaxsplit.comm import one_shot
from jaxsplit.ops.matmul import triton_gemv_int8, triton_small_m_gemm
from jaxsplit.plan.cost import Work
from jaxsplit.plan.devices import DeviceKind
from jaxsplit.sharding import Stage
from jaxsplit.weights import Sources


@dataclasses.dataclass(frozen=True)
class _Efficiency:
    """What is reached of a device's rates; measured (benchmarks/RESULTS.md).

    Attributes:
      memory: of the bandwidth, by products of a few rows.
      few_bits: likewise, with weights of less than 8 bits.
      matmul: of the FLOP/s, by products of many rows.
      score_passes: how often attention's scores pass through memory in prefill.
      weight: seconds that products of a row or two take for each weight, beside reading it. GPUs
        with few multiprocessors take longer, but have less bandwidth, too.
      weight_in_tiles: likewise, products of some tens of rows, without what each row takes.
      tiles: of the FLOP/s, what each row takes there. None: there are no such products.
      float8: how many times as fast products of many rows are in 8-bit floating point, with what is
        around them.
    """

    memory: float
    few_bits: float
    matmul: float
    score_passes: int
    weight: float = 0.0
    weight_in_tiles: float = 0.0
    tiles: float | None = None
    float8: float = 1.44


_EFFICIENCY = {
    False: _Efficiency(memory=0.88, few_bits=0.36, matmul=0.5, score_passes=6),
    True: _Efficiency(
        memory=0.97,
        few_bits=0.97,
        matmul=0.68,
        score_passes=0,
        weight=4.3e-14,
        weight_in_tiles=1e-13,
        tiles=0.62,
    ),
}
"""Without kernels, and with them."""

_COPY_EFFICIENCY = 0.9
_LINK_EFFICIENCY = 0.6


def weight_bits(sources: Sources, weights: jnp.dtype | None = None) -> float:
    """Bits of a weight, on average.

    Args:
      sources: the tensors of a model's parameters.
      weights: dequantized to this dtype; None: as in the file.
    """
    if weights is not None:
        return 8 * weights.itemsize
    count = sum(math.prod(source.shape) for source in sources.values())
    return 8 * sum(source.nbytes for source in sources.values()) / count


def decode_seconds(
    kind: DeviceKind,
    stage: Stage,
    work: Work,
    read: int,
    weights: int,
    bits: float,
    rows: int,
    dtype: jnp.dtype,
) -> float:
    """A step of so many rows on each device.

    Args:
      kind, stage, work: the devices, their layers, and what one of them does.
      read: bytes.
      weights: bytes of them that are weights.
      bits: of a weight.
      rows: sequences.
      dtype: of activations.
    """
    e, count = _EFFICIENCY[kind.kernels], weights * 8 / bits
    reading = read / (kind.bandwidth * (e.few_bits if bits < 8 else e.memory))
    tiled = e.tiles is not None and dtype == jnp.bfloat16 and rows <= triton_small_m_gemm.MAX_ROWS
    if bits < 16 and tiled and rows > triton_gemv_int8.MAX_ROWS:
        products = reading + count * e.weight_in_tiles + work.flops / (kind.flops * e.tiles)
    elif bits < 16 and rows > (triton_gemv_int8.MAX_ROWS if kind.kernels else 1):
        moved = read + 2 * weights * 16 / bits
        products = moved / (kind.bandwidth * _COPY_EFFICIENCY)
        products += work.flops / (kind.flops * e.matmul)
    else:
        products = max(reading + count * e.weight, work.flops / (kind.flops * e.matmul))
    return products + len(stage.layers) * kind.layer_seconds + _meeting(kind, stage, work)


def prefill_seconds(
    kind: DeviceKind,
    stage: Stage,
    work: Work,
    held: int,
    bits: float,
    scores: int,
    chunk: int,
    *,
    float8: bool,
) -> tuple[float, float]:
    """A chunk of a prompt on each device: seconds whatever its length, which dequantized weights
    take that are written and read once, and for each token: products, scores and meeting.

    Args:
      kind, stage, work: the devices, their layers, and what one of them does.
      held: bytes of weights.
      bits: of a weight.
      scores: bytes of attention's scores in a layer.
      chunk: tokens.
      float8: quantized matrices are multiplied in 8-bit floating point.
    """
    e, quantized = _EFFICIENCY[kind.kernels], bits < 16
    bandwidth = kind.bandwidth * _COPY_EFFICIENCY
    dequantized = held * (8 if float8 else 16) / bits if quantized else 0
    fixed = (held + 2 * dequantized) / bandwidth + len(stage.layers) * kind.layer_seconds
    matmul = e.matmul * (e.float8 if float8 and quantized else 1)
    products = work.flops / (kind.flops * matmul)
    traffic = e.score_passes * scores * len(stage.layers) / bandwidth
    return fixed, (products + traffic + _meeting(kind, stage, work)) / chunk


def _meeting(kind: DeviceKind, stage: Stage, work: Work) -> float:
    """An all-reduce carries its bytes twice, less what a device has itself; a gather once. Numbers
    so few that kernels exchange them go to every other device, in 8 bytes each."""
    others = stage.mesh.size // stage.mesh.shape["data"] - 1
    sums, gathers = work.collectives["all-reduce"], work.collectives["all-gather"]
    meetings = sums + gathers
    if kind.exchanges:  # a gather is a kernel of its own, which no product sends for
        meetings = sums * (1 + others / 24) + 2 * gathers * (1 + others / 12)
    summed, gathered = work.collective_bytes["all-reduce"], work.collective_bytes["all-gather"]
    numbers = summed // 4  # float32
    if kind.exchanges and sums and one_shot.supports(numbers // sums):
        sent = 8 * numbers * others
    else:
        sent = summed
    rate = kind.link * _LINK_EFFICIENCY
    return meetings * kind.meet_seconds + (sent + gathered / 2) / rate
