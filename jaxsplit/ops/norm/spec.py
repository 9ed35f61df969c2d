"""Which norm."""

import dataclasses


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
