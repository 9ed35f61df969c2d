"""Time of matmuls with quantized matrices, for each kind of kernel, beside their limits.

  python benchmarks/matmul.py --types=Q4_K,Q6_K --rows=1,8,64
  python benchmarks/matmul.py --kernels=cuda --tilings --out=FILE.json

A program multiplies the same rows with many copies of the matrices, which together exceed the L2
cache; it is one CUDA graph where kernels allow that. Rows are stored in the kernel's layout once,
before, and split-K parts are left to their reader, as in a model. The limit is reading the matrices
at the bandwidth of a copy, or multiplying at the rate of a large 16-bit product, both measured in
the same run, whichever takes longer. NMSE is against float64, on some rows of the matrices, so that
it includes the rounding of activations.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from jaxsplit.bench.measure import copy_bandwidth, markdown, matmul_rate, seconds
from jaxsplit.bench.random_model import QUANTIZED, SHAPES, Shape, random_blocks
from jaxsplit.cli.program import note, run
from jaxsplit.context import MatmulPolicy, compute_capability, forward_context
from jaxsplit.engine import compiler_options
from jaxsplit.errors import JaxsplitError
from jaxsplit.ops.activations.api import apply, in_layout
from jaxsplit.ops.activations.layout import Activations
from jaxsplit.ops.matmul import api, cuda_gemm_bf16, cuda_gemm_int8, cuda_gemv_int8
from jaxsplit.quant import TYPES, QTensor, dequantize, to_u32, unpack

_KERNELS = flags.DEFINE_list("kernels", None, "of xla, triton, cuda (default: those that run here)")
_TYPES = flags.DEFINE_list("types", ["Q4_K", "Q6_K", "Q8_0", "Q4_0"], "GGML types")
_SHAPE = flags.DEFINE_enum("shape", "llama-8b", [*SHAPES], "model that the matrices are of")
_MATRICES = flags.DEFINE_list("matrices", None, "of qkv, o, gate+up, down, head (default: all)")
_ROWS = flags.DEFINE_list("rows", ["1", "2", "8", "16", "32", "64"], "rows of activations")
_TILINGS = flags.DEFINE_bool("tilings", False, "all tilings of kernels in CUDA C++, not the chosen")
_COLD_MIB = flags.DEFINE_integer("cold_mib", 512, "MiB of matrices that a program reads, at least")
_OUT = flags.DEFINE_string("out", None, "write the rows to this JSON file too")

_MAX_COPIES = 64
_CHECKED = 64  # rows of each matrix whose results are compared with float64
_COLUMNS = {
    "kernels": "kernels",
    "type": "type",
    "matrix": "matrix",
    "rows": "rows",
    "tiling": "tiling",
    "micros": "µs",
    "share": "of limit",
    "nmse": "NMSE",
}

_Product = Callable[[Activations, Sequence[QTensor]], list[Array]]
"""`[rows, out]`, or split-K parts `[parts, rows, out]`, for each matrix."""


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Measured: bytes/s of a copy, FLOP/s of a large product."""

    bandwidth: float
    flops: float

    def seconds(self, weights: Sequence[QTensor], rows: int) -> float:
        """That a product of some rows takes at least."""
        flops = 2 * rows * sum(math.prod(w.shape) for w in weights)
        return max(sum(w.nbytes for w in weights) / self.bandwidth, flops / self.flops)


def _matrices(shape: Shape) -> dict[str, tuple[list[tuple[int, ...]], bool]]:
    """Matrices that are multiplied together: their shapes, and whether their readers sum parts."""
    m = shape.matrices
    return {
        "qkv": ([m["attn_q"], m["attn_k"], m["attn_v"]], True),
        "o": ([m["attn_output"]], True),
        "gate+up": ([m["ffn_gate"], m["ffn_up"]], False),
        "down": ([m["ffn_down"]], True),
        "head": ([(shape.vocab, shape.embed)], False),
    }


