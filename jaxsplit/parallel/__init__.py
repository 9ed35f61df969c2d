"""Split modes: meshes of devices, and how a model's axes lie on them."""

from jaxsplit.parallel.layout import AxisLayout, even, grouped_heads
from jaxsplit.parallel.modes import (
    SPLIT_MODES,
    Partition,
    Placement,
    SplitMode,
    choose_devices,
    make_partition,
    split_mode,
)

__all__ = [
    "SPLIT_MODES",
    "AxisLayout",
    "Partition",
    "Placement",
    "SplitMode",
    "choose_devices",
    "even",
    "grouped_heads",
    "make_partition",
    "split_mode",
]
