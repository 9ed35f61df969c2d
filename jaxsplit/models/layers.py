"""Layers that know their logical axes: norm, projection, embedding, rotary positions.

A parameter's logical axes are in its metadata: `param.axes`, one name per dimension. Matrices are
`[out, in]`, plain or quantized (`jaxsplit.quant`).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxsplit.comm.api import all_gather, all_reduce, is_split, shard_index
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import current_context, forward_context
from jaxsplit.models.residual_config import PerLayerEmbeddingConfig
from jaxsplit.ops.activations.api import as_array
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, Readers
from jaxsplit.ops.matmul import api as matmul_ops
from jaxsplit.ops.matmul.api import Like, Rows, split_k_matmuls, unreduced_matmul
from jaxsplit.ops.norm import api as norm_ops
from jaxsplit.ops.norm.spec import NormConfig, NormParams
from jaxsplit.quant import take_rows
from jaxsplit.sharding.axes import EMBED, PER_LAYER, Axis


def param(rngs: nnx.Rngs | None, axes: tuple[Axis, ...], shape: tuple[int, ...]) -> nnx.Param:
    """A float32 parameter: ones without `rngs` (a norm), else normal with variance `1 / in`."""
    if rngs is None:
        return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
    return nnx.Param(_normal(rngs.params(), shape), axes=axes)


@functools.partial(jax.jit, static_argnums=1)  # traced once for each shape
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return shape[-1] ** -0.5 * jax.random.normal(key, shape, jnp.float32)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, computed in float32.

    Args:
      config: which.
      size: elements of the whole axis.
      axis: of the last dimension, which may be split.
      group: elements that are normalized together; None: the whole axis.
    """

    def __init__(
        self, config: NormConfig, size: int, axis: Axis = EMBED, *, group: int | None = None
    ):
        self.scale = param(None, (axis,), (size,)) if config.scale else None
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32), axes=(axis,)) if config.bias else None
        self.config = config
        self.size = size
        self.axis = axis
        self.group = group

    @property
    def params(self) -> NormParams:
        """The norm as ops take it."""
        scale, bias = (None if p is None else p.get_value() for p in (self.scale, self.bias))
        return NormParams(scale, bias, self.config, self.size, self.axis, self.group)

    def __call__(self, x: Array) -> Array:
        """`[..., size]` to the same shape and dtype."""
        return norm_ops.normalize(x, self.params)


def norm(config: NormConfig | None, size: int) -> Norm | None:
    """The norm that a config describes, or none."""
    return None if config is None else Norm(config, size)


def add_norm(
    y: Unreduced | None, residual: Array, norm: Norm | None, readers: Readers
) -> tuple[Activations, Array]:
    """Adds what a layer has computed to the residual stream, and normalizes the sum.

    Args:
      y: `[..., embed]`; None: nothing is added.
      residual: `[..., embed]`.
      norm: of the sum; None: no norm.
      readers: of the activations.

    Returns:
      the activations for their readers, and the residual stream.
    """
    return norm_ops.add_norm(y, residual, None if norm is None else norm.params, readers)


class LoRA(nnx.Module):
    """Low-rank changes of a matrix, of one or several adapters (Hu et al. 2021, arXiv:2106.09685):
    `x A B` with a scale for each sequence. The ranks of all adapters are side by side.

    Args:
      down: `[ranks, in]`: A of each adapter, transposed.
      up: `[out, ranks]`: B of each adapter times `alpha / rank`, transposed.
      parts: index, rank and default scale of each adapter.
    """

    def __init__(self, down: nnx.Param, up: nnx.Param, parts: tuple[tuple[int, int, float], ...]):
        self.down, self.up, self.parts = down, up, parts

    def __call__(self, x: Rows) -> Array:
        """What the adapters add: `[batch, ..., in]` to float32 `[batch, ..., out]`; on a mesh, of
        this device's rows and columns."""
        adapters, ranks, defaults = zip(*self.parts, strict=True)
        scales = current_context().lora_scales
        if scales is None:
            scales = jnp.asarray(defaults, jnp.float32)[None]
        else:
            scales = scales[:, np.asarray(adapters)]
        scales = jnp.repeat(scales, np.asarray(ranks), axis=1, total_repeat_length=sum(ranks))
        scales = scales.reshape(len(scales), *[1] * (len(x.shape) - 2), -1)
        low = matmul_ops.matmul(x, self.down.get_value()) * scales
        return matmul_ops.matmul(low.astype(x.dtype), self.up.get_value())


