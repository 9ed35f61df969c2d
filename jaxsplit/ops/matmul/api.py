"""Matmuls of activations with plain and quantized matrices: `x @ w.T`.

`_IMPLEMENTATIONS` lists the ways to compute them, best first. Each takes the matrices that it
supports for the rows at hand, and names the layout in which its kernel reads these rows.
"""

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.comm.api import one_shot_peers
from jaxsplit.comm.peers import WIDTH, padded
from jaxsplit.comm.unreduced import Unreduced
from jaxsplit.context import current_context, forward_context
from jaxsplit.ops.activations.api import as_array, in_layout
from jaxsplit.ops.activations.int8 import Int8BlockLayout, Int8Layout, quantize_rows
from jaxsplit.ops.activations.layout import (
    ActivationLayout,
    Activations,
    PlainLayout,
    Readers,
    rows_of,
)
from jaxsplit.ops.activations.packed import PackedLayout
from jaxsplit.ops.activations.swizzled import SwizzledLayout
from jaxsplit.ops.matmul import (
    cuda_gemm_bf16,
    cuda_gemm_int8,
    cuda_gemv_16bit,
    cuda_gemv_int8,
    triton_gemv_bf16,
    triton_gemv_int8,
    triton_small_m_gemm,
    xla,
)
from jaxsplit.ops.matmul.cuda_gemm_bf16 import gemm_bf16
from jaxsplit.ops.matmul.cuda_gemm_int8 import gemm_int8
from jaxsplit.ops.matmul.groups import GroupedGemmInfo
from jaxsplit.ops.matmul.triton_gemv_bf16 import gemv_bf16
from jaxsplit.ops.matmul.triton_small_m_gemm import small_m_gemm
from jaxsplit.quant.qtensor import QTensor, Weight
from jaxsplit.sharding.axes import Axis

Rows = Array | Activations
"""Activations `[..., in]`."""

Like = Array | Activations | jax.ShapeDtypeStruct
"""What has the shape and dtype of activations."""

# Which kernels the policy allows for a number of rows.


MAX_INT8_ROWS = triton_gemv_int8.MAX_ROWS
MAX_SMALL_M_ROWS = triton_small_m_gemm.MAX_ROWS
MAX_GROUP_ROWS = cuda_gemm_bf16.MAX_GROUP_ROWS
MAX_EXACT_ROWS = 256
"""Beyond, float8 multiplies if it is asked for, although `gemm_bf16` could."""


def int8_rows(rows: int) -> bool:
    """Whether kernels multiply this number of rows with quantized matrices in integers."""
    policy = current_context().policy
    return policy.int8_activations and policy.has_kernels and rows <= MAX_INT8_ROWS


def _gemv_backend(w: Weight) -> ModuleType | None:
    """The module with a kernel for rows in 8 bits and a matrix, or a stack of them; None: there is
    none."""
    if not isinstance(w, QTensor):
        return None
    context = current_context()
    policy = context.policy
    runs = [(triton_gemv_int8, not policy.only_cuda), (cuda_gemv_int8, policy.cuda > 0)]
    alone = context.peers is None  # it sends peers nothing
    if alone and policy.cuda in cuda_gemv_int8.FASTER and cuda_gemv_int8.is_faster(w):
        runs.reverse()
    return next((module for module, has in runs if has and module.supports(w)), None)


def _gemm_int8_rows(rows: int) -> bool:
    """Whether a kernel in CUDA C++ multiplies this number of rows in integers, on tensor cores."""
    policy = current_context().policy
    if not policy.only_cuda or policy.cuda < cuda_gemm_int8.MIN_CAPABILITY:
        return False
    # Beyond, `gemm_bf16` with products of warpgroups is faster.
    most = 16 if policy.cuda in cuda_gemm_bf16.FASTER else cuda_gemm_int8.MAX_ROWS
    return policy.int8_activations and MAX_INT8_ROWS < rows <= most


def _small_m(rows: int) -> bool:
    """Whether a kernel multiplies this number of rows with quantized matrices on tensor cores."""
    some = 1 < rows <= MAX_SMALL_M_ROWS
    return some and current_context().policy.kernels and not int8_rows(rows)


