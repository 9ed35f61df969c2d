"""ik_llama.cpp's own weight types, against rows and models that it dequantized itself."""

import functools
import re
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DATA, changed_recipe, nmse
from tiny import fresh_rng

import jaxsplit
from jaxsplit.architectures import model_config
from jaxsplit.bench.random_model import SHAPES, Shape, random_model, write
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import IK_TYPES, GGUFTensor, open_gguf
from jaxsplit.formats.ggml_types import REFUSED
from jaxsplit.ops.matmul.api import matmul
from jaxsplit.quant import (
    TYPES,
    QTensor,
    dequantize,
    dequantize_rows,
    take_rows,
    unpack,
)
from jaxsplit.weights.checkpoint import save_checkpoint
from jaxsplit.weights.sources import parameter_sources

IK = DATA / "ik"
MODELS = sorted(path.stem for path in IK.glob("*.gguf"))

# One of each kind of planes: shifted tables, 16-bit scales, trellises with and without signs,
# scales of rows with and without those of groups, plain numbers.
KINDS = (
    *("IQ4_K", "IQ6_K", "IQ5_KS_R4", "IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ1_M_R4", "IQ2_BN"),
    "BF16_R16",
)
PARAMETERS = [
    *KINDS,
    *(pytest.param(name, marks=pytest.mark.full) for name in IK_TYPES if name not in KINDS),
]


@pytest.fixture(scope="module")
def rows():
    """`rows(name)`: bytes of rows, uint8 `[rows, row_bytes]`, and their weights."""
    data = np.load(IK / "rows.npz")
    return lambda name: (data[f"{name}.bytes"], data[f"{name}.values"])


def tensor_of(name, raw, shape):
    """Rows as a tensor; of I2_S, whose rows are whole tensors, the first."""
    raw, shape = (raw[0], (1, shape[1])) if IK_TYPES[name].trailer else (raw.reshape(-1), shape)
    return GGUFTensor.of_bytes("rows", name, shape, raw)


@pytest.mark.parametrize("name", IK_TYPES)
def test_rows_are_dequantized_to_the_bit(rows, name):
    raw, expected = rows(name)
    found = dequantize_rows(name, raw)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", IK_TYPES)
def test_blocks_become_the_bytes_of_the_file_again(rows, name):
    raw, expected = rows(name)
    tensor = tensor_of(name, raw, expected.shape)
    assert tensor.nbytes == (raw[:1] if IK_TYPES[name].trailer else raw).nbytes
    data = IK_TYPES[name].file_bytes(tensor.blocks)
    if name == "Q8_KV":  # the header's second half, a sum that nothing needs
        assert data.nbytes == raw.nbytes
    assert data.tobytes()[: tensor.nbytes] == raw.reshape(-1)[: tensor.nbytes].tobytes()


@pytest.mark.parametrize("name", ["IQ4_KS", "IQ4_KS_R4", "Q8_K_R8"])
def test_any_rows_and_blocks_are_taken(rows, name):
    raw, expected = rows(name)
    rng = fresh_rng()
    tensor = tensor_of(name, raw, expected.shape)
    whole = tensor.blocks
    for _ in range(10):
        chosen = rng.integers(-1, len(whole), (2, 3))
        columns = rng.integers(-1, whole.shape[1], 3)
        found = tensor.take(chosen, columns)
        assert found.shape == (2, 3, 3, whole.shape[-1])
        wanted = np.where((chosen < 0)[..., None, None], 0, whole[chosen][:, :, columns])
        wanted[:, :, columns < 0] = 0
        assert np.array_equal(found, wanted)


# On the device


