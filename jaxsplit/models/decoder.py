"""The decoder: layers over a residual stream, made from a `ModelConfig`.

A layer is a `Block` (`block.py`), or one of another shape (`blocks.py`). Sizes in the forward pass
are read off the parameters, not the config: on a mesh each device runs the same code over the
heads, hidden units and vocabulary rows that it holds.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.cache.layers import Batch, Cache, SideInputs
from jaxsplit.context import ForwardContext, current_context, forward_context
from jaxsplit.models.altup import AltUpProjections
from jaxsplit.models.block import Added, Layer
from jaxsplit.models.blocks import BLOCKS
from jaxsplit.models.config import ModelConfig
from jaxsplit.models.layers import (
    Embedding,
    Linear,
    Norm,
    PerLayerEmbeddings,
    add_norm,
    norm,
    param,
)
from jaxsplit.models.modules import module
from jaxsplit.ops.matmul.api import matmul
from jaxsplit.ops.matmul.api import readers_of as matmul_readers
from jaxsplit.ops.norm.api import add
from jaxsplit.quant import Weight, take_rows
from jaxsplit.sharding.axes import EMBED, Axis


@functools.partial(jax.jit, static_argnums=1)
def _run_block(
    context: ForwardContext,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    stream: tuple[Added, Array],
    batch: Batch,
    cache: Any,
) -> tuple[tuple[Added, Array], Any, Mapping, Array | None]:
    """`Layer.__call__` as a program of its own, traced once for all layers that are alike.

    Args:
      context: of the forward pass.
      graphdef, state: the layer.
      stream: `y` and `residual`.
      batch, cache: its other arguments.

    Returns:
      the stream, the cache, what is lent, and what is carried.
    """
    with forward_context(context):
        block: Layer = nnx.merge(graphdef, state)
        y, residual, cache = block(*stream, batch, cache)
    return (y, residual), cache, batch.lent, batch.side_inputs.carried


class Decoder(nnx.Module):
    """A language model: tokens in, logits out.

    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> logits, _ = model(tokens)

    A decoder may be a part of a model: a run of its layers, the embedding with the first of them,
    norm and head with the last. A part without the embedding takes the output of the part before.

    Args:
      config: what to build.
      layers: which layers; None: all.
      dtype: of the activations.
      rngs: for the parameters' initial values.
    """

    embedding: Embedding | None = None
    positions: nnx.Param | None = None
    embedding_norm: Norm | None = None
    per_layer_embeddings: PerLayerEmbeddings | None = None
    embedding_offset: nnx.Param | None = None
    altup: AltUpProjections | None = None
    head_residual: Any = None
    norm: Norm | None = None
    head: Linear | None = None

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: range | None = None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        layers = range(config.layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.layers
        self.config, self.layers, self.dtype = config, layers, dtype
        c, blocks = config, config.blocks[layers.start : layers.stop]
        if self.first or (self.last and c.tied):
            self.embedding = Embedding(c.vocab, c.embed, rngs=rngs)
        if self.first:
            self._add_embeddings(rngs)
        ropes = [getattr(block.mixer, "rope", None) for block in blocks]
        factors = {rope.freq_factors: rope.dim // 2 for rope in ropes if rope and rope.freq_factors}
        self.freq_factors = nnx.Dict(
            {name: param(None, (Axis("rope"),), (size,)) for name, size in factors.items()}
        )
        made: dict[int, Layer] = {}
        for i, block in zip(layers, blocks, strict=True):
            if (first := c.first_use(i)) not in made:
                made[first] = BLOCKS[type(block)](block, c.embed, rngs=rngs)
        self.blocks = nnx.List([made[c.first_use(i)] for i in layers])
        if self.last:
            self.head_residual = module(c.head_residual, c.embed, rngs)
            self.norm = norm(c.norm, c.embed)
        if self.last and not c.tied:
            vocab = Axis("vocab", c.vocab)
            self.head = Linear(EMBED, c.embed, vocab, c.vocab, bias=c.head_bias, rngs=rngs)

    def _add_embeddings(self, rngs: nnx.Rngs) -> None:
        """What the first layer reads beside the embedding of tokens, in models that have it."""
        c = self.config
        if c.learned_positions:
            shape = c.learned_positions, c.embed
            self.positions = param(rngs, (Axis("positions"), EMBED), shape)
        self.embedding_norm = norm(c.embedding_norm, c.embed)
        if (own := c.per_layer_embeddings) is not None:
            self.per_layer_embeddings = PerLayerEmbeddings(
                own, c.vocab, c.embed, c.layers, rngs=rngs
            )
        if c.embedding_offset:
            self.embedding_offset = nnx.Param(jnp.zeros(c.embed, jnp.float32), axes=(EMBED,))
        self.altup = module(c.altup, c.embed, rngs)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        cache: Cache | None = None,
        slots: Array | None = None,
        pages: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """Logits of every position.

        Args:
          tokens: int32 `[batch, time]`; of a part, as `hidden` takes them.
          positions: int32 `[batch, time]`, consecutive, negative for padding, which comes last;
            None counts from 0.
          cache: what earlier tokens left, from `init_cache`; None: there are none.
          slots: int32 `[batch]`: where in the cache the sequences are; None: in order.
          pages: int32 `[batch, pages]`: the pages of the cache that each sequence has, in order;
            None: its slot.

        Returns:
          float32 logits `[batch, time, vocab]` and the cache with these tokens added.
        """
        stream, _, cache = self._layers(tokens, positions, cache, slots, pages)
        return self._logits(*stream), cache

    def hidden(
        self,
        inputs: Array,
        positions: Array | None = None,
        cache: Cache | None = None,
        slots: Array | None = None,
        pages: Array | None = None,
    ) -> tuple[Array, Cache | None]:
        """The last layer's output.

        Args:
          inputs: tokens, or the output `[batch, time, width]` of the part before.
          positions, cache, slots, pages: as in `__call__`.

        Returns:
          `[batch, time, width]` and the cache; the width is that of `ModelConfig.stream_layout`, or
          after the last layer `embed`.
        """
        (y, residual), side_inputs, cache = self._layers(inputs, positions, cache, slots, pages)
        residual = add(y, residual)
        if not self.last:
            residual = self.config.stream_layout(self.layers.stop).pack(residual, side_inputs)
        return residual, cache

    def _layers(
        self,
        inputs: Array,
        positions: Array | None,
        cache: Cache | None,
        slots: Array | None,
        pages: Array | None,
    ) -> tuple[tuple[Added, Array], SideInputs, Cache | None]:
        """The stream after the last layer, what accompanies it, and the cache."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape[:2])
        if self.first:
            residual, side_inputs = self._embed(inputs, positions)
        else:
            residual, side_inputs = self.config.stream_layout(self.layers.start).unpack(inputs)
        factors = {name: factor.get_value() for name, factor in self.freq_factors.items()}
        batch = Batch(positions, slots, pages, factors)
        y, caches, context = None, [], current_context()
        for i, block in enumerate(self.blocks):
            batch = dataclasses.replace(batch, side_inputs=side_inputs.of_layer(i))
            layer_cache = None if cache is None else cache[i]
            stream = y, residual
            (y, residual), layer_cache, lent, side_inputs.carried = _run_block(
                context, *nnx.split(block), stream, batch, layer_cache
            )
            batch = dataclasses.replace(batch, lent=lent)
            caches.append(layer_cache)
        if self.head_residual is not None:
            residual, _ = self.head_residual.read(residual)
        return (y, residual), side_inputs, None if cache is None else caches

    def logits(self, x: Array) -> Array:
        """`[..., embed]` to float32 logits `[..., vocab]`; on a mesh, of this device's rows."""
        return self._logits(None, x)

    def normalized(self, x: Array) -> Array:
        """The last layer's output as the head reads it, `[..., embed]`."""
        return x if self.norm is None else self.norm(x)

    def _logits(self, y: Added, residual: Array) -> Array:
        """Logits of the stream with what the last layer has computed."""
        c, w = self.config, self._head_matrix
        head = self.head
        readers = matmul_readers(residual, [w]) if head is None else head.readers(residual)
        x, _ = add_norm(y, residual, self.norm, readers)
        logits = matmul(x, w)
        if head is not None and head.bias is not None:
            logits = logits + head.bias.get_value()
        if head is not None and head.lora is not None:
            logits = logits + head.lora(x)
        logits = logits * c.logit_scale
        if c.logit_softcap is None:
            return logits
        return c.logit_softcap * jnp.tanh(logits / c.logit_softcap)

    @property
    def _head_matrix(self) -> Weight:
        """The output head, or the embedding if they are tied: `[vocab, embed]`."""
        if self.head is not None:
            return self.head.kernel.get_value()
        assert self.embedding is not None
        return self.embedding.table.get_value()

    def _embed(self, tokens: Array, positions: Array) -> tuple[Array, SideInputs]:
        """The residual stream that the first layer reads, and what accompanies it."""
        assert self.embedding is not None
        c, given = self.config, tokens
        side_inputs = SideInputs(tokens=given if c.looks_up_tokens else None)
        for token, other in c.substitutes:
            tokens = jnp.where(given == token, other, tokens)
        x = self.embedding(tokens, self.dtype) * c.embedding_scale
        if self.positions is not None:
            table = self.positions.get_value()
            x = x + take_rows(table, jnp.maximum(positions, 0), self.dtype)
        x = (x if self.embedding_norm is None else self.embedding_norm(x)).astype(self.dtype)
        if self.per_layer_embeddings is not None:
            side_inputs.per_layer_embeddings = self.per_layer_embeddings(tokens, x)
        if c.carries_embedding:
            side_inputs.carried = x
        if self.embedding_offset is not None:
            x = (x + self.embedding_offset.get_value()).astype(x.dtype)
        if self.altup is not None:
            return self.altup.begin(x), side_inputs
        return jnp.tile(x, c.streams(0)), side_inputs
