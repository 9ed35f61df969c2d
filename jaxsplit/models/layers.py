"""Layers that know their logical axes: norm, projection, embedding, rotary positions.

A parameter's logical axes are in its metadata: `param.axes`, one name per dimension. Matrices are
`[out, in]`, plain or quantized (`jaxsplit.quant`).
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxsplit.comm import one_shot
from jaxsplit.comm.api import (
    gather_over,
    is_split,
    mesh_axes,
    peers_over,
    shard_of,
    sum_over,
    total_over,
)
from jaxsplit.context import current_context
from jaxsplit.ops.activations.deferred import Pending, Reader, Sum
from jaxsplit.ops.matmul.api import (
    Product,
    Rows,
    Terms,
    computed,
    matmul,
    matmuls,
    pends,
    reader_for,
    terms,
)
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.quant import take_rows
from jaxsplit.sharding.axes import EMBED, LAYER_INPUT, Axis


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
      group: elements that are normalized together; None: all, those of other devices too.
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

    def pending(self, x: Array | Sum) -> Rows:
        """`__call__`, left to the kernel that reads the result if there is one."""
        c = self.config
        plain = c.kind == "rms" and not c.bias and not self.group and not is_split(self.axis)
        if not plain or not pends(x):
            return self(computed(x))
        scale = () if self.scale is None else (self.scale.get_value(),)
        return Pending(_product, (x, *scale), x.dtype, c.epsilon, self.size)

    def __call__(self, x: Array) -> Array:
        """`[..., size]` to the same shape and dtype."""
        x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, self.group or x.shape[-1])

        def mean(values: Array) -> Array:
            if self.group:
                return values.mean(axis=-1, keepdims=True)
            return total_over(values.sum(axis=-1, keepdims=True), self.axis) / self.size

        if self.config.kind == "layer":
            x32 = x32 - mean(x32)
        normed = x32 * jax.lax.rsqrt(mean(x32 * x32) + self.config.epsilon)
        normed = normed.reshape(x.shape)
        if self.scale is not None:
            normed = normed * self.scale.get_value()
        if self.bias is not None:
            normed = normed + self.bias.get_value()
        return normed.astype(x.dtype)


def _product(*factors: Array) -> Array:
    return functools.reduce(operator.mul, factors)


def norm(config: NormConfig | None, size: int, **options: Any) -> Norm | None:
    """The norm that a config describes, or none."""
    return None if config is None else Norm(config, size, **options)


@dataclasses.dataclass(frozen=True)
class Partial:
    """What devices have for the residual stream before they meet.

    Attributes:
      product: what `value` is, perhaps not computed yet.
      columns: the axes over which it is still to be added up.
      rows: the rows' axis.
      bias: float32 `[embed]` or `[..., embed]`, added once; None: none.
    """

    product: Array | Product | Terms
    columns: tuple[Axis, ...]
    rows: Axis
    bias: Array | None = None

    @property
    def value(self) -> Array:
        """float32 `[..., rows]`: this device's rows, summed over this device's columns."""
        return computed(self.product)


Partials = tuple[Partial, ...]


def meet(parts: Partials, dtype: jnp.dtype) -> Array:
    """The sum of partial results, the same on every device: `[..., embed]`.

    Those that the same devices have to add up or to gather are exchanged together.
    """
    sums: dict[tuple[tuple[str, ...], ...], list[Partial]] = {}
    for part in parts:
        sums.setdefault((mesh_axes(part.rows), mesh_axes(*part.columns)), []).append(part)
    gathers: dict[tuple[str, ...], list[Partial]] = {}
    for (rows, _), group in sums.items():
        value = sum(part.value for part in group)
        value = sum_over(value, *group[0].columns, addend_of=dtype)
        gathers.setdefault(rows, []).append(dataclasses.replace(group[0], product=value))
    y = sum(
        gather_over(sum(part.value for part in group).astype(dtype), rows, rows.units)
        for group in gathers.values()
        for rows in [group[0].rows]
    )
    for part in parts:
        if part.bias is not None:
            y = (y + part.bias).astype(dtype)
    return y


def add(x: Array | Sum, parts: Partials) -> Array | Sum:
    """The residual stream with what a layer writes to it, left to the kernel that reads it."""
    x = computed(x)
    if not pends(x) or any(is_split(part.rows) for part in parts):
        return x + meet(parts, x.dtype)
    size = math.prod(x.shape[:-1]) * one_shot.padded(x.shape[-1])  # as a kernel exchanges rows
    peers = [peers_over(size, *part.columns) for part in parts]
    split = any(mesh_axes(*part.columns) for part in parts)
    if (split and None in peers) or any(part.bias is not None for part in parts):
        return Sum(x, meet(parts, jnp.float32)[None])
    interpret, product = current_context().launch.interpret, parts[0].product
    if len(parts) > 1 or not isinstance(product, Product | Terms):
        return Sum(x, sum(part.value for part in parts)[None], peers[0], interpret=interpret)
    if split and isinstance(product, Product) and product.sends:
        addend, counts = product.sent_to(peers[0])
        return Sum(x, addend[None], peers[0], counts, interpret)
    return Sum(x, product.terms, peers[0], interpret=interpret)


class Linear(nnx.Module):
    """A projection from one logical axis to another.

    A kernel split along its columns reads the devices' own parts of `x`, and the partial sums are
    added up; one that is not gathers the parts of `x` first. Rows of the residual stream are
    gathered, since it is whole on every device; rows of other axes stay where they are.
    """

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

    @property
    def local_size(self) -> int:
        """Rows that this device has."""
        return self.kernel.get_value().shape[0]

    def partial(self, x: Rows) -> Partial:
        """`[..., in]` to a part of `[..., out]`."""
        bias = None if self.bias is None else self.bias.get_value()
        product = Product(self._whole(x), self.kernel.get_value())
        return Partial(product, (self.columns,), self.rows, bias)

    def reader(self, x: Rows) -> Reader | None:
        """How a kernel reads rows like `x`, but for their length; None: there is none."""
        own = is_split(self.columns) or not is_split(self.in_axis)
        return reader_for(x, self.kernel.get_value()) if own else None

    def __call__(self, x: Rows) -> Array:
        """`[..., in]` to `[..., out]` in the dtype of `x`, accumulated in float32."""
        if self.rows.name == "embed_out":
            return meet((self.partial(x),), x.dtype)
        [y] = project(x, self)
        return y

    def _whole(self, x: Rows) -> Rows:
        """The columns that this device's kernel multiplies."""
        if is_split(self.columns) or not is_split(self.in_axis):
            return x
        return gather_over(computed(x), self.in_axis)


