"""How a model is laid out on a mesh: split modes, logical axes, stages, processes."""

from jaxsplit.sharding.distributed import (
    broadcast_from_process_0,
    detected_launcher,
    start_processes,
)
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
    "broadcast_from_process_0",
    "grouped_heads",
    "detected_launcher",
    "make_partition",
    "parse_mesh",
    "parse_shares",
    "share_layers",
    "split_mode",
    "stage_memory",
    "start_processes",
]