@functools.partial(
    jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
)
def uses(name, raw, x, chosen, parts):
    """Weights, products with 1 and 3 rows, some rows, and parts of all blocks by their sizes."""
    weights = jax.lax.optimization_barrier(unpack(name, raw))
    cuts = {
        size: dequantize(unpack(name, raw, sub_block=size, sub_block_index=part))
        for size, part in parts.items()
    }
    products = [matmul(x[:1], weights), matmul(x, weights)]
    at_load = unpack(name, raw, dtype=jnp.float32)
    return dequantize(weights), at_load, products, take_rows(weights, chosen, jnp.float32), cuts


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_device_has_the_same_weights(rows, name):
    """Whole, multiplied, by rows, and cut inside blocks, also inside the states of a trellis."""
    raw, expected = rows(name)
    raw = tensor_of(name, raw, expected.shape).blocks
    expected, rng, block = expected[: len(raw)], fresh_rng(), TYPES[name].block
    x = rng.normal(size=(3, expected.shape[1])).astype(np.float32)
    chosen = rng.integers(0, len(raw), (2, 2))
    sizes = [size for size in (1, 4, 16, 32, 64, 128) if size < block and block % size == 0]
    parts = {size: rng.integers(0, block // size, raw.shape[1]).astype(np.int32) for size in sizes}
    if name != "BF16_R16":
        parts.pop(1, None)
    whole, at_load, products, some, cuts = uses(name, raw, x, chosen, parts)
    assert np.array_equal(whole, expected)
    assert np.array_equal(at_load, expected)
    assert np.array_equal(some, expected[chosen])
    for y in products:
        assert nmse(y, np.float64(x[: len(y)]) @ np.float64(expected).T) <= 1e-10
    for size, part in parts.items():
        pieces = expected.reshape(len(raw), raw.shape[1], -1, size)
        wanted = pieces[:, np.arange(raw.shape[1]), part].reshape(len(raw), -1)
        assert np.array_equal(cuts[size], wanted), size


@pytest.mark.parametrize("name", ["IQ4_KS", "IQ2_KT", "IQ2_BN"])
def test_weights_in_padding_are_zeros(rows, name):
    raw, expected = rows(name)
    blocks = tensor_of(name, raw, expected.shape).blocks
    padded = np.insert(blocks, 1, 0, axis=1)
    weights = np.asarray(
        jax.jit(lambda raw: unpack(name, raw, dtype="float32", padded=True))(padded)
    )
    found = weights.reshape(*padded.shape[:2], -1)
    assert not found[:, 1].any()
    assert np.array_equal(np.delete(found, 1, axis=1).reshape(expected.shape), expected)


@pytest.mark.usefixtures("quick_compilation")
def test_heads_that_are_padding_beside_those_of_the_same_keys(monkeypatch):
    """On four devices, each has one of two key heads with two of its three query heads, or one."""
    shape = Shape(256, 1, heads=6, kv_heads=2, head_dim=128, mlp=512, vocab=512)
    monkeypatch.setitem(SHAPES, "odd", shape)
    file, tokens = random_model("odd:IQ4_KS"), fresh_rng().integers(0, 500, 4).tolist()
    options = {"dtype": "float32", "ctx_size": 64}
    expected = jaxsplit.load(file, split_mode="none", **options).logits(tokens)
    assert nmse(jaxsplit.load(file, devices=4, **options).logits(tokens), expected) <= 1e-9


def test_types_take_about_as_much_on_the_device_as_in_the_file():
    limits = {"IQ2_KT": 2.5, "IQ3_KT": 3.5, "IQ4_KT": 4.5, "IQ2_KL": 3.3, "IQ1_KT": 2.4}
    names = (
        *("Q6_0", "IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ2_KS", "IQ3_KS", "IQ4_KS"),
        *("IQ5_KS", "IQ4_K_R4", "IQ5_K_R4", "Q4_K_R4", "Q6_K_R4", "Q8_0_R8", "Q8_KV"),
    )
    for name in (*names, *limits):
        kind, rows, columns = TYPES[name], 8, 4096
        raw = jax.ShapeDtypeStruct((rows, columns // kind.block, kind.block_bytes), np.uint8)
        planes = jax.tree.leaves(jax.eval_shape(functools.partial(unpack, name), raw))
        bits = sum(8 * leaf.size * leaf.dtype.itemsize for leaf in planes) / (rows * columns)
        stored = 8 * IK_TYPES[name].size / kind.block
        assert bits <= limits.get(name, 1.09 * stored), name


# Models


def check_model(lm, reference):
    tokens = reference["tokens"].tolist()
    assert nmse(lm.logits(tokens), reference["logits"]) <= 1e-6
    one_by_one = lm.logits(tokens[:4], one_by_one=True)
    assert nmse(one_by_one, reference["logits"][:4]) <= 1e-6


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ik-moe-kt", {"devices": 3}),
        ("ik-dense-q60", {"devices": 3}),
        *(
            pytest.param(name, {"devices": n, "split_mode": mode}, marks=pytest.mark.full)
            for name in MODELS
            for mode, counts in (
                ("none", (1,)),
                ("layer", (2,)),
                ("row", (2, 3, 8)),
                ("graph", (2, 3, 8)),
            )
            for n in counts
        ),
    ],
)
def test_models_have_the_reference_logits(load, name, options):
    if options.get("split_mode") == "none":
        options = {"split_mode": "none"}
    lm = load(IK / f"{name}.gguf", **options)
    check_model(lm, np.load(IK / f"{name}.npz"))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "name",
    [
        "ik-moe-kt",
        *(pytest.param(n, marks=pytest.mark.full) for n in MODELS if n != "ik-moe-kt"),
    ],
)
def test_checkpoints_keep_the_types(tmp_path, name):
    file = open_gguf(IK / f"{name}.gguf")
    save_checkpoint(file, model_config(file), tmp_path / "checkpoint")
    lm = jaxsplit.load(tmp_path / "checkpoint", devices=2, dtype="float32", ctx_size=64)
    assert isinstance(lm.model.blocks[0].mixer.query.kernel.get_value(), QTensor)
    check_model(lm, np.load(IK / f"{name}.npz"))


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_dequantized_at_load(load, name):
    lm = load(IK / f"{name}.gguf", devices=2, weights="float32")
    check_model(lm, np.load(IK / f"{name}.npz"))


@pytest.mark.full
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", MODELS)
def test_models_with_kernels_are_about_as_exact(name):
    """Interpreted, on two devices, in bfloat16: prompts, and tokens whose rows are in 8 bits."""
    reference = np.load(IK / f"{name}.npz")
    tokens, expected = reference["tokens"][:6].tolist(), reference["logits"][:6]
    options = {"devices": 2, "dtype": "bfloat16", "ctx_size": 64, "activations": "int8"}
    lm = jaxsplit.load(IK / f"{name}.gguf", kernels="interpret", **options)
    for one_by_one in (False, True):
        logits = lm.logits(tokens, one_by_one=one_by_one)
        errors = [nmse(*of) for of in zip(logits, expected, strict=True)]
        assert np.median(errors) <= 1e-3, errors


@pytest.mark.usefixtures("quick_compilation")
def test_old_files_of_deepseek_have_projections_of_all_heads_in_one_matrix(tmp_path, recipe_gguf):
    heads = {"attn_k_b": [32, 48 * 4], "attn_v_b": [48, 24 * 4], "attn_kv_b": [48, (32 + 24) * 4]}
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(3) for name, shape in heads.items()}
    keys = {f"attention.{name}_length": ("UINT32", n) for name, n in (("key", 48), ("value", 24))}
    keys |= {"attention.key_length_mla": None, "attention.value_length_mla": None}
    keys = {f"deepseek2.{key}": value for key, value in keys.items()}
    old = changed_recipe(tmp_path / "old.gguf", keys, shapes, "deepseek2")
    tokens = fresh_rng().integers(0, 160, 6).tolist()
    one, other = (
        jaxsplit.load(path, dtype="float32", ctx_size=64).logits(tokens)
        for path in (old, recipe_gguf("deepseek2"))
    )
    assert nmse(one, other) <= 1e-12


