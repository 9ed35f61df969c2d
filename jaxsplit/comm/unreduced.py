"""Matmul outputs before their all-reduce."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.comm import one_shot
from jaxsplit.comm.api import all_gather, all_reduce, mesh_axes, one_shot_peers
from jaxsplit.sharding.axes import Axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Unreduced:
    """A matmul output that is not summed yet: over split-K parts, or over devices.

    Attributes:
      parts: `[parts, ..., out]`, float32; a single part may have the dtype of activations.
      epochs: int32 `[..., out]`: the matmul kernel has sent its only part to the peers, under these
        epochs; None: nothing is sent yet.
      bias: float32 `[out]` or `[..., out]`, added once after the sum; None: no bias.
      reduce_over: logical axes whose shards hold partial sums.
      axis: logical axis of the last dimension, gathered after the sum if it is split; None: each
        device keeps its shard.
    """

    parts: Array
    epochs: Array | None = None
    bias: Array | None = None
    reduce_over: tuple[Axis, ...] = dataclasses.field(default=(), metadata={"static": True})
    axis: Axis | None = dataclasses.field(default=None, metadata={"static": True})

    @staticmethod
    def of(y: Array) -> "Unreduced":
        """An array `[..., out]` that is a whole sum already."""
        return Unreduced(y[None])

    @property
    def local_sum(self) -> Array:
        """The sum of this device's parts, without the bias: `[..., out]`."""
        return self.parts[0] if len(self.parts) == 1 else self.parts.sum(0)

    @property
    def local_output(self) -> Array:
        """The sum of this device's parts, with the bias: `[..., out]`."""
        return self.local_sum if self.bias is None else self.local_sum + self.bias

    def all_reduce(self, dtype: jnp.dtype, residual_dtype: jnp.dtype | None = None) -> Array:
        """The whole sum with the bias, the same on every device: `[..., out]` of a dtype.

        Args:
          dtype: of the sum.
          residual_dtype: as `all_reduce` takes it; None: the same.
        """
        y = self.local_sum
        if self.epochs is not None:
            peers = one_shot_peers(y.size, *self.reduce_over)
            assert peers is not None  # as when the matmul kernel was chosen
            y = one_shot.all_reduce(y, peers, epochs=self.epochs).astype(dtype)
        else:
            y = all_reduce(y, *self.reduce_over, residual_dtype=residual_dtype or dtype)
            y = y.astype(dtype)
        if self.axis is not None:
            y = all_gather(y, self.axis, self.axis.units)
        return y if self.bias is None else (y + self.bias).astype(dtype)

    def __mul__(self, factor: float) -> "Unreduced":
        """Times a number; it may not be sent already."""
        assert self.epochs is None
        bias = None if self.bias is None else self.bias * factor
        return dataclasses.replace(self, parts=self.parts * factor, bias=bias)

    def __add__(self, other: "Unreduced") -> "Unreduced":
        """The sum of both, with one all-reduce if the same devices take part in theirs.

        Neither may be sent already: set `fuse_all_reduce=False` around both matmuls.
        """
        assert self.epochs is None and other.epochs is None
        if self._devices != other._devices:
            return Unreduced.of(self.all_reduce(jnp.float32) + other.all_reduce(jnp.float32))
        biases = [b for b in (self.bias, other.bias) if b is not None]
        bias = sum(biases[1:], biases[0]) if biases else None
        y = self.local_sum + other.local_sum
        return dataclasses.replace(self, parts=y[None], bias=bias)

    @property
    def _devices(self) -> tuple[tuple[str, ...], ...]:
        """Mesh axes of the all-reduce and of the gather."""
        return mesh_axes(*self.reduce_over), () if self.axis is None else mesh_axes(self.axis)