class SwitchedLoRA(nnx.Module):
    """Low-rank changes of a matrix, one of several for each token: `x A B` of the token's adapter.

    Args:
      axes: of the matrix, rows and columns.
      shape: of the matrix.
      adapters: how many there are.
      rank: of each.
    """

    def __init__(
        self,
        axes: tuple[Axis, Axis],
        shape: tuple[int, ...],
        adapters: int,
        rank: int,
        *,
        rngs: nnx.Rngs,
    ):
        (rows, columns), (out_size, in_size), latent = axes, shape, Axis("lora_rank")
        self.down = param(rngs, (latent, columns), (adapters * rank, in_size))
        self.up = param(rngs, (Axis("adapters"), rows, latent), (adapters, out_size, rank))

    def __call__(self, x: Rows) -> Array:
        """What the tokens' adapters add: `[batch, time, in]` to float32 `[batch, time, out]`; on a
        mesh, of this device's rows and columns."""
        chosen = current_context().token_adapters
        assert chosen is not None
        low = matmul_ops.matmul(x, self.down.get_value())
        low = low.reshape(*chosen.shape, -1) * chosen[..., None]
        low = jnp.moveaxis(low.astype(x.dtype), 2, 0).reshape(chosen.shape[2], -1, low.shape[-1])
        y = matmul_ops.batched(matmul_ops.matmul)(low, self.up.get_value()).sum(axis=0)
        return y.reshape(*chosen.shape[:2], -1)


