"""GEMV with plain bfloat16 matrices: a Triton kernel that can send its results to the peers."""

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
    """The tile of a program: rows of the matrix, and columns per step."""

    rows: int = 4
    columns: int = 2048


def supports(w: Array, dtype: jnp.dtype) -> bool:
    """Whether `gemv_bf16` can multiply activations of a dtype with a matrix."""
    # Rows whose normalization is deferred may overflow float16. Indices are 32-bit.
    suits = w.dtype == dtype == jnp.bfloat16 and w.size < 2**31
    return suits and w.ndim == 2 and w.shape[-1] % BLOCK == 0


def gemv_bf16(
    x: PlainRows,
    weights: Sequence[Array],
    dtype: jnp.dtype = jnp.float32,
    *,
    peers: PeerGroup | None = None,
    tiling: Tiling | None = None,
) -> list[Array]:
    """`x @ w.T` for each matrix, in one launch: `[1, out]`, accumulated in float32.

    Args:
      x: `[1, in]`.
      weights: supported matrices `[out, in]`.
      dtype: of the results.
      peers: devices to which the kernel sends its result, with a single matrix, ahead of an
        all-reduce. The epochs, int32 `[1, out]`, follow the result.
      tiling: None: the default.
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
    """Computes a tile of rows of one matrix.

    Args:
      *refs: inputs, then outputs.
      structure: of the inputs: activations, matrices and peers.
      programs: number of programs of each matrix.
      tiling: of a program.
    """
    x, weights, peers = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    outs = refs[structure.num_leaves :]

    def task(i: int, program: Array) -> None:
        _multiply_tile(x, weights[i], outs[i :: len(weights)], program, peers=peers, tiling=tiling)

    tasks = [partial(task, i) for i in range(len(weights))]
    dispatch_programs(pl.program_id(0), list(zip(programs, tasks, strict=True)))


def _multiply_tile(
    x: PlainRows,
    w: jax.Ref,
    outs: Sequence[jax.Ref],
    program: Array,
    *,
    peers: PeerGroup | None,
    tiling: Tiling,
) -> None:
    """Computes and stores the rows of a program, and sends them to the peers, with epochs."""
    rows, columns = w.shape
    index = program * tiling.rows + jnp.arange(tiling.rows)
    row = jnp.minimum(index, rows - 1)
    writer = None if peers is None or interpreted() else one_shot.peer_writer(peers, index)
    zero = jnp.zeros(tiling.rows, jnp.float32) if writer is None else writer.zero
    width = min(tiling.columns, pl.next_power_of_2(columns))
    shape = (tiling.rows, width)
    total = jnp.broadcast_to(zero[:, None], shape)
    rms_factor = None if x.rms is None else x.rms.inverse_of(jnp.asarray(0))

    def step(i: Array | int, total: Array, *, full: bool = True) -> Array:
        column = i * width + jnp.arange(width)
        element = jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None], shape)
        if full:
            w_tile, x_tile = plgpu.load(w.at[element]), plgpu.load(x.array.at[0, column])
        else:
            mask, zero = column < columns, jnp.zeros((), w.dtype)
            w_mask = jnp.broadcast_to(mask[None], shape)
            w_tile = plgpu.load(w.at[element], mask=w_mask, other=zero)
            x_tile = plgpu.load(x.array.at[0, column], mask=mask, other=zero)
        return total + w_tile.astype(jnp.float32) * x_tile.astype(jnp.float32)[None]

    steps = columns // width
    if steps <= 2:  # unrolled: all loads are issued at once
        for i in range(steps):
            total = step(i, total)
    else:
        total = lax.fori_loop(0, steps, step, total)
    if columns % width:
        total = step(steps, total, full=False)
    y = jnp.sum(total, axis=1)
    if rms_factor is not None:
        y *= rms_factor
    one_shot.store(outs, index, y.astype(outs[0].dtype), index < rows, writer, jnp.asarray(0))