def has_int8_kernel(w: Weight) -> bool:
    """Whether a matrix, or a stack of them, can be multiplied in integers."""
    return _gemv_backend(w) is not None


def _has_small_m_kernel(w: Weight, dtype: jnp.dtype) -> bool:
    """Whether the small-M kernel can multiply activations of a dtype with a matrix, or a stack."""
    kernels = current_context().policy.kernels
    return kernels and isinstance(w, QTensor) and triton_small_m_gemm.supports(w, dtype)


def _has_gemm_bf16(w: Weight, dtype: jnp.dtype) -> bool:
    """As `_has_small_m_kernel`, in CUDA C++."""
    runs = current_context().policy.cuda >= cuda_gemm_bf16.MIN_CAPABILITY
    return runs and isinstance(w, QTensor) and cuda_gemm_bf16.supports(w, dtype)


def _grouped_kernel(stack: Weight, dtype: jnp.dtype, rows: int) -> Callable | None:
    """The kernel for groups of up to some rows of a dtype, and a stack; None: there is none."""
    policy = current_context().policy
    triton, cuda = _has_small_m_kernel(stack, dtype), _has_gemm_bf16(stack, dtype)
    if triton and cuda and policy.cuda in cuda_gemm_bf16.FASTER:
        # Codes in two planes are dequantized faster in CUDA C++.
        assert isinstance(stack, QTensor)
        triton = len(stack.layout.bits) == 1
    if triton and rows <= MAX_SMALL_M_ROWS:
        return small_m_gemm
    return gemm_bf16 if cuda else None


def _grouped_layout(
    kernel: Callable | None, stacks: Sequence[QTensor], dtype: jnp.dtype
) -> ActivationLayout:
    """In which a kernel for groups reads rows."""
    return PackedLayout.of(stacks) if kernel is small_m_gemm else SwizzledLayout(dtype)


def max_group_rows(stacks: Sequence[Weight], dtype: jnp.dtype) -> int:
    """Rows of the largest groups that kernels multiply with all of some stacks."""
    policy = current_context().policy
    many = policy.only_cuda or policy.cuda in cuda_gemm_bf16.FASTER
    many = many and all(_has_gemm_bf16(stack, dtype) for stack in stacks)
    return MAX_GROUP_ROWS if many else MAX_SMALL_M_ROWS


def has_grouped_kernel(stack: Weight, dtype: jnp.dtype) -> bool:
    """Whether a kernel can multiply groups of rows of a dtype with a matrix of a stack each."""
    return _grouped_kernel(stack, dtype, rows=1) is not None


def _supports_gemv_int8(x: Like, w: Weight) -> bool:
    return int8_rows(rows_of(x)) and _gemv_backend(w) is triton_gemv_int8


def _supports_cuda_gemv_int8(x: Like, w: Weight) -> bool:
    return int8_rows(rows_of(x)) and _gemv_backend(w) is cuda_gemv_int8


def _supports_gemm_int8(x: Like, w: Weight) -> bool:
    return _gemm_int8_rows(rows_of(x)) and isinstance(w, QTensor) and cuda_gemm_int8.supports(w)


def _supports_gemm_bf16(x: Like, w: Weight) -> bool:
    policy, rows = current_context().policy, rows_of(x)
    if not isinstance(w, QTensor) or not _has_gemm_bf16(w, x.dtype):
        return False
    fast = policy.cuda in cuda_gemm_bf16.FASTER
    least = MAX_SMALL_M_ROWS if _has_small_m_kernel(w, x.dtype) else 1
    least = min(least, cuda_gemm_bf16.faster_from(w) - 1) if fast else least
    most = cuda_gemm_bf16.max_rows(policy.cuda) if fast or policy.only_cuda else MAX_SMALL_M_ROWS
    return least < rows <= most


def _supports_int8_by_xla(x: Like, w: Weight) -> bool:
    policy = current_context().policy
    few = rows_of(x) <= MAX_INT8_ROWS
    return policy.int8_activations and not policy.has_kernels and few and has_int8_kernel(w)


