"""Transfers of arrays from the devices of one stage to those of the next."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tiny import fresh_rng

from jaxsplit.comm.stage_transfer import fetch, transfer


def mesh(*rows):
    """A mesh of devices by index, a row for each data replica."""
    devices = np.asarray(jax.devices())[np.asarray(rows)]
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def arrays(source):
    """Random arrays on a mesh, and the same in host memory."""
    rng = fresh_rng()
    host = {
        "numbers": rng.normal(size=(4, 3, 5)).astype(np.float32),
        "halves": rng.normal(size=(2, 7)).astype("bfloat16"),
        "tokens": rng.integers(-1, 1000, (4, 2)).astype(np.int32),
        "flags": rng.random(4) < 0.5,
    }
    host["numbers"][0, 0] = np.nan, np.inf, -np.inf, -0.0, 1e-45
    sharding = NamedSharding(source, PartitionSpec("data"))
    return jax.device_put(host, sharding), host


MESHES = {
    "one to one": (mesh([0]), mesh([1])),
    "disjoint": (mesh([0, 1]), mesh([2, 3])),
    "more devices": (mesh([0, 1]), mesh([2, 3, 4, 5, 6])),
    "fewer devices": (mesh([2, 3, 4, 5]), mesh([0])),
    "nested, growing": (mesh([1]), mesh([0, 1, 2])),
    "nested, shrinking": (mesh([0, 1, 2]), mesh([1])),
    "overlapping": (mesh([0, 1, 2]), mesh([2, 3])),
    "same devices in another order": (mesh([0, 1]), mesh([1, 0])),
    "two rows": (mesh([0, 1], [4, 5]), mesh([2, 3], [6, 7])),
    "two rows, growing": (mesh([0], [4]), mesh([0, 1, 2], [4, 5, 6])),
    "two rows, shrinking": (mesh([0, 1, 2], [4, 5, 6]), mesh([1], [6])),
}


@pytest.mark.parametrize("case", MESHES)
def test_every_device_gets_what_its_row_holds(case):
    source, target = MESHES[case]
    tree, host = arrays(source)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    moved = transfer(tree, like, source, target)
    assert moved.keys() == host.keys()
    for name, expected in host.items():
        x = moved[name]
        assert (x.shape, x.dtype) == (expected.shape, expected.dtype)
        assert x.sharding == NamedSharding(target, PartitionSpec("data"))
        assert {shard.device for shard in x.addressable_shards} == set(target.devices.flat)
        for shard in x.addressable_shards:
            assert np.asarray(shard.data).tobytes() == expected[shard.index].tobytes()
    # The source arrays are not donated.
    assert np.asarray(tree["tokens"]).tobytes() == host["tokens"].tobytes()


def test_arrays_stay_where_the_mesh_is_the_same():
    tree, _ = arrays(mesh([0, 1], [2, 3]))
    assert transfer(tree, None, mesh([0, 1], [2, 3]), mesh([0, 1], [2, 3])) is tree


def test_a_process_reads_its_own_arrays_directly():
    source = mesh([0, 1])
    tree, _ = arrays(source)
    like = jax.ShapeDtypeStruct((4, 2), np.int32)
    assert fetch(tree["tokens"], like, source, mesh([0, 1, 2, 3])) is tree["tokens"]
