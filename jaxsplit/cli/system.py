"""The machine as a bug report describes it: versions, devices, links between GPUs, kernels."""

import contextlib
import ctypes
import importlib.metadata
import itertools
import os
import platform
from typing import TYPE_CHECKING, Any

import jaxsplit

if TYPE_CHECKING:
    import jax

_PACKAGES = [
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm-plugin", "libtpu"),
    *("flax", "orbax-checkpoint", "numpy", "ml-dtypes", "tokenizers", "gguf"),
]
_VARIABLES = (
    *("JAX_", "JAXSPLIT_", "XLA_", "CUDA_", "NCCL_", "LD_LIBRARY_PATH"),
    *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"),
)
"""Prefixes of environment variables that change what JAX or jaxsplit does."""

_PERFORMANCE_RANK, _ACCESS, _ATOMICS = 1, 2, 3
"""Values of CUdevice_P2PAttribute: relative speed (0 is the fastest link), access to the peer's
memory, and atomics in it, which GPUs have over NVLink and not over PCIe."""


def describe_system() -> dict[str, Any]:
    """Versions and hardware, environment, devices and links, as JSON values.

    A JAX that finds no devices is described too: `devices` is empty and `error` says why.
    """
    shown: dict[str, Any] = {"system": _system(), "environment": _environment()}
    try:
        import jax

        devices = jax.local_devices()
        shown["devices"] = [_describe_device(device) for device in devices]
        shown["links"] = _links(devices)
    except Exception as error:  # whatever an installation may lack is what the report is about
        shown |= {"devices": [], "links": [], "error": repr(error)}
    return shown


def _system() -> dict[str, str]:
    """The host, and the versions of packages that are installed."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = {
        "jaxsplit": jaxsplit.__version__,
        "Python": platform.python_version(),
        "OS": platform.platform(),
        "CPU": f"{os.cpu_count()} cores, {memory / 1e9:.1f} GB",
    }
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if driver := _driver():
        version = ctypes.c_int()
        driver.cuDriverGetVersion(ctypes.byref(version))
        found["CUDA driver"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return found


def _environment() -> dict[str, str]:
    return {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)}


def _describe_device(device: "jax.Device") -> dict[str, Any]:
    from jaxsplit.context import MatmulPolicy, compute_capability
    from jaxsplit.ops.matmul import float8

    policy = MatmulPolicy.for_device(device)
    kernels = ["triton"] * policy.kernels + ["cuda"] * (policy.cuda > 0)
    stats = device.memory_stats() or {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "compute_capability": compute_capability(device) or None,
        "memory_bytes": stats.get("bytes_limit"),
        "free_bytes": stats["bytes_limit"] - stats["bytes_in_use"] if stats else None,
        "kernels": " and ".join(kernels) or "xla",
        "float8": device.platform != "cpu" and float8.supported_by(device),
    }


def _links(devices: "list[jax.Device]") -> list[dict[str, Any]]:
    """What the CUDA driver says of each pair of NVIDIA GPUs."""
    from jaxsplit.context import compute_capability

    driver = _driver()
    gpus = [device for device in devices if compute_capability(device)]
    return [
        {
            "from": source.id,
            "to": target.id,
            "peer_access": bool(_attribute(driver, _ACCESS, source, target)),
            "nvlink": bool(_attribute(driver, _ATOMICS, source, target)),
            "performance_rank": _attribute(driver, _PERFORMANCE_RANK, source, target),
        }
        for source, target in itertools.permutations(gpus, 2)
        if driver
    ]


def _driver() -> ctypes.CDLL | None:
    """The CUDA driver, if it is installed and finds a GPU."""
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0:
            return driver
    return None


def _attribute(
    driver: ctypes.CDLL, attribute: int, source: "jax.Device", target: "jax.Device"
) -> int | None:
    """A CUdevice_P2PAttribute of a pair of GPUs; None if the driver does not tell it."""
    value, handles = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    for handle, device in zip(handles, (source, target), strict=True):
        if driver.cuDeviceGet(ctypes.byref(handle), device.local_hardware_id):
            return None
    code = driver.cuDeviceGetP2PAttribute(ctypes.byref(value), attribute, *handles)
    return None if code else value.value


def system_text(shown: dict[str, Any]) -> str:
    """The description as lines of text; devices that are alike share one."""
    lines = []
    for title in ("system", "environment"):
        if shown[title]:
            lines += [title, *(f"  {key}: {value}" for key, value in shown[title].items())]
    lines.append("devices")
    if "error" in shown:
        lines.append(f"  none: {shown['error']}")
    for line, devices in itertools.groupby(shown["devices"], _device_line):
        ids = [device["id"] for device in devices]
        lines.append(
            f"  {ids[0]}-{ids[-1]}: {line} each" if len(ids) > 1 else f"  {ids[0]}: {line}"
        )
    if shown["links"]:
        lines += ["links", *map(_link_line, shown["links"])]
    return "\n".join(lines)


def _device_line(device: dict[str, Any]) -> str:
    parts = [f"{device['platform']} {device['kind']}"]
    if device["compute_capability"]:
        parts.append(f"compute capability {device['compute_capability']}")
    if device["memory_bytes"]:
        parts.append(
            f"{device['memory_bytes'] / 1e9:.1f} GB for JAX, {device['free_bytes'] / 1e9:.1f} free"
        )
    parts.append(f"kernels: {device['kernels']}")
    return ", ".join([*parts, *(["float8"] if device["float8"] else [])])


def _link_line(link: dict[str, Any]) -> str:
    kind = "NVLink" if link["nvlink"] else "PCIe"
    access = "peer access" if link["peer_access"] else "no peer access"
    return f"  {link['from']} to {link['to']}: {kind}, {access}, rank {link['performance_rank']}"
