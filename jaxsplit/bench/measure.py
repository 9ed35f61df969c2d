"""Measured rates of the devices, and tables of what is measured."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxsplit.comm import one_shot, two_shot
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.comm.symmetric_memory import allocate_peer_buffers
from jaxsplit.context import MatmulPolicy
from jaxsplit.engine import compiler_options
from jaxsplit.errors import JaxsplitError

WARM_UP = 2
"""Runs that do not count: the first compiles, and XLA captures the second into a CUDA graph."""


def times_of(run: Callable[[], Any], repeat: int = 3) -> list[float]:
    """Seconds of each of several runs."""
    times = []
    for _ in range(WARM_UP + repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return times[WARM_UP:]


def seconds(run: Callable[[], Any], repeat: int = 3) -> float:
    """Seconds of the shortest of several runs."""
    return min(times_of(run, repeat))


def copy_bandwidth(device: jax.Device) -> float:
    """Bytes read and written per second by a large copy on one device."""
    size = 2**26 if device.platform == "cpu" else 2**30
    state = [jax.device_put(np.ones(size // 4, np.float32), device)]
    add = jax.jit(lambda x: x + 1, donate_argnums=0)  # into memory that is there already

    def run() -> jax.Array:
        for _ in range(8):
            state[0] = add(state[0])
        return state[0]

    return 8 * 2 * size / seconds(run)


def matmul_rate(device: jax.Device, dtype: jnp.dtype) -> float:
    """FLOP/s of a large matrix product on one device, of random numbers."""
    size = 1024 if device.platform == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    x = jax.device_put(x, device)
    dot = jax.jit(lambda x: jnp.dot(x, x.T, preferred_element_type=jnp.float32))

    def run() -> jax.Array:
        return [dot(x) for _ in range(8)][-1]

    return 8 * 2 * size**3 / seconds(run)


def all_reduce_seconds(mesh: Mesh, size: int, *, kernels: bool = False) -> float | None:
    """The shortest of `all_reduce_times`; 0 on one device."""
    times = all_reduce_times(mesh, size, kernels=kernels)
    return None if times is None else min(times)


def all_reduce_times(mesh: Mesh, size: int, *, kernels: bool = False) -> list[float] | None:
    """Times of an all-reduce over all devices of a mesh, one of several in a row.

    Args:
      mesh: of any axes.
      size: bytes: float32 elements; bfloat16 for large all-reduces in kernels.
      kernels: use peer-to-peer kernels (`jaxsplit.comm`) instead of XLA.

    Returns:
      seconds, one for each repetition; None: the devices do not support the kernels.
    """
    if mesh.size == 1:
        return [0.0]
    axes, count = ("tensor",), 32
    mesh = Mesh(mesh.devices.reshape(-1), axes)
    few = one_shot.supports(size // 4)
    dtype = jnp.float32 if few or not kernels else jnp.bfloat16
    numbers = size // jnp.dtype(dtype).itemsize
    owner, table = _Owner(), None
    if kernels:
        if MatmulPolicy.for_device(mesh.devices.flat[0]).kernels:
            size_of = functools.partial(two_shot.buffer_bytes, max_elements=0 if few else numbers)
            table = allocate_peer_buffers(mesh, axes, size_of, owner)
        if table is None:
            return None

    def local(table: jax.Array | None, x: jax.Array) -> jax.Array:
        for _ in range(count):
            if table is None:
                x = lax.psum(x, axes)
            else:
                peers = PeerGroup(table.reshape(-1), axes, 0 if few else numbers)
                x = (one_shot.all_reduce if few else two_shot.all_reduce)(x, peers)
            x = x * jnp.asarray(1 / mesh.size, dtype)
        return x

    specs = (PartitionSpec(*axes), PartitionSpec())
    local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[1], check_vma=False)
    options = compiler_options(mesh.devices.flat[0].platform, decode=True)
    add, x = jax.jit(local, compiler_options=options), jnp.ones(numbers, dtype)
    times = [took / count for took in times_of(lambda: add(table, x))]
    del owner
    return times


class _Owner:
    """Frees the peer buffers when it is collected."""


def counts_up_to(devices: int, values: Sequence[str] | None) -> list[int]:
    """The numbers of devices that `--counts` asks for; None: powers of two, and all.

    Raises:
      JaxsplitError: some are no numbers, or more than there are.
    """
    if values is None:
        return sorted({devices, *(2**n for n in range(devices.bit_length()))})
    counts = [int(value) if value.isdigit() else 0 for value in values]
    if not counts or not all(1 <= count <= devices for count in counts):
        raise JaxsplitError(f"--counts={','.join(values)}: there are {devices} devices")
    return counts


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; `columns` are their keys and the headings."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
