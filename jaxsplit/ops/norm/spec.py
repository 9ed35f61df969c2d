"""Norms: which, and their parameters."""

import dataclasses

import jax
from jax import Array

from jaxsplit.sharding.axes import Axis


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """A norm over the last dimension.

    Attributes:
      kind: `rms` (Zhang and Sennrich 2019, arXiv:1910.07467) or `layer` (Ba et al. 2016,
        arXiv:1607.06450).
      epsilon: added to the mean square, or to the variance.
      scale, bias: it has these parameters.
    """

    kind: str = "rms"
    epsilon: float = 1e-5
    scale: bool = True
    bias: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NormParams:
    """A norm with its parameters.

    Attributes:
      scale, bias: float32 `[size]`, this device's shard; None: no such parameter.
      config: which norm.
      size: elements of the whole axis.
      axis: of the normalized dimension, which may be split.
      group: elements that are normalized together; None: the whole axis.
    """

    scale: Array | None
    bias: Array | None
    config: NormConfig = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})
    axis: Axis = dataclasses.field(metadata={"static": True})
    group: int | None = dataclasses.field(default=None, metadata={"static": True})
