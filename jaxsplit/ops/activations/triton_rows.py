"""A kernel for GPUs between two matmuls: it computes rows and stores them as the next one reads.

Residual addition, all-reduce, normalization, activation functions and 8-bit quantization are all
element-wise but for the mean square, which consumers divide by: one launch does all of them.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.comm import one_shot
from jaxsplit.comm.peers import WARPS, WIDTH
from jaxsplit.context import interpreted
from jaxsplit.ops.activations.layout import (
    BLOCK,
    ActivationLayout,
    Addend,
    Readers,
    RMSStatistics,
    block_elements,
    broadcast_leading,
    store_layouts,
    wrap_layouts,
)
from jaxsplit.ops.launch import launch_dependents
from jaxsplit.pallas import pl, plgpu

_BLOCKS = WIDTH // BLOCK  # of a program


def store_rows(
    function: Callable[..., Array],
    operands: Sequence[Array],
    readers: Readers,
    *,
    addend: Addend | None = None,
    bias: Array | None = None,
    norm: tuple[float, int] | None = None,
) -> tuple[tuple[Any, ...], RMSStatistics | None, Array]:
    """Computes rows and stores them in layouts.

    Args:
      function: of the operands' elements in float32.
      operands: `[..., in]`, `[..., 1]` or `[in]` each; the first is `[..., in]`.
      readers: of the rows, with layouts.
      addend: added to the first operand before anything else.
      bias: added with the addend, float32 `[in]` or `[..., in]`; None: none is.
      norm: epsilon and size of the RMS norm of the first operand, whose division is left to the
        readers; None: no norm.

    Returns:
      the rows in each layout, the statistics of the norm, and the first operand with the addend in
      its dtype.
    """
    layouts, first, columns = readers.layouts, operands[0], operands[0].shape[-1]
    rows, programs = math.prod(first.shape[:-1]), pl.cdiv(columns // BLOCK, _BLOCKS)
    operands = tuple(x if x.ndim == 1 else x.reshape(rows, -1) for x in operands)
    bias = bias if bias is None or bias.ndim == 1 else bias.reshape(rows, -1)
    if addend is not None:
        parts, epochs, peers = addend
        epochs = None if epochs is None else epochs.reshape(rows, columns)
        addend = parts.reshape(-1, rows, columns), epochs, peers
    inputs, structure = jax.tree.flatten((operands, addend, bias))
    shapes = [shape for layout in layouts for shape in layout.shapes(rows, columns)]
    if norm is not None:
        shapes.append(jax.ShapeDtypeStruct((rows, programs), jnp.float32))
    if addend is not None:
        shapes.append(jax.ShapeDtypeStruct((rows, columns), first.dtype))
    arrays = pl.pallas_call(
        partial(
            _store_rows_kernel,
            function=function,
            structure=structure,
            layouts=layouts,
            norm=norm is not None,
            early=not readers.xla,
        ),
        grid=(rows, programs),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpreted(),
        name="store_rows",
    )(*inputs)
    arrays = list(arrays)
    total = arrays.pop().reshape(first.shape) if addend is not None else first
    rms = None if norm is None else RMSStatistics(arrays.pop(), *norm)
    return wrap_layouts(layouts, arrays, rows, columns, rms), rms, total


def _store_rows_kernel(
    *refs: jax.Ref,
    function: Callable[..., Array],
    structure: jax.tree_util.PyTreeDef,
    layouts: Sequence[ActivationLayout],
    norm: bool,
    early: bool,
) -> None:
    """Some blocks of a row.

    Args:
      *refs: operands, addend and bias; then arrays of the layouts, sums of squares, and the first
        operand with the addend, as far as they exist.
      function, layouts: as in `store_rows`.
      structure: of operands, addend and bias.
      norm: sums of squares are stored.
      early: as in `launch_dependents`.
    """
    inputs = jax.tree.unflatten(structure, refs[: structure.num_leaves])
    (first, *others), addend, bias_ref = inputs
    outs = list(refs[structure.num_leaves :])
    total_ref = outs.pop() if addend else None
    squares_ref = outs.pop() if norm else None
    columns = first.shape[-1]
    row = launch_dependents(pl.program_id(0), early)
    block = pl.program_id(1) * _BLOCKS + jnp.arange(_BLOCKS)
    exists = block < columns // BLOCK
    element = block_elements(block)
    mask = broadcast_leading(exists, element.shape)

    def load(ref: jax.Ref, *before: int, dtype: jnp.dtype = jnp.float32) -> Array:
        column = element if ref.shape[-1] > 1 else jnp.zeros_like(element)
        at = (column,) if ref.ndim == 1 else (*before, row, column)
        zero = jnp.zeros((), ref.dtype)
        return plgpu.load(ref.at[at], mask=mask, other=zero).astype(dtype)

    others = [load(ref) for ref in others]  # before the wait for the peers, not after it
    if total_ref is None:
        x = load(first)
    else:
        parts, epochs, peers = addend
        stream = load(first)
        if bias_ref is not None:
            stream += load(bias_ref)
        y = reduce(add, (load(parts, part) for part in range(parts.shape[0])))
        if peers is not None:
            y = one_shot.all_reduce_block(
                y,
                peers,
                row * pl.num_programs(1) + pl.program_id(1),
                element - pl.program_id(1) * WIDTH,
                None if epochs is None else load(epochs, dtype=jnp.int32),
            )
        total = (stream + y).astype(total_ref.dtype)
        plgpu.store(total_ref.at[row, element], total, mask=mask)
        x = total.astype(jnp.float32)
    store_layouts(layouts, outs, row, block, exists, function(x, *others))
    if squares_ref is not None:
        squares = jnp.sum(jnp.where(mask, x * x, 0))
        plgpu.store(squares_ref.at[row, pl.program_id(1)], squares)