def _supports_small_m_gemm(x: Like, w: Weight) -> bool:
    return _small_m(rows_of(x)) and _has_small_m_kernel(w, x.dtype)


def _supports_gemv_bf16(x: Like, w: Weight) -> bool:
    # Without peers, XLA's product of a single row is a little faster.
    single = current_context().peers is not None and rows_of(x) == 1
    return single and not isinstance(w, QTensor) and triton_gemv_bf16.supports(w, x.dtype)


def _supports_gemv_16bit(x: Like, w: Weight) -> bool:
    # Elsewhere, and a single row, XLA multiplies with matrices as they are stored.
    policy, rows = current_context().policy, rows_of(x)
    runs = policy.only_cuda and policy.cuda < cuda_gemv_16bit.BELOW_CAPABILITY
    if not runs or isinstance(w, QTensor) or not 1 < rows <= cuda_gemv_16bit.MAX_ROWS:
        return False
    return jnp.bfloat16 in (w.dtype, x.dtype) and cuda_gemv_16bit.supports(w, x.dtype)


def _supports_float8(x: Like, w: Weight) -> bool:
    policy = current_context().policy
    gemm = policy.only_cuda or policy.cuda in cuda_gemm_bf16.FASTER
    least = MAX_EXACT_ROWS if gemm and _has_gemm_bf16(w, x.dtype) else MAX_SMALL_M_ROWS
    return policy.float8 and isinstance(w, QTensor) and rows_of(x) > least


def _int8_by_xla(x: Array, weights: Sequence[QTensor], dtype: jnp.dtype) -> list[Array]:
    """The results of `gemv_int8`, computed by XLA."""
    rows = quantize_rows(x.reshape(-1, x.shape[-1])).dequantized()
    return xla.matmuls(rows, weights, dtype)


@dataclasses.dataclass(frozen=True)
class _Implementation:
    """One way to multiply rows with matrices.

    Attributes:
      name: for people.
      supports: whether it multiplies rows like these with a matrix.
      run: `(rows, weights, dtype)` to results `[..., out]`; rows in the layout, or an array.
      layout: `(weights, dtype)` to the layout in which its kernel reads rows of a dtype; None: they
        are read as an array.
      run_split_k: `(rows, weights)` to float32 `[parts, rows, out]`, left to the reader to sum;
        None: there is only one part.
      run_and_send: `(rows, weights, peers)`, of one matrix, to its float32 result, which the kernel
        has sent to the peers, and its epochs; None: it cannot send.
    """

    name: str
    supports: Callable[[Like, Weight], bool]
    run: Callable[..., list[Array]]
    layout: Callable[..., ActivationLayout] | None = None
    run_split_k: Callable[..., list[Array]] | None = None
    run_and_send: Callable[..., list[Array]] | None = None

    def rows(self, x: Rows, weights: Sequence[Weight]) -> Any:
        """Rows as `run` reads them."""
        return in_layout(x, self.layout(weights, x.dtype)) if self.layout else as_array(x)


