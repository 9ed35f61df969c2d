"""Kernels in CUDA C++, on the CPU against float64."""

import dataclasses
import itertools

import cuda_host
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import usual_blocks
from cuda_emulation import emulate_gpu, matrix, quantize_rows, rounded_rows, values_of
from flax import nnx
from helpers import GREEDY, nmse, quick_jit
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.cuda.expression import expression
from jaxsplit.models import AttentionConfig, MLPConfig, MoEConfig, NormConfig, RopeConfig
from jaxsplit.models.attention import Attention
from jaxsplit.ops.activations import cuda_rows, int8
from jaxsplit.ops.activations.api import apply
from jaxsplit.ops.activations.functions import (
    ACTIVATIONS,
    XIELU,
    BoundedSwiGLU,
    SiTUGLU,
    activate,
)
from jaxsplit.ops.activations.int8 import Int8BlockLayout, Int8Layout
from jaxsplit.ops.activations.layout import Activations, Readers, RMSStatistics
from jaxsplit.ops.activations.swizzled import SwizzledLayout
from jaxsplit.ops.attention import cuda_decode, xla
from jaxsplit.ops.matmul import api as matmul_api
from jaxsplit.ops.matmul import (
    cuda_dequantize,
    cuda_gemm_bf16,
    cuda_gemm_int8,
    cuda_gemv_16bit,
    cuda_gemv_int8,
    float8,
    triton_gemv_int8,
)
from jaxsplit.ops.matmul.cuda_gemv_int8 import Tiling, launch_of
from jaxsplit.ops.matmul.groups import GroupedGemmInfo
from jaxsplit.ops.moe import api as moe
from jaxsplit.ops.moe import cuda_groups, cuda_router, router
from jaxsplit.ops.moe.experts import ExpertMatrices, ExpertParams
from jaxsplit.quant import TYPES, dequantize, to_u32, unpack
from jaxsplit.quant.qtensor import minima, row_bounds, scales, shifts, unscaled
from jaxsplit.sharding.axes import Axis

READERS = Readers((Int8Layout(),), xla=False)
OF_MANY_ROWS = Readers((Int8BlockLayout(),), xla=False)

pytestmark = pytest.mark.usefixtures("quick_module")

on_cpu = pytest.mark.skipif(cuda_host.COMPILER is None, reason="needs g++")

dequantized = quick_jit(dequantize)


@pytest.fixture
def rng():
    return fresh_rng()


