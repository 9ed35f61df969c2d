"""Where the units of a logical axis lie on the devices that split it.

A unit is what cannot be taken apart: a head, a block of quantized weights, a row. Units that do
not divide evenly are padded with zeros, which change no result; key and value heads that are fewer
than the devices are given to several of them.
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class AxisLayout:
    """The slots of all devices along one logical axis, in the devices' order.

    Attributes:
      unit: elements in a unit.
      slots: int array: the unit in each slot, or -1 for padding; every device has as many slots.
      devices: how many devices split the axis.
    """

    unit: int
    slots: np.ndarray
    devices: int = 1

    @property
    def size(self) -> int:
        """Elements of the padded axis."""
        return self.unit * len(self.slots)

    @property
    def original(self) -> int:
        """Elements of the axis before padding."""
        return self.unit * (int(self.slots.max()) + 1)

    def elements(self) -> np.ndarray:
        """The original element at each padded position, or -1: int `[size]`."""
        start = np.where(self.slots < 0, -self.unit, self.slots * self.unit)
        return np.maximum(start[:, None] + np.arange(self.unit), -1).reshape(-1)

    def granules(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """The axis in pieces of blocks of `block` elements.

        Returns:
          the elements of a granule (the whole block where the units allow it), the block of each
          granule (-1 for padding), and which granule of that block it is.
        """
        size = len(self.slots) // self.devices * self.unit
        for granule in (block, math.gcd(block, self.unit)):
            if size % granule:
                continue
            pieces = self.elements().reshape(-1, granule)
            first = pieces[:, :1]
            whole = (first % granule == 0) | (first < 0)
            if (
                np.all(pieces == np.where(first < 0, -1, first + np.arange(granule)))
                and whole.all()
            ):
                break
        first = first[:, 0]
        source = np.where(first < 0, -1, first // block)
        return granule, source, np.where(first < 0, 0, first % block // granule)


def even(count: int, unit: int, devices: int) -> AxisLayout:
    """Units shared out evenly, the last devices padded."""
    local = math.ceil(count / devices)
    slots = np.arange(local * devices)
    return AxisLayout(unit, np.where(slots < count, slots, -1), devices)


def grouped_heads(
    heads: int,
    kv_heads: int,
    head_dim: int,
    devices: int,
    kv_cost: float = 1.0,
    *,
    tiled: bool = False,
) -> tuple[AxisLayout, AxisLayout]:
    """Query heads and the key and value heads that groups of them share.

    Every device gets the same number of key and value heads, and each of these the same number of
    query heads. Where the counts do not divide, some slots are padding, and where it costs less, a
    key and value head is given to several devices, each with a part of its query heads.

    Args:
      heads, kv_heads: how many there are.
      head_dim: the width of each.
      devices: how many share them.
      kv_cost: of a key and value head with its cache, a query head costing 1: the bytes that are
        read for it. Of two layouts the one with fewer bytes decodes faster (benchmarks/RESULTS.md).
      tiled: head h shares key and value head `h % kv_heads`; else neighbours share one.

    Returns:
      the layouts of the query heads and of the key and value heads.
    """
    group = heads // kv_heads

    def work(local: int) -> tuple[float, int]:
        copies = devices * local // kv_heads
        return local * math.ceil(group / copies) + local * kv_cost, local

    least = math.ceil(kv_heads / devices)
    local = min(range(least, kv_heads + 1), key=work)
    copies = devices * local // kv_heads
    part = math.ceil(group / copies)
    kv_slots = np.full(devices * local, -1)
    slots = np.full((devices * local, part), -1)
    for kv in range(kv_heads):
        members = np.arange(heads)[kv::kv_heads] if tiled else np.arange(group) + kv * group
        for copy in range(math.ceil(group / part)):
            slot = kv * copies + copy
            chosen = members[copy * part : (copy + 1) * part]
            kv_slots[slot] = kv
            slots[slot, : len(chosen)] = chosen
    return (
        AxisLayout(head_dim, slots.reshape(-1), devices),
        AxisLayout(head_dim, kv_slots, devices),
    )
