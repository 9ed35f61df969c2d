"""What a decoder looks like: sizes and choices, independent of where they came from."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from jaxsplit.models.axes import Axis, head_axes
from jaxsplit.models.cache import AttentionCache, attention_cache


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
        magnitude = self.attention_factor * (1 + 0.1 * math.log(self.factor))
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
class MLPConfig:
    """A perceptron with one hidden layer.

    Attributes:
      hidden: its width.
      activation: a name in `jaxsplit.models.mlp.ACTIVATIONS`.
      gated: a second projection is multiplied with the activated one (Shazeer 2020,
        arXiv:2002.05202).
      bias: the projections have biases.
    """

    hidden: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


Mixer = AttentionConfig
FeedForward = MLPConfig


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """A layer: a mixer of tokens, then an MLP, each added to the residual stream.

    Attributes:
      mixer: how tokens see one another.
      mlp: what is done to each token.
      mixer_norm, mlp_norm: of what they read; None: no norm.
      mixer_post_norm, mlp_post_norm: of what they write; None: no norm.
      parallel: both read the stream before the layer; without `mlp_norm` what the mixer reads.
      residual_scale: multiplies what they write.
    """

    mixer: Mixer
    mlp: FeedForward
    mixer_norm: NormConfig | None = NormConfig()
    mlp_norm: NormConfig | None = NormConfig()
    mixer_post_norm: NormConfig | None = None
    mlp_post_norm: NormConfig | None = None
    parallel: bool = False
    residual_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder.

    Attributes:
      architecture: the GGUF architecture's name, for messages only.
      vocab: tokens in the vocabulary.
      embed: width of the residual stream.
      context: longest context that the model was made for, in tokens.
      blocks: the layers.
      norm: of the last layer's output.
      embedding_scale: multiplies embeddings.
      embedding_norm: of embeddings; None: no norm.
      learned_positions: positions that have an embedding of their own; 0: none have.
      tied: the embedding is the output head too.
      head_bias: the head has a bias.
      logit_scale: multiplies logits.
      logit_softcap: logits are bounded to this by a tanh; None: they are not.
    """

    architecture: str
    vocab: int
    embed: int
    context: int
    blocks: tuple[BlockConfig, ...]
    norm: NormConfig = NormConfig()
    embedding_scale: float = 1.0
    embedding_norm: NormConfig | None = None
    learned_positions: int = 0
    tied: bool = False
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.blocks)

    @property
    def together(self) -> list[range]:
        """Layers that have to be on the same devices: those that lend keys and values, and all up
        to the last that borrows them."""
        lends = [getattr(block.mixer, "lends", None) for block in self.blocks]
        borrows = [getattr(block.mixer, "borrows", None) for block in self.blocks]
        spans = {}
        for i, name in enumerate(borrows):
            if name:
                spans[name] = range(lends.index(name), i + 1)
        return list(spans.values())

    def cache(self, context: int, dtype: jnp.dtype, layers: range | None = None) -> list:
        """What layers keep of a sequence: caches of `CacheArray`s.

        Args:
          context: tokens.
          dtype: of keys and values.
          layers: which; None: all.
        """
        blocks = self.blocks if layers is None else self.blocks[layers.start : layers.stop]
        return [block.mixer.cache(context, dtype) for block in blocks]

    @property
    def attention(self) -> AttentionConfig | None:
        """Of the first layer that has any."""
        mixers = (block.mixer for block in self.blocks)
        return next((m for m in mixers if hasattr(m, "heads")), None)
