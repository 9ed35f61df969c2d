"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      dim: dimensions of a head that are rotated, from the first.
      base: wavelengths are `2 pi base ** (2 i / dim)`.
      interleaved: pairs are dimensions `(2i, 2i + 1)`; else `(i, i + dim / 2)`.
      scaling: `none`, `linear` (positions divided by `factor`) or `yarn`.
      factor: how much longer than in training the context may be.
      original_context: the context length in training, for YaRN.
      attention_factor: multiplies cosine and sine.
      freq_factors: name of the parameter that divides the frequencies; None: there is none.
      still: how many of the last pairs are not rotated.
      beta_fast, beta_slow: YaRN scales dimensions with less than `beta_slow` rotations in the
        original context, keeps those with more than `beta_fast`, and blends between.
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    freq_factors: str | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    still: int = 0

    def divisors(self, freq_factors: Mapping[str, Array]) -> Array | None:
        """The parameter named `freq_factors`, float32 `[dim / 2]`, of those of a `Batch`."""
        return None if self.freq_factors is None else freq_factors.get(self.freq_factors)

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Angles per position and the attention factor.

        Linear: Chen et al. 2023, arXiv:2306.15595. YaRN: Peng et al. 2023, arXiv:2309.00071, with
        llama.cpp's rounding of the borders.

        Returns:
          float32 `[dim / 2]` in radians, and the factor of cosine and sine.
        """
        frequency = self.base ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        frequency[self.dim // 2 - self.still :] = 0
        if self.scaling == "none" or self.factor == 1.0:
            return frequency.astype(np.float32), self.attention_factor
        scaled = frequency / self.factor
        if self.scaling == "linear":
            return scaled.astype(np.float32), self.attention_factor

        def dimension(rotations: float) -> float:
            """The (fractional) pair with this many rotations in the original context."""
            wavelength = self.original_context / (rotations * 2 * math.pi)
            return self.dim * math.log(wavelength) / (2 * math.log(self.base))

        low = max(0, math.floor(dimension(self.beta_fast)))
        high = min(self.dim - 1, math.ceil(dimension(self.beta_slow)))
        ramp = np.clip((np.arange(self.dim // 2) - low) / max(0.001, high - low), 0, 1)
        attention_factor = self.attention_factor * (1 + 0.1 * math.log(max(1.0, self.factor)))
        return (frequency * (1 - ramp) + scaled * ramp).astype(np.float32), attention_factor


def rope_cos_sin(
    positions: Array, config: RopeConfig, freq_factors: Array | None = None
) -> tuple[Array, Array]:
    """Cosines and sines of the angles by which `rope` rotates: float32 `[batch, time, dim / 2]`."""
    frequencies, attention_factor = config.frequencies()
    frequencies = jnp.asarray(frequencies)
    if freq_factors is not None:
        frequencies = frequencies / freq_factors
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * np.float32(attention_factor), jnp.sin(angles) * np.float32(
        attention_factor
    )


def rope(
    x: Array, positions: Array, config: RopeConfig, freq_factors: Array | None = None
) -> Array:
    """Rotates heads by their positions (Su et al. 2021, arXiv:2104.09864), computed in float32.

    Args:
      x: `[batch, time, ..., head_dim]`.
      positions: int32 `[batch, time]`.
      config: frequencies and scaling.
      freq_factors: float32 `[dim / 2]` that divide the frequencies, or None.

    Returns:
      the shape and dtype of `x`; dimensions from `config.dim` on are unchanged.
    """
    cos, sin = (
        factor.reshape(*positions.shape, *[1] * (x.ndim - 3), -1)
        for factor in rope_cos_sin(positions, config, freq_factors)
    )
    rotating, rest = jnp.split(x.astype(jnp.float32), [config.dim], axis=-1)
    pairs = (-1, 2) if config.interleaved else (2, -1)
    axis = -1 if config.interleaved else -2
    rotating = rotating.reshape(*x.shape[:-1], *pairs)
    a, b = jnp.moveaxis(rotating, axis, 0)
    rotated = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=axis)
    rotated = rotated.reshape(*x.shape[:-1], config.dim)
    return jnp.concatenate([rotated, rest], axis=-1).astype(x.dtype)
