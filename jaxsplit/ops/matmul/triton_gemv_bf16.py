"""Products of one row with plain matrices: a kernel for GPUs, which can send what it computes."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.comm import one_shot
from jaxsplit.comm.peers import WARPS, PeerGroup
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.layout import BLOCK, PlainRows
from jaxsplit.ops.launch import dispatch_programs
from jaxsplit.pallas import pl, plgpu


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a program multiplies: rows of the matrix, and columns in a step."""

    rows: int = 4
    columns: int = 2048


def supports(w: Array, dtype: jnp.dtype) -> bool:
    """Whether `products` can multiply activations of a dtype with a matrix."""
    # Not float16, for which rows that are not normalized may be too large; 32 bits count elements.
    suits = w.dtype == dtype == jnp.bfloat16 and w.size < 2**31
    return suits and w.ndim == 2 and w.shape[-1] % BLOCK == 0


def products(
    x: PlainRows,
    weights: Sequence[Array],
    dtype: jnp.dtype = jnp.float32,
    *,
    peers: PeerGroup | None = None,
    tiling: Tiling | None = None,
) -> list[Array]:
    """`x @ w.T` for each matrix, all in one kernel: `[1, out]`, accumulated in float32.

    Args:
      x: `[1, in]`.
      weights: `[out, in]` each, ones that are supported.
      dtype: of the results.
      peers: devices to which the results are sent, of one matrix, ahead of an exchange: its counts
        follow, int32 likewise.
      tiling: of the work; None: a usual one.
    """
    tiling = tiling or Tiling()
    programs = [pl.cdiv(w.shape[0], tiling.rows) for w in weights]
    inputs, structure = jax.tree.flatten((x, list(weights), peers))
    return pl.pallas_call(
        partial(
            _gemv_bf16_kernel,
            structure=structure,
            programs=programs,
            tiling=tiling,
        ),
        grid=(sum(programs),),
        out_shape=one_shot.out_shapes([(1, len(w)) for w in weights], dtype, peers),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="gemv_bf16",
    )(*inputs)


def _gemv_bf16_kernel(
    *refs: jax.Ref, structure: Any, programs: Sequence[int], tiling: Tiling
) -> None:
    """Some rows of one matrix.

    Args:
      *refs: activations, matrices and results.
      structure: of activations, matrices and peers.
      programs: for each matrix.
      tiling: of the work.
    """
    x, weights, peers = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs = refs[structure.num_leaves :]

    def some_rows(i: int, program: Array) -> None:
        _multiply(x, weights[i], outs[i :: len(weights)], program, peers, tiling)

    tasks = [partial(some_rows, i) for i in range(len(weights))]
    dispatch_programs(pl.program_id(0), list(zip(programs, tasks, strict=True)))


def _multiply(
    x: PlainRows,
    w: jax.Ref,
    outs: Sequence[jax.Ref],
    program: Array,
    peers: PeerGroup | None,
    tiling: Tiling,
) -> None:
    """A program's rows, all steps; results are stored, and sent to peers, with counts."""
    height, columns = w.shape
    at = program * tiling.rows + jnp.arange(tiling.rows)
    row = jnp.minimum(at, height - 1)
    writer = None if peers is None or interpreted() else one_shot.peer_writer(peers, at)
    zero = jnp.zeros(tiling.rows, jnp.float32) if writer is None else writer.zero
    width = min(tiling.columns, pl.next_power_of_2(columns))
    shape = (tiling.rows, width)
    total = jnp.broadcast_to(zero[:, None], shape)
    factor = None if x.rms is None else x.rms.inverse_of(jnp.asarray(0))

    def step(i: Array | int, total: Array, *, whole: bool = True) -> Array:
        column = i * width + jnp.arange(width)
        index = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None], shape)
        if whole:
            of_w, of_x = plgpu.load(w.at[index]), plgpu.load(x.array.at[0, column])
        else:
            inside, zero = column < columns, jnp.zeros((), w.dtype)
            of_w = plgpu.load(w.at[index], mask=jnp.broadcast_to(inside[None], shape), other=zero)
            of_x = plgpu.load(x.array.at[0, column], mask=inside, other=zero)
        return total + of_w.astype(jnp.float32) * of_x.astype(jnp.float32)[None]

    steps = columns // width
    if steps <= 2:  # read at once
        for i in range(steps):
            total = step(i, total)
    else:
        total = lax.fori_loop(0, steps, step, total)
    if columns % width:
        total = step(steps, total, whole=False)
    y = jnp.sum(total, axis=1)
    if factor is not None:
        y *= factor
    one_shot.store(outs, at, y.astype(outs[0].dtype), at < height, writer, jnp.asarray(0))
