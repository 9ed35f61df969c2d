"""GGUF files: what is read, and what is refused."""

import math
import re
import struct
import time

import gguf
import numpy as np
import pytest
from helpers import changed_recipe, recipe, recipe_values, write_recipe
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import ARCHITECTURES, model_config, open_gguf
from jaxsplit.loading import parameters
from jaxsplit.quant import TYPES

JPEG = bytes.fromhex("ffd8ffe000104a46494600010100000100010000") + bytes(2000)
KINDS = gguf.GGUFValueType
SCALARS = {
    KINDS.UINT8: 255,
    KINDS.INT8: -128,
    KINDS.UINT16: 65535,
    KINDS.INT16: -32768,
    KINDS.UINT32: 2**32 - 1,
    KINDS.INT32: -(2**31),
    KINDS.FLOAT32: 0.1,
    KINDS.UINT64: 2**64 - 1,
    KINDS.INT64: -(2**63),
    KINDS.FLOAT64: 1e300,
    KINDS.BOOL: True,
    KINDS.STRING: "naïve 水 \x00 🦙",
}


@pytest.fixture
def rng():
    return fresh_rng()


def one_line(error):
    """The message of a `pytest.raises`, which has to be a single line."""
    message = str(error.value)
    assert message and "\n" not in message
    return message


def write(path, metadata=(), tensors=None, **options):
    """Writes `(key, type, item type or None, value)` and `name: array` as a llama file."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, kind, item, value in metadata:
        writer.add_key_value(key, value, kind, sub_type=item)
    for name, values in (tensors or {}).items():
        kind = None
        if isinstance(values, tuple):
            kind, values = values
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Opening


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory):
    """A file with a scalar and an array of every GGUF value type, and tensors of several types."""
    rng = np.random.default_rng(0)
    lists = {kind: [value] * 3 for kind, value in SCALARS.items()}
    lists[KINDS.INT16] = [-32768, 0, 32767]
    lists[KINDS.BOOL] = [True, False, True]
    lists[KINDS.STRING] = ["", "Ġa", "naïve 水 🦙", "a\nb"]
    metadata = [(f"test.{kind.name}", kind, None, value) for kind, value in SCALARS.items()]
    metadata += [(f"test.{k.name}s", KINDS.ARRAY, k, values) for k, values in lists.items()]
    metadata += [("test.one", KINDS.ARRAY, KINDS.UINT32, [7])]
    weights = rng.normal(size=(3, 64)).astype(np.float32)
    types = [gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_1", "BF16", "F16", "F32")]
    tensors = {t.name: (t, gguf.quants.quantize(weights, t)) for t in types}
    tensors["vector"] = weights[0]
    tensors["stack"] = rng.normal(size=(2, 3, 4)).astype(np.float32)
    return write(tmp_path_factory.mktemp("kinds") / "kinds.gguf", metadata, tensors)


def test_metadata_are_those_of_the_gguf_package(every_kind):
    file, reader = open_gguf(every_kind), gguf.GGUFReader(every_kind)
    assert file.metadata.keys() == reader.fields.keys()
    for key, field in reader.fields.items():
        value, expected = file.metadata[key], field.contents()
        assert value == expected, key
        assert type(value) is type(expected) and type(value) in (int, float, bool, str, list), key
        if isinstance(value, list):
            assert [type(v) for v in value] == [type(v) for v in expected], key


def test_metadata_are_what_was_written(every_kind):
    metadata = open_gguf(every_kind).metadata
    for kind, value in SCALARS.items():
        expected = float(np.float32(value)) if kind == KINDS.FLOAT32 else value
        assert metadata[f"test.{kind.name}"] == expected
    assert metadata["test.STRINGs"] == ["", "Ġa", "naïve 水 🦙", "a\nb"]
    assert metadata["test.one"] == [7]


def test_tensors_are_those_of_the_gguf_package(every_kind):
    file, reader = open_gguf(every_kind), gguf.GGUFReader(every_kind)
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for expected in reader.tensors:
        tensor = file.tensors[expected.name]
        block, size = gguf.GGML_QUANT_SIZES[expected.tensor_type]
        assert (tensor.name, tensor.type) == (expected.name, expected.tensor_type.name)
        assert tensor.shape == tuple(reversed(expected.shape.tolist()))
        assert tensor.blocks.shape == (*tensor.shape[:-1], tensor.shape[-1] // block, size)
        assert tensor.blocks.dtype == np.uint8
        assert (tensor.block_size, tensor.nbytes) == (block, expected.n_bytes)
        assert tensor.blocks.tobytes() == expected.data.tobytes()


def test_blocks_are_a_map_of_the_file_even_after_release(every_kind):
    for tensor in open_gguf(every_kind).tensors.values():
        before = tensor.blocks.tobytes()
        assert isinstance(tensor.blocks, np.memmap)
        tensor.release()
        assert tensor.blocks.tobytes() == before


def test_a_big_vocabulary_opens_fast(tmp_path):
    """150,000 strings, as in today's vocabularies; a NumPy view for each would take 15 s."""
    words = [f"word{i}é" for i in range(150_000)]
    metadata = [
        ("tokenizer.ggml.tokens", KINDS.ARRAY, KINDS.STRING, words),
        ("tokenizer.ggml.token_type", KINDS.ARRAY, KINDS.INT32, [1] * len(words)),
        ("tokenizer.ggml.scores", KINDS.ARRAY, KINDS.FLOAT32, [-0.5] * len(words)),
    ]
    path = write(tmp_path / "big.gguf", metadata, {"a": np.ones(4, np.float32)})
    start = time.perf_counter()
    metadata = open_gguf(path).metadata
    assert time.perf_counter() - start < 5  # about 0.3 s on an idle machine
    assert metadata["tokenizer.ggml.tokens"] == words
    assert metadata["tokenizer.ggml.token_type"] == [1] * len(words)
    assert metadata["tokenizer.ggml.scores"] == [-0.5] * len(words)


