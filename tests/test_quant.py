"""Quantized weights against the gguf package's NumPy code and against float64."""

import functools
import re

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import any_blocks, ggml_type, reference, usual_blocks
from helpers import nmse
from tiny import fresh_rng

from jaxsplit.engine.runner import compiler_options
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import IK_TYPES
from jaxsplit.ops.matmul.api import matmul
from jaxsplit.quant import TYPES, QTensor, dequantize, quant_type, take_rows, unpack

# Not those of ik_llama.cpp (test_ik.py) and of tables.
NAMES = [name for name in TYPES if name not in IK_TYPES and name != "I32"]
QUANTIZED = [name for name in NAMES if TYPES[name].layout is not None]
PACKED_AS_IN_THE_FILE = (
    *("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K"),
    *("IQ4_NL", "IQ4_XS", "MXFP4"),
)
# One of each kind of layout: plain, 8 bits, a minimum, two planes, two levels of scales, tables.
LAYOUTS = [
    name
    for name in ("F32", "F16", "Q8_0", "Q5_1", "Q6_K", "Q4_K", "IQ4_NL", "IQ2_S", "NVFP4")
    if name in TYPES
]
ROWS, BLOCKS = 8, 4  # of every matrix that is multiplied: each shape is compiled anew

# Where compiling takes far longer than running.
jit_quickly = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
unpack_quickly = jit_quickly(unpack, static_argnums=0, static_argnames="sub_block")


@functools.partial(jax.jit, static_argnums=0)
def uses(name, raw, x, rows):
    """All that can be done with a matrix, compiled as one: products with 1, 3 and 40 rows."""
    weights = jax.lax.optimization_barrier(unpack(name, raw))
    return {
        "weights": dequantize(weights),
        "at_load": unpack(name, raw, dtype=jnp.float32),
        "products": {n: matmul(x[:n], weights) for n in (1, 3, 40)},
        "rows": take_rows(weights, rows, jnp.float32),
    }


@functools.partial(jit_quickly, static_argnums=0)
def uses_of_cuts(name, raw, inputs, parts):
    """Weights, and the product with one row, of a matrix that is cut inside blocks.

    Args:
      name, raw: the matrix.
      inputs: the row, by sub-block size.
      parts: index of the sub-block to keep of each block, by sub-block size.

    Returns:
      weights and product, by sub-block size.
    """
    results = {}
    for sub_block, x in inputs.items():
        weights = unpack(name, raw, sub_block=sub_block, sub_block_index=parts[sub_block])
        weights = jax.lax.optimization_barrier(weights)
        results[sub_block] = dequantize(weights), matmul(x, weights)
    return results


@pytest.fixture
def rng():
    return fresh_rng()


def inputs(rng, size, rows=40):
    return rng.normal(size=(rows, size)).astype(np.float32)


def check_same_bits(actual, expected):
    """Equal to the last bit, and infinite or not a number in the same places."""
    actual = np.asarray(actual)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert np.array_equal(np.isnan(actual), np.isnan(expected))
    bits = f"u{expected.itemsize}"
    same = (actual.view(bits) == expected.view(bits)) | np.isnan(expected)
    # CPUs flush scales of MXFP4 that are subnormal in float32 to zero: the weights, up to
    # 12 * 2**-127, are lost.
    flushed = (actual == 0) & (np.abs(expected) < 2.0**-123)
    assert (same | flushed).all()


def check_product(y, x, weights):
    """Equal to the product in float64."""
    assert nmse(y, np.float64(x) @ np.float64(weights).T) <= 1e-10


# Whole blocks


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_gguf_package_to_the_bit(rng, name):
    for blocks in (usual_blocks, any_blocks, any_blocks, any_blocks):
        raw = blocks(rng, name, ROWS, BLOCKS)
        expected = reference(name, raw)
        assert blocks is any_blocks or np.isfinite(expected).all()
        rows = rng.integers(0, ROWS, (2, 3))
        used = uses(name, raw, inputs(rng, expected.shape[1]), rows)
        check_same_bits(used["weights"], expected)
        check_same_bits(used["at_load"], expected)
        check_same_bits(used["rows"], expected[rows])


