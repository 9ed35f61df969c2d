"""The small-M GEMM kernel, interpreted, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from blocks import usual_blocks
from helpers import nmse, quick_jit
from tiny import fresh_rng

from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.ops.activations.layout import Readers
from jaxsplit.ops.activations.packed import PackedLayout, packing_of
from jaxsplit.ops.activations.triton_rows import store_rows
from jaxsplit.ops.matmul import trellis, triton_small_m_gemm
from jaxsplit.ops.matmul.groups import GroupedGemmInfo
from jaxsplit.quant import TYPES, dequantize, qtensor, to_u32, unpack
from jaxsplit.quant.scale_codes import e8m0, ue4m3

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture
def rng():
    return fresh_rng()


_unpacked = quick_jit(lambda name, raw: to_u32(unpack(name, raw)), static_argnums=0)
dequantized = quick_jit(dequantize)


def matrix(rng, name, rows, columns):
    return _unpacked(name, usual_blocks(rng, name, rows, columns // TYPES[name].block))


@quick_jit
def operands(x, w):
    """What the kernel multiplies, rounded to bfloat16: scaled codes; minima and sums of
    activations, or None."""

    def bfloat16(values):
        return values.astype(jnp.bfloat16).astype(jnp.float32)

    scale, shift = bfloat16(qtensor.scales(w)), qtensor.shifts(w)
    values = qtensor.unscaled(w).reshape(*scale.shape, -1)
    values = values if shift is None else values + shift[..., None]
    scaled = bfloat16(values * scale[..., None]).reshape(w.shape)
    minima = qtensor.minima(w)
    if minima is None:
        return scaled, None
    groups = x.astype(jnp.float32).reshape(len(x), minima.shape[-1], -1)
    return scaled, (bfloat16(groups.sum(axis=-1)), bfloat16(minima))


def product(x, w):
    """The matmul in float64, with the kernel's roundings."""
    scaled, of_minima = operands(x, w)
    y = np.float64(x) @ np.float64(scaled).T
    if of_minima is not None:
        sums, minima = map(np.float64, of_minima)
        y += sums @ minima.T
    return y


def readers(matrices):
    return Readers((PackedLayout.of(matrices),), xla=False)


def multiply(x, matrices, **options):
    """The kernel's results, with activations that `store_rows` stored."""

    @quick_jit
    def call(x, matrices):
        [rows], *_ = store_rows(lambda x: x, (x,), readers(matrices))
        return triton_small_m_gemm.small_m_gemm(rows, matrices, **options)

    return call(x, matrices)


def activations(rng, rows, columns):
    return rng.normal(size=(rows, columns)).astype(jnp.bfloat16)


# Rows that do not fill a tile, columns that do not fill a step or a part, several layouts at once.
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("names", "rows", "columns", "split_k"),
    [
        *((["Q8_0"], 3, 1536, None), (["Q4_0"], 9, 2816, 3), (["Q5_1"], 2, 1536, 1)),
        *((["Q4_K"], 17, 1280, 2), (["Q3_K"], 40, 768, 1), (["Q5_K"], 5, 1280, None)),
        *((["TQ2_0"], 16, 1536, 2), (["Q6_K", "Q4_K", "Q8_0"], 33, 512, None)),
        *((["IQ4_K"], 9, 2816, None), (["IQ4_KS", "IQ2_KL"], 33, 1536, 2), (["IQ2_K"], 3, 768, 1)),
        *((["IQ3_KS"], 5, 1536, None), (["IQ5_KS", "IQ6_K"], 17, 768, 1), (["IQ4_XS"], 3, 1536, 1)),
        *((["IQ2_BN", "Q8_KV", "Q6_0"], 9, 1536, None), (["IQ2_KT", "IQ4_KT"], 5, 1536, None)),
        *((["IQ3_KT"], 33, 768, 1), (["MXFP4", "NVFP4"], 9, 2880, None)),
    ],
)
def test_matmuls_equal_float64(rng, names, rows, columns, split_k):
    matrices = [matrix(rng, name, 70 + i, columns) for i, name in enumerate(names)]
    assert all(triton_small_m_gemm.supports(w, jnp.bfloat16) for w in matrices)
    x = activations(rng, rows, columns)
    results = multiply(x, matrices, split_k=split_k)
    for y, w in zip(results, matrices, strict=True):
        assert nmse(y, product(x, w)) <= 1e-10
        error = nmse(y, np.float64(x) @ np.float64(dequantized(w)).T)
        assert error < (1e-4 if w.minimum is None else 3e-4)
        exact = w.layout.decode_scale in (e8m0, ue4m3)  # weights of few bits
        assert exact == (error < 1e-7)


