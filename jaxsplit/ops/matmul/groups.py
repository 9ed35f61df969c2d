"""Groups of rows that kernels multiply with a matrix of a stack each."""

import dataclasses

import jax
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupedGemmInfo:
    """Groups of rows, each multiplied with one matrix of a stack.

    Attributes:
      matrix: index into the stack, int32 `[groups]`.
      start: first row of the results of each group, int32 `[groups]`.
      stop: end of its rows, int32 `[groups]`.
      x_row: the rows of activations that each group multiplies, int32 `[groups, rows]`; the rows
        past `stop` are padding.
      count: number of groups that exist, int32.
    """

    matrix: Array
    start: Array
    stop: Array
    x_row: Array
    count: Array
