"""What a decoder looks like: sizes and choices, independent of where they came from."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
      dim: how many of a head's dimensions turn, from the first.
      base: wavelengths are `2 pi base ** (2 i / dim)`.
      interleaved: pairs are dimensions `(2i, 2i + 1)`; else `(i, i + dim / 2)`.
      scaling: `none`, `linear` (positions divided by `factor`) or `yarn`.
      factor: how much longer than in training the context may be.
      original_context: the context length in training, for YaRN.
      attention_factor: multiplies cosine and sine.
      beta_fast, beta_slow: YaRN scales dimensions that turn less than `beta_slow` times in the
        original context, keeps those that turn more than `beta_fast` times, and blends between.
    """

    dim: int
    base: float = 10000.0
    interleaved: bool = False
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def frequencies(self) -> tuple[np.ndarray, float]:
        """Angles per position and the magnitude of the rotation.

        Linear: Chen et al. 2023, arXiv:2306.15595. YaRN: Peng et al. 2023, arXiv:2309.00071, with
        llama.cpp's rounding of the borders.

        Returns:
          float32 `[dim / 2]` in radians, and the factor of cosine and sine.
        """
        frequency = self.base ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        if self.scaling == "none" or self.factor == 1.0:
            return frequency.astype(np.float32), self.attention_factor
        scaled = frequency / self.factor
        if self.scaling == "linear":
            return scaled.astype(np.float32), self.attention_factor

        def dimension(turns: float) -> float:
            """The (fractional) pair that turns so often in the original context."""
            turn = self.original_context / (turns * 2 * math.pi)
            return self.dim * math.log(turn) / (2 * math.log(self.base))

        low = max(0, math.floor(dimension(self.beta_fast)))
        high = min(self.dim - 1, math.ceil(dimension(self.beta_slow)))
        ramp = np.clip((np.arange(self.dim // 2) - low) / max(0.001, high - low), 0, 1)
        magnitude = self.attention_factor * (1 + 0.1 * math.log(self.factor))
        return (frequency * (1 - ramp) + scaled * ramp).astype(np.float32), magnitude


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family.

    Attributes:
      architecture: the GGUF architecture's name, for messages only.
      vocab: tokens in the vocabulary.
      embed: width of the residual stream.
      layers: decoder layers.
      heads, kv_heads: query heads, and the key and value heads that they share.
      head_dim: width of a head.
      mlp: hidden width of the MLP.
      context: longest context that the model was made for, in tokens.
      norm_epsilon: added to the mean square in RMSNorm.
      rope: positions.
      rope_factors: the model has a parameter that divides the rotary frequencies.
      tied: the embedding is the output head too.
      qkv_bias, out_bias, mlp_bias: the projections have biases.
    """

    architecture: str
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context: int
    norm_epsilon: float
    rope: RopeConfig
    rope_factors: bool = False
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
