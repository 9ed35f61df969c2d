"""Memory of GPUs that the other GPUs of a mesh can write to, through the CUDA driver."""

import ctypes
import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_ALREADY_ENABLED = 704  # CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED


class _CudaError(Exception):
    """A call of the driver that failed."""


@functools.cache
def _driver() -> Callable[..., None]:
    """`call(name, *arguments)` of the CUDA driver API.

    Raises:
      _CudaError: there is no driver.
    """
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _CudaError(str(error)) from error

    def call(name: str, *arguments: Any) -> None:
        code = getattr(library, name)(*arguments)
        if code not in (0, _ALREADY_ENABLED):
            raise _CudaError(f"{name}: error {code}")

    call("cuInit", 0)
    return call


_pointer = ctypes.c_uint64


class _Context:
    """What the process has on a device; entered, it is where calls of the driver work."""

    def __init__(self, device: jax.Device):
        self.device, self.handle = ctypes.c_int(), ctypes.c_void_p()
        _driver()("cuDeviceGet", ctypes.byref(self.device), device.local_hardware_id)
        _driver()("cuDevicePrimaryCtxRetain", ctypes.byref(self.handle), self.device)

    def __enter__(self) -> Callable[..., None]:
        _driver()("cuCtxPushCurrent_v2", self.handle)
        return _driver()

    def __exit__(self, *_: object) -> None:
        _driver()("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def may_reach(self, other: "_Context") -> bool:
        """Whether this device can write to another's memory; after that it may."""
        can = ctypes.c_int()
        _driver()("cuDeviceCanAccessPeer", ctypes.byref(can), self.device, other.device)
        if can.value:
            with self as call:
                call("cuCtxEnablePeerAccess", other.handle, 0)
        return bool(can.value)

    def allocate(self, size: int) -> int:
        """The address of so many bytes."""
        address = ctypes.c_uint64()
        with self as call:
            call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def fill(self, address: int, byte: int, size: int) -> None:
        """Writes to this device's memory."""
        with self as call:
            call("cuMemsetD8_v2", _pointer(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))
            call("cuCtxSynchronize")

    def send(self, address: int, other: int) -> None:
        """Copies a byte of this device's memory to that of another."""
        with self as call:
            call("cuMemcpyDtoD_v2", _pointer(other), _pointer(address), ctypes.c_size_t(1))
            call("cuCtxSynchronize")

    def read(self, address: int) -> int:
        """A byte of this device's memory."""
        byte = ctypes.c_ubyte()
        with self as call:
            call("cuMemcpyDtoH_v2", ctypes.byref(byte), _pointer(address), ctypes.c_size_t(1))
        return byte.value

    def free(self, address: int) -> None:
        with self as call:
            call("cuMemFree_v2", _pointer(address))


def make_mailboxes(
    mesh: Mesh, axes: Sequence[str], size: Callable[[int], int], owner: object
) -> jax.Array | None:
    """Memory for the devices along some axes of a mesh, which those can write to.

    Args:
      mesh: of GPUs.
      axes: along which the devices lie that write to one another.
      size: bytes for each, given how many these are.
      owner: the memory is freed when it is.

    Returns:
      for each device its place among them, and the addresses of its own memory and that of those
      after it, in turn, two words each with the lower first: uint32 `[*mesh, 1 + 2 * devices]`,
      split over the mesh. None if some device cannot write to another's memory, or belongs to
      another process.
    """
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        return None
    others = [axis for axis in mesh.axis_names if axis not in axes]
    order = [mesh.axis_names.index(axis) for axis in (*others, *axes)]
    count = int(np.prod([mesh.shape[axis] for axis in axes]))
    groups = mesh.devices.transpose(order).reshape(-1, count)
    allocated: list[tuple[_Context, int]] = []
    rows = []
    try:
        for group in groups:
            contexts = [_Context(device) for device in group]
            if not all(a.may_reach(b) for a, b in itertools.permutations(contexts, 2)):
                return None
            addresses = []
            for context in contexts:
                addresses.append(context.allocate(size(count)))
                allocated.append((context, addresses[-1]))
            if not _arrives(contexts, addresses):
                return None
            for context, address in zip(contexts, addresses, strict=True):
                context.fill(address, 0, size(count))
            words = np.asarray([[a & 0xFFFFFFFF, a >> 32] for a in addresses])
            rows += [[i, *np.roll(words, -i, axis=0).reshape(-1)] for i in range(count)]
    except _CudaError:
        return None
    finally:
        weakref.finalize(owner, _free, allocated).atexit = False
    shape = [mesh.devices.shape[i] for i in order]
    table = np.asarray(rows, np.uint32).reshape(*shape, -1)
    table = table.transpose([*np.argsort(order), len(order)])
    return jax.device_put(table, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def make_ring(meshes: Sequence[Mesh], size: int, owner: object) -> list[jax.Array] | None:
    """Memory for the devices at the same place of several meshes, as `make_mailboxes`.

    Args:
      meshes: of as many GPUs each.
      size: bytes for each device.
      owner: the memory is freed when it is.

    Returns:
      a table for each mesh, as there, of the devices at the same place: uint32 `[*mesh, 1 + 2 *
      meshes]`, split over the mesh. None likewise.
    """
    axes = meshes[0].axis_names
    devices = np.stack([mesh.devices for mesh in meshes])
    whole = make_mailboxes(Mesh(devices, ("stage", *axes)), ["stage"], lambda _: size, owner)
    if whole is None:
        return None
    tables = zip(meshes, np.asarray(whole), strict=True)
    return [
        jax.device_put(table, NamedSharding(mesh, PartitionSpec(*axes))) for mesh, table in tables
    ]


def _arrives(contexts: Sequence[_Context], addresses: Sequence[int]) -> bool:
    """Whether what each device writes to the others is there; not all machines keep the promise."""
    for i, (writer, mine) in enumerate(zip(contexts, addresses, strict=True)):
        for reader, other in zip(contexts, addresses, strict=True):
            reader.fill(other + 1, 0, 1)
            writer.fill(mine, i + 1, 1)
            writer.send(mine, other + 1)
            if reader.read(other + 1) != i + 1:
                return False
    return True


def _free(allocated: Sequence[tuple[_Context, int]]) -> None:
    for context, address in allocated:
        context.free(address)
