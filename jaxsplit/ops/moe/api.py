"""Mixtures of experts: routing, and the experts' MLPs.

`_EXPERTS` lists the implementations of the MLPs, best first, each with the predicate that tells
whether it supports the arguments.
"""

import dataclasses
from functools import partial

from jax import Array

from jaxsplit.comm.api import is_split
from jaxsplit.context import current_context
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import (
    XLA_ONLY,
    Activations,
    Readers,
    RMSStatistics,
    rows_of,
)
from jaxsplit.ops.matmul.api import (
    MAX_GROUP_ROWS,
    Like,
    grouped_readers,
    has_grouped_kernel,
    has_int8_kernel,
    int8_rows,
)
from jaxsplit.ops.moe import cuda_router, router, triton_router
from jaxsplit.ops.moe.experts import (
    ExpertMatrices,
    ExpertParams,
    by_gemv,
    by_grouped_gemm,
    by_tiles,
    by_vmap,
)
from jaxsplit.ops.moe.router import weigh_experts
from jaxsplit.ops.moe.spec import MoEConfig
from jaxsplit.quant import QTensor

__all__ = [
    "ExpertMatrices",
    "ExpertParams",
    "experts",
    "readers_of",
    "topk_experts",
    "weigh_experts",
]

_FEW_PAIRS = 64  # up to which XLA's matmuls with quantized experts need little memory


def topk_experts(
    logits: Array,
    config: MoEConfig,
    bias: Array | None = None,
    scale: Array | None = None,
    *,
    rms: RMSStatistics | None = None,
    logit_bias: Array | None = None,
) -> tuple[Array, Array]:
    """Selects the experts of each token.

    Groups of experts are those of DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437), scored as in
    llama.cpp.

    Args:
      logits: float32 `[..., experts]`.
      config: of the mixture.
      bias: float32 `[experts]`, added to the scores for the selection only; None: no bias.
      scale: float32 `[experts]`, multiplies the router weights; None: no scale.
      rms: statistics of a deferred normalization of the router's input; None: it was normalized.
      logit_bias: float32 `[experts]`, added to the logits once they are normalized; None: nothing.

    Returns:
      experts, int32 `[..., top_k]`, and router weights, float32 `[..., top_k]`.
    """
    policy = current_context().policy
    for runs, kernel in ((policy.kernels, triton_router), (policy.only_cuda, cuda_router)):
        if runs and kernel.supports(config, rows_of(logits)):
            options = {"rms": rms, "logit_bias": logit_bias}
            return kernel.topk_experts(logits, config, bias, scale, **options)
    if rms is not None:
        logits = logits * rms.inverse.reshape(*logits.shape[:-1], 1)
    logits = logits if logit_bias is None else logits + logit_bias
    return router.topk_experts(logits, config, bias, scale)


def readers_of(x: Like, top_k: int, params: ExpertParams) -> Readers:
    """Who reads tokens like `x`, `[..., time, embed]`, that are routed to `top_k` experts each."""
    if _supports_gemv(x, top_k, params):
        return Readers((Int8Layout(),), xla=False)
    if _supports_grouped_gemm(x, top_k, params) and rows_of(x) <= MAX_GROUP_ROWS:
        rows = params.group_rows(rows_of(x) * top_k, x.dtype)
        return grouped_readers(params.input_stacks, x.dtype, rows)
    return XLA_ONLY


def experts(x: Activations, topk_ids: Array, weights: Array, params: ExpertParams) -> Array:
    """The weighted sum of the outputs of each token's experts.

    Args:
      x: `[..., time, embed]`.
      topk_ids: int32 `[..., time, top_k]`, distinct for each token.
      weights: router weights, float32 `[..., time, top_k]`.
      params: of the experts.

    Returns:
      float32 `[parts, ..., time, out]`, to be summed over the parts, and over the devices that hold
      other experts or hidden units.
    """
    shape = x.shape
    run = next(run for supports, run in _EXPERTS if supports(x, topk_ids.shape[-1], params))
    topk_ids, weights = (a.reshape(-1, a.shape[-1]) for a in (topk_ids, weights))
    y = run(_as_rows(x), topk_ids, weights, params)
    return y.reshape(len(y), *shape[:-1], -1)


def _as_rows(x: Activations) -> Activations:
    """`[..., embed]` as `[tokens, embed]`."""
    return dataclasses.replace(x, rows=x.array.reshape(-1, x.shape[-1]))


def _decodes(x: Like, *_: object) -> bool:
    """Whether this is a decode step: one token of each sequence."""
    return x.shape[-2] == 1


def _few_pairs(x: Like, top_k: int, params: ExpertParams) -> bool:
    """Whether this is a decode step with few pairs of a token and an expert, and whether all
    experts are quantized and on this device."""
    few = rows_of(x) * top_k <= _FEW_PAIRS and _decodes(x)
    quantized = all(isinstance(stack, QTensor) for stack in params.stacks)
    return few and quantized and not is_split(params.axis)


def _supports_gemv(x: Like, top_k: int, params: ExpertParams) -> bool:
    few = _few_pairs(x, top_k, params) and int8_rows(rows_of(x))
    return few and not params.weight_on_input and all(map(has_int8_kernel, params.stacks))


def _supports_grouped_gemm(x: Like, top_k: int, params: ExpertParams) -> bool:
    if params.weight_on_input:
        return False
    if _few_pairs(x, top_k, params) and int8_rows(rows_of(x)):
        return False
    return all(has_grouped_kernel(stack, x.dtype) for stack in params.stacks)


_EXPERTS = (
    (_supports_gemv, by_gemv),
    (_supports_grouped_gemm, by_grouped_gemm),
    (_few_pairs, by_vmap),
    (_decodes, partial(by_tiles, decode=True)),
    (lambda *_: True, partial(by_tiles, decode=False)),
)
