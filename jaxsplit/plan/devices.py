"""Data sheets of devices."""

import dataclasses
import math
import os

import jax

from jaxsplit.errors import JaxsplitError
from jaxsplit.sharding import free_memory

KERNELS = ("xla", "dp4a", "cuda", "triton", "both")
"""What multiplies quantized matrices, slowest first: XLA; kernels in CUDA C++ for one or two rows,
or for more on tensor cores; Triton kernels; these, and CUDA C++ for more rows than they take."""


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """A kind of device.

    Attributes:
      name: common name; JAX's `device_kind` contains it.
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      flops: of dense matmuls with 16-bit inputs and 32-bit accumulation, FLOP/s.
      link: to another device of the same host, bytes/s in each direction.
      layer_seconds: time of a layer besides reading its weights: launching small kernels.
      collective_seconds: latency of a collective or a stage transfer.
      peer_access: all-reduces and transfers run in kernels over peer access. Each further device
        then adds a 24th of `collective_seconds` to an all-reduce; an all-gather takes twice as long
        as an all-reduce, and a 12th more for each further device.
      kernels: one of `KERNELS`.
      float8: whether it multiplies 8-bit floating point, at twice the rate.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: float
    layer_seconds: float = 13.5e-6
    collective_seconds: float = 10e-6
    peer_access: bool = False
    kernels: str = "triton"
    float8: bool = True

    @property
    def triton(self) -> bool:
        """Whether Triton kernels run: for attention and between peers, too."""
        return self.kernels in ("triton", "both")


def _gpu(
    name: str,
    gigabytes: float,
    gb_per_s: float,
    teraflops: float,
    link: float,
    *,
    kernels: str = "triton",
    float8: bool = True,
) -> DeviceKind:
    rates = (gigabytes * 1e9, gb_per_s * 1e9, teraflops * 1e12, link * 1e9)
    kind = DeviceKind(name, *rates, kernels=kernels, float8=float8)
    if not kind.triton:
        return dataclasses.replace(kind, layer_seconds=22e-6)
    if link <= _PCIE:
        return kind
    return dataclasses.replace(kind, collective_seconds=2.6e-6, peer_access=True)  # over NVLink


_PCIE = 48
"""GB/s of PCIe 5.0 x16; 4.0 has 24, 3.0 has 12."""

# NVLink only for kinds of which every board has it.
DEVICE_KINDS: dict[str, DeviceKind] = {
    kind.name: kind
    for kind in (
        _gpu("T4", 16, 320, 65, 12, kernels="cuda", float8=False),
        _gpu("P40", 24, 346, 11.8, 12, kernels="dp4a", float8=False),
        _gpu("RTX 3060", 12, 360, 25.6, 24, float8=False),
        _gpu("RTX 3090", 24, 936, 71, 24, float8=False),
        _gpu("RTX 4090", 24, 1008, 165, 24),
        _gpu("RTX A6000", 48, 768, 155, 24, float8=False),
        _gpu("A100", 80, 2039, 312, 300, float8=False),
        _gpu("L40S", 48, 864, 362, 24),
        _gpu("H100", 80, 3350, 989, 450, kernels="both"),
        _gpu("H200", 141, 4800, 989, 450, kernels="both"),
        _gpu("RTX 5090", 32, 1792, 210, 48),
        _gpu("B200", 180, 8000, 2250, 900),
        DeviceKind("CPU", 16e9, 20e9, 0.5e12, 10e9, 200e-6, 50e-6, kernels="xla"),
    )
}


def device_kind(name: str) -> DeviceKind:
    """The kind named, for instance, `3090`, `rtx 3090` or `NVIDIA H200`.

    Raises:
      JaxsplitError: the name is unknown; the message lists the known ones.
    """
    words = set(name.lower().replace("-", " ").split())
    matches = [
        kind
        for kind in DEVICE_KINDS.values()
        if {kind.name.lower().split()[-1]} <= words or name.lower() == kind.name.lower()
    ]
    if not matches:
        raise JaxsplitError(
            f"unknown device {name!r}; known are {', '.join(DEVICE_KINDS)}; for another give "
            "memory, bandwidth, tflops and link"
        )
    return matches[0]


def kind_of(device: jax.Device) -> DeviceKind:
    """The kind of a device of this machine, with its free memory.

    An unknown kind is treated as the one closest in memory.
    """
    if device.platform == "cpu":
        # Simulated devices share the CPU.
        count = len([d for d in jax.devices() if d.process_index == device.process_index])
        cpu = DEVICE_KINDS["CPU"]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return dataclasses.replace(
            cpu, memory=memory / count, bandwidth=cpu.bandwidth / count, flops=cpu.flops / count
        )
    free = free_memory([device])
    try:
        kind = device_kind(device.device_kind)
    except JaxsplitError:
        if free is None:
            raise
        gpus = [kind for kind in DEVICE_KINDS.values() if kind.name != "CPU"]
        kind = min(gpus, key=lambda kind: abs(math.log(kind.memory / free[0])))
    return dataclasses.replace(kind, memory=free[0]) if free else kind
