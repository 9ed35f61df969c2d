"""int8 activations and the int8 GEMV kernel, interpreted, against float64; models with kernels."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from blocks import usual_blocks
from helpers import Q8_0, SHAPES, nmse, quick_jit
from jax.extend.core import Literal, jaxprs_in_params
from tiny import fresh_rng

import jaxsplit
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.engine import ClosedBatch
from jaxsplit.errors import JaxsplitError
from jaxsplit.ops.activations import int8
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import Readers
from jaxsplit.ops.activations.swizzled import SwizzledLayout
from jaxsplit.ops.activations.triton_rows import store_rows
from jaxsplit.ops.matmul import byte_tables, float8, trellis, triton_gemv_int8
from jaxsplit.ops.matmul.api import matmul, matmuls
from jaxsplit.quant import TYPES, dequantize, to_u32, unpack

pytestmark = pytest.mark.usefixtures("interpreter")

SUPPORTED = {
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("TQ1_0", "TQ2_0", "Q1_0", "IQ4_NL", "IQ4_XS"),
    *("Q6_0", "IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ2_KS", "IQ3_KS", "IQ4_KS", "IQ5_KS"),
    *("IQ4_KSS", "IQ2_KL", "IQ1_KT", "IQ2_KT", "IQ3_KT", "IQ4_KT"),
    *("I2_S", "IQ1_BN", "IQ2_BN", "Q8_KV", "MXFP4", "NVFP4"),
}


_unpacked = quick_jit(lambda name, raw: to_u32(unpack(name, raw)), static_argnums=0)
dequantized = quick_jit(dequantize)


def matrix(rng, name, rows, columns):
    return _unpacked(name, usual_blocks(rng, name, rows, columns // TYPES[name].block))


@pytest.fixture
def rng():
    return fresh_rng()


def test_which_types_have_a_kernel():
    found = set()
    for name, kind in TYPES.items():
        raw = jax.ShapeDtypeStruct((4, 2, kind.block_bytes), np.uint8)
        if name.endswith(("_R4", "_R8", "_R16")):  # as their plain types
            continue
        if kind.layout and triton_gemv_int8.supports(
            jax.eval_shape(functools.partial(unpack, name), raw)
        ):
            found.add(name)
    assert found == SUPPORTED


def test_quantization_is_that_of_ggml(rng):
    """The largest magnitude of 32 becomes 127, the other values the nearest integers."""
    x = rng.normal(size=(3, 128)).astype(np.float32) * rng.uniform(0, 10, (3, 1))
    x[1, 32:64] = 0
    rounded = int8.quantize_rows(x)
    blocks = np.float64(x).reshape(3, -1, 32)
    scale = np.abs(blocks).max(axis=-1) / 127
    assert np.allclose(rounded.scale, scale, rtol=1e-6)
    error = np.abs(np.asarray(rounded.dequantized()).reshape(blocks.shape) - blocks)
    assert (error <= 0.5001 * scale[..., None]).all()


def test_codes_do_not_depend_on_compilation(rng):
    """Of a million products, some are so close to halfway between two codes that contracting the
    product into an FMA would change their code."""
    x = rng.normal(size=(256, 2**14)).astype(np.float32)
    compiled = jax.jit(lambda x: int8.quantize_rows(x).codes)(x)
    assert np.array_equal(compiled, int8.quantize_rows(jnp.asarray(x)).codes)


@pytest.mark.parametrize("apart", [1, 2, 4, 8])
def test_the_swizzle_avoids_bank_conflicts(rng, apart):
    first = 8 * apart * rng.integers(0, 1000) + rng.integers(0, apart)
    slices = first + apart * np.arange(8)
    places = int8.bank_swizzle(slices)
    assert sorted(places % 8) == list(range(8))
    assert np.array_equal(int8.bank_swizzle(places), slices)


def stored(function, operands, **options):
    """Rows that the kernel computes and quantizes."""
    return store_rows(function, operands, Readers((Int8Layout(),), xla=False), **options)


@pytest.mark.parametrize("rows", [2, 13])
def test_rows_swizzled_for_tensor_cores(rng, rows):
    x = jnp.asarray(rng.normal(size=(rows, 320)), jnp.bfloat16)
    readers = Readers((SwizzledLayout(x.dtype),), xla=False)
    [stored], *_ = jax.jit(lambda x: store_rows(lambda x: x, (x,), readers))(x)
    np.testing.assert_array_equal(stored.array(), np.float32(x))


@pytest.mark.parametrize("shape", [(96,), (3, 1, 96)])
def test_rows_are_summed_before_they_are_quantized(rng, shape):
    stream, *addends = rng.normal(size=(4, 3, 1, 96)).astype(np.float32)
    stream, bias = jnp.asarray(stream, jnp.bfloat16), rng.normal(size=shape).astype(np.float32)
    expected = np.float64(stream) + np.sum(np.float64(addends), axis=0) + bias
    addend = jnp.asarray(addends), None, None
    [rounded], _, total = stored(lambda x: x, (stream,), addend=addend, bias=jnp.asarray(bias))
    assert nmse(total, expected) <= 2e-5
    exact = int8.quantize_rows(total[:, 0])
    there = int8.bank_swizzle(np.arange(96 // int8.SLICE))
    codes = [np.reshape(x.codes, (3, -1, int8.SLICE // 4))[:, there] for x in (rounded, exact)]
    assert np.array_equal(*codes)


@pytest.mark.parametrize("epsilon", [None, 1e-5])
def test_a_fused_function_and_norm_precede_quantization(rng, epsilon):
    """The result is that of computing, normalizing and quantizing one after the other."""
    x, scale = rng.normal(size=(2, 3, 1344)).astype(np.float32), rng.uniform(0.5, 2, 1344)
    operands = (jnp.asarray(x), jnp.asarray(scale, jnp.float32))
    [rounded], *_ = stored(jnp.multiply, operands, norm=epsilon and (epsilon, 1400))
    exact = np.float64(x) * np.float32(scale)
    if epsilon:
        exact /= np.sqrt((np.float64(x) ** 2).sum(axis=-1, keepdims=True) / 1400 + epsilon)
    expected = int8.quantize_rows(jnp.asarray(exact.reshape(6, -1), jnp.float32))
    assert nmse(rounded.dequantized(), expected.dequantized()) <= 1e-6
    assert 1e-7 < nmse(rounded.dequantized(), exact.reshape(6, -1)) < 1e-4


# Rows of one step, of several in flight, of many; some do not fill a step or a swizzled run of
# slices, and the matrices do not fill a program.
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        *((["Q8_0"], 1, 1536), (["Q4_0"], 1, 2816), (["Q5_1"], 1, 1536), (["Q3_K"], 1, 1536)),
        *((["Q4_K"], 1, 4352), (["Q4_K"], 3, 512), (["Q5_K"], 1, 2816), (["TQ2_0"], 1, 1536)),
        *((["Q6_K"], 1, 4608), (["Q6_K", "Q4_K", "Q8_0"], 3, 512), (["Q5_0"], 2, 1376)),
        *((["Q4_K"], 1, 9472), (["Q8_0"], 2, 5120), (["Q6_K"], 1, 10240), (["Q4_K"], 1, 8192)),
        *((["IQ4_K"], 1, 1536), (["IQ4_KS"], 2, 2816), (["IQ2_K"], 1, 1536), (["IQ3_KS"], 1, 1536)),
        *((["IQ2_KT"], 1, 2816), (["IQ3_KT"], 2, 1536), (["IQ4_KT"], 1, 1536)),
        *((["IQ5_K"], 1, 2816), (["IQ6_K", "IQ2_KL", "Q6_0"], 1, 512), (["IQ4_XS"], 1, 1536)),
        *((["MXFP4"], 1, 2880), (["NVFP4"], 2, 1536)),
    ],
)
def test_matmuls_equal_float64(rng, names, rows, columns):
    matrices = [matrix(rng, name, 7 + i, columns) for i, name in enumerate(names)]
    exact = [np.float64(dequantized(w)).T for w in matrices]

    @quick_jit
    def products(x, matrices):
        """Rows, and what they are multiplied by each matrix: rounded, and normalized before."""
        [normalized], *_ = stored(lambda x: x, (x,), norm=(1e-6, columns))
        both = int8.quantize_rows(x), normalized
        return [(r.dequantized(), triton_gemv_int8.gemv_int8(r, matrices)) for r in both]

    x = rng.normal(size=(rows, columns)).astype(np.float32)
    for rounded, results in products(x, matrices):
        for y, w in zip(results, exact, strict=True):
            assert nmse(y, np.float64(rounded) @ w) <= 1e-10


@pytest.mark.parametrize("name", ["IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "Q1_0"])
def test_ptx_looks_up_tables(rng, monkeypatch, name):
    table = TYPES[name].layout.table
    monkeypatch.setattr(byte_tables.plgpu, "elementwise_inline_asm", ptx.elementwise_inline_asm)
    codes = rng.integers(0, len(table), (5, 7, 4), np.uint8)
    expected = np.asarray(table, np.int8)[codes]
    with forward_context(policy=MatmulPolicy(kernels=True)):
        found = byte_tables.look_up_bytes(jnp.asarray(codes.view(np.uint32)), table)
        assert np.array_equal(np.asarray(found).view(np.int8), expected)
        for part in range(0, len(table), 16):
            table_ = table[part : part + 16]
            if len(table_) < 16:
                continue
            packed = rng.integers(0, 256, (9, 4), np.uint8)
            halves = byte_tables.look_up_nibbles(jnp.asarray(packed.view(np.uint32)), table_)
            for half, index in zip(halves, (packed & 15, packed >> 4), strict=True):
                assert np.array_equal(np.asarray(half).view(np.int8), np.int8(table_)[index])


@pytest.mark.parametrize("signed", [False, True])
def test_ptx_computes_values_of_trellises(rng, monkeypatch, signed):
    monkeypatch.setattr(trellis.plgpu, "elementwise_inline_asm", ptx.elementwise_inline_asm)
    states, first = rng.integers(0, 2**16, (7, 64), np.uint32), 4 * rng.integers(0, 2, (7, 64))
    signs = [jnp.asarray(rng.integers(0, 2**32, (7, 64), np.uint32))] if signed else []
    arguments = jnp.asarray(states), jnp.asarray(first, jnp.int32), *signs
    expected = trellis.four_values(*arguments)
    with forward_context(policy=MatmulPolicy(kernels=True)):
        found = trellis.four_values(*arguments)
    assert np.array_equal(found, expected)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("used", [1, 2])
def test_expert_matmuls_equal_float64(rng, used):
    stacks = [
        jax.tree.map(lambda *planes: np.stack(planes), *[matrix(rng, *of, 512) for _ in range(3)])
        for of in (("Q4_K", 9), ("Q6_K", 6))
    ]
    x = rng.normal(size=(2, 512)).astype(np.float32)
    experts = rng.integers(0, 3, 2 * used).astype(np.int32)

    @quick_jit
    def products(x, stacks):
        rounded = int8.quantize_rows(x)
        results = triton_gemv_int8.gemv_int8(rounded, stacks, experts=experts)
        return rounded.dequantized(), results

    rounded, results = products(x, stacks)
    for y, stack in zip(results, stacks, strict=True):
        dense = np.float64(dequantized(stack))[experts]
        rows = np.repeat(np.float64(rounded), used, axis=0)
        assert nmse(y, np.einsum("pi,poi->po", rows, dense)) <= 1e-10


@pytest.mark.parametrize("rows", [1, 2])
def test_xla_computes_the_same_without_kernels(rng, rows):
    w = matrix(rng, "Q4_K", 33, 512)
    x = rng.normal(size=(rows, 512)).astype(np.float32)
    with forward_context(policy=MatmulPolicy(int8_activations=True)):
        y = jax.jit(lambda x, w: matmul(x, w))(x, w)
    kernel = quick_jit(lambda x, w: triton_gemv_int8.gemv_int8(int8.quantize_rows(x), [w]))
    [expected] = kernel(x, w)
    assert nmse(y, expected) <= 1e-10
    exact = np.float64(x) @ np.float64(dequantized(w)).T
    assert nmse(y, exact) > 1e-7
    # No activation is farther from its code than half the scale of its block.
    step = np.abs(x).reshape(rows, -1, 32).max(axis=-1).repeat(32, axis=-1) / 127
    bound = 0.5001 * np.float64(step) @ np.abs(np.float64(dequantized(w))).T
    assert (np.abs(y - exact) <= bound).all()


def test_many_rows_are_not_quantized(rng):
    w = matrix(rng, "Q4_K", 33, 512)
    x = rng.normal(size=(triton_gemv_int8.MAX_ROWS + 1, 512)).astype(np.float32)
    with forward_context(policy=MatmulPolicy(int8_activations=True)):
        y = jax.jit(lambda x, w: matmul(x, w))(x, w)
    assert nmse(y, np.float64(x) @ np.float64(dequantized(w)).T) <= 1e-10


def test_int8_activations_change_a_model_little(load, recipe_gguf):
    path, tokens = recipe_gguf(SHAPES["9-3"], Q8_0), fresh_rng().integers(0, 160, 12).tolist()
    exact = load(path, devices=2)
    rounded = load(path, devices=2, activations="int8")
    assert np.array_equal(rounded.logits(tokens), exact.logits(tokens)), "prompts are not rounded"
    error = nmse(rounded.logits(tokens, one_by_one=True), exact.logits(tokens, one_by_one=True))
    assert 1e-7 < error < 1e-2


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("options", [{}, {"devices": 2}])
def test_a_model_with_kernels_is_the_one_without(recipe_gguf, options):
    path, texts = recipe_gguf(SHAPES["9-3"], Q8_0), fresh_rng().integers(0, 160, (3, 5)).tolist()
    options |= {"dtype": "float32", "ctx_size": 64, "activations": "int8"}

    def run(kernels: str) -> tuple[np.ndarray, list[list[int]]]:
        """Logits token by token, and what greedy steps choose after each text."""
        lm = jaxsplit.load(path, kernels=kernels, **options)
        logits = np.concatenate([lm.logits(text, one_by_one=True) for text in texts])
        return logits, [chosen(lm.closed_batch, text) for text in texts]

    def chosen(engine: ClosedBatch, text: list[int]) -> list[int]:
        engine.start(text, jaxsplit.SamplingConfig(temperature=0.0))
        for _ in range(3):
            engine.step()
        return engine.read(engine.tokens())[0].tolist()

    plain, plain_choice = run("xla")
    logits, choice = run("interpret")
    errors = [nmse(*of_token) for of_token in zip(logits, plain, strict=True)]
    # Where the last bits of sums differ, an activation may be rounded to the other side: that is
    # seen in this token and, a little, in those after it, but not in other texts.
    assert np.median(errors) <= 1e-5, errors
    assert max(errors) <= 1e-3, errors
    assert sum(map(list.__eq__, choice, plain_choice)) >= 2, (choice, plain_choice)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("options", [{"split_mode": "none"}, {"devices": 2}])
def test_single_tokens_of_a_mixture_with_kernels(recipe_gguf, options):
    path, texts = recipe_gguf("qwen3moe", Q8_0), fresh_rng().integers(0, 160, (4, 6)).tolist()

    def logits(**kernels):
        lm = jaxsplit.load(path, ctx_size=64, dtype="float32", **kernels, **options)
        return np.concatenate([lm.logits(text, one_by_one=True) for text in texts])

    exact = logits(activations="float")
    rounded = logits(activations="int8", kernels="interpret")
    # Of most tokens: an undecided router may choose another expert.
    errors = [nmse(*of) for of in zip(rounded, exact, strict=True)]
    assert 1e-7 < np.median(errors) < 3e-3, errors


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("source", "count", "options"),
    [
        pytest.param(SHAPES["9-3"], 9, {"split_mode": "none"}, id="tiles-dense"),
        pytest.param(
            "qwen3moe", 9, {"split_mode": "none"}, id="tiles-mixture", marks=pytest.mark.full
        ),
        pytest.param(SHAPES["9-3"], 70, {"split_mode": "none"}, id="dequantized-dense"),
        pytest.param("qwen3moe", 70, {"split_mode": "none"}, id="dequantized-mixture"),
        pytest.param(
            SHAPES["9-3"], 9, {"devices": 2}, id="two devices-dense", marks=pytest.mark.full
        ),
        pytest.param("qwen3moe", 9, {"devices": 2}, id="two devices-mixture"),
    ],
)
def test_prompts_with_kernels_are_as_exact_as_those_without(recipe_gguf, source, count, options):
    path, texts = recipe_gguf(source, Q8_0), fresh_rng().integers(0, 160, (5, count)).tolist()

    def logits(dtype, kernels="xla"):
        same = {"ctx_size": 128, "activations": "float", **options}
        lm = jaxsplit.load(path, dtype=dtype, kernels=kernels, **same)
        return np.concatenate([lm.logits(text) for text in texts])

    exact, plain = logits("float32"), logits("bfloat16")
    kernel = logits("bfloat16", "interpret")
    # Of most tokens: an undecided router may choose another expert for one of them, which those
    # after it in the text see.
    errors = [np.median([nmse(*of) for of in zip(x, exact, strict=True)]) for x in (kernel, plain)]
    assert errors[0] <= 5e-3, errors
    assert errors[0] <= 3 * errors[1], errors


@pytest.mark.usefixtures("quick_compilation")
def test_devices_send_products_with_plain_matrices(recipe_gguf):
    path, tokens = recipe_gguf(SHAPES["9-3"], Q8_0), fresh_rng().integers(0, 160, 15).tolist()

    def load(dtype, kernels="xla"):
        options = {"ctx_size": 128, "devices": 2, "weights": "bfloat16"}
        return jaxsplit.load(path, dtype=dtype, kernels=kernels, **options)

    exact, plain = (
        load(dtype).logits(tokens, one_by_one=True) for dtype in ("float32", "bfloat16")
    )
    lm = load("bfloat16", "interpret")
    (step,) = lm.engine.trace_step(jaxsplit.SamplingConfig(temperature=0.0))
    assert "gemv_bf16" in str(step.jaxpr)
    kernel = lm.logits(tokens, one_by_one=True)
    errors = [np.median([nmse(*of) for of in zip(x, exact, strict=True)]) for x in (kernel, plain)]
    assert errors[0] <= 5e-3, errors
    assert errors[0] <= 3 * errors[1], errors


@pytest.mark.parametrize("kernels", [False, True])
def test_many_rows_are_multiplied_in_8_bit_floating_point(rng, kernels):
    weights = [matrix(rng, *of, 768) for of in (("Q4_K", 20), ("Q8_0", 9), ("IQ4_XS", 7))]
    plain = rng.normal(size=(6, 768)).astype(np.float32)
    sizes = 10.0 ** rng.uniform(-6, 6, (70, 1))  # of rows, of which one is nearly of zeros
    x = (rng.normal(size=(70, 768)) * sizes).astype(np.float32)
    x[3] = 1e-38
    policy = MatmulPolicy(float8=True, kernels=kernels, interpret=True)
    with forward_context(policy=policy):
        product = quick_jit(matmuls)
        *ys, exact = product(x, [*weights, plain])
        few = product(x[:3], weights)
    assert nmse(exact, np.float64(x) @ np.float64(plain).T) <= 1e-10
    for y, w in zip(ys, weights, strict=True):
        expected = np.float64(x) @ np.float64(dequantized(w)).T
        assert not np.any(y[3])
        # Both are rounded to 4 bits, with an error of 2^-5 to 2^-4 at most.
        assert 5e-4 < nmse(y / sizes, expected / sizes) < 4e-3
    for y, w in zip(few, weights, strict=True):  # these are not
        assert nmse(y, np.float64(x[:3]) @ np.float64(dequantized(w)).T) <= 1e-10


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("options", [{"split_mode": "none"}, {"devices": 2}], ids=["one", "two"])
def test_prompts_in_8_bit_floating_point_are_nearly_as_they_were(recipe_gguf, rng, options):
    path, tokens = recipe_gguf(SHAPES["9-3"], Q8_0), rng.integers(0, 160, 70).tolist()
    options |= {"dtype": "float32", "ctx_size": 128}
    exact = jaxsplit.load(path, **options).logits(tokens)
    lm = jaxsplit.load(path, prefill_dtype="float8", **options)
    assert 1e-3 < nmse(lm.logits(tokens), exact) < 1e-1
    assert nmse(lm.logits(tokens[:20]), exact[:20]) <= 1e-9  # few are multiplied as ever


def test_devices_that_do_not_multiply_8_bit_floating_point_are_refused(recipe_gguf, monkeypatch):
    monkeypatch.setattr(float8, "supported_by", lambda _: False)
    with pytest.raises(JaxsplitError, match="prefill_dtype=float8 does not suit cpu"):
        jaxsplit.load(recipe_gguf(SHAPES["9-3"], Q8_0), prefill_dtype="float8")


@pytest.mark.parametrize(
    ("platform", "found", "capability", "multiplies"),
    [
        *(("gpu", "8.9", 8.9, True), ("cuda", "12.0", 12.0, True), ("gpu", "8.6", 8.6, False)),
        *(("gpu", "gfx942", 0, False), ("tpu", None, 0, False), ("cpu", None, 0, True)),
    ],
)
def test_what_devices_can_do(platform, found, capability, multiplies):
    names = {"platform": platform} | ({} if found is None else {"compute_capability": found})
    device = types.SimpleNamespace(**names)
    assert MatmulPolicy.for_device(device).kernels == (capability >= 8)
    assert float8.supported_by(device) == multiplies


def live(jaxpr):
    """The operations whose results are used; XLA drops the others."""
    used = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or used & set(eqn.outvars):
            used |= {v for v in eqn.invars if not isinstance(v, Literal)}
            kept.append(eqn)
    return reversed(kept)


def early_readers(jaxpr):
    """What reads results of kernels that let the next one begin: names of operations, and whether
    the kernel has certainly ended, since they also read what a kernel made of its results."""
    source, ended = {}, {}  # of each value: the kernel it comes from, and those that have ended
    for number, eqn in enumerate(live(jaxpr)):
        name = eqn.primitive.name
        inputs = [v for v in eqn.invars if not isinstance(v, Literal)]
        read = {source[v] for v in inputs if v in source}
        over = set().union(*(ended.get(v, ()) for v in inputs))
        if name in ("reshape", "squeeze", "bitcast_convert_type"):
            source.update((v, kernel) for v in eqn.outvars for kernel in read)
        else:
            yield from ((name, kernel in over) for kernel in read)
        if name == "pallas_call":
            over |= read
            if "launch_dependents" in str(eqn.params["jaxpr"]):
                source.update((v, number) for v in eqn.outvars)
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from early_readers(inner)
        ended.update((v, over) for v in eqn.outvars)


@pytest.mark.parametrize(
    "name",
    [SHAPES["9-3"], "qwen3moe", "gemma2", "llama4"],
    ids=["llama", "qwen3moe", "gemma2", "llama4"],
)
def test_only_kernels_begin_before_what_they_read_has_ended(recipe_gguf, monkeypatch, name):
    policy = MatmulPolicy(kernels=True, pdl=True)
    monkeypatch.setattr(MatmulPolicy, "for_device", lambda *_: policy)
    options = {"dtype": "bfloat16", "activations": "int8", "split_mode": "none", "ctx_size": 1024}
    lm = jaxsplit.load(recipe_gguf(name, Q8_0), **options)
    (step,) = lm.engine.trace_step(jaxsplit.SamplingConfig(temperature=0.0))
    readers = list(early_readers(step.jaxpr.jaxpr))
    assert len(readers) > lm.config.layers * 3
    assert all(name == "pallas_call" or ended for name, ended in readers), readers