SMALL_BLOCKS = [
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_0"],
    ["IQ1_BN", "IQ2_BN", "IQ4_NL", "MXFP4", "NVFP4", "Q8_KV"],
]
LARGE_BLOCKS = [
    ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"],
    ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"],
    ["TQ1_0", "TQ2_0", "Q1_0", "Q8_K_R8", "IQ2_KL", "IQ2_KS"],
    ["IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ3_KS"],
    ["IQ4_KS", "IQ5_KS", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT"],
]
TYPES_WITH_KERNELS = SMALL_BLOCKS + LARGE_BLOCKS
"""In groups that are multiplied by one kernel, as compiling takes the longest."""


def matrices(names, columns):
    """Random matrices of a few rows, and their values."""
    rng = fresh_rng()
    raws = [
        usual_blocks(rng, name, 37 - i, columns // TYPES[name].block)
        for i, name in enumerate(names)
    ]

    @jax.jit
    def both(raws):
        weights = [unpack(name, raw) for name, raw in zip(names, raws, strict=True)]
        return weights, list(map(dequantize, weights))

    return both(raws)


@pytest.fixture(scope="module", params=TYPES_WITH_KERNELS, ids=" ".join)
def some(request):
    """Names of types, matrices, and their values."""
    return request.param, *matrices(request.param, 2816)


@on_cpu
def test_gemv_int8_equals_float64(rng, some):
    """Rows that fill a step and rows that do not; two rows of activations."""
    names, weights, values = some
    assert all(map(cuda_gemv_int8.supports, weights))
    x = rounded_rows(rng, 2, 2816)
    for tiling in (None, Tiling(32, 2, 3)):
        ys = cuda_host.run(launch_of(x, weights, jnp.float32, tiling=tiling))
        for y, w, name in zip(ys, values, names, strict=True):
            assert nmse(y, np.float64(values_of(x)) @ np.float64(w).T) <= 1e-10, name


def in_blocks(x):
    """The same rows as `Int8Blocks`."""
    rows, blocks = x.scale.shape
    slices = np.asarray(x.codes).reshape(rows, -1, 4)[:, int8.bank_swizzle(np.arange(2 * blocks))]
    codes = slices.reshape(rows, blocks, 2, 4).transpose(1, 0, 3, 2)
    return int8.Int8Blocks(jnp.asarray(codes), x.scale.T, x.sums.T, x.half_sums.T, x.rms)


def gemm(x, weights, **options):
    """float32 `[parts, rows, out]` for each matrix."""
    return cuda_host.run(cuda_gemm_int8.launch_of(x, weights, jnp.float32, **options))


@on_cpu
def test_gemm_int8_equals_float64(rng, some):
    """Rows of a matrix that fill no tile; where chunks are long, a last round in which some units
    do not exist."""
    names, weights, values = some
    assert all(map(cuda_gemm_int8.supports, weights))
    x = in_blocks(rounded_rows(rng, 5, 2816))
    for y, w, name in zip(gemm(x, weights, split_k=1), values, names, strict=True):
        assert nmse(y[0], np.float64(values_of(x)) @ np.float64(w).T) <= 1e-12, name


@on_cpu
def test_gemm_int8_of_a_last_round_that_is_not_full(rng):
    weights, values = matrices(["Q4_0", "Q8_0"], 704)
    x = in_blocks(rounded_rows(rng, 5, 704))
    for y, w in zip(gemm(x, weights, split_k=1), values, strict=True):
        assert nmse(y[0], np.float64(values_of(x)) @ np.float64(w).T) <= 1e-12


@on_cpu
@pytest.mark.parametrize("rows", [3, 8, 17, 33, 64])
def test_each_row_is_what_it_is_alone(rng, rows):
    """Several matrices, deferred norms, and split-K, whose parts do not divide the rounds."""
    x = rounded_rows(rng, rows, 1280, normalized=True)
    weights = [matrix(rng, name, 5 + 40 * i, 1280) for i, name in enumerate(("Q6_K", "Q4_K"))]
    ys = gemm(in_blocks(x), weights, split_k=3)
    row = rows - 2
    alone = jax.tree.map(lambda array: array[row : row + 1], x)
    one_row = cuda_host.run(launch_of(alone, weights, jnp.float32))
    for y, w, same in zip(ys, weights, one_row, strict=True):
        assert y.shape == (3, rows, len(w.scale))
        y = np.float64(y).sum(axis=0)
        assert nmse(y, np.float64(values_of(x)) @ np.float64(dequantized(w)).T) <= 1e-12
        assert nmse(y[row], np.float64(same[0])) <= 1e-12


@on_cpu
@pytest.mark.parametrize("tiling", [(1, 1), (1, 2), (2, 1), (2, 4)])
def test_tilings_of_gemm_int8_equal_float64(rng, tiling):
    x = rounded_rows(rng, 11, 512)
    w = matrix(rng, "Q5_K", 150, 512)
    [y] = gemm(in_blocks(x), [w], split_k=2, tiling=cuda_gemm_int8.Tiling(*tiling))
    expected = np.float64(values_of(x)) @ np.float64(dequantized(w)).T
    assert nmse(y.sum(axis=0), expected) <= 1e-12


def swizzled(x):
    """`[rows, in]` as a kernel stores it."""
    layout = SwizzledLayout(x.dtype)
    readers = Readers((layout,), xla=False)
    stored = cuda_host.run(cuda_rows.launch_of(lambda x: x, (x,), readers))
    rows = layout.wrap(list(map(jnp.asarray, stored)), None)
    np.testing.assert_array_equal(rows.array(), np.float32(x))
    return rows


def product_of_rounded(x, w):
    """In float64, with weights that have the dtype of the activations, as have the scales and
    minima that make them: `[rows, out]`."""

    @quick_jit
    def parts(w):
        fraction = w.layout.offset % 1
        scale, below = scales(w), minima(w)
        if below is None:
            below = (-fraction if (shift := shifts(w)) is None else shift - fraction) * scale
        return unscaled(w) + fraction, scale.astype(x.dtype), below.astype(x.dtype)

    codes, scale, below = map(np.float64, parts(w))
    weights = codes.reshape(*scale.shape, -1) * scale[..., None] + below[..., None]
    return np.float64(x) @ np.float64(weights.astype(x.dtype)).reshape(codes.shape).T


@on_cpu
@pytest.mark.parametrize("names", TYPES_WITH_KERNELS, ids=" ".join)
def test_gemm_bf16_equals_float64(rng, names):
    """Rows that fill no tile; matrices that fill no block."""
    capability = 8.0 if names in TYPES_WITH_KERNELS[::2] else 9.0
    x = jnp.asarray(rng.normal(size=(11, 1024)), "bfloat16")
    weights, _ = matrices(names, 1024)
    assert all(cuda_gemm_bf16.supports(w, x.dtype) for w in weights)
    launch = cuda_gemm_bf16.launch_of(swizzled(x), weights, jnp.float32, capability, split_k=1)
    for y, w, name in zip(cuda_host.run(launch), weights, names, strict=True):
        assert nmse(y[0], product_of_rounded(x, w)) <= 1e-12, name


@on_cpu
@pytest.mark.parametrize(
    ("names", "columns"), [(["MXFP4", "Q4_0"], 2880), (["NVFP4", "Q4_1"], 832)]
)
def test_gemm_bf16_of_rounds_that_are_not_whole(rng, names, columns):
    """Scales of rows of 90 bytes, of which every second one begins within a word, and of 180."""
    x = jnp.asarray(rng.normal(size=(11, columns)), "bfloat16")
    weights = [matrix(rng, name, 19, columns) for name in names]
    assert all(cuda_gemm_bf16.supports(w, x.dtype) for w in weights)
    for stages, split_k in ((2, 2), (4, 1)):
        options = {"tiling": cuda_gemm_bf16.Tiling(4, 16, stages), "split_k": split_k}
        launch = cuda_gemm_bf16.launch_of(swizzled(x), weights, jnp.float32, 9.0, **options)
        for y, w in zip(cuda_host.run(launch), weights, strict=True):
            assert nmse(y.sum(axis=0), product_of_rounded(x, w)) <= 1e-12


@on_cpu
@pytest.mark.parametrize("capability", [8.6, 9.0])
def test_gemm_bf16_of_tiles_parts_and_norms(rng, capability):
    """Several tiles of rows and blocks of a matrix, float16, split-K, deferred normalization."""
    x = jnp.asarray(rng.normal(size=(45, 1280)), "float16")
    squares = jnp.square(x.astype(jnp.float32)).reshape(45, 5, -1).sum(axis=-1)
    rows = dataclasses.replace(swizzled(x), rms=RMSStatistics(squares, 1e-5, 1280))
    sizes = {"Q6_K": 5, "Q4_K": 75, "Q8_0": 3}
    weights = [matrix(rng, name, out, 1280) for name, out in sizes.items()]
    tiling = cuda_gemm_bf16.Tiling(warps=4, rows=24, stages=3)
    options = {"tiling": tiling, "split_k": 3}
    launch = cuda_gemm_bf16.launch_of(rows, weights, jnp.float32, capability, **options)
    assert launch.grid == (4, 3, 2)
    norm = np.sqrt(np.float64(squares).sum(axis=-1, keepdims=True) / 1280 + 1e-5)
    for y, w in zip(cuda_host.run(launch), weights, strict=True):
        assert nmse(y.sum(axis=0), product_of_rounded(x, w) / norm) <= 1e-12


@on_cpu
@pytest.mark.parametrize("out", [24, 21], ids=["fours", "odd"])
def test_gemm_bf16_of_high_tiles(rng, out):
    """A block whose results are stored a part after the other; no whole fours of a row."""
    x = jnp.asarray(rng.normal(size=(200, 256)), "bfloat16")
    w = matrix(rng, "Q8_0", out, 256)
    tiling = cuda_gemm_bf16.Tiling(warps=8, rows=200, stages=2)
    assert tiling.shared_bytes([w]) < 200 * 4 * (8 * 16 + 4)
    options = {"tiling": tiling, "split_k": 1}
    for dtype, bound in ((jnp.float32, 1e-12), (jnp.bfloat16, 1e-5)):
        launch = cuda_gemm_bf16.launch_of(swizzled(x), [w], jnp.dtype(dtype), 9.0, **options)
        [y] = cuda_host.run(launch)
        assert nmse(np.float32(y[0]), product_of_rounded(x, w)) <= bound


@on_cpu
def test_gemm_bf16_of_groups(rng):
    """Groups of 16 rows in two tiles: some end within a tile, some have one only, one does not
    exist."""
    x = jnp.asarray(rng.normal(size=(9, 768)), "bfloat16")
    squares = jnp.square(x.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    rows = dataclasses.replace(swizzled(x), rms=RMSStatistics(squares, 1e-5, 768))
    each = {name: [matrix(rng, name, 37, 768) for _ in range(3)] for name in ("Q4_K", "Q3_K")}
    stacks = [jax.tree.map(lambda *planes: jnp.stack(planes), *ws) for ws in each.values()]
    of_group = [(2, 0, 16), (0, 16, 27), (2, 27, 30)]  # matrix, start, stop
    index, start, stop = np.array([*of_group, (1, 0, 9)], np.int32).T
    x_row = np.int32(rng.integers(0, 9, (4, 16)))
    groups = GroupedGemmInfo(*map(jnp.asarray, (index, start, stop, x_row, np.int32(3))))
    tiling = cuda_gemm_bf16.Tiling(warps=4, rows=8, stages=2)
    more = {"groups": groups, "out_rows": 30, "tiling": tiling}
    norm = np.sqrt(np.float64(squares) / 768 + 1e-5)
    ys = cuda_host.run(cuda_gemm_bf16.launch_of(rows, stacks, jnp.float32, 9.0, **more))
    for y, ws in zip(ys, each.values(), strict=True):
        expected = [
            (product_of_rounded(x, ws[m]) / norm)[x_row[i, : stop - start]]
            for i, (m, start, stop) in enumerate(of_group)
        ]
        assert nmse(y[0], np.concatenate(expected)) <= 1e-12


def in_float32(w, values):
    """The values; of a type with minima, with products that are not rounded before the minima are
    added: XLA may do either."""
    if w.minimum is None:
        return values
    scale, below = np.float64(scales(w))[..., None], np.float64(minima(w))[..., None]
    codes = np.float64(unscaled(w)).reshape(*scale.shape[:-1], -1)
    return jnp.asarray(codes * scale + below, "float32").reshape(values.shape)


@on_cpu
def test_every_type_is_dequantized(some):
    """In float32, rounded once to 16 bits: the same bits. Last blocks are not full."""
    names, weights, values = some
    assert all(map(cuda_dequantize.supports, weights))
    dtype = "float16" if TYPES_WITH_KERNELS.index(names) % 2 else "bfloat16"
    launch = cuda_dequantize.launch_of(weights, jnp.dtype(dtype), after=jnp.full(3, jnp.nan))
    [y] = cuda_host.run(launch)
    expected = [in_float32(w, v).astype(dtype) for w, v in zip(weights, values, strict=True)]
    np.testing.assert_array_equal(y, np.concatenate(expected))


@on_cpu
@pytest.mark.parametrize("rows", [32, 3])
def test_matrices_are_dequantized_to_float32(rng, rows):
    """The same bits: with minima, in two planes, in units that are parts of chunks."""
    weights = [matrix(rng, name, rows, 1024) for name in ("Q5_K", "IQ3_K", "Q6_K", "TQ2_0")]
    [y] = cuda_host.run(cuda_dequantize.launch_of(weights, jnp.dtype("float32")))
    expected = [in_float32(w, dequantized(w)) for w in weights]
    np.testing.assert_array_equal(y, np.concatenate(expected))


@on_cpu
def test_bounds_scale_rows_to_the_largest_number(rng):
    """Of float8; rows whose bound is hardly above 0 become zeros."""
    weights = [matrix(rng, name, rows, 768) for name, rows in (("Q4_K", 5), ("Q8_0", 3))]
    bounds = [row_bounds(w) for w in weights]
    bounds[0] = bounds[0].at[2].set(0).at[4].set(1e-38)
    launch = cuda_dequantize.launch_of(weights, float8.DTYPE, bounds=bounds)
    [y] = map(np.float32, cuda_host.run(launch))
    expected = [float8.round_matrix(w, b) for w, b in zip(weights, bounds, strict=True)]
    expected = np.float32(jnp.concatenate(expected))
    np.testing.assert_allclose(y, expected, rtol=1 / 8)  # one step of 3 bits
    assert np.mean(y == expected) > 0.999
    assert not y[[2, 4]].any()
    assert np.abs(y).max() > 100


@on_cpu
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("columns", [520, 2048])
def test_gemv_16bit_equals_float64(rng, rows, columns):
    """Both types of 16 bits; rounds that are whole and not; rows that fill no tile, nor a block."""
    dtypes = ("bfloat16", "float16") if rows > 1 else ("float16", "bfloat16")
    x = jnp.asarray(rng.normal(size=(rows, columns)), dtypes[0])
    weights = [
        jnp.asarray(rng.normal(size=(out, columns)), dtype)
        for out, dtype in zip((9, 33), dtypes, strict=True)
    ]
    assert all(cuda_gemv_16bit.supports(w, x.dtype) for w in weights)
    launch = cuda_gemv_16bit.launch_of(x, weights, jnp.float32)
    for y, w in zip(cuda_host.run(launch), weights, strict=True):
        assert nmse(y, np.float64(x) @ np.float64(w).T) <= 1e-12


def test_gemv_16bit_supports_whole_runs_of_16_bits():
    w = jnp.zeros((8, 64), jnp.bfloat16)
    assert not cuda_gemv_16bit.supports(w[:, :36], jnp.bfloat16)
    assert not cuda_gemv_16bit.supports(w, jnp.float32)
    assert not cuda_gemv_16bit.supports(w.astype(jnp.float32), jnp.bfloat16)


@on_cpu
@pytest.mark.parametrize(
    ("rows", "capability", "of_rows", "of_matrix", "expected"),
    [
        (4, 7.5, "float16", "bfloat16", {"gemv_16bit"}),
        (8, 6.1, "bfloat16", "bfloat16", {"gemv_16bit"}),
        (1, 7.5, "float16", "bfloat16", set()),
        (9, 7.5, "float16", "bfloat16", set()),
        (4, 7.5, "float16", "float16", set()),
        (4, 8.0, "bfloat16", "bfloat16", set()),
    ],
)
def test_a_few_rows_are_multiplied_with_plain_matrices_by_a_kernel(
    rng, monkeypatch, rows, capability, of_rows, of_matrix, expected
):
    """Where XLA would convert the matrices first."""
    launched = emulate_gpu(monkeypatch, capability)
    x = jnp.asarray(rng.normal(size=(rows, 64)), of_rows)
    weights = [jnp.asarray(rng.normal(size=(out, 64)), of_matrix) for out in (24, 5)]
    with forward_context(policy=MatmulPolicy(cuda=capability)):
        ys = matmul_api.matmuls(x, weights)
    assert launched == expected
    for y, w in zip(ys, weights, strict=True):
        assert y.shape == (rows, len(w))
        assert nmse(y, np.float64(x) @ np.float64(w).T) <= (1e-12 if expected else 1e-5)


def test_gemm_bf16_fits_the_shared_memory_of_each_gpu(rng):
    """With several stages, and without a second tile where one fits."""
    weights = [matrix(rng, name, 4, 1024) for name in ("Q4_K", "Q8_0", "Q6_K", "TQ2_0")]
    for w, (capability, limit), rows in itertools.product(
        weights, ((8.0, 163), (8.6, 99), (9.0, 227), (12.0, 99)), (2, 16, 100, 256)
    ):
        tiling = cuda_gemm_bf16.Tiling.of([w], rows, capability)
        assert tiling.stages >= 2
        assert tiling.shared_bytes([w]) <= 1024 * limit - 2048
        assert tiling.rows % 8 == 0
        assert tiling.rows >= rows or rows > 64


def test_split_k_and_tilings_keep_a_gpu_busy():
    """Small matrices are split; large ones are not, and share activations between tiles."""

    def chosen(out, columns, rows):
        found = []
        raw = jax.ShapeDtypeStruct((out, columns // 32, 18), "uint8")

        def launch(raw, *arrays):
            x = Int8BlockLayout().wrap(arrays, None)
            found.append(cuda_gemm_int8.launch_of(x, [unpack("Q4_0", raw)], jnp.float32))

        jax.eval_shape(launch, raw, *Int8BlockLayout().shapes(rows, columns))
        blocks, parts, _ = found[0].grid
        return blocks, parts

    assert chosen(28672, 4096, 8) == (28672 // 32, 1)
    assert chosen(4096, 4096, 8) == (4096 // 32, 2)
    assert chosen(28672, 4096, 64) == (28672 // 128, 1)
    assert chosen(4096, 4096, 64) == (4096 // 32, 2)
    assert chosen(64, 4096, 8) == (4, 8)


@pytest.mark.parametrize(
    ("capability", "out", "rows", "grid", "stages"),
    [
        *((9.0, 4096, 64, (32, 4, 1), 4), (9.0, 28672, 64, (224, 1, 1), 2)),
        *((8.0, 4096, 64, (32, 8, 1), 2), (9.0, 28672, 512, (224, 1, 4), 2)),
        *((9.0, 4096, 512, (32, 2, 4), 2), (9.0, 8192, 512, (64, 1, 2), 2)),
    ],
)
def test_blocks_of_gemm_bf16_keep_a_gpu_busy(capability, out, rows, grid, stages):
    """On Hopper, few are deep, and many rows make as many blocks as divide into multiprocessors."""
    found = []

    def launch(raw, *arrays):
        x = SwizzledLayout(jnp.dtype("bfloat16")).wrap(arrays, None)
        w = unpack("Q4_K", raw)
        found.append(cuda_gemm_bf16.launch_of(x, [w], jnp.float32, capability))

    raw = jax.ShapeDtypeStruct((out, 16, 144), "uint8")
    jax.eval_shape(launch, raw, *SwizzledLayout(jnp.dtype("bfloat16")).shapes(rows, 4096))
    assert found[0].grid == grid
    assert f", {stages}>(" in found[0].source


@pytest.mark.parametrize(
    ("names", "capability", "expected"),
    [
        (["Q8_0", "IQ3_K", "IQ2_KS", "MXFP4"], 9.0, cuda_gemv_int8),
        (["Q4_K", "Q6_K", "IQ4_K", "IQ3_KT"], 9.0, triton_gemv_int8),
        (["Q8_0", "IQ3_K"], 8.0, triton_gemv_int8),
        (["IQ2_XXS", "Q2_K"], 8.0, cuda_gemv_int8),
    ],
)
def test_one_row_is_multiplied_by_the_faster_kernel(rng, names, capability, expected):
    """But on a mesh by the one that sends its results to peers."""
    policy = MatmulPolicy(kernels=True, cuda=capability)
    peers = PeerGroup(jnp.zeros(5, jnp.uint32), ("tensor",))
    for name in names:
        w = to_u32(matrix(rng, name, 8, 1024))
        with forward_context(policy=policy):
            assert matmul_api._gemv_backend(w) is expected, name
        with forward_context(policy=policy, peers=peers):
            sends = triton_gemv_int8.supports(w)
            assert matmul_api._gemv_backend(w) is (triton_gemv_int8 if sends else cuda_gemv_int8)


def exact_rows(function, operands, addend, norm):
    """In float64: rows before rounding, and the first operand with the addend."""
    first, *others = [np.float64(x) for x in operands]
    total = first if addend is None else first + np.float64(addend).sum(axis=0)
    rows = np.float64(function(jnp.float32(total), *map(jnp.float32, others)))
    if norm is not None:
        rows = rows / np.sqrt((total**2).sum(axis=-1, keepdims=True) / norm[1] + norm[0])
    return rows, total


@on_cpu
@pytest.mark.parametrize("columns", [96, 1344])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_added_normalized_and_rounded(rng, columns, dtype):
    x = jnp.asarray(rng.normal(size=(2, 1, columns)), dtype)
    scale = jnp.asarray(rng.uniform(0.5, 2, columns), jnp.float32)
    parts, norm = jnp.asarray(rng.normal(size=(3, 2, 1, columns)), jnp.float32), (1e-5, columns)
    bias = jnp.asarray(rng.normal(size=columns if dtype == "float16" else x.shape), jnp.float32)
    given = (jnp.multiply, (x, scale), READERS)
    options = {"addend": (parts, None, None), "bias": bias, "norm": norm}
    *stored, squares, total = cuda_host.run(cuda_rows.launch_of(*given, **options))
    addends = jnp.concatenate([parts, jnp.broadcast_to(bias, parts[:1].shape)])[:, :, 0]
    expected, sums = exact_rows(jnp.multiply, (x[:, 0], scale), addends, norm)
    assert (
        nmse(np.float64(total), sums)
        <= {"float32": 1e-12, "float16": 1e-6, "bfloat16": 2e-5}[dtype]
    )
    rms = RMSStatistics(jnp.asarray(squares), *norm)
    found = int8.Int8Rows(*map(jnp.asarray, stored), rms)
    assert 1e-7 < nmse(values_of(found), expected) <= 1e-4
    # Against what XLA makes of the same rows.
    y = jnp.asarray(np.float32(total)) * scale
    same = quantize_rows(y)
    for a, b in zip(stored[1:], (same.scale, same.sums, same.half_sums), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@on_cpu
def test_many_rows_are_stored_block_by_block(rng):
    """The same codes and scales as row by row."""
    x = jnp.asarray(rng.normal(size=(5, 352)), "bfloat16")
    by_row, by_block = (
        cuda_host.run(cuda_rows.launch_of(jnp.abs, (x,), readers))
        for readers in (READERS, OF_MANY_ROWS)
    )
    expected = in_blocks(int8.Int8Rows(*map(jnp.asarray, by_row)))
    found = int8.Int8Blocks(*map(jnp.asarray, by_block))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(values_of(found), values_of(expected))
    assert 1e-7 < nmse(values_of(found), np.float64(jnp.abs(x))) <= 1e-4


@on_cpu
@pytest.mark.parametrize(
    "name",
    [*ACTIVATIONS, "clamped_swiglu", BoundedSwiGLU(2.0), BoundedSwiGLU(2.0, True), SiTUGLU(2.0, 3)],
)
def test_activation_functions_are_printed_as_cuda(rng, name):
    """Also where they are far from 0, and with the weight of an expert."""
    up, gate = jnp.asarray(4 * rng.normal(size=(2, 2, 320)), jnp.float32)
    weight = jnp.asarray(rng.uniform(size=(2, 1)), jnp.float32)

    def function(up, gate, weight):
        return activate(name, up, gate) * weight

    assert expression(function, ["a", "b", "c"]) is not None
    stored = cuda_host.run(cuda_rows.launch_of(function, (up, gate, weight), READERS))
    found = int8.Int8Rows(*map(jnp.asarray, stored)).dequantized()
    exact = quantize_rows(function(up, gate, weight)).dequantized()
    assert nmse(found, exact) <= 3e-5  # a value halfway between two codes may get either


@on_cpu
def test_what_is_not_a_number_stays_so(rng):
    x = np.float32(rng.normal(size=(1, 96)))
    x[0, 40] = np.nan
    stored = cuda_host.run(cuda_rows.launch_of(lambda x: x, (jnp.asarray(x),), READERS))
    found = np.asarray(int8.Int8Rows(*map(jnp.asarray, stored)).dequantized())
    assert np.isnan(found[0, 32:64]).all() and np.isfinite(found[0, :32]).all()


def test_an_activation_of_plain_mlps_is_printed_as_cuda():
    xielu = XIELU(0.7, 1.1, 0.5, -1e-6)
    assert expression(lambda up: activate(xielu, up), ["up"]) is not None


def test_functions_beyond_the_table_are_left_to_xla():
    assert expression(lambda x: jnp.sin(x), ["x"]) is None


@on_cpu
def test_several_matrices_deferred_norms_and_experts(rng):
    x = rounded_rows(rng, 2, 512, normalized=True)
    matrices = [matrix(rng, name, 5 + i, 512) for i, name in enumerate(("Q6_K", "Q4_K", "Q8_0"))]
    rows = np.float64(values_of(x))
    for y, w in zip(cuda_host.run(launch_of(x, matrices, jnp.float32)), matrices, strict=True):
        assert nmse(y, rows @ np.float64(dequantized(w)).T) <= 1e-10
    stack = matrix(rng, "Q5_K", 12, 512)
    stack = jax.tree.map(lambda plane: plane.reshape(4, 3, -1), stack)
    experts = jnp.asarray(rng.integers(0, 4, 6), jnp.int32)
    [y] = cuda_host.run(launch_of(x, [stack], jnp.bfloat16, experts=experts))
    each = np.float64(dequantized(stack))[np.asarray(experts)]
    expected = np.einsum("pi,poi->po", np.repeat(rows, 3, axis=0), each)
    assert nmse(np.float64(y), expected) <= 1e-5


HEADS, KV_HEADS, WIDTH = 6, 2, 32
LAYERS = {
    "plain": {"rope": RopeConfig(32)},
    "interleaved, in part": {"rope": RopeConfig(16, interleaved=True), "softcap": 3.0},
    "window": {"rope": RopeConfig(8), "window": 40},
    "norms, sinks": {
        "rope": RopeConfig(32),
        "query_norm": NormConfig(),
        "key_norm": NormConfig(scale=False),
        "sinks": True,
    },
}
BIASED = {"window": "qkv", "norms, sinks": "qv"}
"""Projections that have biases."""


@on_cpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_attends_to_earlier_tokens_and_itself(rng, name, dtype):
    """In pages in any order, and in rings; padding stores nothing."""
    window = LAYERS[name].get("window")
    page, count = (window, 1) if window else (64, 5)
    config = AttentionConfig(HEADS, KV_HEADS, WIDTH, WIDTH, **LAYERS[name])
    module = Attention(config, 64, rngs=nnx.Rngs(0))
    if module.query_norm is not None:
        module.query_norm.scale.set_value(jnp.asarray(rng.uniform(0.5, 2, WIDTH), jnp.float32))
    if config.sinks:
        module.sinks.set_value(jnp.asarray(rng.normal(size=HEADS), jnp.float32))

    def normal(*shape, dtype="bfloat16"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    positions = jnp.asarray([[0], [5], [130 if window else 300], [-1]])
    pages = jnp.asarray(rng.permutation(4 * count).reshape(4, count), jnp.int32)
    batch = Batch(positions, jnp.asarray([2, 0, 3, 1]), None if window else pages)
    floats = "bfloat16" if dtype == "int8" else dtype
    query, key, value = (normal(2, 4, 1, WIDTH * n) for n in (HEADS, KV_HEADS, KV_HEADS))
    memory = (normal(4 * count, page, KV_HEADS, WIDTH, dtype=floats) for _ in range(2))
    cache = AttentionCache.of(*memory, dtype)
    like = jax.ShapeDtypeStruct(query.shape[1:], jnp.dtype(floats))
    assert cuda_decode.supports(config, batch, cache, like, OF_MANY_ROWS)
    options = {"config": config, "params": module.params}
    biases = [
        normal(x.shape[-1], dtype="float32") if which in BIASED.get(name, "") else None
        for which, x in zip("qkv", (query, key, value), strict=True)
    ]
    given, more = (query, key, value, batch, cache), {"biases": biases, "readers": OF_MANY_ROWS}
    results = cuda_host.run(cuda_decode.launch_of(*given, **options, **more))
    leaves, structure = jax.tree.flatten(cache)
    rows = int8.Int8Blocks(*map(jnp.asarray, results[3:7])).dequantized()
    found = jax.tree.unflatten(structure, results[7:])
    exact = [
        x.astype(jnp.float32).sum(axis=0) + (0 if bias is None else bias)
        for x, bias in zip((query, key, value), biases, strict=True)
    ]
    queries, kv, expected = xla.rope_cache_update(*exact, batch, cache, **options)
    y = xla.attend(
        queries.reshape(4, 1, KV_HEADS, -1, WIDTH),
        kv,
        positions,
        config=config,
        sinks=module.params.sinks,
    ).reshape(4, -1)
    for row in range(3):
        # Rounding normal values to 8 bits alone costs 1e-5.
        assert nmse(rows[row], y[row].astype(jnp.float32)) <= 1e-4, row
    for new, actual in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert actual.dtype == new.dtype
        assert nmse(np.float64(actual), np.float64(new)) <= 1e-5
    changed = np.asarray(cache.keys != found.keys).any(axis=(1, 3)).sum()
    assert changed <= 3  # a place for each token that is no padding


@on_cpu
@pytest.mark.parametrize(
    ("capability", "activations", "kernels"),
    [
        (7.5, "int8", {"gemv_int8", "gemm_int8"}),
        # `dequantize`: of rows that are no whole rounds.
        (9.0, "float", {"gemm_bf16", "dequantize", "flash_attention"}),
    ],
)
def test_a_model_of_several_sequences_is_the_one_without_kernels(
    tmp_path, rng, monkeypatch, capability, activations, kernels
):
    """Prompts in one go and token by token, and sequences that are decoded together."""
    sizes = {"embed": 128, "heads": 4, "kv_heads": 2, "mlp": 96, "layers": 1}
    path = write_tiny_model(
        tmp_path / "tiny.gguf", kind="Q8_0", seed=int(rng.integers(99)), **sizes
    )
    options = {"devices": 1, "ctx_size": 64, "slots": 5, "cache_tokens": 5 * 64}
    prompts = rng.integers(97, 122, (5, 4)).tolist()

    def run(**more):
        """Logits of both ways to read a prompt, and the tokens that follow each."""
        lm = jaxsplit.load(path, **options | more)
        ways = [lm.logits(prompts[0], one_by_one=single) for single in (False, True)]
        lm.closed_batch.start_all(dict(enumerate(prompts)), GREEDY)
        return ways, lm.closed_batch.loop(3, 3)[:5].tolist()

    exact, expected = run(dtype="float32")
    launched = emulate_gpu(monkeypatch, capability)
    ways, tokens = run(dtype="bfloat16", activations=activations)
    assert launched == {"store_rows", "decode_attention", "rope_cache_update", *kernels}
    for logits, values in zip(ways, exact, strict=True):
        assert 1e-7 < nmse(logits, values) <= 1e-3
    assert nmse(*ways) <= 1e-3
    assert sum(map(list.__eq__, tokens, expected)) >= 4, (tokens, expected)


@on_cpu
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("rows", [1, 5])
def test_types_without_a_triton_kernel_beside_those_with_one(rng, monkeypatch, rows):
    launched = emulate_gpu(monkeypatch, 8.0)
    weights = [matrix(rng, kind, 24, 512) for kind in ("Q4_K", "IQ3_S")]
    x = jnp.asarray(rng.normal(size=(rows, 512)), "bfloat16")
    both = MatmulPolicy(kernels=True, interpret=True, cuda=8.0, int8_activations=True)
    with forward_context(policy=both):
        weights = [to_u32(w) for w in weights]
        activations = apply(lambda x: x, (x,), matmul_api.readers_of(x, weights))
        ys = matmul_api.matmuls(activations, weights)
    assert launched == {"gemv_int8" if rows == 1 else "gemm_bf16"}
    rounded, bound = (values_of(quantize_rows(x)), 1e-12) if rows == 1 else (x, 3e-5)
    for y, w in zip(ys, weights, strict=True):
        assert nmse(y, np.float64(rounded) @ np.float64(dequantized(w)).T) <= bound


@on_cpu
@pytest.mark.parametrize("in_float8", [False, True])
def test_matrices_of_many_rows_are_dequantized_by_one_kernel(rng, monkeypatch, in_float8):
    """Those of the same rows together; a type without a kernel by XLA."""
    launched = emulate_gpu(monkeypatch, 9.0)
    weights = [matrix(rng, kind, out, 512) for kind, out in (("Q4_K", 24), ("Q6_K", 40))]
    other = matrix(rng, "IQ1_M", 8, 512)
    assert not cuda_dequantize.supports(other)
    x = jnp.asarray(rng.normal(size=(520, 512)), "bfloat16")
    with forward_context(policy=MatmulPolicy(cuda=9.0, float8=in_float8)):
        [plain] = matmul_api.matmuls(x, [other])
        assert not launched
        ys = matmul_api.matmuls(x, weights)
    assert launched == {"dequantize"}
    for y, w in zip((plain, *ys), (other, *weights), strict=True):
        error = nmse(y, np.float64(x) @ np.float64(dequantized(w)).T)
        assert error <= (4e-3 if in_float8 else 2e-5)


@on_cpu
@pytest.mark.parametrize(("tokens", "held"), [(3, [0, 1, 2, 3, 4]), (700, [3, 1]), (45, [4])])
def test_pairs_are_grouped_by_expert(rng, tokens, held):
    """On a device that holds all experts, or some of them; an expert may have no tokens."""
    rows, experts, used, count = 8, 5, 2, len(held)
    ids = rng.permuted(np.tile([0, 2, 3, 4], (tokens, 1)), axis=1)[:, :used].astype(np.int32)
    index = np.full(experts, count, np.int32)
    index[held] = np.arange(count)
    most = min(2 * tokens, 2 * tokens // rows + count)
    given = jnp.asarray(ids), jnp.asarray(index), count, rows, most
    found = cuda_host.run(cuda_groups.launch_of(*given))
    matrix, start, stop, of_tokens, of_pairs, groups, place, expert = map(np.asarray, found)
    local = index[ids.reshape(-1)]
    order = np.argsort(local, kind="stable")
    order = order[local[order] < count]
    assert np.array_equal(place[order], np.arange(len(order)))
    assert (np.delete(place, order) == 2 * tokens).all()
    assert np.array_equal(expert[: len(order)], local[order])
    covered = []
    for group in range(groups.item()):
        own = np.arange(start[group], min(start[group] + rows, stop[group]))
        assert (local[order[own]] == matrix[group]).all()
        assert np.array_equal(of_tokens[group, : len(own)], order[own] // used)
        assert np.array_equal(of_pairs[group, : len(own)], own)
        # Padding repeats what the group's expert has.
        same = np.flatnonzero(local[order] == matrix[group])
        assert np.isin(of_pairs[group], same).all()
        assert np.isin(of_tokens[group], order[same] // used).all()
        covered += [*own]
    assert covered == [*range(len(order))]


@on_cpu
@pytest.mark.parametrize("rows", [1, 40])
def test_a_matrix_of_each_head_is_multiplied_without_them(rng, monkeypatch, rows):
    """Since they take no batches."""
    launched = emulate_gpu(monkeypatch, 9.0)
    each = [matrix(rng, "Q8_0", 24, 256) for _ in range(3)]
    stack = jax.tree.map(lambda *planes: jnp.stack(planes), *each)
    x = jnp.asarray(rng.normal(size=(3, rows, 256)), "bfloat16")
    with forward_context(policy=MatmulPolicy(cuda=9.0, int8_activations=True)):
        y = matmul_api.batched(matmul_api.matmul)(x, stack)
    assert not launched
    expected = [np.float64(a) @ dequantized(w).T for a, w in zip(x, each, strict=True)]
    assert nmse(np.float64(y), np.stack(expected)) <= (1e-4 if rows == 1 else 1e-5)


@on_cpu
@pytest.mark.parametrize("biased", [False, True])
def test_experts_of_many_tokens_multiply_their_own(rng, monkeypatch, biased):
    """In groups; some experts have no tokens, some have more than a group's."""
    launched = emulate_gpu(monkeypatch, 9.0)
    tokens, used = 45, 2
    each = {
        name: [matrix(rng, kind, *shape) for _ in range(6)]
        for name, kind, shape in (
            ("up", "Q4_K", (256, 512)),
            ("gate", "Q6_K", (256, 512)),
            ("down", "Q8_0", (24, 256)),
        )
    }
    biases = {
        name: rng.normal(size=(6, 256)).astype(np.float32) * biased for name in ("up", "gate")
    }
    stacks = {
        name: ExpertMatrices(
            jax.tree.map(lambda *planes: jnp.stack(planes), *ws),
            jnp.asarray(biases[name]) if biased and name in biases else None,
        )
        for name, ws in each.items()
    }
    params = ExpertParams(
        **stacks, activation="silu", axis=Axis("experts", 6), mlp=Axis("mlp"), weight_on_input=False
    )
    x = jnp.asarray(rng.normal(size=(1, tokens, 512)), "bfloat16")
    ids = rng.permuted(np.tile(np.arange(4), (tokens, 1)), axis=1)[:, :used]
    ids[:, 0] = np.where(rng.uniform(size=tokens) < 0.7, 5, ids[:, 0])
    weights = np.float32(rng.uniform(size=(tokens, used)))
    with forward_context(policy=MatmulPolicy(cuda=9.0)):
        args = Activations(x), jnp.asarray(ids[None]), jnp.asarray(weights[None]), params
        y = np.float64(moe.experts(*args)).sum(axis=0)[0]
    assert launched == {"group_pairs", "store_rows", "gemm_bf16"}
    exact = {name: [np.float64(dequantized(w)) for w in ws] for name, ws in each.items()}
    expected = np.zeros((tokens, 24))
    for token, slot in np.ndindex(tokens, used):
        row, expert = np.float64(x[0, token]), ids[token, slot]
        up, gate = (exact[name][expert] @ row + biases[name][expert] for name in ("up", "gate"))
        hidden = up * gate / (1 + np.exp(-gate))
        expected[token] += weights[token, slot] * (exact["down"][expert] @ hidden)
    assert 1e-7 < nmse(y, expected) <= 1e-4


ROUTINGS = {
    "softmax": MoEConfig(100, 6, MLPConfig(8), normalize=True),
    "sigmoid": MoEConfig(33, 8, MLPConfig(8), routing="sigmoid", normalize=True, scale=2.5),
    "sqrt_softplus": MoEConfig(256, 5, MLPConfig(8), routing="sqrt_softplus"),
    "softmax_after_topk": MoEConfig(8, 2, MLPConfig(8), routing="softmax_after_topk"),
}


@on_cpu
@pytest.mark.parametrize("name", ROUTINGS)
def test_a_kernel_chooses_the_experts_that_xla_does(rng, name):
    """With ties; with and without biases, scales, and a deferred normalization; NaN stays."""
    config = ROUTINGS[name]
    logits = np.float32(rng.normal(size=(5, config.experts)))
    bias, scale, more = np.float32(rng.uniform(0, 1, (3, config.experts)))
    logits[2, 1::2] = logits[2, : len(logits[2, 1::2]) * 2 : 2]
    rms = RMSStatistics(jnp.asarray(rng.uniform(size=(5, 3)), jnp.float32), 1e-6, 2)
    for vectors, by, added in (((None, None), None, None), ((bias, scale), rms, more)):
        divided = logits if by is None else logits * np.asarray(by.inverse)[:, None] + added
        expected = router.topk_experts(jnp.asarray(divided), config, *vectors)
        options = {"rms": by, "logit_bias": added}
        ids, weights = cuda_host.run(cuda_router.launch_of(logits, config, *vectors, **options))
        np.testing.assert_array_equal(ids, expected[0])
        np.testing.assert_allclose(weights, expected[1], rtol=3e-6)
    logits[3, 1] = np.nan
    _, weights = cuda_host.run(cuda_router.launch_of(logits, config, None, None, rms=None))
    assert np.isnan(weights).any(axis=-1).tolist() == [False, False, False, True, False]
