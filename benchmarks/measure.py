"""What benchmarks share: what the devices can do, measured; tables."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec


def seconds(run: Callable[[], Any], repeat: int = 3) -> float:
    """The shortest of several runs, after one that compiles."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return min(times)


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
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    x = jax.device_put(x, device)
    dot = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))

    def run() -> jax.Array:
        return [dot(x) for _ in range(8)][-1]

    return 8 * 2 * size**3 / seconds(run)


def all_reduce_seconds(mesh: Mesh, size: int) -> float:
    """How long the devices of a mesh take to add up so many float32 numbers."""
    if mesh.size == 1:
        return 0.0
    count = 64

    def local(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: lax.psum(x, mesh.axis_names) / mesh.size, x)

    spec = PartitionSpec()
    add = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = np.ones(size, np.float32)
    return seconds(lambda: add(x)) / count


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table; `columns` are their keys and the headings."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(row[key]) for key in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
