"""Products of rounded activations: the kernel, run without a GPU, and the numbers it stands for."""

import functools

import jax
import numpy as np
import pytest
from blocks import usual_blocks
from helpers import Q8_0, SHAPES, nmse
from tiny import fresh_rng

from jaxsplit.quant import (
    TYPES,
    Arithmetic,
    dequantize,
    kernels,
    matmul,
    unpack,
    use_arithmetic,
    with_words,
)

SUPPORTED = {
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("TQ1_0", "TQ2_0"),
}


def matrix(rng, name, rows, columns):
    return with_words(unpack(name, usual_blocks(rng, name, rows, columns // TYPES[name].block)))


@pytest.fixture
def rng():
    return fresh_rng()


def test_which_types_have_a_kernel():
    found = set()
    for name, kind in TYPES.items():
        raw = jax.ShapeDtypeStruct((4, 2, kind.block_bytes), np.uint8)
        if kind.form and kernels.supports(jax.eval_shape(functools.partial(unpack, name), raw)):
            found.add(name)
    assert found == SUPPORTED


def test_rounding_is_that_of_ggml(rng):
    """The largest magnitude of 32 becomes 127, the others the nearest integers."""
    x = rng.normal(size=(3, 128)).astype(np.float32) * rng.uniform(0, 10, (3, 1))
    x[1, 32:64] = 0
    rounded = kernels.round_rows(x)
    blocks = np.float64(x).reshape(3, -1, 32)
    scale = np.abs(blocks).max(axis=-1) / 127
    assert np.allclose(rounded.scale, scale, rtol=1e-6)
    error = np.abs(np.asarray(rounded.dequantized()).reshape(blocks.shape) - blocks)
    assert (error <= 0.5001 * scale[..., None]).all()
    for run in (16, 32):
        sums = np.float64(rounded.dequantized()).reshape(3, -1, run).sum(axis=-1)
        assert np.allclose(rounded.sums(run), sums, atol=1e-4 * np.abs(x).max())


# Rows that end inside a tile, one or more tiles of them.
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        *(("Q8_0", 1, 1536), ("Q4_0", 1, 2816), ("Q5_1", 1, 1536), ("Q3_K", 1, 1536)),
        *(("Q4_K", 1, 2816), ("Q4_K", 3, 512), ("Q5_K", 1, 2816), ("Q6_K", 1, 2816)),
        *(("Q6_K", 3, 512), ("TQ2_0", 1, 1536)),
    ],
)
def test_the_kernel_multiplies_rounded_activations(rng, name, rows, columns):
    w = matrix(rng, name, 7, columns)
    x = kernels.round_rows(rng.normal(size=(rows, columns)).astype(np.float32))
    expected = np.float64(x.dequantized()) @ np.float64(dequantize(w)).T
    assert nmse(kernels.product(x, w, interpret=True), expected) <= 1e-10


@pytest.mark.parametrize("rows", [1, 8])
def test_without_kernels_the_same_numbers_are_computed(rng, rows):
    w = matrix(rng, "Q4_K", 33, 512)
    x = rng.normal(size=(rows, 512)).astype(np.float32)
    with use_arithmetic(Arithmetic(rounded=True)):
        y = jax.jit(lambda x, w: matmul(x, w))(x, w)
    expected = kernels.product(kernels.round_rows(x), w, interpret=True)
    assert nmse(y, expected) <= 1e-10
    exact = np.float64(x) @ np.float64(dequantize(w)).T
    assert 1e-7 < nmse(y, exact) < 1e-4


def test_many_rows_are_not_rounded(rng):
    w = matrix(rng, "Q4_K", 33, 512)
    x = rng.normal(size=(kernels.MAX_ROWS + 1, 512)).astype(np.float32)
    with use_arithmetic(Arithmetic(rounded=True)):
        y = jax.jit(lambda x, w: matmul(x, w))(x, w)
    assert nmse(y, np.float64(x) @ np.float64(dequantize(w)).T) <= 1e-10


def test_rounded_activations_change_a_model_little(load, recipe_gguf):
    path, tokens = recipe_gguf(SHAPES["9-3"], Q8_0), fresh_rng().integers(0, 160, 12).tolist()
    exact = load(path, devices=2)
    rounded = load(path, devices=2, activations="int8")
    assert np.array_equal(rounded.logits(tokens), exact.logits(tokens)), "prompts are not rounded"
    error = nmse(rounded.logits(tokens, one_by_one=True), exact.logits(tokens, one_by_one=True))
    assert 1e-7 < error < 1e-2
