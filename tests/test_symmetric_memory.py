"""Symmetric memory, with a fake CUDA driver."""

import gc
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxsplit.comm import symmetric_memory as module
from jaxsplit.comm.symmetric_memory import allocate_peer_buffers, allocate_ring_buffers


class Owner:
    pass


@pytest.fixture
def memory(monkeypatch):
    """The fake devices' memory by address; options decide what works."""
    state = types.SimpleNamespace(bytes={}, freed=[], reaches=True, arrives=True)

    class Context:
        def __init__(self, device):
            self.device = device

        def enable_peer_access(self, other):
            return state.reaches

        def allocate(self, size):
            address = (self.device.id + 1 << 36) + 4096 * len(state.bytes)
            state.bytes[address] = (self.device, size, bytearray([99] * size))
            return address

        def find(self, address):
            device, size, content = state.bytes[address // 4096 * 4096]
            assert device == self.device
            assert address % 4096 < size
            return content, address % 4096

        def fill(self, address, byte, size):
            content, offset = self.find(address)
            content[offset : offset + size] = [byte] * size

        def send(self, address, other):
            target, _, content = state.bytes[other // 4096 * 4096]
            if state.arrives or target == self.device:
                content[other % 4096] = self.read(address)

        def read(self, address):
            content, offset = self.find(address)
            return content[offset]

        def free(self, address):
            state.freed.append(address)

    monkeypatch.setattr(module, "_Context", Context)
    return state


def mesh_of(*shape):
    devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, ("data", "expert", "tensor"))


def test_each_device_has_the_addresses_of_the_next_ranks(memory):
    owner, mesh = Owner(), mesh_of(2, 1, 3)
    table = np.asarray(allocate_peer_buffers(mesh, ("tensor",), lambda count: 1000 * count, owner))
    assert table.shape == (2, 1, 3, 7)
    assert all(bytes(content) == bytes(3000) for _, _, content in memory.bytes.values())
    for data in range(2):
        for rank in range(3):
            own, *words = table[data, 0, rank].tolist()
            assert own == rank
            addresses = [
                low + (high << 32) for low, high in zip(words[::2], words[1::2], strict=True)
            ]
            found = [memory.bytes[address][0] for address in addresses]
            assert found == [mesh.devices[data, 0, (rank + step) % 3] for step in range(3)]
    del owner
    gc.collect()
    assert sorted(memory.freed) == sorted(memory.bytes)


def test_devices_along_two_axes_are_peers(memory):
    table = allocate_peer_buffers(
        mesh_of(2, 2, 2), ("expert", "tensor"), lambda count: 8 * count, Owner()
    )
    assert np.asarray(table)[..., 0].tolist() == [[[0, 1], [2, 3]]] * 2


@pytest.mark.parametrize("broken", ["reaches", "arrives"])
def test_there_are_none_where_devices_cannot_write_to_one_another(memory, broken):
    setattr(memory, broken, False)
    owner = Owner()
    assert allocate_peer_buffers(mesh_of(1, 1, 2), ("tensor",), lambda count: 64, owner) is None
    del owner
    gc.collect()
    assert sorted(memory.freed) == sorted(memory.bytes)


def test_there_are_none_without_a_driver():
    assert allocate_peer_buffers(mesh_of(1, 1, 2), ("tensor",), lambda count: 64, Owner()) is None


def test_stages_reach_the_next_one(memory):
    """Two and three stages of two devices each."""
    for stages in (2, 3):
        devices = np.asarray(jax.devices()[: 2 * stages]).reshape(stages, 1, 1, 2)
        meshes = [Mesh(part, ("data", "expert", "tensor")) for part in devices]
        owner = Owner()
        tables = allocate_ring_buffers(meshes, 64, owner)
        addresses = []
        for stage, (mesh, table) in enumerate(zip(meshes, tables, strict=True)):
            assert {*table.sharding.device_set} == {*mesh.devices.flat}
            words = np.asarray(table).reshape(2, -1).astype(np.uint64)
            assert (words[:, 0] == stage).all()
            addresses.append(words[:, 1::2] + (words[:, 2::2] << np.uint64(32)))
        for stage, mine in enumerate(addresses):
            assert np.array_equal(mine[:, 1], addresses[(stage + 1) % stages][:, 0])
            held = [memory.bytes[int(address)][0] for address in mine[:, 0]]
            assert held == [*meshes[stage].devices.flat]
    memory.reaches = False
    assert allocate_ring_buffers(meshes, 64, owner) is None
