"""Models and matmuls that run CUDA C++ on the CPU."""

import dataclasses

import cuda_host
import jax
import jax.numpy as jnp
import numpy as np
from blocks import usual_blocks
from helpers import quick_jit

from jaxsplit.context import MatmulPolicy, current_context
from jaxsplit.ops.activations import cuda_rows, int8
from jaxsplit.ops.activations.layout import RMSStatistics
from jaxsplit.ops.attention import cuda_decode, cuda_flash, cuda_rope_cache_update
from jaxsplit.ops.matmul import (
    cuda_dequantize,
    cuda_gemm_bf16,
    cuda_gemm_int8,
    cuda_gemv_16bit,
    cuda_gemv_int8,
)
from jaxsplit.ops.moe import cuda_groups, cuda_router
from jaxsplit.quant import TYPES, unpack

unpacked = quick_jit(unpack, static_argnums=0)
quantize_rows = quick_jit(int8.quantize_rows)
values_of = quick_jit(lambda rows: rows.dequantized())


def matrix(rng, name, rows, columns):
    """A random matrix of a GGML type."""
    raw = usual_blocks(rng, name, rows, columns // TYPES[name].block)
    return unpacked(name, raw)


def rounded_rows(rng, rows, columns, *, normalized=False):
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    found = quantize_rows(jnp.asarray(x))
    if not normalized:
        return found
    squares = (x.reshape(rows, 4, -1) ** 2).sum(axis=-1)
    return int8.Int8Rows(
        found.codes,
        found.scale,
        found.sums,
        found.half_sums,
        RMSStatistics(jnp.asarray(squares), 1e-5, columns),
    )


def emulate_gpu(monkeypatch, capability):
    """Models that are loaded from here on run CUDA C++ on the CPU; the names of kernels that were
    launched."""
    launched = set()

    def emulated(launch, *, capability):
        assert capability == current_context().policy.cuda

        def run(*arrays):
            launched.add(launch.name)
            return cuda_host.run(dataclasses.replace(launch, operands=arrays))

        return list(jax.pure_callback(run, list(launch.results), *launch.operands))

    for module in (
        *(cuda_rows, cuda_decode, cuda_flash, cuda_rope_cache_update, cuda_router, cuda_groups),
        *(cuda_gemv_int8, cuda_gemv_16bit, cuda_gemm_int8, cuda_gemm_bf16, cuda_dequantize),
    ):
        monkeypatch.setattr(module, "cuda_call", emulated)
    monkeypatch.setattr(MatmulPolicy, "for_device", lambda *_: MatmulPolicy(cuda=capability))
    return launched