_IMPLEMENTATIONS = (
    _Implementation(
        "gemv_int8",
        _supports_gemv_int8,
        triton_gemv_int8.gemv_int8,
        layout=lambda weights, dtype: Int8Layout(),
        run_and_send=lambda rows, weights, peers: triton_gemv_int8.gemv_int8(
            rows, weights, peers=peers
        ),
    ),
    _Implementation(
        "gemv_int8 in CUDA C++",
        _supports_cuda_gemv_int8,
        cuda_gemv_int8.gemv_int8,
        layout=lambda weights, dtype: Int8Layout(),
    ),
    _Implementation(
        "gemm_int8",
        _supports_gemm_int8,
        gemm_int8,
        layout=lambda weights, dtype: Int8BlockLayout(),
        run_split_k=lambda rows, weights: gemm_int8(rows, weights, sum_parts=False),
    ),
    _Implementation("float8", _supports_float8, xla.float8_matmuls),
    _Implementation(
        "gemm_bf16",
        _supports_gemm_bf16,
        gemm_bf16,
        layout=lambda weights, dtype: SwizzledLayout(dtype),
        run_split_k=lambda rows, weights: gemm_bf16(rows, weights, sum_parts=False),
    ),
    _Implementation("int8 by XLA", _supports_int8_by_xla, _int8_by_xla),
    _Implementation(
        "small_m_gemm",
        _supports_small_m_gemm,
        small_m_gemm,
        layout=lambda weights, dtype: PackedLayout.of(weights),
        run_split_k=lambda rows, weights: small_m_gemm(rows, weights, sum_parts=False),
    ),
    _Implementation(
        "gemv_bf16",
        _supports_gemv_bf16,
        gemv_bf16,
        layout=lambda weights, dtype: PlainLayout(dtype),
        run_and_send=lambda rows, weights, peers: gemv_bf16(rows, weights, peers=peers),
    ),
    _Implementation("gemv_16bit", _supports_gemv_16bit, cuda_gemv_16bit.gemv_16bit),
    _Implementation("XLA", lambda x, w: True, xla.matmuls),
)


def _choose(x: Like, weights: Sequence[Weight]) -> list[tuple[_Implementation, list[int]]]:
    """The implementations for some matrices, each with the indices of its own."""
    left, chosen = dict(enumerate(weights)), []
    for implementation in _IMPLEMENTATIONS:
        own = [i for i, w in left.items() if implementation.supports(x, w)]
        for i in own:
            del left[i]
        if own:
            chosen.append((implementation, own))
    return chosen


def readers_of(x: Like, weights: Sequence[Weight]) -> Readers:
    """Who reads rows like `x` when they are multiplied with some matrices."""
    layouts, by_xla = [], False
    for implementation, own in _choose(x, weights):
        if implementation.layout is None:
            by_xla = True
        else:
            layouts.append(implementation.layout([weights[i] for i in own], x.dtype))
    return Readers(tuple(layouts), by_xla)


def matmul(x: Rows, w: Weight, dtype: jnp.dtype = jnp.float32) -> Array:
    """`x @ w.T` with one matrix, as `matmuls`."""
    return matmuls(x, [w], dtype)[0]


def matmuls(x: Rows, weights: Sequence[Weight], dtype: jnp.dtype = jnp.float32) -> list[Array]:
    """`x @ w.T` with several plain or quantized matrices.

    Args:
      x: `[..., in]`.
      weights: `[out, in]` each.
      dtype: of the results.

    Returns:
      `[..., out]` each, accumulated in float32.
    """
    results: dict[int, Array] = {}
    for implementation, own in _choose(x, weights):
        mine = [weights[i] for i in own]
        ys = implementation.run(implementation.rows(x, mine), mine, dtype)
        results |= {i: _shaped(y, x) for i, y in zip(own, ys, strict=True)}
    return [results[i] for i in range(len(weights))]


def batched(function: Callable, in_axes: Any = 0, out_axes: Any = 0) -> Callable:
    """`jax.vmap` of a function that multiplies, by the kernels that take batches: those in CUDA C++
    do not."""

    def run(*args: Any) -> Any:
        policy = dataclasses.replace(current_context().policy, cuda=0.0)
        with forward_context(policy=policy):
            return jax.vmap(function, in_axes, out_axes)(*args)

    return run


def split_k_matmuls(x: Rows, weights: Sequence[Weight], dtype: jnp.dtype) -> list[Unreduced]:
    """`matmuls` whose split-K parts are left to their reader to sum.

    The parts are float32; where there is only one, it has the dtype.
    """
    [(implementation, _), *others] = _choose(x, weights)
    if others or implementation.run_split_k is None:
        return [Unreduced.of(y) for y in matmuls(x, weights, dtype)]
    ys = implementation.run_split_k(implementation.rows(x, weights), weights)
    return [Unreduced(y.reshape(len(y), *x.shape[:-1], -1)) for y in ys]