# Files that cannot be used


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def changed(tmp_path, change):
    """The path of a model of IQ4_KS, and others, with its bytes changed."""
    content = bytearray((IK / "ik-dense-ks.gguf").read_bytes())
    change(content)
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    return path


def tensor_entry(content, name):
    """Where the header says the type of a tensor with two dimensions, and its dimensions."""
    at = content.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4
    return at + 16, at


def test_a_damaged_scale_of_a_row_is_found(tmp_path):
    name = "blk.0.ffn_gate.weight"
    data = open_gguf(IK / "ik-dense-ks.gguf").tensors[name].parts[0].tobytes()[:4]

    def change(content):
        whole = tensor.parts[-1].base
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        start = tensor.parts[0][3].__array_interface__["data"][0]
        place = start - whole.__array_interface__["data"][0]
        content[place : place + 4] = np.array([np.inf], "<f4").tobytes()

    tensor = open_gguf(IK / "ik-dense-ks.gguf").tensors[name]
    assert data == tensor.blocks[0, 0, :4].tobytes()
    with pytest.raises(JaxsplitError, match=f"{name}.*damaged.*row 3 is inf") as error:
        jaxsplit.load(changed(tmp_path, change), dtype="float32", ctx_size=64)
    one_line(error)


def test_a_file_that_ends_inside_a_row_is_truncated(tmp_path):
    path = changed(tmp_path, lambda content: content.__delitem__(slice(-200, None)))
    with pytest.raises(JaxsplitError, match="truncated or damaged: tensor .* would end") as error:
        open_gguf(path)
    one_line(error)


