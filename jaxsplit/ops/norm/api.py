"""Norms, and the step between two layers: all-reduce, residual addition, norm, layout."""

import jax.numpy as jnp
from jax import Array

from jaxsplit.comm.api import is_split, mesh_axes, one_shot_peers
from jaxsplit.comm.peers import padded
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.ops.activations.api import apply, store_rows
from jaxsplit.ops.activations.layout import Activations, Addend, Readers, rows_of
from jaxsplit.ops.norm.spec import NormParams
from jaxsplit.ops.norm.xla import normalize

__all__ = ["add", "add_norm", "normalize"]


def add_norm(
    unreduced: Unreduced | None, residual: Array, norm: NormParams | None, readers: Readers
) -> tuple[Activations, Array]:
    """Adds a matmul output to the residual stream, and normalizes the sum for its readers.

    Args:
      unreduced: `[..., embed]`; None: nothing is added.
      residual: `[..., embed]`.
      norm: of the sum; None: its readers read it as it is.
      readers: of the activations.

    Returns:
      the activations, and the residual stream with the output added, both of its dtype.
    """
    for supports, run in _IMPLEMENTATIONS:
        if supports(norm, readers):
            return run(unreduced, residual, norm, readers)
    raise AssertionError("the last implementation supports everything")


def add(unreduced: Unreduced | None, residual: Array) -> Array:
    """The residual stream `[..., embed]` with a matmul output added."""
    if unreduced is None:
        return residual
    return residual + unreduced.all_reduce(residual.dtype)


def _add_then_norm(
    unreduced: Unreduced | None, residual: Array, norm: NormParams | None, readers: Readers
) -> tuple[Activations, Array]:
    residual = add(unreduced, residual)
    x = residual if norm is None else normalize(residual, norm)
    return apply(lambda x: x, (x,), readers), residual


def _fuses(norm: NormParams | None, readers: Readers) -> bool:
    """Whether the kernel can add and normalize: for RMS norms over a whole axis."""
    if not readers.layouts or norm is None:
        return bool(readers.layouts)
    plain = norm.config.kind == "rms" and norm.bias is None and norm.group is None
    return plain and not is_split(norm.axis)


def _fused(
    unreduced: Unreduced | None, residual: Array, norm: NormParams | None, readers: Readers
) -> tuple[Activations, Array]:
    """All in the kernel that stores the activations, the all-reduce too if it is between peers."""
    scale = () if norm is None or norm.scale is None else (norm.scale,)
    addend, bias = (None, None) if unreduced is None else _addend(unreduced, residual)
    stored, rms, residual = store_rows(
        _scaled,
        (residual, *scale),
        readers,
        addend=addend,
        bias=bias,
        norm=None if norm is None else (norm.config.epsilon, norm.size),
    )
    if norm is None:
        return Activations(residual, readers.layouts, stored), residual
    unnormalized = _scaled(residual.astype(jnp.float32), *scale)
    array = normalize(residual, norm)
    return Activations(array, readers.layouts, stored, unnormalized, rms), residual


def _addend(unreduced: Unreduced, residual: Array) -> tuple[Addend, Array | None]:
    """The parts that the kernel sums, and the bias that it adds."""
    u, split = unreduced, mesh_axes(*unreduced.reduce_over)
    size = rows_of(residual) * padded(residual.shape[-1])
    peers = one_shot_peers(size, *u.reduce_over)
    gathered = u.axis is not None and is_split(u.axis)
    if gathered or (split and peers is None):
        return (u.all_reduce(jnp.float32, residual.dtype)[None], None, None), None
    return (u.parts, u.epochs, peers if split else None), u.bias


def _scaled(x: Array, scale: Array | None = None) -> Array:
    return x if scale is None else x * scale


_IMPLEMENTATIONS = (
    (_fuses, _fused),
    (lambda norm, readers: True, _add_then_norm),
)
"""Ways to add and normalize, best first: whether one supports a norm for readers, and it."""
