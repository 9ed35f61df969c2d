"""Products with matrices of every type, by every kernel, against float64 NumPy.

Tolerances are NMSE. What a kernel is meant to round, the reference rounds too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blocks import reference
from gpu import internals
from helpers import nmse

from jaxsplit.formats import IK_TYPES

INT8 = 1e-7
"""Activations rounded to 8 bits, as the reference rounds them; sums in float32."""
BFLOAT16 = 2e-5
"""Weights and their minima rounded to bfloat16, of 2 rows or more."""
MINIMA = 1e-4
"""Likewise where the minima's part is large, which cancels."""
FLOAT32 = 1e-10
"""Nothing rounded."""
FLOAT8 = 4e-3
"""Activations and weights rounded to 4 bits."""

ROWS = (1, 2, 8, 33, 100)
SHAPES = [(40, 512)] if internals.INTERPRET else [(200, 2816), (72, 10_240)]
"""`[out, in]`, of which types take one in turn."""
FEW = ["Q4_K", "Q8_0", "IQ4_XS"]
CUDA_TYPES = ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "IQ4_XS", "Q3_K", "MXFP4", "IQ2_KS", "IQ3_K", "IQ4_K"]
CUDA_TYPES += ["IQ5_K", "IQ6_K", "IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ2_XXS"]
TYPES = FEW if internals.INTERPRET else internals.quant_types()


