"""Devices that exchange numbers in kernels, run without GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Q8_0, SHAPES, first_layers, make_recipe, nmse, quick_jit
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec
from tiny import fresh_rng

import jaxsplit
from jaxsplit.comm import one_shot, two_shot
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import forward_context
from jaxsplit.engine import SamplingConfig
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import Readers
from jaxsplit.ops.norm.api import add_norm
from jaxsplit.sharding.axes import Axis, AxisRules

pytestmark = pytest.mark.usefixtures("interpreter")

AXIS = ("tensor",)
WIDE = make_recipe("wide", heads=8, kv_heads=2, embed=512)
"""Products of this width are sent by the kernels that compute them."""


def on_devices(count, function, x):
    """`function(shard, peers)` on each device: its results, one after another."""
    mesh = Mesh(np.asarray(jax.devices()[:count]), AXIS)
    spec = PartitionSpec(*AXIS)

    def local(x, table):
        return function(x[0], PeerGroup(table[0], AXIS))[None]

    run = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    return np.asarray(quick_jit(run)(x, np.zeros((count, 1 + 2 * count), np.uint32)))


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("shape", [(1,), (3, 200), (2, 2, 512)])
def test_sums_are_the_same_on_all_devices(devices, shape):
    x = fresh_rng().normal(size=(devices, *shape)).astype(np.float32)
    found = on_devices(devices, lambda x, peers: one_shot.all_reduce(x, peers), x)
    assert found.shape == x.shape
    assert (found == found[0]).all()
    error = np.abs(found[0] - x.astype(np.float64).sum(axis=0))
    # Addends may cancel: the bound of a sum in float32 is relative to their magnitudes.
    assert (error <= devices * 2.0**-24 * np.abs(x).sum(axis=0)).all()


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("size", [3000, 20000])
def test_sums_of_many_are_the_same_on_all_devices(devices, size):
    x = jnp.asarray(fresh_rng().normal(size=(devices, 3, size)), jnp.bfloat16)
    most = 3 * size
    assert two_shot.supports(most, x.dtype, PeerGroup(np.zeros(1 + 2 * devices), AXIS, most))
    found = on_devices(devices, lambda x, peers: two_shot.all_reduce(x, peers), x)
    assert (found == found[0]).all()
    exact = np.asarray(x.astype(jnp.float32)).sum(axis=0, dtype=np.float64)
    assert nmse(found[0].astype(np.float32), exact) <= 1e-5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bfloat16])
def test_all_devices_have_the_numbers_of_all(dtype):
    x = jnp.asarray(fresh_rng().normal(size=(3, 2, 300)) * 100, dtype)
    found = on_devices(3, lambda x, peers: one_shot.all_gather(x, peers), x)
    for device in range(3):
        assert (found[device] == np.asarray(x)).all()


def test_sent_parts_are_received_by_the_kernel_that_adds_them(monkeypatch):
    """Once: what was sent can be received once."""
    x = fresh_rng().normal(size=(2, 1, 512)).astype(np.float32)
    gathered, gather = [], jax.lax.all_gather
    counting = lambda *a, **k: gathered.append(a) or gather(*a, **k)  # noqa: E731
    monkeypatch.setattr(jax.lax, "all_gather", counting)

    def function(x, peers):
        axis = Axis("mlp_in", 2)
        y = Unreduced(2 * x[None], jnp.zeros(x.shape, jnp.int32), None, (axis,))
        rules = AxisRules({"mlp_in": AXIS})
        with forward_context(peers=peers, rules=rules):
            rows, residual = add_norm(y, x, None, Readers((Int8Layout(),), xla=False))
        return jnp.stack([residual, rows.stored[0].dequantized()])

    plain, rounded = on_devices(2, function, x)[0]
    assert nmse(plain, x[0] + 2 * x.astype(np.float64).sum(axis=0)) <= 1e-12
    assert nmse(rounded, plain) <= 1e-4
    assert len(gathered) == 1


def primitives(jaxpr):
    """Names of all operations, those inside of kernels left out."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "pallas_call":
            for inner in jaxprs_in_params(eqn.params):
                yield from primitives(inner)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "mesh", "recipe"),
    [
        pytest.param("graph", "tensor:2", SHAPES["8-2"], marks=pytest.mark.full),
        ("graph", "data:2,tensor:3", SHAPES["9-3"]),
        ("row", "tensor:2", SHAPES["6-1"]),
        ("graph", "tensor:2", first_layers("gemma2", 2)),  # normalized before they are added
        ("graph", "tensor:2", "llama-bias"),
        ("graph", "tensor:2", WIDE),
    ],
)
def test_a_step_needs_no_other_collectives(recipe_gguf, monkeypatch, mode, mesh, recipe):
    path, tokens = recipe_gguf(recipe, Q8_0), fresh_rng().integers(0, 160, 6).tolist()
    options = {"ctx_size": 64, "activations": "int8", "kernels": "interpret"}
    sending, outbox = [], one_shot.out_shapes
    monkeypatch.setattr(
        one_shot, "out_shapes", lambda *a: sending.append(a[-1] is not None) or outbox(*a)
    )
    one = jaxsplit.load(path, split_mode="none", dtype="bfloat16", **options)
    split = jaxsplit.load(path, split_mode=mode, mesh=mesh, dtype="bfloat16", **options)
    expected = one.logits(tokens, one_by_one=True)
    # SoftmaxState in another order are rounded to another neighbour here and there.
    assert nmse(split.logits(tokens, one_by_one=True), expected) <= 3e-3
    (step,) = split.engine.trace_step(SamplingConfig(temperature=0.0))
    found = list(primitives(step.jaxpr.jaxpr))
    assert found.count("pallas_call") > 4 * split.config.layers
    assert not {"psum", "psum_invariant", "all_gather"} & set(found)
    assert any(sending) == (recipe is WIDE)
    assert split.describe().endswith("| all-reduce through peer access")
    assert "all-reduce" not in one.describe()
    split = jaxsplit.load(path, split_mode=mode, mesh=mesh, collectives="nccl", **options)
    assert split.describe().endswith("| all-reduce through NCCL")