def test_alignment_of_the_file_is_followed(tmp_path):
    values = np.arange(5, dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(128)
    for name in "abc":
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for tensor in open_gguf(tmp_path / "a.gguf").tensors.values():
        assert tensor.blocks.tobytes() == values.tobytes()


# Several files


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The recipe `llama` in files of four tensors, and the values of its tensors."""
    folder = tmp_path_factory.mktemp("shards")
    llama = recipe("llama")
    values = {spec["name"]: recipe_values(llama["seed"], spec) for spec in llama["tensors"]}
    metadata = [(k, KINDS[kinds[0]], None, value) for k, kinds, value in llama["metadata"]]
    write(folder / "m.gguf", metadata, values, split_max_tensors=4)
    return sorted(folder.glob("*.gguf")), values


def test_any_of_several_files_opens_them_all(shards):
    paths, values = shards
    assert len(paths) == math.ceil(len(values) / 4) > 2
    for path in paths:
        file = open_gguf(path)
        assert file.path == paths[0]
        assert file.metadata["split.count"] == len(paths)
        assert model_config(file).layers == 2
        assert file.tensors.keys() == values.keys()
        for name, expected in values.items():
            assert file.tensors[name].blocks.tobytes() == expected.tobytes()


def test_a_model_in_several_files_has_the_weights_of_one_file(shards, recipe_gguf):
    one, several = (
        parameters(jaxsplit.load(path, split_mode="none").model)
        for path in (recipe_gguf("llama"), shards[0][1])
    )
    assert one.keys() == several.keys()
    for path, param in one.items():
        assert np.array_equal(param.get_value(), several[path].get_value()), path


def test_a_missing_file_of_several_is_refused_by_name(shards, tmp_path):
    for missing in (0, 2, len(shards[0]) - 1):
        folder = tmp_path / str(missing)
        folder.mkdir()
        for path in shards[0]:
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / shards[0][missing].name).unlink()
        with pytest.raises(JaxsplitError, match=re.escape(shards[0][missing].name)) as error:
            open_gguf(folder / shards[0][1].name)
        assert "no such file" in one_line(error)


def test_files_of_two_models_are_refused(shards, tmp_path):
    for path in shards[0]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    other = tmp_path / shards[0][2].name
    (tmp_path / shards[0][1].name).write_bytes(other.read_bytes())
    with pytest.raises(JaxsplitError, match=f"{other.name}.*is in two files"):
        open_gguf(other)
    write(other, [], {"unrelated": np.ones(4, np.float32)})
    (tmp_path / shards[0][1].name).write_bytes(shards[0][1].read_bytes())
    with pytest.raises(JaxsplitError, match=r"tensors in \d+ files, but the header says") as error:
        open_gguf(other)
    one_line(error)


# Refusals


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.gguf", None, "no such file"),
        ("empty.gguf", b"", "not a GGUF file|is empty"),
        ("short.gguf", b"GG", "not a GGUF file.*GG"),
        ("photo.gguf", JPEG, r"not a GGUF file.*\\xff\\xd8"),
        ("page.gguf", b"<!doctype html><html></html>", "not a GGUF file.*<!do"),
        ("version.gguf", b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
    ],
)
def test_files_that_are_no_gguf_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(JaxsplitError, match=message) as error:
        open_gguf(path)
    assert str(path) in one_line(error)


def test_a_directory_is_refused_and_its_models_are_listed(tmp_path):
    for hint in ("", r".*a\.gguf.*b\.gguf"):
        with pytest.raises(JaxsplitError, match=f"is a directory{hint}") as error:
            open_gguf(tmp_path)
        assert str(tmp_path) in one_line(error)
        for name in ("a.gguf", "b.gguf"):
            (tmp_path / name).touch()


def regions(path):
    """The file's bytes, and where key-values, tensor infos and data begin; the data's last end."""
    reader = gguf.GGUFReader(path)
    infos = min(tensor.field.offset for tensor in reader.tensors)
    end = max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)
    return path.read_bytes(), {
        "header": (0, 24),
        "metadata": (24, infos),
        "tensor infos": (infos, int(reader.data_offset)),
        "data": (int(reader.data_offset), end),
    }


@pytest.fixture(scope="module")
def vocabulary_model(tmp_path_factory):
    """A small model with a vocabulary, so that cuts fall into arrays of strings too."""
    return write_tiny_model(tmp_path_factory.mktemp("whole") / "tiny.gguf")


@pytest.mark.parametrize("region", ["header", "metadata", "tensor infos", "data"])
def test_a_file_cut_at_any_place_is_refused(tmp_path, vocabulary_model, every_kind, region, rng):
    for whole in (vocabulary_model, every_kind):
        content, where = regions(whole)
        low, high = where[region]
        path = tmp_path / "cut.gguf"
        for cut in {low, high - 1, *rng.integers(low, high, 40).tolist()}:
            path.write_bytes(content[:cut])
            with pytest.raises(JaxsplitError, match=r"not a GGUF file|is truncated") as error:
                open_gguf(path)
            assert str(path) in one_line(error), cut
            assert cut < 4 or f"{cut:,} bytes" in str(error.value)


def test_a_file_with_damaged_bytes_opens_or_is_refused(tmp_path, every_kind, rng):
    content, where = regions(every_kind)
    path = tmp_path / "damaged.gguf"
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(4, where["data"][0], rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_gguf(path)
        except JaxsplitError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)


@pytest.mark.parametrize("item", [KINDS.UINT64, KINDS.STRING, KINDS.ARRAY], ids=lambda k: k.name)
def test_an_array_that_claims_to_be_endless_is_refused(tmp_path, item):
    key = b"endless"
    path = tmp_path / "endless.gguf"
    path.write_bytes(
        b"GGUF"
        + struct.pack("<IQQ", 3, 0, 1)
        + struct.pack("<Q", len(key))
        + key
        + struct.pack("<IIQ", KINDS.ARRAY, item, 2**62)
        + bytes(96)
    )
    with pytest.raises(JaxsplitError, match="is truncated") as error:
        open_gguf(path)
    one_line(error)


def test_deeply_nested_arrays_are_refused(tmp_path):
    path = tmp_path / "nested.gguf"
    level = struct.pack("<IQ", KINDS.ARRAY, 1)
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path.write_bytes(header + struct.pack("<I", KINDS.ARRAY) + level * 20_000)
    with pytest.raises(JaxsplitError, match="truncated or damaged") as error:
        open_gguf(path)
    one_line(error)


def test_text_that_is_not_utf8_opens_or_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", [("test.text", KINDS.STRING, None, "abcdefgh")])
    path.write_bytes(path.read_bytes().replace(b"abcdefgh", b"abc\xff\xfefgh"))
    try:
        assert open_gguf(path).metadata["test.text"].startswith("abc")
    except JaxsplitError as error:
        assert str(path) in str(error)


def test_files_of_the_other_byte_order_are_refused(tmp_path):
    options = {"endianess": gguf.GGUFEndian.BIG}
    path = write(tmp_path / "big.gguf", [], {"a": np.ones(4, np.float32)}, **options)
    with pytest.raises(JaxsplitError, match=r"(?i)endian|byte order") as error:
        open_gguf(path)
    assert str(path) in one_line(error)


def test_an_unknown_architecture_is_refused(tmp_path):
    other = recipe("llama") | {"arch": "perceptron"}
    write_recipe(other, tmp_path / "a.gguf")
    with pytest.raises(
        JaxsplitError, match=r"'perceptron' is not supported.*supported are"
    ) as error:
        jaxsplit.load(tmp_path / "a.gguf")
    message = one_line(error)
    assert str(tmp_path / "a.gguf") in message
    assert all(name in message for name in ARCHITECTURES)


def test_a_tensor_type_without_support_is_refused(tmp_path):
    unsupported = next(
        kind
        for kind in ("I8", "I16", "I32", "I64", "F64")
        if kind not in TYPES and kind in gguf.GGMLQuantizationType.__members__
    )
    name = "blk.1.attn_k.weight"
    llama = recipe("llama")
    tensors = {s["name"]: recipe_values(llama["seed"], s) for s in llama["tensors"]}
    number = {"I": "int", "F": "float"}[unsupported[0]] + unsupported[1:]
    tensors[name] = tensors[name].astype(number)
    metadata = [(k, KINDS[kinds[0]], None, value) for k, kinds, value in llama["metadata"]]
    path = write(tmp_path / "a.gguf", metadata, tensors)
    with pytest.raises(JaxsplitError, match=f"{name}.*type {unsupported} .*supported are") as error:
        jaxsplit.load(path)
    message = one_line(error)
    assert str(path) in message
    assert all(kind in message for kind in TYPES)


def test_a_tensor_type_without_a_name_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", [], {"weights": np.ones(32, np.float32)})
    content = path.read_bytes()
    info = content.index(b"weights") + len(b"weights") + 4 + 8
    path.write_bytes(content[:info] + struct.pack("<I", 4321) + content[info + 4 :])
    with pytest.raises(JaxsplitError, match="4321") as error:
        open_gguf(path)
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"token_embd.weight": None}, "'?token_embd.weight'? is missing"),
        ({"blk.1.ffn_down.weight": None}, "blk.1.ffn_down.weight is missing"),
        ({"output_norm.weight": None}, "output_norm.weight is missing"),
        (
            {"blk.0.attn_q.weight": [128, 128]},
            r"attn_q.weight has shape \(128, 128\).*\(256, 128\)",
        ),
        ({"output_norm.weight": [64]}, r"output_norm.weight has shape \(64,\).*\(128,\)"),
        ({"output.weight": [128, 161]}, r"output.weight has shape \(161, 128\).*\(160, 128\)"),
        ({"output_norm.weight": [128, 2]}, r"output_norm.weight has shape"),
        ({"blk.0.attn_sinks.weight": [4]}, "blk.0.attn_sinks.weight is not used"),
        ({"blk.2.attn_q.weight": [128, 256]}, "blk.2.attn_q.weight is not used"),
        (
            {"blk.0.attn_q.weight": None, "extra": [4]},
            "attn_q.weight is missing.*extra is not used",
        ),
        ({f"extra{i}": [4] for i in range(9)}, r"extra0.*\(and 4 more\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, shapes, message):
    path = changed_recipe(tmp_path / "a.gguf", shapes=shapes)
    with pytest.raises(JaxsplitError, match=message) as error:
        jaxsplit.load(path)
    assert str(path) in one_line(error)


def test_tensors_that_are_known_to_be_useless_are_ignored(tmp_path):
    path = changed_recipe(tmp_path / "a.gguf", shapes={"blk.0.attn_rot_embd": [4]})
    assert jaxsplit.load(path).config.layers == 2


def test_only_some_layers_with_biases_are_refused(tmp_path):
    path = changed_recipe(
        tmp_path / "a.gguf", shapes={"blk.1.attn_q.bias": None}, name="llama-bias"
    )
    with pytest.raises(JaxsplitError, match=r"blk.1.attn_q.bias is missing"):
        jaxsplit.load(path)


@pytest.mark.parametrize(
    "key",
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_metadata_key_is_named(tmp_path, key):
    path = changed_recipe(tmp_path / "a.gguf", {f"llama.{key}": None})
    with pytest.raises(JaxsplitError, match=f"'llama.{key}' is missing") as error:
        jaxsplit.load(path)
    assert str(path) in one_line(error)


def test_a_file_without_architecture_is_refused(tmp_path):
    path = changed_recipe(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes().replace(b"general.architecture", b"general.architektur_"))
    with pytest.raises(JaxsplitError, match=r"'general.architecture' is missing") as error:
        model_config(open_gguf(path))
    assert str(path) in one_line(error)


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        ("attention.head_count", "UINT32", 0, "head_count"),
        ("attention.head_count", "STRING", "four", "head_count"),
        ("attention.head_count_kv", "UINT32", 3, "head"),  # not a divisor of the 4 heads
        ("attention.head_count_kv", "UINT32", 8, "head"),
        ("block_count", "UINT32", 0, "block_count"),
        ("context_length", "UINT32", 0, "context_length"),
        ("rope.dimension_count", "UINT32", 66, "rope.dimension_count"),  # wider than a head
        ("rope.dimension_count", "UINT32", 63, "rope.dimension_count"),  # odd
        ("rope.scaling.type", "STRING", "spiral", "'spiral' is not supported.*none, linear, yarn"),
    ],
)
def test_a_metadata_value_that_cannot_be_is_named(tmp_path, key, kind, value, message):
    changed = recipe("llama")
    changed["metadata"] = [m for m in changed["metadata"] if m[0] != f"llama.{key}"]
    changed["metadata"].append((f"llama.{key}", [kind], value))
    write_recipe(changed, tmp_path / "a.gguf")
    with pytest.raises(JaxsplitError, match=message) as error:
        model_config(open_gguf(tmp_path / "a.gguf"))
    assert str(tmp_path / "a.gguf") in one_line(error)
