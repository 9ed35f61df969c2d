"""Element-wise ops on activations, stored as their readers need them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from jax import Array

from jaxsplit.context import current_context
from jaxsplit.ops.activations import cuda_rows, triton_rows
from jaxsplit.ops.activations.functions import Activation, activate
from jaxsplit.ops.activations.layout import ActivationLayout, Activations, Readers

__all__ = ["act_and_mul", "apply", "as_array", "in_layout", "store_rows"]


def store_rows(function: Callable[..., Array], operands: Sequence[Array], *args: Any, **kw: Any):
    """As `triton_rows.store_rows`, by a kernel of the backend that runs."""
    backend = cuda_rows if current_context().policy.only_cuda else triton_rows
    return backend.store_rows(function, operands, *args, **kw)


def in_layout(x: Array | Activations, layout: ActivationLayout) -> Any:
    """Rows `[..., in]` in the layout of a kernel, stored by one now if they are not yet."""
    if isinstance(x, Activations):
        for present, stored in zip(x.layouts, x.stored, strict=True):
            if present.serves(layout):
                return stored
    [stored], *_ = store_rows(_identity, (as_array(x),), Readers((layout,), xla=False))
    return stored


def as_array(x: Array | Activations) -> Array:
    """The rows `[..., in]` as an array."""
    return x.array if isinstance(x, Activations) else x


def act_and_mul(
    up: Array,
    gate: Array | None,
    activation: Activation,
    readers: Readers,
    *,
    row_scale: Array | None = None,
) -> Activations:
    """Hidden units of an MLP.

    Args:
      up, gate: `[..., hidden]`, as in `activate`.
      activation: as `activate` takes it.
      readers: of the result.
      row_scale: `[..., 1]`, multiplies the result; None: 1.
    """
    operands = [x for x in (up, gate, row_scale) if x is not None]
    function = partial(_activated, activation, gate is not None)
    return apply(function, operands, readers)


def apply(
    function: Callable[..., Array], operands: Sequence[Array], readers: Readers
) -> Activations:
    """A function of the operands' elements as activations of the dtype of the first operand.

    Args:
      function: element-wise.
      operands: `[..., in]`, `[..., 1]` or `[in]` each; the first is `[..., in]`.
      readers: of the result.
    """
    array = function(*operands).astype(operands[0].dtype)
    if not readers.layouts:
        return Activations(array)
    stored, *_ = store_rows(function, operands, readers)
    return Activations(array, readers.layouts, stored)


def _activated(activation: Activation, gated: bool, up: Array, *others: Array) -> Array:
    gate, scale = others[:1] if gated else (None,), others[int(gated) :]
    y = activate(activation, up, gate[0])
    return y * scale[0] if scale else y


def _identity(x: Array) -> Array:
    return x
