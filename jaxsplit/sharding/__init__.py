"""How a model lies on a mesh of devices: split modes, logical axes, stages, processes."""

from jaxsplit.sharding.distributed import from_first, launcher, start_processes
from jaxsplit.sharding.layout import AxisLayout, even, grouped_heads
from jaxsplit.sharding.partition import (
    Partition,
    Placement,
    Stage,
    free_memory,
    make_partition,
    share_layers,
    stage_memory,
)
from jaxsplit.sharding.split_modes import (
    MESH_AXES,
    SPLIT_MODES,
    SplitMode,
    choose_devices,
    parse_mesh,
    parse_shares,
    split_mode,
)

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
    "free_memory",
    "from_first",
    "grouped_heads",
    "launcher",
    "make_partition",
    "parse_mesh",
    "parse_shares",
    "share_layers",
    "split_mode",
    "stage_memory",
    "start_processes",
]