@pytest.mark.parametrize(
    "name",
    [
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0"),
        *("IQ2_K", "IQ3_K", "IQ4_K", "IQ5_KS", "IQ6_K", "IQ4_NL", "Q1_0", "MXFP4"),
    ],
)
def test_ptx_dequantizes_bit_for_bit_like_jax(rng, monkeypatch, name):
    monkeypatch.setattr(
        triton_small_m_gemm.plgpu, "elementwise_inline_asm", ptx.elementwise_inline_asm
    )
    layout = TYPES[name].layout
    codes_per_byte, per_chunk = packing_of(layout)
    scale = jnp.asarray(rng.normal(size=(8, 32)) * 2.0**60, jnp.bfloat16)
    for position in range(2 * codes_per_byte):
        code, byte = divmod(position, 2)
        planes = [jnp.asarray(rng.integers(0, 2**16, (8, 32), np.uint16)) for _ in layout.bits]
        shifts = [code * per_chunk * 16 // (layout.chunk * bits) * bits for bits in layout.bits]
        moved = jnp.asarray(rng.integers(0, 2, (8, 32)) * layout.shift, jnp.uint16)
        arguments = planes, shifts, byte, layout, scale, *([moved] if layout.shift else [])
        expected = triton_small_m_gemm._scaled_codes(*arguments)
        with forward_context(policy=MatmulPolicy(kernels=True)):
            actual = triton_small_m_gemm._scaled_codes(*arguments)
        assert np.count_nonzero(expected) > 100
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("signed", [False, True])
def test_ptx_scales_values_of_trellises_like_jax(rng, monkeypatch, signed):
    monkeypatch.setattr(trellis.plgpu, "elementwise_inline_asm", ptx.elementwise_inline_asm)
    states, signs = rng.integers(0, 2**16, (2, 8, 32), np.uint16)
    scale = jnp.asarray(rng.normal(size=(8, 32)) * 2.0**60, jnp.bfloat16)
    for place in range(8):
        arguments = jnp.asarray(states), place, scale, jnp.asarray(signs) if signed else None
        expected = trellis.scaled_trellis(*arguments, exponent=-133)
        with forward_context(policy=MatmulPolicy(kernels=True)):
            found = trellis.scaled_trellis(*arguments, exponent=-133)
        assert np.count_nonzero(expected) > 100
        np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "rows", "sub_block"),
    [("Q4_K", 6, 128), ("Q4_K", 17, 128), ("Q4_K", 17, 64), ("Q6_K", 17, 128)],
)
def test_sub_blocks_with_replicated_super_scales(rng, name, rows, sub_block):
    # A device's heads may end inside a block, whose super-scale is then replicated.
    raw = usual_blocks(rng, name, 40, 7)
    index = np.arange(7) % (256 // sub_block)
    cut = functools.partial(unpack, name, sub_block=sub_block, sub_block_index=index)
    w = quick_jit(lambda raw: to_u32(cut(raw)))(raw)
    assert w.super_scale.shape[-1] == 7
    x = activations(rng, rows, w.shape[-1])
    [y] = multiply(x, [w], split_k=1)
    assert nmse(y, product(x, w)) <= 1e-10


@pytest.mark.usefixtures("quick_compilation")
def test_store_rows_in_the_orders_of_several_matrices(rng):
    stream, *terms = rng.normal(size=(3, 2, 3, 1280)).astype(np.float32)
    scale = rng.uniform(0.5, 2, 1280).astype(np.float32)
    matrices = [matrix(rng, name, 40, 1280) for name in ("Q4_K", "Q6_K", "Q4_1")]
    stream = stream.astype(jnp.bfloat16)

    @quick_jit
    def call(stream, scale, terms, matrices):
        [rows], _, total = store_rows(
            jnp.multiply,
            (stream, scale),
            readers(matrices),
            addend=(terms, None, None),
            norm=(0.5, 1500),
        )
        return triton_small_m_gemm.small_m_gemm(rows, matrices), total

    results, total = call(stream, scale, np.asarray(terms), matrices)
    added = np.float64(stream) + np.float64(terms).sum(axis=0)
    assert nmse(total, added) <= 1e-5
    added = np.float64(total).reshape(6, -1)
    root = np.sqrt((added**2).sum(axis=-1, keepdims=True) / 1500 + 0.5)
    for y, w in zip(results, matrices, strict=True):
        # The normalization is deferred: rows are rounded before their division.
        rounded = (np.float32(total).reshape(6, -1) * scale).astype(jnp.bfloat16)
        expected = product(rounded, w) / root
        assert nmse(y, expected) <= 1e-10


@pytest.mark.usefixtures("quick_compilation")
def test_split_k_parts_without_their_sum(rng):
    matrices = [matrix(rng, name, rows, 1280) for name, rows in (("Q4_K", 40), ("Q8_0", 33))]
    x = activations(rng, 5, 1280)
    results = multiply(x, matrices, sum_parts=False)
    for y, w in zip(results, matrices, strict=True):
        assert y.shape == (3, 5, len(w.scale))
        assert y.dtype == jnp.float32
        assert nmse(np.sum(y, axis=0), product(x, w)) <= 1e-10


@pytest.mark.usefixtures("quick_compilation")
def test_grouped_gemm_equals_float64(rng):
    stacks = [
        jax.tree.map(lambda *planes: np.stack(planes), *[matrix(rng, *of, 512) for _ in range(2)])
        for of in (("Q4_K", 40), ("Q6_K", 33))
    ]
    x = activations(rng, 9, 512)
    x_row = rng.integers(0, 9, (4, 8))
    of_group = [(1, 0, 8), (0, 8, 11), (1, 11, 12)]  # matrix, start, stop
    matrix_, start, stop = np.array([*of_group, (0, 0, 0)], np.int32).T
    groups = GroupedGemmInfo(matrix_, start, stop, np.int32(x_row), np.int32(len(of_group)))
    results = multiply(x, stacks, groups=groups, out_rows=12)
    for y, stack in zip(results, stacks, strict=True):
        expected = [
            product(x[x_row[i, : stop - start]], jax.tree.map(lambda planes, m=m: planes[m], stack))
            for i, (m, start, stop) in enumerate(of_group)
        ]
        assert nmse(y, np.concatenate(expected)) <= 1e-10


def test_unsupported_dtypes_and_types(rng):
    w = matrix(rng, "Q4_K", 8, 512)
    assert not triton_small_m_gemm.supports(w, jnp.float32)
    assert not triton_small_m_gemm.supports(matrix(rng, "IQ2_XS", 8, 512), jnp.bfloat16)