def int8_rounded(x: np.ndarray) -> np.ndarray:
    """Rows as ggml rounds them: the largest magnitude of 32 elements becomes 127."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    return (np.rint(blocks / scale) * scale).reshape(x.shape)


def activations(rng: np.random.Generator, rows: int, columns: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=(rows, columns)), jnp.bfloat16)


def unrounded(rng: np.random.Generator, rows: int, columns: int) -> jax.Array:
    """In float32, of which hardly one lies halfway between two codes of 8 bits."""
    return jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)


def exact_matrix(name: str, raw: np.ndarray) -> np.ndarray:
    """By the gguf package, where it knows the type; others are tested bit for bit elsewhere."""
    if name in IK_TYPES:
        return np.float64(internals.dequantized(internals.from_blocks(name, raw)))
    return np.float64(reference(name, raw))


@pytest.mark.parametrize("name", TYPES)
def test_products_with_quantized_matrices(rng, bounded, name):
    """Two matrices at once, the second with fewer rows."""
    shape = SHAPES[TYPES.index(name) % len(SHAPES)]
    raws = [internals.raw_blocks(rng, name, shape[0] - 35 * i, shape[1]) for i in range(2)]
    weights = [internals.from_blocks(name, raw) for raw in raws]
    exact = [exact_matrix(name, raw) for raw in raws]
    xs = {(rows, False): activations(rng, rows, shape[1]) for rows in ROWS}
    if internals.rounds_activations(weights[0]):
        xs |= {(rows, True): unrounded(rng, rows, shape[1]) for rows in (1, 2)}

    @jax.jit
    def run(xs, weights):
        return {case: internals.products(x, weights, int8=case[1]) for case, x in xs.items()}

    ok = []
    for (rows, int8), ys in run(xs, weights).items():
        x = np.float64(xs[rows, int8])
        if int8:
            x, bound = int8_rounded(x), INT8
        elif rows == 1:
            bound = FLOAT32
        else:
            bound = BFLOAT16 if weights[0].minimum is None else MINIMA
        error = max(nmse(y, x @ w.T) for y, w in zip(ys, exact, strict=True))
        mode = f"{rows} rows{', int8' if int8 else ''}"
        ok.append(bounded(f"{name} {shape[0]}x{shape[1]}", mode, error, bound))
    assert all(ok)


def test_products_with_matrices_of_several_types(rng, bounded):
    """In one kernel, as the projections of a layer in Q4_K_M."""
    names, columns = ("Q4_K", "Q4_K", "Q6_K", "Q8_0"), SHAPES[0][1]
    raws = [internals.raw_blocks(rng, name, 33 + 16 * i, columns) for i, name in enumerate(names)]
    weights = [internals.from_blocks(name, raw) for name, raw in zip(names, raws, strict=True)]
    exact = [exact_matrix(name, raw) for name, raw in zip(names, raws, strict=True)]
    run = jax.jit(internals.products, static_argnames="int8")
    ok = []
    for rows in ROWS:
        int8 = rows <= 2
        x = (unrounded if int8 else activations)(rng, rows, columns)
        expected = int8_rounded(np.float64(x)) if int8 else np.float64(x)
        ys = run(x, weights, int8=int8)
        error = max(nmse(y, expected @ w.T) for y, w in zip(ys, exact, strict=True))
        bound = INT8 if int8 else MINIMA
        ok.append(bounded("several types", f"{rows} rows", error, bound))
    assert all(ok)


@pytest.mark.skipif(internals.INTERPRET, reason="compiles for a GPU")
@pytest.mark.parametrize("name", CUDA_TYPES)
def test_products_by_kernels_in_cuda(rng, bounded, name):
    """Rounded to 8 bits and not; 600 rows with the dequantized matrix. Some tiles are not full."""
    raw = internals.raw_blocks(rng, name, 200, 2048)
    w, exact = internals.from_blocks(name, raw), exact_matrix(name, raw)
    run = jax.jit(internals.products_in_cuda, static_argnames="int8")
    minima, ok = w.minimum is not None, []
    few, many = [(1, True), (8, True), (16, True), (8, False)], [100, 256, 300, 600]
    for rows, int8 in (*few, *((rows, False) for rows in many)):
        x = (unrounded if int8 else activations)(rng, rows, 2048)
        [y] = run(x, [w], int8=int8)
        expected = int8_rounded(np.float64(x)) if int8 else np.float64(x)
        bound = INT8 if int8 else MINIMA if minima else BFLOAT16
        mode = f"CUDA, {rows} rows{', int8' if int8 else ''}"
        ok.append(bounded(name, mode, nmse(y, expected @ exact.T), bound))
    assert all(ok)


@pytest.mark.skipif(internals.INTERPRET, reason="compiles for a GPU")
@pytest.mark.parametrize("name", CUDA_TYPES)
def test_matrices_dequantized_by_a_kernel_in_cuda(rng, bounded, name):
    """Two, whose last blocks are not full."""
    raws = [internals.raw_blocks(rng, name, rows, 2048) for rows in (201, 33)]
    weights = [internals.from_blocks(name, raw) for raw in raws]
    exact = np.concatenate([exact_matrix(name, raw) for raw in raws])
    run, ok = jax.jit(internals.dequantized_in_cuda, static_argnums=1), []
    for dtype, bound in (("float32", FLOAT32), ("float16", 1e-7), ("bfloat16", 5e-6)):
        error = nmse(np.float64(run(weights, dtype)), exact)
        ok.append(bounded(name, f"CUDA, {dtype}", error, bound))
    assert all(ok)


@pytest.mark.skipif(internals.INTERPRET, reason="compiles for a GPU")
@pytest.mark.parametrize("columns", [520, 4096])
def test_products_with_plain_matrices_by_a_kernel_in_cuda(rng, bounded, columns):
    """In both types of 16 bits."""
    weights = [activations(rng, rows, columns) for rows in (9, 40)]
    weights[1] = weights[1].astype(jnp.float16)
    run, ok = jax.jit(internals.gemv_16bit), []
    for rows, dtype in ((1, jnp.bfloat16), (3, jnp.float16), (8, jnp.bfloat16)):
        x = activations(rng, rows, columns).astype(dtype)
        error = max(
            nmse(y, np.float64(x) @ np.float64(w).T)
            for y, w in zip(run(x, weights), weights, strict=True)
        )
        ok.append(bounded(f"16 bits {columns}", f"CUDA, {rows} rows", error, FLOAT32))
    assert all(ok)


@pytest.mark.parametrize("columns", [512, 4096 + 64])
def test_products_with_plain_matrices(rng, bounded, columns):
    weights = [activations(rng, rows, columns) for rows in (9, 40)]
    run = jax.jit(internals.products, static_argnames="int8")
    ok = []
    for rows in ROWS:
        x = activations(rng, rows, columns)
        ys = run(x, weights, int8=True)
        error = max(
            nmse(y, np.float64(x) @ np.float64(w).T) for y, w in zip(ys, weights, strict=True)
        )
        ok.append(bounded(f"bfloat16 {columns}", f"{rows} rows", error, FLOAT32))
    assert all(ok)


@pytest.mark.parametrize("backend", ["chosen", "CUDA"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ4_XS"])
def test_products_in_8_bit_floating_point(rng, bounded, name, backend):
    in_cuda = backend == "CUDA"
    if in_cuda and internals.INTERPRET:
        pytest.skip("compiles for a GPU")
    if not internals.multiplies_float8():
        pytest.skip("needs compute capability 8.9")
    columns = SHAPES[0][1]
    raw = internals.raw_blocks(rng, name, 72, columns)
    x = activations(rng, 600, columns)
    products = internals.products_in_cuda if in_cuda else internals.products
    run = jax.jit(products, static_argnames=("int8", "float8"))
    [y] = run(x, [internals.from_blocks(name, raw)], int8=False, float8=True)
    error = nmse(y, np.float64(x) @ exact_matrix(name, raw).T)
    assert bounded(name, "CUDA, float8" if in_cuda else "float8", error, FLOAT8)


@pytest.mark.parametrize("used", [1, 2])
def test_products_with_matrices_of_experts(rng, bounded, used):
    from_blocks = internals.from_blocks
    names, experts, columns = ("Q4_K", "Q6_K"), 5, SHAPES[0][1]
    raws = [
        np.stack([internals.raw_blocks(rng, name, rows, columns) for _ in range(experts)])
        for name, rows in zip(names, (40, 24), strict=True)
    ]
    stacks = [
        jax.tree.map(lambda *planes: jnp.stack(planes), *[from_blocks(name, r) for r in raw])
        for name, raw in zip(names, raws, strict=True)
    ]
    x = unrounded(rng, 2, columns)
    chosen = jnp.asarray(rng.integers(0, experts, 2 * used), jnp.int32)
    rows = np.repeat(int8_rounded(np.float64(x)), used, axis=0)
    ok = []
    ys = jax.jit(internals.expert_products)(x, stacks, chosen)
    for name, raw, y in zip(names, raws, ys, strict=True):
        expected = np.einsum("pi,poi->po", rows, exact_matrix(name, raw)[np.asarray(chosen)])
        ok.append(bounded(f"experts {name}", f"{used} of each row", nmse(y, expected), INT8))
    assert all(ok)


@pytest.mark.parametrize("routing", ["softmax", "sigmoid", "softmax_after_topk"])
@pytest.mark.parametrize("experts", [8, 60, 128])
def test_the_router_chooses_the_best_experts(rng, routing, experts):
    used, tokens = 6, 33
    logits = np.float32(rng.normal(size=(tokens, experts)))
    bias = np.float32(rng.normal(size=experts) * 0.1)
    run = jax.jit(internals.route, static_argnums=(1, 2))
    chosen, weights = map(np.asarray, run(logits, used, routing, bias))
    exact = np.exp(np.float64(logits))
    scores = {
        "softmax": exact / exact.sum(axis=-1, keepdims=True),
        "sigmoid": exact / (1 + exact),
        "softmax_after_topk": np.float64(logits),
    }[routing]
    expected = np.argsort(-(scores + bias), axis=-1)[:, :used]
    assert (np.sort(chosen) == np.sort(expected)).all()
    scores = np.take_along_axis(scores, chosen, axis=-1)
    if routing == "softmax_after_topk":
        scores = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    assert nmse(weights, scores) <= 1e-10
