"""How tokens may see one another: configs of mixers, and of the norms and rotations in them."""

import dataclasses

import jax.numpy as jnp

from jaxsplit.cache.layers import (
    AttentionCache,
    RecurrentCache,
    attention_cache,
    pool_cache,
    recurrent_cache,
)
from jaxsplit.ops.attention.rope import RopeConfig
from jaxsplit.ops.attention.spec import AttentionConfig, GateConfig
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.sharding.axes import EMBED, LATENT, Axis, head_axes

SELECTION = "selection"
"""The name under which layers lend which keys their indexers have selected."""


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """Blocks of tokens that are pooled to single entries.

    Attributes:
      block: tokens of a block.
      width: of an entry.
      overlap: entries are pooled from the block before, too.
      gated: elements have scores, from a projection and from places in the block; else entries are
        means.
    """

    block: int
    width: int
    overlap: bool = False
    gated: bool = True

    @property
    def row_width(self) -> int:
        """Width of what is pooled, with overlap one part for each of two blocks."""
        return self.width * (2 if self.overlap else 1)

    @property
    def rows_before(self) -> int:
        """How many tokens before the one that completes a block are pooled."""
        return self.block * (2 if self.overlap else 1) - 1

    def cache(self, context: int) -> RecurrentCache:
        """What it keeps of a sequence: the last tokens with their scores, and the entries."""
        return pool_cache(self.rows_before, 2 * self.row_width, context // self.block, self.width)


@dataclasses.dataclass(frozen=True)
class IndexerConfig:
    """The indexer of DeepSeek sparse attention.

    Attributes:
      heads: its heads, which share one key.
      head_dim: width of a query or key.
      top_k: how many keys a query may see.
      rope: of queries and keys; None: none.
      norm: of keys.
      rope_last: the last dimensions are rotated; else the first.
      pool: keys are pooled, and whole blocks are selected, beside the keys of the last one, which
        is not complete; None: single keys are selected.
    """

    heads: int
    head_dim: int
    top_k: int
    rope: RopeConfig | None
    norm: NormConfig
    rope_last: bool = False
    pool: PoolConfig | None = None

    def cache(self, context: int, dtype: jnp.dtype) -> AttentionCache | RecurrentCache:
        """What it keeps of a sequence: keys, or pooled ones."""
        if self.pool is not None:
            return self.pool.cache(context)
        return attention_cache(LATENT, context, self.head_dim, None, dtype)


@dataclasses.dataclass(frozen=True)
class LatentAttentionConfig:
    """Attention whose keys and values come from a latent vector.

    Attributes:
      heads: how many.
      head_dim: width of a query or key head, without the rotated part.
      value_dim: width of a value head.
      kv_lora_rank: width of the latent vector.
      q_lora_rank: width of the vector that queries come from; 0: the layer's input.
      rope: of the rotated part, whose key all heads share; None: no rotation.
      scale: of the scores.
      norm: of the latent vectors.
      k_up_transposed: keys' projections are `[head_dim, latent]`, else `[latent, head_dim]`.
      attn_temperature, window, sinks, gate: as in `AttentionConfig`.
      unrotated_dim: width of the shared part of keys, without `rope`.
      shared_key_norm: of the shared part of keys; None: no norm.
      indexer: selects the keys that a query may see; None: there is none.
      sparse: queries see only keys that were selected: by the indexer, or by that of the last layer
        that has one.
    """

    heads: int
    head_dim: int
    value_dim: int
    kv_lora_rank: int
    q_lora_rank: int
    rope: RopeConfig | None
    scale: float
    norm: NormConfig = NormConfig()
    k_up_transposed: bool = False
    attn_temperature: tuple[float, int, int] | None = None
    window: int | None = None
    sinks: bool = False
    gate: GateConfig | None = None
    unrotated_dim: int = 0
    shared_key_norm: NormConfig | None = None
    indexer: IndexerConfig | None = None
    sparse: bool = False

    @property
    def shared_dim(self) -> int:
        """Width of the part of keys that all heads share."""
        return self.rope.dim if self.rope else self.unrotated_dim

    @property
    def lends(self) -> str | None:
        """The name under which later layers may use its selection."""
        return SELECTION if self.indexer else None

    @property
    def borrows(self) -> str | None:
        """The name under which it finds the selection of an earlier layer."""
        return SELECTION if self.sparse and not self.indexer else None

    @property
    def axis(self) -> Axis:
        """Of the heads."""
        return head_axes(self.heads, self.heads)[0]

    @property
    def kv_heads(self) -> int:
        """What the heads share is as one key head."""
        return 1

    def cache(
        self, context: int, dtype: jnp.dtype
    ) -> tuple[AttentionCache, AttentionCache | RecurrentCache | None]:
        """What it keeps of a sequence: latent vectors with the shared part of keys, and the
        indexer's keys."""
        length = context if self.window is None else min(self.window, context)
        width, ring = self.kv_lora_rank + self.shared_dim, self.window is not None
        latent = attention_cache(LATENT, length, width, None, dtype, ring=ring)
        if self.indexer is None:
            return latent, None
        return latent, self.indexer.cache(context, dtype)


@dataclasses.dataclass(frozen=True)
class CompressedAttentionConfig:
    """Attention to a window of tokens and to compressed blocks of all earlier ones.

    Attributes:
      heads: query heads, which share one key; it is its own value.
      head_dim: width of a head.
      q_lora_rank: width of the vector that queries come from.
      groups, out_rank: outputs of a group of heads are projected to `out_rank` dimensions first.
      window: how many of the last positions a query sees.
      rope: of the last dimensions of queries and keys, and of outputs, backwards.
      norm: of the vectors that queries come from, of queries, keys and entries.
      pool: how blocks of tokens are compressed; None: there is only the window.
      indexer: selects entries; None: all are visible.
    """

    heads: int
    head_dim: int
    q_lora_rank: int
    groups: int
    out_rank: int
    window: int
    rope: RopeConfig
    norm: NormConfig
    pool: PoolConfig | None = None
    indexer: IndexerConfig | None = None

    @property
    def axis(self) -> Axis:
        """Of the groups of heads."""
        return head_axes(self.groups, 1)[0]

    def cache(
        self, context: int, dtype: jnp.dtype
    ) -> tuple[AttentionCache, RecurrentCache | None, RecurrentCache | None]:
        """What it keeps of a sequence: the window, compressed entries, and the indexer's."""
        length = min(self.window, context)
        window = attention_cache(LATENT, length, self.head_dim, None, dtype, ring=True)
        pools = self.pool, self.indexer and self.indexer.pool
        entries, index = (pool and pool.cache(context) for pool in pools)
        return window, entries, index


@dataclasses.dataclass(frozen=True)
class BlockIndexerConfig:
    """An indexer that selects blocks of keys for each key head.

    Attributes:
      head_dim: width of a query or key; queries have a head for each key head.
      block: positions of a block.
      top_k: blocks that a query may see.
      local: how many of these are the last ones up to its own.
      rope: of queries and keys.
      norm: of queries and keys, by head.
    """

    head_dim: int
    block: int
    top_k: int
    local: int
    rope: RopeConfig
    norm: NormConfig

    def cache(self, context: int, dtype: jnp.dtype) -> AttentionCache:
        """What it keeps of a sequence: keys."""
        return attention_cache(LATENT, context, self.head_dim, None, dtype)


@dataclasses.dataclass(frozen=True)
class PooledBlockIndexerConfig:
    """An indexer that selects blocks of keys for all heads, by their means.

    Attributes:
      heads: its heads, which share one key.
      head_dim: width of a query or key.
      block: positions of a block.
      top_k: complete blocks that a query may see, beside the last one.
      rope: of queries and of blocks' keys, at their first positions.
      norm: of queries and of blocks' keys.
    """

    heads: int
    head_dim: int
    block: int
    top_k: int
    rope: RopeConfig
    norm: NormConfig

    @property
    def pool(self) -> PoolConfig:
        """How keys are pooled."""
        return PoolConfig(self.block, self.head_dim, gated=False)

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence: blocks' keys, and the last tokens'."""
        return self.pool.cache(context)


@dataclasses.dataclass(frozen=True)
class BlockSparseConfig:
    """Attention to blocks of keys.

    Attributes:
      attention: of each query to the keys of its blocks.
      indexer: selects the blocks.
    """

    attention: AttentionConfig
    indexer: BlockIndexerConfig | PooledBlockIndexerConfig

    @property
    def heads(self) -> int:
        """Of the attention."""
        return self.attention.heads

    @property
    def rope(self) -> RopeConfig | None:
        """Of the attention."""
        return self.attention.rope

    def cache(
        self, context: int, dtype: jnp.dtype
    ) -> tuple[AttentionCache | None, AttentionCache | RecurrentCache]:
        """What it keeps of a sequence: keys and values, and the indexer's keys."""
        return self.attention.cache(context, dtype), self.indexer.cache(context, dtype)


@dataclasses.dataclass(frozen=True)
class LinearConfig:
    """A projection in place of a mixer: tokens do not see one another (Bercovich et al. 2024,
    arXiv:2411.19146)."""

    def cache(self, context: int, dtype: jnp.dtype) -> None:
        """It keeps nothing of a sequence."""


@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig:
    """Heads with a matrix of associations that forgets: what the kinds have in common.

    Attributes:
      value_heads, key_heads: heads, and the query and key heads that they share.
      value_dim, key_dim: width of a value head, and of a query or key head.
      kernel_size: tokens that the convolutions see.
      norm: of the output, before the last projection; None: no norm.
      conv_bias: the convolutions have biases.
      tiled: as in `Axis`.
      gate: the activation of the output's gate.
    """

    value_heads: int
    key_heads: int
    value_dim: int
    key_dim: int
    kernel_size: int
    norm: NormConfig | None = None
    conv_bias: bool = False
    tiled: bool = False
    gate: str = "silu"

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
            self.kernel_size, [keys, keys, values], (heads, self.key_dim, self.value_dim)
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
class KDAConfig:
    """Kimi delta attention (Kimi Team 2025, arXiv:2510.26692).

    Attributes:
      heads: how many.
      head_dim: width of a query, key or value head.
      kernel_size: tokens that the convolutions see.
      norm: of each head's output.
      epsilon: added to the squares of queries and keys before they are divided by their lengths.
      decay_rank, gate_rank: of the projections to decays and gates; 0: full rank.
      lower_bound: of the logarithm of decays; None: there is none.
    """

    heads: int
    head_dim: int
    kernel_size: int
    norm: NormConfig
    epsilon: float
    decay_rank: int = 0
    gate_rank: int = 0
    lower_bound: float | None = None

    @property
    def axis(self) -> Axis:
        """Of the heads."""
        return head_axes(self.heads, self.heads)[0]

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is."""
        inner = self.axis, self.heads * self.head_dim
        state = (self.axis, self.head_dim, self.head_dim)
        return recurrent_cache(self.kernel_size, [inner] * 3, state)


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Lightning attention (Qin et al. 2024, arXiv:2401.04658).

    Attributes:
      heads: how many.
      head_dim: width of a head.
      rate: multiplies the heads' rates of decay.
      norm: of the output of all heads together.
    """

    heads: int
    head_dim: int
    rate: float
    norm: NormConfig

    @property
    def axis(self) -> Axis:
        """Of the heads."""
        return head_axes(self.heads, self.heads)[0]

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is."""
        return recurrent_cache(1, [], (self.axis, self.head_dim, self.head_dim))


@dataclasses.dataclass(frozen=True)
class MambaConfig:
    """Mamba (Gu and Dao 2023, arXiv:2312.00752).

    Attributes:
      channels: width of what is mixed.
      state_size: dimensions of a channel's state.
      dt_rank: width of the vector that steps come from.
      kernel_size: tokens that the convolution sees.
      heads: of equally many channels each, which share a step.
      scalar_decay: a head's state has one decay; else one for each dimension, and heads are single
        channels.
      norm: of the vector that steps come from, of B and of C; None: no norm.
      conv_bias: the convolution has a bias.
    """

    channels: int
    state_size: int
    dt_rank: int
    kernel_size: int
    heads: int
    scalar_decay: bool = False
    norm: NormConfig | None = None
    conv_bias: bool = False

    @property
    def axis(self) -> Axis:
        """Of the heads, which are split as hidden units are if they are channels."""
        return head_axes(self.heads, 1)[0] if self.scalar_decay else Axis("mlp", self.channels)

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is."""
        state = (self.axis, self.state_size, self.channels // self.heads)
        return recurrent_cache(self.kernel_size, [(self.axis, self.channels)], state)


@dataclasses.dataclass(frozen=True)
class RWKV6Config:
    """The time mixing of RWKV-6 (Peng et al. 2024, arXiv:2404.05892).

    Attributes:
      heads, kv_heads: of receptances, and of keys and values, which they share.
      head_dim: width of a head.
      mix_rank, decay_rank: of the low-rank MLPs.
      bonus: the state is read before a token is written, which has a weight of its own, and outputs
        are normalized by head. Else it is read after that, keys are multiplied with 1 - decay, and
        the gate is a sigmoid.
      bias: receptances, keys and values have biases.
    """

    heads: int
    kv_heads: int
    head_dim: int
    mix_rank: int
    decay_rank: int
    bonus: bool = True
    bias: bool = False

    @property
    def lerps(self) -> tuple[str, ...]:
        """The inputs that are mixed: of decays, keys, values, receptances and gates."""
        return ("w", "k", "v", "r", "g")

    @property
    def axes(self) -> tuple[Axis, Axis]:
        """Of receptances' heads and of keys' and values' heads."""
        return head_axes(self.heads, self.kv_heads)

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is: the last token and the state."""
        embed = self.heads * self.head_dim
        return recurrent_cache(2, [(EMBED, embed)], (self.axes[0], self.head_dim, self.head_dim))


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    """The time mixing of RWKV-7 (Peng et al. 2025, arXiv:2503.14456).

    Attributes:
      heads: how many.
      head_dim: width of a head.
      decay_rank, iclr_rank, value_rank, gate_rank: of the low-rank MLPs of decays, in-context
        learning rates, shares of the first layer's values, and gates; `gate_rank` 0: no gate.
      norm: outputs are normalized by head.
      first: the first layer, which lends its values.
    """

    heads: int
    head_dim: int
    decay_rank: int
    iclr_rank: int
    value_rank: int
    gate_rank: int
    norm: bool
    first: bool

    @property
    def lerps(self) -> tuple[str, ...]:
        """The inputs that are mixed: of receptances, decays, keys, values, rates and gates."""
        return ("r", "w", "k", "v", "a", "g")[: 6 if self.gate_rank else 5]

    @property
    def axis(self) -> Axis:
        """Of the heads."""
        return head_axes(self.heads, self.heads)[0]

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is: the last token and the state."""
        embed = self.heads * self.head_dim
        return recurrent_cache(2, [(EMBED, embed)], (self.axis, self.head_dim, self.head_dim))


@dataclasses.dataclass(frozen=True)
class ChannelMixConfig:
    """The MLP of RWKV, which reads the token before, too.

    Attributes:
      embed: width of the residual stream.
      intermediate_size: number of hidden units.
      gated: its output is gated by a projection of the input.
    """

    embed: int
    intermediate_size: int
    gated: bool = False

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is: the last token."""
        return recurrent_cache(2, [(EMBED, self.embed)])


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Attention and Mamba-2 side by side.

    Attributes:
      attention, recurrent: the mixers, which read the same input.
    """

    attention: AttentionConfig
    recurrent: Mamba2Config

    @property
    def heads(self) -> int:
        """Of the attention."""
        return self.attention.heads

    @property
    def rope(self) -> RopeConfig | None:
        """Of the attention."""
        return self.attention.rope

    def cache(self, context: int, dtype: jnp.dtype) -> tuple[AttentionCache | None, RecurrentCache]:
        """What each of them keeps of a sequence."""
        return self.attention.cache(context, dtype), self.recurrent.cache(context, dtype)


@dataclasses.dataclass(frozen=True)
class ShortConvConfig:
    """A short convolution between two gates (LFM2).

    Attributes:
      channels: the width of the residual stream.
      kernel_size: tokens that the convolution sees.
    """

    channels: int
    kernel_size: int

    @property
    def axis(self) -> Axis:
        """Of the channels, which are split as hidden units are."""
        return Axis("mlp", self.channels)

    def cache(self, context: int, dtype: jnp.dtype) -> RecurrentCache:
        """What it keeps of a sequence, however long that is."""
        return recurrent_cache(self.kernel_size, [(self.axis, self.channels)])


Mixer = (
    AttentionConfig
    | LatentAttentionConfig
    | DeltaNetConfig
    | Mamba2Config
    | ShortConvConfig
    | LinearConfig
    | HybridConfig
    | BlockSparseConfig
    | CompressedAttentionConfig
    | KDAConfig
    | LightningConfig
    | MambaConfig
    | RWKV6Config
    | RWKV7Config
)
