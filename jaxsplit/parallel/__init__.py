"""Split modes: meshes of devices, and how a model's layers and axes lie on them."""

from jaxsplit.parallel.layout import AxisLayout, even, grouped_heads
from jaxsplit.parallel.mailboxes import make_mailboxes, make_ring
from jaxsplit.parallel.modes import (
    MESH_AXES,
    SPLIT_MODES,
    SplitMode,
    choose_devices,
    parse_mesh,
    parse_shares,
    split_mode,
)
from jaxsplit.parallel.partition import (
    Partition,
    Placement,
    Stage,
    free_memory,
    make_partition,
    share_layers,
    stage_memory,
)
from jaxsplit.parallel.processes import from_first, launcher, start_processes
from jaxsplit.parallel.transfer import fetch, hand_over

__all__ = [
    "MESH_AXES",
    "SPLIT_MODES",
    "AxisLayout",
    "Partition",
    "Placement",
    "SplitMode",
    "Stage",
    "choose_devices",
    "even",
    "fetch",
    "free_memory",
    "from_first",
    "grouped_heads",
    "hand_over",
    "launcher",
    "make_mailboxes",
    "make_partition",
    "make_ring",
    "parse_mesh",
    "parse_shares",
    "share_layers",
    "split_mode",
    "stage_memory",
    "start_processes",
]