def unreduced_matmul(
    x: Rows,
    w: Weight,
    *,
    reduce_over: tuple[Axis, ...] = (),
    axis: Axis | None = None,
    bias: Array | None = None,
) -> Unreduced:
    """`x @ w.T` before its all-reduce. If the kernel can, it sends its result to the peers as soon
    as it has it.

    Args:
      x: `[..., in]`.
      w: `[out, in]`.
      reduce_over, axis, bias: as in `Unreduced`.
    """
    [(implementation, _)] = _choose(x, [w])
    size = rows_of(x) * padded(w.shape[0])  # as the kernel that receives rows counts
    peers = one_shot_peers(size, *reduce_over) if current_context().fuse_all_reduce else None
    whole = w.shape[0] % WIDTH == 0 and bias is None
    if peers is not None and implementation.run_and_send and whole:
        y, epochs = implementation.run_and_send(implementation.rows(x, [w]), [w], peers)
        return Unreduced(_shaped(y, x)[None], _shaped(epochs, x), None, reduce_over, axis)
    [y] = split_k_matmuls(x, [w], jnp.float32)
    return dataclasses.replace(y, bias=bias, reduce_over=reduce_over, axis=axis)


def expert_matmuls(
    x: Rows, stacks: Sequence[QTensor], experts: Array, dtype: jnp.dtype = jnp.float32
) -> list[Array]:
    """Rows times the matrices of the experts chosen for each, where `int8_rows` holds.

    Args:
      x: `[rows, in]`.
      stacks: `[experts, out, in]` each, with `has_int8_kernel`.
      experts: int32 `[pairs]`: first those of the first row; all rows have the same number.
      dtype: of the results.

    Returns:
      `[pairs, out]` each.
    """
    rows, results = in_layout(x, Int8Layout()), {}
    for backend, own in _by(_gemv_backend, stacks).items():
        assert backend is not None
        mine = [stacks[i] for i in own]
        ys = backend.gemv_int8(rows, mine, dtype, experts=experts)
        results |= dict(zip(own, ys, strict=True))
    return [results[i] for i in range(len(stacks))]


def grouped_readers(stacks: Sequence[QTensor], dtype: jnp.dtype, rows: int) -> Readers:
    """Who reads rows of a dtype when groups of up to `rows` of them are multiplied with stacks."""
    kernels = _by(lambda stack: _grouped_kernel(stack, dtype, rows), stacks)
    layouts = (
        _grouped_layout(kernel, [stacks[i] for i in own], dtype) for kernel, own in kernels.items()
    )
    return Readers(tuple(layouts), xla=False)


def grouped_matmuls(
    x: Rows,
    stacks: Sequence[QTensor],
    groups: GroupedGemmInfo,
    results: int,
    dtype: jnp.dtype = jnp.float32,
) -> list[Array]:
    """Groups of rows times one matrix of a stack each.

    Args:
      x: `[rows, in]`.
      stacks: `[experts, out, in]` each, with `has_grouped_kernel`.
      groups: of rows.
      results: number of rows of the results.
      dtype: of the results.

    Returns:
      `[results, out]` each.
    """
    height, results_of = groups.x_row.shape[1], {}
    for kernel, own in _by(lambda w: _grouped_kernel(w, x.dtype, height), stacks).items():
        assert kernel is not None
        mine = [stacks[i] for i in own]
        rows = in_layout(x, _grouped_layout(kernel, mine, x.dtype))
        ys = kernel(rows, mine, dtype, groups=groups, out_rows=results)
        results_of |= dict(zip(own, ys, strict=True))
    return [results_of[i] for i in range(len(stacks))]


def _by(key: Callable[[Any], Any], weights: Sequence[QTensor]) -> dict[Any, list[int]]:
    """The indices of matrices, by what a function says of each."""
    found: dict[Any, list[int]] = {}
    for i, w in enumerate(weights):
        found.setdefault(key(w), []).append(i)
    return found


def _shaped(y: Array, x: Like) -> Any:
    """`[rows, out]` as `[..., out]`."""
    return y.reshape(*x.shape[:-1], y.shape[-1])
