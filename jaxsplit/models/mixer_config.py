"""How tokens may see one another: configs of mixers, and of the norms and rotations in them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxsplit.models.axes import LATENT, Axis, head_axes
from jaxsplit.models.cache import (
    AttentionCache,
    RecurrentCache,
    attention_cache,
    recurrent_cache,
)


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
      factors: the model has a parameter of this name that divides the frequencies; None: it has
        none.
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
    factors: str | None = None
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
        magnitude = self.attention_factor * (1 + 0.1 * math.log(max(1.0, self.factor)))
        return (frequency * (1 - ramp) + scaled * ramp).astype(np.float32), magnitude


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


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention with grouped key and value heads.

    Attributes:
      heads, kv_heads: query heads, and the key and value heads that they share.
      head_dim: width of a query or key head.
      value_dim: width of a value head.
      rope: how heads turn with their position; None: they do not.
      scale: of the scores; None: `head_dim ** -0.5`.
      window: only so many of the last positions are seen; None: all.
      chunked: instead, only those in the same run of `window` positions.
      softcap: scores are bounded to this by a tanh; None: they are not.
      alibi: the largest bias by distance (Press et al. 2021, arXiv:2108.12409); None: no bias.
      query_norm: of each head, or of all heads together (`norm_over="all"`), or of each head with
        its own scales (`norm_over="each"`); None: no norm.
      key_norm: of the keys, likewise.
      value_norm: of each value head.
      norm_over: see `query_norm`.
      norm_first: queries and keys are normalized before they turn; else after.
      qkv_bias, out_bias: the projections have biases.
      clamp: bound of queries, keys and values; None: none.
      sinks: each head has a learned score that takes part in the softmax and reads nothing.
      gate: outputs are multiplied with the sigmoid of a projection of the input.
      temperature: `(scale, floor, offset)`: queries at position p are multiplied with
        `1 + scale * log(1 + (p + offset) // floor)`; None: they are not.
      value_is_key: values are the keys as projected.
      lends: the name under which later layers may use its keys and values; None: they do not.
      borrows: it has no keys and values of its own but uses those lent under this name.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rope: RopeConfig | None = None
    scale: float | None = None
    window: int | None = None
    chunked: bool = False
    softcap: float | None = None
    alibi: float | None = None
    query_norm: NormConfig | None = None
    key_norm: NormConfig | None = None
    value_norm: NormConfig | None = None
    norm_over: str = "head"
    norm_first: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    clamp: float | None = None
    sinks: bool = False
    gate: bool = False
    temperature: tuple[float, int, int] | None = None
    value_is_key: bool = False
    lends: str | None = None
    borrows: str | None = None

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of query heads and of key and value heads."""
        return head_axes(self.heads, self.kv_heads)

    def cache(self, context: int, dtype: jnp.dtype) -> AttentionCache | None:
        """What it keeps of a sequence; None: nothing."""
        if self.borrows is not None:
            return None
        length = context if self.window is None else min(self.window, context)
        _, kv_heads = self.axes
        return attention_cache(kv_heads, length, self.head_dim, self.value_dim, dtype)


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Attention whose keys and values come from a latent vector.

    Attributes:
      heads: how many.
      head_dim: width of a query or key head, without the part that turns with position.
      value_dim: width of a value head.
      latent: width of the latent vector.
      query_latent: width of the vector that queries come from; 0: the layer's input.
      rope: of the turning part, which all heads share.
      scale: of the scores.
      norm: of the latent vectors.
      keys_by_row: keys' projections are `[head_dim, latent]`, else `[latent, head_dim]`.
      temperature: as in `AttentionConfig`.
    """

    heads: int
    head_dim: int
    value_dim: int
    latent: int
    query_latent: int
    rope: RopeConfig
    scale: float
    norm: NormConfig = NormConfig()
    keys_by_row: bool = False
    temperature: tuple[float, int, int] | None = None

    @property
    def axis(self) -> Axis:
        """Of the heads."""
        return head_axes(self.heads, self.heads)[0]

    @property
    def kv_heads(self) -> int:
        """What the heads share is as one key head."""
        return 1

    def cache(self, context: int, dtype: jnp.dtype) -> AttentionCache:
        """What it keeps of a sequence: latent vectors and the turning part of keys."""
        return attention_cache(LATENT, context, self.latent + self.rope.dim, None, dtype)


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """Heads with a matrix of associations that forgets: what the kinds have in common.

    Attributes:
      value_heads, key_heads: heads, and the query and key heads that they share.
      value_dim, key_dim: width of a value head, and of a query or key head.
      width: tokens that the convolutions see.
      norm: of the output, before the last projection; None: no norm.
      conv_bias: the convolutions have biases.
      tiled: as in `Axis`.
    """

    value_heads: int
    key_heads: int
    value_dim: int
    key_dim: int
    width: int
    norm: NormConfig | None = None
    conv_bias: bool = False
    tiled: bool = False

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of value heads and of query and key heads."""
        return head_axes(self.value_heads, self.key_heads, tiled=self.tiled)

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is."""
        heads, key_heads = self.axes
        keys = key_heads, self.key_heads * self.key_dim
        values = heads, self.value_heads * self.value_dim
        return recurrent_cache(
            self.width, [keys, keys, values], (heads, self.key_dim, self.value_dim)
        )


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(LinearAttentionConfig):
    """The gated delta rule (Yang et al. 2024, arXiv:2412.06464).

    Attributes:
      epsilon: added to the squares of queries and keys before they are divided by their lengths.
    """

    epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class Mamba2Config(LinearAttentionConfig):
    """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060).

    Its x, B and C are values, keys and queries; groups are key heads.
    """


@dataclasses.dataclass(frozen=True)
class ShortConvConfig:
    """A short convolution between two gates (LFM2).

    Attributes:
      channels: the width of the residual stream.
      width: tokens that the convolution sees.
    """

    channels: int
    width: int

    @property
    def axis(self) -> Axis:
        """Of the channels, which are split as hidden units are."""
        return Axis("mlp", self.channels)

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is."""
        return recurrent_cache(self.width, [(self.axis, self.channels)])


Mixer = AttentionConfig | LatentAttentionConfig | DeltaNetConfig | Mamba2Config | ShortConvConfig
