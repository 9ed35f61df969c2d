"""Plans: memory, cost and predicted speed of a model on a mesh, without loading it."""

from typing import TYPE_CHECKING

from jaxsplit.lazy import importer

if TYPE_CHECKING:
    from jaxsplit.plan.compiled import collectives
    from jaxsplit.plan.cost import ProgramCost, trace_decode, trace_prefill
    from jaxsplit.plan.devices import DEVICE_KINDS, DeviceKind, device_kind, kind_of
    from jaxsplit.plan.plan import Plan, StagePlan, best_plans, best_split, candidates, make_plan
    from jaxsplit.plan.roofline import weight_bits

__all__ = [
    "DEVICE_KINDS",
    "DeviceKind",
    "Plan",
    "StagePlan",
    "ProgramCost",
    "best_plans",
    "best_split",
    "candidates",
    "collectives",
    "device_kind",
    "kind_of",
    "make_plan",
    "trace_decode",
    "trace_prefill",
    "weight_bits",
]

__getattr__ = importer(
    __name__,
    compiled=["collectives"],
    devices=["DEVICE_KINDS", "DeviceKind", "device_kind", "kind_of"],
    plan=["Plan", "StagePlan", "best_plans", "best_split", "candidates", "make_plan"],
    roofline=["weight_bits"],
    cost=["ProgramCost", "trace_decode", "trace_prefill"],
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