class Linear(nnx.Module):
    """A projection from one logical axis to another.

    A kernel split along its columns reads the device's own shard of `x`, and leaves a partial sum
    to an all-reduce. One that is not gathers the shards of `x` first. Rows of the residual stream
    are gathered, since it is whole on every device; rows of other axes stay where they are.

    Attributes:
      lora: what adapters add to the result, split as the kernel; None: there are none.
      switched: what the model's own adapters add; None: it has none.
    """

    lora: LoRA | None = None
    switched: SwitchedLoRA | None = None

    def __init__(
        self,
        in_axis: Axis,
        in_size: int,
        out_axis: Axis,
        out_size: int,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.rows = Axis("embed_out", out_size) if out_axis == EMBED else out_axis
        self.columns = in_axis.columns
        self.kernel = param(rngs, (self.rows, self.columns), (out_size, in_size))
        self.bias = nnx.Param(jnp.zeros(out_size, jnp.float32), axes=(out_axis,)) if bias else None
        self.in_axis = in_axis

    def readers(self, x: Like) -> Readers:
        """Who reads inputs of this projection with the rows and dtype of `x`."""
        if self._gathers:
            return XLA_ONLY
        return readers_of(x, self)

    def unreduced(self, x: Rows) -> Unreduced:
        """`[..., in]` to `[..., out]` before its all-reduce."""
        x = self._gathered(x)
        options = {
            "reduce_over": (self.columns,),
            "axis": self.rows,
            "bias": None if self.bias is None else self.bias.get_value(),
        }
        if not self.low_rank:
            return unreduced_matmul(x, self.kernel.get_value(), **options)
        with forward_context(fuse_all_reduce=False):  # one for both, after they are added
            y = unreduced_matmul(x, self.kernel.get_value(), **options)
        parts = sum((change(x) for change in self.low_rank), y.local_sum)
        return dataclasses.replace(y, parts=parts[None])

    def __call__(self, x: Rows) -> Array:
        """`[..., in]` to `[..., out]` in the dtype of `x`, accumulated in float32."""
        if self.rows.name == "embed_out":
            return self.unreduced(x).all_reduce(x.dtype)
        return project(x, self)[0].local_sum

    @property
    def low_rank(self) -> list[LoRA | SwitchedLoRA]:
        """The changes of its matrix."""
        return [change for change in (self.lora, self.switched) if change is not None]

    @property
    def _gathers(self) -> bool:
        """Whether the kernel's columns are whole although the input is split."""
        return is_split(self.in_axis) and not is_split(self.columns)

    def _gathered(self, x: Rows) -> Rows:
        """The columns that this device's kernel multiplies."""
        return all_gather(as_array(x), self.in_axis) if self._gathers else x


def readers_of(x: Like, *linears: Linear | None) -> Readers:
    """Who reads rows like `x` when several projections multiply them; None: no projection."""
    present = [linear for linear in linears if linear]
    params = [linear.kernel for linear in present]
    params += [change.down for linear in present for change in linear.low_rank]
    return matmul_ops.readers_of(x, [param.get_value() for param in params])


def project(
    x: Rows, first: Linear, *others: Linear | None, split_k: bool = False
) -> tuple[Unreduced, *tuple[Unreduced | None, ...]]:
    """Several projections of the same input at once, None for None.

    Args:
      x: `[..., in]`.
      first, *others: projections whose rows stay where they are.
      split_k: split-K parts and biases are left to the readers of the results to add.

    Returns:
      `[..., out]` each: a single part in the dtype of `x`, or parts in float32.
    """
    present = [first, *(linear for linear in others if linear is not None)]
    kernels, x = [linear.kernel.get_value() for linear in present], first._gathered(x)
    biases = [None if linear.bias is None else linear.bias.get_value() for linear in present]
    low_rank = any(linear.low_rank for linear in present)
    if split_k and not low_rank:
        sums = split_k_matmuls(x, kernels, x.dtype)
        results = [dataclasses.replace(y, bias=bias) for y, bias in zip(sums, biases, strict=True)]
    elif low_rank or any(bias is not None for bias in biases):
        results = []
        ys = matmul_ops.matmuls(x, kernels)
        for y, bias, linear in zip(ys, biases, present, strict=True):
            y = y if bias is None else y + bias
            y = sum((change(x) for change in linear.low_rank), y)
            results.append(Unreduced.of(y.astype(x.dtype)))
    else:
        results = [Unreduced.of(y) for y in matmul_ops.matmuls(x, kernels, x.dtype)]
    following = iter(results)
    return next(following), *(None if linear is None else next(following) for linear in others)


class Embedding(nnx.Module):
    """Token embedding, split by vocabulary; it may be the output head, too."""

    def __init__(self, vocab: int, embed: int, *, rngs: nnx.Rngs):
        self.axis = Axis("vocab", vocab)
        self.table = param(rngs, (self.axis, EMBED), (vocab, embed))

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """int32 `[...]` to `[..., embed]`: each device looks up the rows that it holds."""
        table = self.table.get_value()
        size = table.shape[0]
        local = tokens - shard_index(self.axis) * size
        held = (local >= 0) & (local < size)
        rows = take_rows(table, jnp.clip(local, 0, size - 1), jnp.float32)
        rows = jnp.where(held[..., None], rows, 0)
        return all_reduce(rows, self.axis, residual_dtype=dtype).astype(dtype)


class PerLayerEmbeddings(nnx.Module):
    """An embedding of each token for every layer, plus a projection of its embedding for the stream
    (Gemma 3n)."""

    def __init__(
        self,
        config: PerLayerEmbeddingConfig,
        vocab: int,
        embed: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        width = config.width
        self.embedding = Embedding(vocab, layers * width, rngs=rngs)
        self.project = Linear(EMBED, embed, PER_LAYER, layers * width, rngs=rngs)
        self.norm = Norm(config.norm, width, PER_LAYER)
        self.layers, self.width = layers, width

    def __call__(self, tokens: Array, x: Array) -> tuple[Array, ...]:
        """Tokens `[...]` and their scaled embeddings `[..., embed]` to `[..., width]` for each
        layer."""
        own = self.embedding(tokens, x.dtype) * self.width**0.5
        projected = self.project(x) * x.shape[-1] ** -0.5
        projected = self.norm(projected.reshape(*tokens.shape, -1, self.width))
        every = ((projected.reshape(own.shape) + own) * 2**-0.5).astype(x.dtype)
        return tuple(jnp.split(every, self.layers, axis=-1))