@pytest.mark.parametrize("name", NAMES)
def test_products_equal_those_in_float64(rng, name):
    raw = usual_blocks(rng, name, ROWS, BLOCKS)
    expected = reference(name, raw)
    x = inputs(rng, expected.shape[1])
    for rows, y in uses(name, raw, x, np.zeros((2, 3), int))["products"].items():
        assert (y.shape, y.dtype) == ((rows, ROWS), jnp.float32)
        check_product(y, x[:rows], expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_half_precision_loses_no_more_than_its_rounding(rng, name):
    raw = usual_blocks(rng, name, ROWS, BLOCKS)
    weights = reference(name, raw)
    x = inputs(rng, weights.shape[1], rows=3).astype(jnp.bfloat16)

    @jit_quickly
    def in_half_precision(raw, x):
        whole = jax.lax.optimization_barrier(unpack(name, raw))
        halves = (jnp.bfloat16, jnp.float16)
        return (
            [unpack(name, raw, dtype=dtype) for dtype in halves],
            [dequantize(whole, dtype) for dtype in halves],
            [matmul(x[:1], whole), matmul(x, whole)],
        )

    at_load, later, products = in_half_precision(raw, x)
    for dtype, first, second in zip((jnp.bfloat16, jnp.float16), at_load, later, strict=True):
        assert not isinstance(first, QTensor)
        check_same_bits(first, weights.astype(dtype))
        check_same_bits(second, weights.astype(dtype))
    for y in products:
        assert y.dtype == jnp.float32
        rows, matrix = np.float64(x[: len(y)]), np.float64(weights).T
        # Half a unit in the last place of bfloat16 is at most 2**-8 of a number.
        assert (np.abs(y - rows @ matrix) <= 2.0**-8 * (np.abs(rows) @ np.abs(matrix))).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_matrices_is_unpacked_like_each_of_them(rng, name):
    raw = any_blocks(rng, name, 3, 2, 2)
    stack = jit_quickly(lambda raw: dequantize(unpack(name, raw)))(raw)
    check_same_bits(stack, reference(name, raw))


@pytest.mark.parametrize("name", NAMES)
def test_products_with_each_matrix_of_a_stack(rng, name):
    """As experts and heads of latent attention use them: all at once, or one that is looked up."""
    raw, count = usual_blocks(rng, name, 3, ROWS, 2), 2 * TYPES[name].block
    x = inputs(rng, count, 3)

    def products(raw, x, i):
        stack = jax.lax.optimization_barrier(unpack(name, raw))
        chosen = jax.tree.map(lambda plane: plane[i], stack)
        return jax.vmap(matmul)(x[:, None], stack)[:, 0], matmul(x, chosen)

    each, one = jit_quickly(products)(raw, x, jnp.int32(2))
    matrices = reference(name, raw)
    check_product(one, x, matrices[2])
    for row, y, matrix in zip(x, each, matrices, strict=True):
        check_product(y, row, matrix)


@pytest.mark.parametrize("name", ["F16", "Q4_1"])
def test_nothing_depends_on_jit(rng, name):
    raw = any_blocks(rng, name, 4, 2)
    weights = unpack(name, jnp.asarray(raw))
    check_same_bits(dequantize(weights), reference(name, raw))
    check_same_bits(take_rows(weights, jnp.int32(3), jnp.float32), reference(name, raw)[3])


@pytest.mark.parametrize("name", ["F16", "Q8_0"])
@pytest.mark.parametrize("shape", [(), (1, 1), (2, 3)], ids=str)
def test_products_keep_the_leading_dimensions(rng, name, shape):
    raw = usual_blocks(rng, name, 4, 2)
    x = rng.normal(size=(*shape, 2 * TYPES[name].block)).astype(np.float32)
    y = matmul(jnp.asarray(x), unpack_quickly(name, raw))
    assert (y.shape, y.dtype) == ((*shape, 4), jnp.float32)
    check_product(y, x, reference(name, raw))


# Cuts between blocks


@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_cut_by_rows_is_put_together_again(rng, name, shards):
    raw = usual_blocks(rng, name, shards * ROWS, BLOCKS)
    expected = reference(name, raw)
    x = inputs(rng, expected.shape[1])
    parts = [uses(name, part, x, np.zeros((2, 3), int)) for part in np.split(raw, shards)]
    check_same_bits(np.concatenate([part["weights"] for part in parts]), expected)
    for rows in (1, 3, 40):
        y = np.concatenate([part["products"][rows] for part in parts], axis=-1)
        check_product(y, x[:rows], expected)


@pytest.mark.parametrize("shards", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_matrix_cut_by_columns_is_put_together_again(rng, name, shards):
    raw = usual_blocks(rng, name, ROWS, shards * BLOCKS)
    expected = reference(name, raw)
    x = inputs(rng, expected.shape[1])
    parts = [
        uses(name, part, piece, np.zeros((2, 3), int))
        for part, piece in zip(
            np.split(raw, shards, axis=1), np.split(x, shards, axis=1), strict=True
        )
    ]
    check_same_bits(np.concatenate([part["weights"] for part in parts], axis=1), expected)
    for rows in (1, 3, 40):
        y = sum(np.float64(part["products"][rows]) for part in parts)
        check_product(y, x[:rows], expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_planes_of_a_part_are_parts_of_the_planes(rng, name):
    """What lets one partition spec shard all of them."""
    raw = any_blocks(rng, name, ROWS, BLOCKS)
    planes = jax.tree.leaves(unpack_quickly(name, raw))
    for i, part in enumerate(np.split(raw, 2, axis=1)):
        for whole, plane in zip(planes, jax.tree.leaves(unpack_quickly(name, part)), strict=True):
            assert np.asarray(plane).tobytes() == np.split(whole, 2, axis=1)[i].tobytes()


# Cuts inside blocks: each shard is given the same raw blocks and keeps another part of each


def sub_blocks(name):
    """Weights of a block that may be kept: 16 and more, and for blocks of 32 those of heads of 100
    dimensions, as in OpenLLaMA 3B."""
    block = TYPES[name].block
    return [g for g in range(1, block) if block % g == 0 and (g >= 16 or (g, block) == (4, 32))]


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_cut_inside_blocks_keeps_the_right_weights(rng, name):
    raw, block = any_blocks(rng, name, ROWS, BLOCKS), TYPES[name].block
    parts = {g: rng.integers(0, block // g, BLOCKS).astype(np.int32) for g in sub_blocks(name)}
    x = {g: inputs(rng, BLOCKS * g, rows=1) for g in sub_blocks(name)}
    for sub_block, (weights, _) in uses_of_cuts(name, raw, x, parts).items():
        pieces = reference(name, raw).reshape(ROWS, BLOCKS, -1, sub_block)
        expected = pieces[:, np.arange(BLOCKS), parts[sub_block]].reshape(ROWS, -1)
        check_same_bits(weights, expected)


@pytest.mark.parametrize("name", QUANTIZED)
def test_products_with_all_parts_of_the_blocks_make_up_the_product(rng, name):
    raw, block = usual_blocks(rng, name, ROWS, BLOCKS), TYPES[name].block
    expected = reference(name, raw)
    x = inputs(rng, expected.shape[1], rows=1)
    sizes = sub_blocks(name)
    total = dict.fromkeys(sizes, 0)
    for i in range(block // min(sizes)):
        part = {g: np.full(BLOCKS, i % (block // g), np.int32) for g in sizes}
        pieces = {g: x.reshape(BLOCKS, -1, g)[:, part[g][0]].reshape(1, -1) for g in sizes}
        for sub_block, (weights, y) in uses_of_cuts(name, raw, pieces, part).items():
            check_product(y, pieces[sub_block], weights)
            if i < block // sub_block:
                total[sub_block] = total[sub_block] + np.float64(y)
    for y in total.values():
        check_product(y, x, expected)


@pytest.mark.parametrize("name", [name for name in ("Q8_0", "Q5_1", "Q6_K") if name in TYPES])
def test_uses_of_a_cut_inside_blocks(rng, name):
    """Rows, products with several rows, and dequantizing at load."""
    raw = usual_blocks(rng, name, ROWS, BLOCKS)
    part = np.zeros(BLOCKS, np.int32)
    expected = reference(name, raw).reshape(ROWS, BLOCKS, -1)[..., :16].reshape(ROWS, -1)
    weights = unpack_quickly(name, raw, sub_block=16, sub_block_index=part)
    rows = rng.integers(0, ROWS, (2, 3))
    take = jit_quickly(take_rows, static_argnums=2)
    check_same_bits(take(weights, rows, jnp.float32), expected[rows])
    x = inputs(rng, BLOCKS * 16, rows=3)
    check_product(jit_quickly(matmul)(x, weights), x, expected)
    at_load = jit_quickly(
        lambda raw, part: unpack(name, raw, sub_block=16, sub_block_index=part, dtype="float32")
    )
    check_same_bits(at_load(raw, part), expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sub_block_of_the_whole_block_changes_nothing(rng, name):
    raw, part = any_blocks(rng, name, ROWS, BLOCKS), np.zeros(BLOCKS, np.int32)
    cut = unpack_quickly(name, raw, sub_block=TYPES[name].block, sub_block_index=part)
    whole = unpack_quickly(name, raw)
    assert jax.tree.structure(cut) == jax.tree.structure(whole)
    for one, other in zip(jax.tree.leaves(cut), jax.tree.leaves(whole), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# Sizes and refusals


@pytest.mark.parametrize("name", [name for name in PACKED_AS_IN_THE_FILE if name in TYPES])
def test_a_device_needs_hardly_more_bytes_than_the_file(rng, name):
    raw = any_blocks(rng, name, ROWS, BLOCKS)
    weights = unpack_quickly(name, raw)
    assert weights.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    assert weights.nbytes <= 1.05 * raw.nbytes


@pytest.mark.parametrize("name", NAMES)
def test_block_sizes_are_those_of_ggml(name):
    kind = TYPES[name]
    assert (kind.block, kind.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type(name)]


def test_an_unknown_type_is_refused_and_the_known_are_listed():
    for refused in (quant_type, functools.partial(unpack, raw=jnp.zeros((1, 1, 1), jnp.uint8))):
        with pytest.raises(JaxsplitError, match=r"type I8 are not supported.*supported") as error:
            refused("I8")
        assert all(name in str(error.value) for name in TYPES)
        assert "\n" not in str(error.value)


ALL_LAYOUTS = [*QUANTIZED, "IQ5_K", "IQ6_K", "IQ2_KT", "IQ3_KT", "IQ4_KT"]


@pytest.mark.parametrize(
    ("name", "rows", "out", "size"),
    [
        *((name, 1, 2048, 2048) for name in ALL_LAYOUTS),
        *((name, 1, 512, 14336) for name in QUANTIZED[::4]),
        *((name, 4, 2048, 2048) for name in ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "IQ3_S", "MXFP4")),
    ],
)
def test_few_rows_need_no_temporary_of_a_matrix(name, rows, out, size):
    """With the engine's compiler options, for every layout of planes, and for long rows."""
    blocks = (out, size // TYPES[name].block, TYPES[name].block_bytes)
    weights = jax.eval_shape(
        functools.partial(unpack, name), jax.ShapeDtypeStruct(blocks, np.uint8)
    )
    x = jax.ShapeDtypeStruct((rows, size), np.float32)
    product = (
        jax.jit(matmul, compiler_options=compiler_options("cpu", decode=True))
        .lower(x, weights)
        .compile()
    )
    planes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(weights))
    assert product.memory_analysis().temp_size_in_bytes < planes / 2


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "Q4_K"])
def test_a_norm_is_not_computed_again_for_each_row_of_a_matrix(name):
    blocks = (512, 256 // TYPES[name].block, TYPES[name].block_bytes)
    weights = jax.eval_shape(
        functools.partial(unpack, name), jax.ShapeDtypeStruct(blocks, np.uint8)
    )

    def normalized_product(scale, x, w):
        return matmul(x * jax.lax.rsqrt((x * x).mean() + 1e-5) * scale, w)

    row = jax.ShapeDtypeStruct((256,), np.float32)
    options = compiler_options("cpu", decode=True)
    compiled = jax.jit(normalized_product, compiler_options=options).lower(row, row, weights)
    text = compiled.compile().as_text()
    entry = text[text.index("\nENTRY") :]
    [scale] = re.findall(r"%(\S+) = f32\[256\]\S* parameter\(0\)", entry)
    loops = re.findall(r"= f32\[512\]\S* fusion\((.*?)\), kind", entry)
    assert loops
    assert not [loop for loop in loops if f"%{scale}" in re.split(r"[, ]+", loop)]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "IQ3_S"])
def test_many_rows_keep_one_dequantized_matrix_alive(name):
    size, layers = 512, 6
    blocks = (size, size // TYPES[name].block, TYPES[name].block_bytes)
    weights = jax.eval_shape(
        functools.partial(unpack, name), jax.ShapeDtypeStruct(blocks, np.uint8)
    )

    def chain(x, layers):
        for layer in layers:
            x = matmul(x, layer)
        return x

    x = jax.ShapeDtypeStruct((64, size), np.float32)
    compiled = jax.jit(chain).lower(x, [weights] * layers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1.8 * 4 * size * size