@functools.cache
def _matrix(kind: str, out: int, columns: int) -> QTensor:
    """A random matrix, whose rows repeat after some hundred: speed does not depend on values."""
    per_row, some = columns // TYPES[kind].block, min(out, 509)
    blocks = random_blocks(np.random.default_rng(0), kind, some * per_row, columns**-0.5)
    raw = jnp.asarray(blocks).reshape(some, per_row, -1)
    whole = jnp.tile(raw, (-(-out // some), 1, 1))[:out]
    w = jax.jit(functools.partial(unpack, kind))(whole)
    assert isinstance(w, QTensor)
    return w


def _policy(name: str) -> MatmulPolicy:
    policy = MatmulPolicy.for_device(jax.devices()[0], name)
    return dataclasses.replace(policy, int8_activations=policy.has_kernels)


def _runs(name: str) -> bool:
    try:
        _policy(name)
    except JaxsplitError as error:
        note(str(error))
        return False
    return True


def _chosen(parts: bool, dtype: jnp.dtype) -> _Product:
    """As models multiply."""

    def product(x: Activations, weights: Sequence[QTensor]) -> list[Array]:
        if parts:
            return [y.parts for y in api.split_k_matmuls(x, weights, dtype)]
        return api.matmuls(x, weights, dtype)

    return product


def _tilings(
    weights: Sequence[QTensor], rows: int, parts: bool, dtype: jnp.dtype, capability: float
) -> Iterator[tuple[str, _Product]]:
    """All tilings of the kernels in CUDA C++ for some matrices and rows, by name."""

    def gemv(x: Activations, weights: Sequence[QTensor], tiling: Any) -> list[Array]:
        stored = in_layout(x, api.Int8Layout())
        return cuda_gemv_int8.gemv_int8(stored, weights, dtype, tiling=tiling)

    def gemm(x: Activations, weights: Sequence[QTensor], **options: Any) -> list[Array]:
        stored = in_layout(x, api.Int8BlockLayout())
        return cuda_gemm_int8.gemm_int8(stored, weights, dtype, **options)

    def gemm_bf16(x: Activations, weights: Sequence[QTensor], **options: Any) -> list[Array]:
        stored = in_layout(x, api.SwizzledLayout(dtype))
        return cuda_gemm_bf16.gemm_bf16(stored, weights, dtype, **options)

    if rows <= api.MAX_INT8_ROWS:
        for sizes in itertools.product((32, 64, 128), (1, 2, 4), (1, 2, 4)):
            tiling = cuda_gemv_int8.Tiling(*sizes)
            yield str(sizes), functools.partial(gemv, tiling=tiling)
        return
    splits = (1, 2, 4) if parts else (1,)
    if rows <= cuda_gemm_int8.MAX_ROWS:
        for *sizes, split_k in itertools.product((1, 2), (1, 2, 4), splits):
            options = {"split_k": split_k, "sum_parts": not parts}
            tiling = cuda_gemm_int8.Tiling(*sizes)
            yield f"int8 {sizes} x {split_k}", functools.partial(gemm, tiling=tiling, **options)
    most = cuda_gemm_bf16.max_rows(capability)
    if rows <= most and capability >= cuda_gemm_bf16.MIN_CAPABILITY:
        least = -(-rows // 256)
        heights = {-(-rows // (8 * tiles)) * 8 for tiles in (least, 2 * least)}
        for *sizes, split_k in itertools.product((4, 8), heights, (2, 3, 4), splits):
            options = {"split_k": split_k, "sum_parts": not parts}
            tiling = cuda_gemm_bf16.Tiling(*sizes)
            if tiling.fits(weights, capability):
                named = f"bf16 {sizes} x {split_k}"
                yield named, functools.partial(gemm_bf16, tiling=tiling, **options)


def _error(product: _Product, x: Array, weights: Sequence[QTensor], policy: MatmulPolicy) -> float:
    """NMSE against float64, on some rows of each matrix, the last among them."""
    error, size = 0.0, 0.0
    for y, w in zip(_program(product, policy)(x, [weights])[0], weights, strict=True):
        at = np.unique(np.linspace(0, w.shape[0] - 1, _CHECKED).astype(int))
        some = dequantize(jax.tree.map(lambda plane, at=at: plane[at], w))
        exact = np.float64(x) @ np.float64(some).T
        parts = np.float64(y.reshape(-1, *exact.shape[:1], w.shape[0])[..., at])
        error += ((parts.sum(axis=0) - exact) ** 2).sum()
        size += (exact**2).sum()
    return error / size


def _program(product: _Product, policy: MatmulPolicy) -> Callable[..., list[list[Array]]]:
    """Compiled: the rows times each of several copies of the matrices."""

    def multiply(x: Array, copies: Sequence[Sequence[QTensor]]) -> list[list[Array]]:
        with forward_context(policy=policy):
            rows = apply(lambda x: x, (x,), api.readers_of(x, copies[0]))
            return [product(rows, weights) for weights in copies]

    options = compiler_options(jax.devices()[0].platform, decode=True)
    return jax.jit(multiply, compiler_options=options)


def _seconds(product: _Product, x: Array, weights: list[QTensor], policy: MatmulPolicy) -> float:
    """Of one product."""
    size = sum(w.nbytes for w in weights)
    count = max(1, min(_MAX_COPIES, -(-_COLD_MIB.value * 2**20 // size)))
    copies = [weights, *(jax.tree.map(jnp.copy, weights) for _ in range(count - 1))]
    program, repeats = _program(product, policy), -(-_MAX_COPIES // count)
    took = seconds(lambda: [program(x, copies) for _ in range(repeats)][-1])
    return took / repeats / count


def _measure(dtype: jnp.dtype, limits: _Limits) -> Iterator[dict[str, Any]]:
    """A row of the table for each product."""
    found = _matrices(SHAPES[_SHAPE.value])
    names = _KERNELS.value or [name for name in ("xla", "triton", "cuda") if _runs(name)]
    for kind, name, backend in itertools.product(_TYPES.value, _MATRICES.value or found, names):
        shapes, parts = found[name]
        policy = _policy(backend)
        with forward_context(policy=policy):
            weights = [_matrix(kind, *shape) for shape in shapes]
            weights = [
                to_u32(w) if policy.has_kernels and api.has_int8_kernel(w) else w for w in weights
            ]
        for rows in map(int, _ROWS.value):
            x = jax.random.normal(jax.random.key(rows), (rows, weights[0].shape[1])).astype(dtype)
            products = [("", _chosen(parts, dtype))]
            if _TILINGS.value and backend == "cuda" and all(map(cuda_gemm_int8.supports, weights)):
                products = list(_tilings(weights, rows, parts, dtype, policy.cuda))
            for tiling, product in products:
                took = _seconds(product, x, weights, policy)
                yield {
                    "kernels": backend,
                    "type": kind,
                    "matrix": name,
                    "rows": rows,
                    "tiling": tiling,
                    "micros": took * 1e6,
                    "share": limits.seconds(weights, rows) / took,
                    "nmse": _error(product, x, weights, policy),
                }


def main(_: list[str]) -> None:
    """Measures each product."""
    _check()
    device = jax.devices()[0]
    capability = compute_capability(device)
    dtype = jnp.dtype(jnp.float16 if 0 < capability < 8 else jnp.bfloat16)
    limits = _Limits(copy_bandwidth(device), matmul_rate(device, dtype))
    print(
        f"{device.device_kind}, jax {jax.__version__}, {dtype.name}: copy "
        f"{limits.bandwidth / 1e9:.1f} GB/s, products {limits.flops / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for row in _measure(dtype, limits):
        rows.append(row)
        note(
            " ".join(
                f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()
            )
        )
        if _OUT.value:
            found = {"kind": device.device_kind, "jax": jax.__version__, "dtype": dtype.name}
            found |= dataclasses.asdict(limits) | {"rows": rows}
            Path(_OUT.value).write_text(json.dumps(found, indent=1))
    print(f"\n{markdown(rows, _COLUMNS)}")


def _check() -> None:
    """Refuses flags that no product is made of."""
    shape = SHAPES[_SHAPE.value]
    if shape.experts:
        raise JaxsplitError(f"--shape={_SHAPE.value} is a mixture; try --shape=llama-8b")
    known = {
        "kernels": (_KERNELS.value or [], ["xla", "triton", "cuda"]),
        "types": (_TYPES.value, QUANTIZED),
        "matrices": (_MATRICES.value or [], [*_matrices(shape)]),
    }
    for name, (given, names) in known.items():
        if wrong := [value for value in given if value not in names]:
            raise JaxsplitError(f"--{name}={wrong[0]} is none of {', '.join(names)}")
    if wrong := [value for value in _ROWS.value if not value.isdigit() or value == "0"]:
        raise JaxsplitError(f"--rows={wrong[0]} is no number of rows")


if __name__ == "__main__":
    run(main)