@pytest.mark.parametrize(
    ("number", "dims", "expected"),
    [
        (
            144,
            (128, 512),
            "rows of 128 weights, not a multiple of the 256 in a block of type IQ4_KS",
        ),
        (339, (256, 510), "510 rows, not a multiple of the 4 .* of type IQ4_K_R4"),
        (399, (256, 4), "4 rows, not a multiple of the 8 .* of type Q8_K_R8"),
        (142, (256, 512), "type number 142, IQ2_TN, which ik_llama.cpp removed"),
        (149, (256, 512), "type number 149, Q8_KR8, in which .* keeps activations"),
        (160, (256, 512), "type number 160, a type of a fork"),
        (134217728, (256, 512), "type number 134217728, which is no GGML type"),
    ],
)
def test_what_a_type_does_not_allow_is_refused(tmp_path, number, dims, expected):
    def change(content):
        kind, at = tensor_entry(content, "blk.0.ffn_gate.weight")
        content[kind : kind + 4] = struct.pack("<I", number)
        content[at : at + 16] = struct.pack("<QQ", *dims)

    with pytest.raises(JaxsplitError, match=f"'blk.0.ffn_gate.weight' has.*{expected}") as error:
        open_gguf(changed(tmp_path, change))
    one_line(error)


def test_no_number_is_known_and_refused():
    assert not REFUSED.keys() & {kind.number for kind in IK_TYPES.values()}


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("IQ4_KS", np.zeros((2, 100), np.uint8), r"100 bytes; IQ4_KS needs 4 \+ a multiple of 136"),
        ("IQ4_KS", np.zeros((2, 4), np.uint8), r"4 bytes"),
        ("IQ4_KS_R4", np.zeros((2, 140), np.uint8), "rows in units of 4"),
        ("IQ4_KS", np.zeros((2, 140), np.int8), "int8.*is not uint8"),
        ("IQ9_KS", np.zeros((2, 140), np.uint8), "type IQ9_KS are not supported"),
    ],
)
def test_bytes_that_are_no_rows_are_refused(name, raw, expected):
    with pytest.raises(JaxsplitError, match=expected) as error:
        dequantize_rows(name, raw)
    one_line(error)


# Random models


@pytest.mark.parametrize(
    "spec",
    ["llama-tiny:mix-IQ2_KT", pytest.param("llama-tiny:IQ4_KS_R4", marks=pytest.mark.full)],
)
def test_random_models_are_files(tmp_path, spec):
    write(spec, str(tmp_path / "random.gguf"))
    file, made = open_gguf(tmp_path / "random.gguf"), random_model(spec)
    assert file.tensors.keys() == made.tensors.keys()
    for name, tensor in made.tensors.items():
        found = file.tensors[name]
        assert (found.type, found.shape) == (tensor.type, tensor.shape)
        assert np.array_equal(found.blocks, tensor.blocks)
    config = model_config(file)
    assert parameter_sources(file, config)


def test_docs_list_every_type():
    text = (DATA.parent.parent / "docs" / "weights.md").read_text("utf-8")
    listed = re.findall(r"^\| ([A-Z0-9_]+) \|", text, re.MULTILINE)
    assert set(TYPES) <= set(listed)
