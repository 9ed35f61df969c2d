"""How the units of a logical axis are laid out on the devices that shard it.

A unit is indivisible: a head, a block of quantized weights, a row. Units that do not divide evenly
are padded with zeros, which change no result; KV heads fewer than the devices are replicated.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class AxisLayout:
    """The units of all devices along one logical axis, in device order.

    Attributes:
      unit: elements in a unit.
      units: int array: the unit in each slot, or -1 for padding; all devices have equally many.
      devices: number of shards.
    """

    unit: int
    units: np.ndarray
    devices: int = 1

    @property
    def size(self) -> int:
        """Elements of the padded axis."""
        return self.unit * len(self.units)

    @property
    def original(self) -> int:
        """Elements of the axis before padding."""
        return self.unit * (int(self.units.max()) + 1)

    def elements(self) -> np.ndarray:
        """The original element at each padded index, or -1: int `[size]`."""
        start = np.where(self.units < 0, -self.unit, self.units * self.unit)
        return np.maximum(start[:, None] + np.arange(self.unit), -1).reshape(-1)

    def sub_blocks(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The axis in sub-blocks of blocks of `block` elements.

        Returns:
          the elements of a sub-block (the whole block where the units allow it), the block of each
          sub-block (-1 for padding), and the sub-block's index in it.
        """
        size = len(self.units) // self.devices * self.unit
        for sub_block in (block, math.gcd(block, self.unit)):
            if size % sub_block:
                continue
            elements = self.elements().reshape(-1, sub_block)
            first = elements[:, :1]
            aligned = (first % sub_block == 0) | (first < 0)
            consecutive = np.where(first < 0, -1, first + np.arange(sub_block))
            if np.all(elements == consecutive) and aligned.all():
                break
        first = first[:, 0]
        source = np.where(first < 0, -1, first // block)
        return sub_block, source, np.where(first < 0, 0, first % block // sub_block)


def even(count: int, unit: int, devices: int) -> AxisLayout:
    """Equally many units on each device, the last devices padded."""
    local = math.ceil(count / devices)
    units = np.arange(local * devices)
    return AxisLayout(unit, np.where(units < count, units, -1), devices)


def grouped_heads(
    heads: int,
    kv_heads: int,
    head_dim: int,
    devices: int,
    kv_cost: float = 1.0,
    *,
    tiled: bool = False,
) -> tuple[AxisLayout, AxisLayout]:
    """Layouts of query heads and of the KV heads that groups of them share.

    Every device gets the same number of KV heads, and each of these the same number of query heads.
    Where the counts do not divide, some units are padding, or, where that costs less, a KV head is
    replicated on several devices, each with some of its query heads.

    Args:
      heads, kv_heads: head counts.
      head_dim: width of a head.
      devices: number of shards.
      kv_cost: bytes read for a KV head and its cache, relative to a query head: the layout that
        reads fewer bytes decodes faster (docs/log.md).
      tiled: query head h uses KV head `h % kv_heads`; else neighboring heads share one.

    Returns:
      the layouts of the query heads and of the KV heads.
    """
    group = heads // kv_heads

    def cost(local: int) -> tuple[float, int]:
        copies = devices * local // kv_heads
        return local * math.ceil(group / copies) + local * kv_cost, local

    least = math.ceil(kv_heads / devices)
    local = min(range(least, kv_heads + 1), key=cost)
    copies = devices * local // kv_heads
    share = math.ceil(group / copies)
    kv_slots = np.full(devices * local, -1)
    units = np.full((devices * local, share), -1)
    for kv in range(kv_heads):
        members = np.arange(heads)[kv::kv_heads] if tiled else np.arange(group) + kv * group
        for copy in range(math.ceil(group / share)):
            slot = kv * copies + copy
            chosen = members[copy * share : (copy + 1) * share]
            kv_slots[slot] = kv
            units[slot, : len(chosen)] = chosen
    return (
        AxisLayout(head_dim, units.reshape(-1), devices),
        AxisLayout(head_dim, kv_slots, devices),
    )
