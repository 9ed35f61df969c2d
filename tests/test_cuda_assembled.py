"""Kernels in CUDA C++, compiled and assembled for GPUs that are not there."""

import functools
import importlib
import os
import re
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.context import MatmulPolicy
from jaxsplit.cuda import nvrtc
from jaxsplit.cuda.source import source_of
from jaxsplit.errors import JaxsplitError
from jaxsplit.models import AttentionConfig, RopeConfig
from jaxsplit.ops.activations import cuda_rows, int8
from jaxsplit.ops.activations.int8 import Int8BlockLayout, Int8Layout
from jaxsplit.ops.activations.layout import Readers
from jaxsplit.ops.activations.swizzled import SwizzledLayout
from jaxsplit.ops.attention import cuda_decode, cuda_flash
from jaxsplit.ops.attention.spec import AttentionParams
from jaxsplit.ops.matmul import (
    cuda_dequantize,
    cuda_gemm_bf16,
    cuda_gemm_int8,
    cuda_gemv_16bit,
)
from jaxsplit.ops.matmul.cuda_gemv_int8 import launch_of
from jaxsplit.quant import TYPES, unpack

READERS = Readers((Int8Layout(),), xla=False)

COMPILER = os.environ.get("JAXSPLIT_GPU_COMPILER", "")

pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """`compiler(launch, capability)`: registers, bytes of shared memory, and bytes of spills, by
    NVIDIA's assembler, which `make test` installs."""
    assemblers = sorted(Path(COMPILER).glob("nvidia/**/bin/ptxas")) if COMPILER else []
    if not assemblers:
        pytest.skip("needs NVRTC and ptxas: make test installs them")
    monkeypatch.syspath_prepend(COMPILER)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (nvrtc._library, nvrtc._architectures):
        cached.cache_clear()
    importlib.invalidate_caches()
    assert nvrtc.compiles_for(7.5)

    def used(launch, capability):
        ptx = tmp_path / "kernel.ptx"
        text = nvrtc.compile_ptx(launch.source, capability, launch.name)
        ptx.write_text(text)
        architecture = re.search(r"\.target (\w+)", text)[1]
        command = [assemblers[0], f"-arch={architecture}", "-v", ptx, "-o", tmp_path / "cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "serialized" not in done.stderr  # products of warpgroups
        found = [re.search(p, done.stderr) for p in (r"(\d+) registers", r"(\d+) bytes smem")]
        spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
        return *(int(x[1]) if x else 0 for x in found), spills

    yield used
    for cached in (nvrtc._library, nvrtc._architectures):
        cached.cache_clear()


def launches():
    """Of an 8B, as traced: no array is made."""

    def shapes(function, *arrays):
        found = []
        like = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]
        jax.eval_shape(lambda *given: found.append(function(*given)), *like)
        return found[0]

    def gemv(name, rows, columns):
        block = TYPES[name]
        raw = (rows, columns // block.block, block.block_bytes), "uint8"
        x = (1, columns), "float32"
        return shapes(
            lambda x, raw: launch_of(int8.quantize_rows(x), [unpack(name, raw)], jnp.bfloat16),
            *(x, raw),
        )

    def gemm(name, rows, out, columns):
        block = TYPES[name]
        raw = (out, columns // block.block, block.block_bytes), "uint8"
        layout = Int8BlockLayout()
        x = [(array.shape, array.dtype) for array in layout.shapes(rows, columns)]
        return shapes(
            lambda raw, *x: cuda_gemm_int8.launch_of(
                layout.wrap(x, None), [unpack(name, raw)], jnp.bfloat16
            ),
            *(raw, *x),
        )

    def attention(kv_heads, width, dtype):
        config = AttentionConfig(32, kv_heads, width, width, rope=RopeConfig(width))
        heads = [((1, 1, 1, n * width), "bfloat16") for n in (32, kv_heads, kv_heads)]
        memory = [((64, 256, kv_heads, width), "bfloat16")] * 2

        def launch(query, key, value, positions, pages, keys, values):
            batch = Batch(positions, jnp.zeros(1, jnp.int32), pages)
            cache = AttentionCache.of(keys, values, dtype)
            options = {"config": config, "params": AttentionParams(), "readers": READERS}
            return cuda_decode.launch_of(query, key, value, batch, cache, **options)

        return shapes(launch, *heads, ((1, 1), "int32"), ((1, 16), "int32"), *memory)

    def rows():
        function, norm = jnp.multiply, (1e-5, 4096)
        stream, scale, parts = ((1, 1, 4096), "bfloat16"), ((4096,), "float32"), (1, 1, 1, 4096)
        return shapes(
            lambda x, scale, parts: cuda_rows.launch_of(
                function, (x, scale), READERS, addend=(parts, None, None), norm=norm
            ),
            *(stream, scale, (parts, "float32")),
        )

    yield "rows", rows()
    for name, out, columns in (("Q4_K", 28672, 4096), ("Q6_K", 4096, 14336), ("Q8_0", 4096, 4096)):
        yield name, gemv(name, out, columns)
        for count in (8, 64):
            yield f"{count} rows, {name}", gemm(name, count, out, columns)
    for kv_heads, width, dtype in ((8, 128, "bfloat16"), (4, 128, "bfloat16"), (8, 64, "int8")):
        yield f"{kv_heads} x {width} {dtype}", attention(kv_heads, width, dtype)


@pytest.mark.parametrize("capability", [7.5, 8.0, 9.0])
def test_kernels_fit_their_gpu(compiler, capability):
    """A T4's multiprocessor has 65536 registers and 64 KiB of shared memory; nothing is spilled."""
    for name, launch in launches():
        registers, shared, spills = compiler(launch, capability)
        assert registers * launch.threads <= 65536 // 2, name
        assert shared <= 32768, name
        assert spills == 0, name


@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_gemm_bf16_fits_its_gpu(compiler, capability):
    """Nothing is spilled, and the assembler has no remarks: it would say that products wait for one
    another."""
    columns, layout, found = 4096, SwizzledLayout(jnp.dtype("bfloat16")), []

    def launch(name, raw, *x):
        weights, rows = [unpack(name, raw)], layout.wrap(x, None)
        found.append(cuda_gemm_bf16.launch_of(rows, weights, jnp.bfloat16, capability))

    for name, rows in (("Q4_K", 16), ("Q6_K", 32), ("Q8_0", 40), ("Q4_K", 256)):
        size = columns // TYPES[name].block, TYPES[name].block_bytes
        raw = jax.ShapeDtypeStruct((28672, *size), "uint8")
        jax.eval_shape(functools.partial(launch, name), raw, *layout.shapes(rows, columns))
        registers, _, spills = compiler(found[-1], capability)
        assert registers * found[-1].threads <= 65536
        assert spills == 0


GPUS = [7.5, 8.0, 8.9, 9.0, 12.0]


@pytest.mark.parametrize("capability", GPUS)
def test_dequantize_fits_its_gpu(compiler, capability):
    """Nothing is spilled; a block may have 48 KiB of shared memory on any GPU."""
    found = []

    def launch(name, dtype, raw):
        found.append(cuda_dequantize.launch_of([unpack(name, raw)], jnp.dtype(dtype)))

    cases = [("Q4_K", "float16"), ("Q6_K", "bfloat16"), ("IQ6_K", "float32"), ("TQ2_0", "float32")]
    cases += [("Q4_K", "float8_e4m3fn")] * (capability >= 8.9)
    for name, dtype in cases:
        size = 4096 // TYPES[name].block, TYPES[name].block_bytes
        raw = jax.ShapeDtypeStruct((28672, *size), "uint8")
        jax.eval_shape(functools.partial(launch, name, dtype), raw)
        assert found[-1].shared_bytes <= 48 * 1024
        _, _, spills = compiler(found[-1], capability)
        assert spills == 0, (name, dtype)


@pytest.mark.parametrize("capability", GPUS)
def test_gemv_16bit_fits_its_gpu(compiler, capability):
    found = []

    def launch(x, w):
        found.append(cuda_gemv_16bit.launch_of(x, [w], jnp.float32))

    for rows, dtype in ((2, "float16"), (8, "bfloat16")):
        x = jax.ShapeDtypeStruct((rows, 4096), dtype)
        jax.eval_shape(launch, x, jax.ShapeDtypeStruct((28672, 4096), "bfloat16"))
        registers, _, spills = compiler(found[-1], capability)
        assert registers * found[-1].threads <= 65536 // 4
        assert spills == 0


@pytest.mark.parametrize(
    ("capability", "dtype"), [(7.5, "float16"), (8.0, "bfloat16"), (8.6, "bfloat16")]
)
def test_flash_attention_fits_its_gpu(compiler, capability, dtype):
    found = []

    def launch(queries, positions, pages, cache):
        width = queries.shape[-1]
        config = AttentionConfig(32, 8, width, width)
        options = {"config": config, "pages": pages}
        found.append(cuda_flash.launch_of(queries, cache, positions, capability, **options))

    for time, width, cache_dtype in (
        *((2048, 128, dtype), (2048, 256, dtype), (2048, 128, "int8")),
        *((8, 128, dtype), (2, 128, "int8")),
    ):
        like = jax.ShapeDtypeStruct
        memory = [like((64, 8, 256, width), cache_dtype)] * 2
        scales = [like((64, 8, 256), "float32")] * 2 if cache_dtype == "int8" else []
        jax.eval_shape(
            launch,
            like((1, time, 8, 4, width), dtype),
            *(like((1, time), "int32"), like((1, 64), "int32")),
            AttentionCache(*memory, *scales),
        )
        registers, _, spills = compiler(found[-1], capability)
        assert registers * found[-1].threads <= 65536
        assert spills == 0, (time, width, cache_dtype)


def test_errors_name_the_file_and_the_line(compiler):
    source = source_of("\nint x = y;")
    with pytest.raises(JaxsplitError, match=r"cannot compile broken.cu: .*y"):
        nvrtc.compile_ptx(source, 9.0, "broken.cu")
    assert not nvrtc.compiles_for(5.2)
    with pytest.raises(JaxsplitError, match=r"this GPU has 5.2"):
        nvrtc.compile_ptx(source, 5.2, "broken.cu")


def test_without_nvrtc_the_backend_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    with pytest.raises(JaxsplitError, match=r"kernels=cuda needs NVRTC"):
        nvrtc.compile_ptx("", 9.0, "x.cu")
    with pytest.raises(JaxsplitError, match=r"kernels=cuda does not run on cpu"):
        MatmulPolicy.for_device(jax.devices()[0], "cuda")
