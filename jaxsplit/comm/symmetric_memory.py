"""Symmetric memory: GPU buffers that peers can write to, allocated through the CUDA driver."""

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
    """A failed driver call."""


@functools.cache
def _driver() -> Callable[..., None]:
    """`call(name, *arguments)` of the CUDA driver API.

    Raises:
      _CudaError: no driver is installed.
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
    """A device's primary context; a context manager that makes it current."""

    def __init__(self, device: jax.Device):
        self.device, self.handle = ctypes.c_int(), ctypes.c_void_p()
        _driver()("cuDeviceGet", ctypes.byref(self.device), device.local_hardware_id)
        _driver()("cuDevicePrimaryCtxRetain", ctypes.byref(self.handle), self.device)

    def __enter__(self) -> Callable[..., None]:
        _driver()("cuCtxPushCurrent_v2", self.handle)
        return _driver()

    def __exit__(self, *_: object) -> None:
        _driver()("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def enable_peer_access(self, other: "_Context") -> bool:
        """Enables access to a peer's memory; returns whether the hardware supports it."""
        can = ctypes.c_int()
        _driver()("cuDeviceCanAccessPeer", ctypes.byref(can), self.device, other.device)
        if can.value:
            with self as call:
                call("cuCtxEnablePeerAccess", other.handle, 0)
        return bool(can.value)

    def allocate(self, size: int) -> int:
        """Address of `size` new bytes."""
        address = ctypes.c_uint64()
        with self as call:
            call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def fill(self, address: int, byte: int, size: int) -> None:
        """Sets `size` bytes of this device's memory."""
        with self as call:
            call("cuMemsetD8_v2", _pointer(address), ctypes.c_ubyte(byte), ctypes.c_size_t(size))
            call("cuCtxSynchronize")

    def send(self, address: int, other: int) -> None:
        """Copies a byte from this device's memory to a peer's."""
        with self as call:
            call("cuMemcpyDtoD_v2", _pointer(other), _pointer(address), ctypes.c_size_t(1))
            call("cuCtxSynchronize")

    def read(self, address: int) -> int:
        """Reads a byte of this device's memory."""
        byte = ctypes.c_ubyte()
        with self as call:
            call("cuMemcpyDtoH_v2", ctypes.byref(byte), _pointer(address), ctypes.c_size_t(1))
        return byte.value

    def free(self, address: int) -> None:
        with self as call:
            call("cuMemFree_v2", _pointer(address))


def allocate_peer_buffers(
    mesh: Mesh, axes: Sequence[str], size: Callable[[int], int], owner: object
) -> jax.Array | None:
    """Allocates a buffer on each GPU of a mesh that its peers can write to.

    Args:
      mesh: of GPUs.
      axes: mesh axes; devices along them are peers.
      size: bytes of each buffer, given the number of peers, the device included.
      owner: its finalization frees the buffers.

    Returns:
      for each device its rank among its peers, then the addresses of its own buffer and of those of
      the next ranks, cyclically, each as two words, low word first: uint32
      `[*mesh, 1 + 2 * peers]`, sharded over the mesh. None if some devices have no peer access or
      belong to another process.
    """
    if any(device.process_index != jax.process_index() for device in mesh.devices.flat):
        return None
    others = [axis for axis in mesh.axis_names if axis not in axes]
    order = [mesh.axis_names.index(axis) for axis in (*others, *axes)]
    count = int(np.prod([mesh.shape[axis] for axis in axes]))
    allocated: list[tuple[_Context, int]] = []
    pointers = []
    try:
        for peers in mesh.devices.transpose(order).reshape(-1, count):
            addresses = _allocate([_Context(device) for device in peers], size(count), allocated)
            if addresses is None:
                return None
            words = np.asarray([[a & 0xFFFFFFFF, a >> 32] for a in addresses])
            pointers += [[i, *np.roll(words, -i, axis=0).reshape(-1)] for i in range(count)]
    except _CudaError:
        return None
    finally:
        weakref.finalize(owner, _free, allocated).atexit = False
    shape = [mesh.devices.shape[i] for i in order]
    table = np.asarray(pointers, np.uint32).reshape(*shape, -1)
    table = table.transpose([*np.argsort(order), len(order)])
    return jax.device_put(table, NamedSharding(mesh, PartitionSpec(*mesh.axis_names)))


def _allocate(
    contexts: Sequence[_Context], size: int, allocated: list[tuple[_Context, int]]
) -> list[int] | None:
    """Allocates zeroed buffers of peers, noted in `allocated`; None without peer access."""
    if not all(a.enable_peer_access(b) for a, b in itertools.permutations(contexts, 2)):
        return None
    addresses = []
    for context in contexts:
        addresses.append(context.allocate(size))
        allocated.append((context, addresses[-1]))
    if not _peer_writes_work(contexts, addresses):
        return None
    for context, address in zip(contexts, addresses, strict=True):
        context.fill(address, 0, size)
    return addresses


def allocate_ring_buffers(
    meshes: Sequence[Mesh], size: int, owner: object
) -> list[jax.Array] | None:
    """Allocates buffers for rings across stages, each of the devices with the same mesh index.

    Args:
      meshes: of GPUs, all of the same shape.
      size: bytes of each buffer.
      owner: its finalization frees the buffers.

    Returns:
      buffer pointers for each mesh, as from `allocate_peer_buffers`: uint32
      `[*mesh, 1 + 2 * meshes]`, sharded over the mesh; or None.
    """
    axes = meshes[0].axis_names
    devices = np.stack([mesh.devices for mesh in meshes])
    whole = allocate_peer_buffers(Mesh(devices, ("stage", *axes)), ["stage"], lambda _: size, owner)
    if whole is None:
        return None
    tables = zip(meshes, np.asarray(whole), strict=True)
    return [
        jax.device_put(table, NamedSharding(mesh, PartitionSpec(*axes))) for mesh, table in tables
    ]


def _peer_writes_work(contexts: Sequence[_Context], addresses: Sequence[int]) -> bool:
    """Whether writes to peers arrive; some machines report peer access but lose them."""
    for i, (writer, own) in enumerate(zip(contexts, addresses, strict=True)):
        for reader, other in zip(contexts, addresses, strict=True):
            reader.fill(other + 1, 0, 1)
            writer.fill(own, i + 1, 1)
            writer.send(own, other + 1)
            if reader.read(other + 1) != i + 1:
                return False
    return True


def _free(allocated: Sequence[tuple[_Context, int]]) -> None:
    for context, address in allocated:
        context.free(address)
