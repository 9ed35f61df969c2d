"""What the GPU tests use beside the public API: the only file here that knows internal names."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from blocks import usual_blocks
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh

from jaxsplit.comm import one_shot, p2p, two_shot
from jaxsplit.comm.one_shot import Peers
from jaxsplit.comm.p2p import Ring
from jaxsplit.comm.symmetric_memory import make_mailboxes, make_ring
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.engine import compiler_options
from jaxsplit.ops.activations.deferred import Sum, as_late
from jaxsplit.ops.activations.int8 import Rounding
from jaxsplit.ops.matmul.api import Product, matmul
from jaxsplit.quant import TYPES, QTensor, unpack, with_words

INTERPRET = "JAXSPLIT_GPU_LANE_ON_CPU" in os.environ
AXIS = "tensor"


def policy(**changes: bool) -> MatmulPolicy:
    """With kernels, for the first device; `changes`: fields of it."""
    kernels = "interpret" if INTERPRET else "triton"
    found = MatmulPolicy.for_device(jax.devices()[0], kernels)
    return dataclasses.replace(found, **changes)


def kernels_run(device: jax.Device) -> bool:
    """Whether this package's kernels run on a device."""
    return MatmulPolicy.for_device(device).kernels


def loop_options() -> dict | None:
    """Compiler options with which decode steps run as one CUDA graph."""
    return compiler_options(jax.devices()[0].platform, decode=True)


# Weights.


def quantized(rng: np.random.Generator, name: str, rows: int, columns: int) -> QTensor:
    """A random matrix of a GGML type, as models hold it: `[rows, columns]`."""
    raw = usual_blocks(rng, name, rows, columns // TYPES[name].block)
    return with_words(unpack(name, raw))


# Peers.


def make_peers(mesh: Mesh, owner: object, largest: int = 0) -> Array | None:
    """What the devices of a mesh of one axis need to exchange data: `[devices, words]`; None: they
    cannot. `largest`: elements of the largest two-shot all-reduce."""
    if INTERPRET:
        return jnp.zeros((mesh.size, 1 + 2 * mesh.size), jnp.uint32)
    size = functools.partial(two_shot.mailbox_bytes, most=largest)
    return make_mailboxes(mesh, [AXIS], size, owner)


def peers(table: Array, largest: int = 0) -> Peers:
    """Inside `shard_map`: the peers of a device, given its part of the table."""
    return Peers(table.reshape(-1), (AXIS,), largest)


def one_shot_all_reduce(x: Array, peers: Peers) -> Array:
    """The sum over the devices in their order, in float32."""
    return one_shot.total(x, peers, interpret=INTERPRET)


def one_shot_all_gather(x: Array, peers: Peers) -> Array:
    """`[devices, *x.shape]`."""
    return one_shot.gather(x, peers, interpret=INTERPRET)


def two_shot_all_reduce(x: Array, peers: Peers) -> Array:
    """The sum over the devices, of bfloat16 or float16."""
    assert two_shot.supports(x.size, x.dtype, peers)
    return two_shot.total(x, peers, interpret=INTERPRET)


def matmul_here(x: Array, w: QTensor | Array) -> Array:
    """`x @ w.T` as `matmul_all_reduce` computes it on each device: float32 `[rows, out]`."""
    with forward_context(policy=policy(int8_activations=True, fuse_all_reduce=True)):
        return matmul(x, w)


def matmul_all_reduce(x: Array, w: QTensor | Array, peers: Peers, *, fused: bool) -> Array:
    """`x @ w.T`, sent to the peers by the kernel that computes it, and the sum over the devices:
    float32 `[rows, out]`. `fused`: a kernel that also prepares activations receives it."""
    context = policy(int8_activations=True, fuse_all_reduce=True)
    with forward_context(policy=context, peers=peers):
        product = Product(x, w)
        assert product.sends
        y, counts = product.sent_to(peers)
        if not fused:
            return one_shot.total(y, peers, counts=counts, interpret=INTERPRET)
        total = Sum(jnp.zeros_like(y), y[None], peers, counts, INTERPRET)
        # XLA, which reads the sum here, must not begin early.
        launch = dataclasses.replace(context.launch, pdl=False)
        as_late(total).prepared(Rounding(), launch)
        return total.array


# Stages.


def ring_tables(devices: Sequence[jax.Device], channels: int, words: int, owner: object):
    """What each device needs to send to the next one; None: they cannot."""
    meshes = [Mesh(np.asarray([device]), (AXIS,)) for device in devices]
    if INTERPRET:
        return [*jnp.asarray(p2p.host_tables(len(meshes), (1,)))]
    return make_ring(meshes, p2p.mailbox_bytes(channels, words), owner)


def ring(table: Array) -> Ring:
    """A device's place in the ring, with methods `send`, `receive` and `next_round`."""
    return Ring(table.reshape(-1), jnp.ones(1, jnp.int32), INTERPRET)


# Time.


def delayed(value: Array, turns: Array) -> Array:
    """An int32 as it is, after a kernel has run for so many turns of some nanoseconds each."""
    return pl.pallas_call(
        _delay,
        out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=INTERPRET,
        name="delay",
    )(value.reshape(1), turns.reshape(1))[0]


def _delay(value: jax.Ref, turns: jax.Ref, out: jax.Ref) -> None:
    # Never negative, which the compiler does not know.
    busy = lax.fori_loop(0, turns[0], lambda _, x: x * 0.9999 + 0.25, jnp.float32(1.0))
    out[0] = value[0] + (busy < 0).astype(jnp.int32)
