"""How fast devices should be: a roofline with measured efficiencies."""

import dataclasses
import math

import jax.numpy as jnp

from jaxsplit.parallel import Stage
from jaxsplit.plan.devices import DeviceKind
from jaxsplit.plan.work import Work
from jaxsplit.quant import exchange, kernels, tiles
from jaxsplit.sources import Sources


@dataclasses.dataclass(frozen=True)
class _Efficiency:
    """What is reached of a device's rates; measured (benchmarks/RESULTS.md).

    Attributes:
      few_bits, bytes, plain: of the bandwidth, by products of one row with weights of less than 8
        bits, of less than 16, and with others.
      few_bits_tiles, bytes_tiles: likewise, by products of some tens of rows, without what each row
        takes.
      tiles: of the FLOP/s, what each row takes there. None of these: there are no such products.
      matmul: of the FLOP/s, by products of many rows.
      float8: how many times as fast these are in 8-bit floating point, with what is around them.
      score_passes: how often attention's scores pass through memory in prefill.
    """

    few_bits: float
    bytes: float
    plain: float
    matmul: float
    score_passes: int
    float8: float = 1.44
    few_bits_tiles: float | None = None
    bytes_tiles: float | None = None
    tiles: float | None = None


_EFFICIENCY = {
    False: _Efficiency(few_bits=0.36, bytes=0.88, plain=0.88, matmul=0.5, score_passes=6),
    True: _Efficiency(
        few_bits=0.73,
        bytes=0.8,
        plain=0.9,
        matmul=0.68,
        score_passes=0,
        few_bits_tiles=0.64,
        bytes_tiles=0.82,
        tiles=0.3,
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
    e, few = _EFFICIENCY[kind.kernels], bits < 8
    tiled = kind.kernels and dtype == jnp.bfloat16 and rows <= tiles.MAX_ROWS
    if bits < 16 and tiled and rows > kernels.MAX_ROWS:
        reached = e.few_bits_tiles if few else e.bytes_tiles
        products = read / (kind.bandwidth * reached) + work.flops / (kind.flops * e.tiles)
    elif bits < 16 and rows > (kernels.MAX_ROWS if kind.kernels else 1):
        moved = read + 2 * weights * 16 / bits
        products = moved / (kind.bandwidth * _COPY_EFFICIENCY)
        products += work.flops / (kind.flops * e.matmul)
    else:
        reached = e.plain if bits >= 16 else e.few_bits if few else e.bytes
        products = max(read / (kind.bandwidth * reached), work.flops / (kind.flops * e.matmul))
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
    each = kind.meet_seconds * (1 + others / 12 if kind.exchanges else 1)
    gather = 2 if kind.exchanges else 1  # a kernel of its own, which no product sends for
    sums, gathers = work.collectives["all-reduce"], work.collectives["all-gather"]
    summed, gathered = work.collective_bytes["all-reduce"], work.collective_bytes["all-gather"]
    numbers = summed // 4  # float32
    if kind.exchanges and sums and exchange.supports(numbers // sums):
        sent = 8 * numbers * others
    else:
        sent = summed
    rate = kind.link * _LINK_EFFICIENCY
    return (sums + gather * gathers) * each + (sent + gathered / 2) / rate
