"""Attention and a recurrent mixer side by side."""

from typing import Any

from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import forward_context
from jaxsplit.models.attention import Attention
from jaxsplit.models.linear_attention import Mamba2
from jaxsplit.models.mixer_config import HybridConfig
from jaxsplit.ops.activations.layout import Activations, Readers


class Hybrid(nnx.Module):
    """Attention and Mamba-2 that read the same input, their outputs added (Falcon LLM Team 2025,
    arXiv:2507.22448, section 2.1)."""

    def __init__(self, config: HybridConfig, embed: int, *, rngs: nnx.Rngs):
        self.attention = Attention(config.attention, embed, rngs=rngs)
        self.recurrent = Mamba2(config.recurrent, embed, rngs=rngs)

    def readers(self, x: Array) -> Readers:
        """Who reads the input `[batch, time, embed]`."""
        return self.attention.readers(x) | self.recurrent.readers(x)

    def __call__(self, x: Activations, batch: Batch, cache: Any) -> tuple[Unreduced, Any]:
        """Mixes `[batch, time, embed]`; returns the same shape, and the updated caches."""
        caches = (None, None) if cache is None else cache
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            attended, kv = self.attention(x, batch, caches[0])
            mixed, state = self.recurrent(x, batch, caches[1])
        return attended + mixed, None if cache is None else (kv, state)