def project(x: Rows, *linears: Linear | None) -> list[Array | None]:
    """What several projections of the same input make of it, None for None: all at once.

    Args:
      x: `[..., in]`.
      *linears: whose rows stay where they are.

    Returns:
      `[..., out]` each in the dtype of `x`.
    """
    present = [linear for linear in linears if linear is not None]
    biased = any(linear.bias is not None for linear in present)
    kernels = [linear.kernel.get_value() for linear in present]
    dtype = jnp.float32 if biased else x.dtype
    results = []
    for y, linear in zip(matmuls(present[0]._whole(x), kernels, dtype), present, strict=True):
        y = y if linear.bias is None else y + linear.bias.get_value()
        results.append(y.astype(x.dtype))
    results = iter(results)
    return [None if linear is None else next(results) for linear in linears]


def project_in_terms(x: Rows, *linears: Linear | None) -> list[Array | None]:
    """`project`, left to be added up by what reads it: `[terms, ..., out]` each, float32 or in the
    dtype of `x`."""
    present = [linear for linear in linears if linear is not None]
    if any(linear.bias is not None for linear in present):
        return [y if y is None else y[None] for y in project(x, *linears)]
    kernels = [linear.kernel.get_value() for linear in present]
    results = iter(terms(present[0]._whole(x), kernels, x.dtype))
    return [None if linear is None else next(results) for linear in linears]


class Embedding(nnx.Module):
    """Token embedding, split by vocabulary; `attend` uses the same matrix as output head."""

    def __init__(self, vocab: int, embed: int, *, rngs: nnx.Rngs):
        self.axis = Axis("vocab", vocab)
        self.table = param(rngs, (self.axis, EMBED), (vocab, embed))

    def __call__(self, tokens: Array, dtype: jnp.dtype) -> Array:
        """int32 `[...]` to `[..., embed]`: each device looks up the rows that it holds."""
        table = self.table.get_value()
        size = table.shape[0]
        local = tokens - shard_of(self.axis) * size
        held = (local >= 0) & (local < size)
        rows = take_rows(table, jnp.clip(local, 0, size - 1), jnp.float32)
        rows = jnp.where(held[..., None], rows, 0)
        return sum_over(rows, self.axis, addend_of=dtype).astype(dtype)

    def attend(self, x: Rows) -> Array:
        """`[..., embed]` to float32 logits `[..., vocab]` of this device's rows."""
        return matmul(x, self.table.get_value())


class LayerInputs(nnx.Module):
    """Embeddings of tokens for each layer, with a projection of those for the stream (Gemma 3n).

    Args:
      width: numbers for each layer.
    """

    def __init__(
        self, vocab: int, embed: int, layers: int, width: int, config: NormConfig, rngs: nnx.Rngs
    ):
        self.embedding = Embedding(vocab, layers * width, rngs=rngs)
        self.project = Linear(EMBED, embed, LAYER_INPUT, layers * width, rngs=rngs)
        self.norm = Norm(config, width, LAYER_INPUT)
        self.width = width

    def __call__(self, tokens: Array, x: Array) -> Array:
        """Tokens `[...]` and their scaled embeddings `[..., embed]` to `[..., layers * width]`."""
        chosen = self.embedding(tokens, x.dtype) * self.width**0.5
        projected = self.project(x) * x.shape[-1] ** -0.5
        projected = self.norm(projected.reshape(*tokens.shape, -1, self.width))
        return ((projected.reshape(chosen.shape) + chosen) * 2**-0.5).astype(x.dtype)


class LayerInput(nnx.Module):
    """What a layer adds to the stream last: its own embedding of the token, gated by the stream.

    Its matrices are small: every device has them whole, so that none has to wait.
    """

    def __init__(self, width: int, embed: int, config: NormConfig, *, rngs: nnx.Rngs):
        self.gate = Linear(EMBED, embed, LAYER_INPUT, width, rngs=rngs)
        self.out = Linear(LAYER_INPUT, width, EMBED, embed, rngs=rngs)
        self.norm = Norm(config, embed)

    def __call__(self, x: Array, layer_input: Array) -> Array:
        """`[..., embed]` and `[..., width]` to `[..., embed]`."""
        return self.norm(self.out(jax.nn.gelu(self.gate(x)) * layer_input))
