"""What attention computes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache, attention_cache
from jaxsplit.ops.attention.rope import RopeConfig
from jaxsplit.ops.norm.spec import NormConfig, NormParams
from jaxsplit.sharding.axes import Axis, head_axes

SHAPE_FIELDS = (
    *("heads", "kv_heads", "head_dim", "value_dim"),
    *("qkv_bias", "out_bias", "gate", "out_norm", "value_is_key", "kv_donor"),
)
"""Fields of `AttentionConfig` that do not change what rotation and attention compute."""

HEAD_FIELDS = (
    *("rope", "query_norm", "key_norm", "value_norm", "norm_over", "norm_first"),
    *("clip_qkv", "attn_temperature", "kv_source", "query_scale"),
)
"""Fields about what is done to heads before attention."""

SCORE_FIELDS = ("scale", "window", "chunked", "softcap", "alibi", "sinks")
"""Fields about scores."""


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """A projection of a mixer's input that multiplies its output.

    Attributes:
      activation: of the projection: `sigmoid` or `softplus`.
      per_head: it has one value for each head; else one for each element of the output.
    """

    activation: str = "sigmoid"
    per_head: bool = False

    def __call__(self, y: Array, gate: Array, width: int) -> Array:
        """The output `[..., heads * width]` times the gate, `[..., heads]` or as the output."""
        gate = getattr(jax.nn, self.activation)(gate.astype(y.dtype))
        return y * (jnp.repeat(gate, width, axis=-1) if self.per_head else gate)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Softmax attention with grouped key and value heads.

    Attributes:
      heads, kv_heads: query heads, and the key and value heads that they share.
      head_dim: width of a query or key head.
      value_dim: width of a value head.
      rope: rotary position embedding of queries and keys; None: none.
      scale: of the scores; None: `head_dim ** -0.5`.
      window: how many of the last positions a query sees; None: all.
      chunked: instead, only those in the same run of `window` positions.
      softcap: scores are bounded to this by a tanh; None: they are not.
      alibi: the largest bias by distance (Press et al. 2021, arXiv:2108.12409); None: no bias.
      query_norm: of each head, or of all heads together (`norm_over="all"`), or of each head with
        its own scales (`norm_over="each"`); None: no norm.
      key_norm: as `query_norm`, of the keys.
      value_norm: of each value head.
      norm_over: see `query_norm`.
      norm_first: queries and keys are normalized before they are rotated; else after.
      qkv_bias, out_bias: the projections have biases.
      clip_qkv: bound of queries, keys and values; None: none.
      sinks: each head has a learned score that takes part in the softmax and reads nothing.
      gate: of the output; None: there is none.
      out_norm: of the output of all heads together, before the last projection; None: no norm.
      attn_temperature: `(scale, floor, offset)`: queries at position p are multiplied with
        `1 + scale * log(1 + (p + offset) // floor)`; None: they are not.
      query_scale: a parameter multiplies the queries of each head.
      value_is_key: values are the keys as projected.
      kv_donor: the name under which later layers may use its keys and values; None: they do not.
      kv_source: it has no keys and values of its own but uses those lent under this name.
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
    clip_qkv: float | None = None
    sinks: bool = False
    gate: GateConfig | None = None
    out_norm: NormConfig | None = None
    attn_temperature: tuple[float, int, int] | None = None
    query_scale: bool = False
    value_is_key: bool = False
    kv_donor: str | None = None
    kv_source: str | None = None

    def uses_only(self, *fields: str) -> bool:
        """Whether all other fields have their defaults: a kernel refuses what it does not know."""
        return all(
            f.name in fields or getattr(self, f.name) == f.default for f in dataclasses.fields(self)
        )

    @property
    def lends(self) -> str | None:
        """The name under which later layers may use its keys and values."""
        return self.kv_donor

    @property
    def borrows(self) -> str | None:
        """The name under which it finds the keys and values of an earlier layer."""
        return self.kv_source

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of query heads and of key and value heads."""
        return head_axes(self.heads, self.kv_heads)

    def cache(self, context: int, dtype: jnp.dtype) -> AttentionCache | None:
        """What it keeps of a sequence; None: nothing."""
        if self.kv_source is not None:
            return None
        length = context if self.window is None else min(self.window, context)
        _, kv_heads = self.axes
        return attention_cache(
            kv_heads, length, self.head_dim, self.value_dim, dtype, ring=self.window is not None
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionParams:
    """Parameters of attention beside its projections.

    Attributes:
      query_norm, key_norm, value_norm: as in `AttentionConfig`; None: no norm.
      sinks: float32 `[heads]`; None: none.
      query_scale: float32 `[heads]`; None: queries are not scaled.
    """

    query_norm: NormParams | None = None
    key_norm: NormParams | None = None
    value_norm: NormParams | None = None
    sinks: Array | None = None
    query_scale: Array | None = None

    @property
    def norm_scales(self) -> tuple[Array | None, Array | None]:
        """Scales of the norms of queries and of keys."""
        query, key = (n and n.scale for n in (self.query_norm, self.key_norm))
        return query, key
