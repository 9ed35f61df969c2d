"""GGUF files: what is read, and what is refused."""

import math
import os
import re
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from helpers import changed_recipe, recipe, recipe_values, write_recipe
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.architectures import ARCHITECTURES, model_config
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import open_gguf
from jaxsplit.llm import open_model
from jaxsplit.paths import os_errors, user_path
from jaxsplit.quant import TYPES
from jaxsplit.weights.loader import parameters

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
    with pytest.raises(JaxsplitError, match=f"{other.name} is file 3 of .*and so is") as error:
        open_gguf(other)
    one_line(error)
    write(other, [], {"unrelated": np.ones(4, np.float32)})
    (tmp_path / shards[0][1].name).write_bytes(shards[0][1].read_bytes())
    with pytest.raises(JaxsplitError, match=f"{other.name} is file 1 of 1 .*one model") as error:
        open_gguf(tmp_path / shards[0][0].name)
    one_line(error)


def split(folder, names, groups, declared=None, **keys):
    """The tensors `a`, `b`, ... in files of these names, as `groups` says; `keys` are changed."""
    counts = {"split.count": len(names), "split.tensors.count": declared or len("".join(groups))}
    for i, (name, group) in enumerate(zip(names, groups, strict=True)):
        numbers = {"split.no": i} | counts | keys.get(f"file{i}", {})
        metadata = [(key, KINDS.UINT16, None, n) for key, n in numbers.items() if n is not None]
        tensors = {t: np.full(3, ord(t), np.float32) for t in group}
        write(folder / name, [("test.no", KINDS.UINT8, None, i), *metadata], tensors)
    return [folder / name for name in names]


def check_split(path, tensors):
    file = open_gguf(path)
    assert sorted(file.tensors) == sorted(tensors)
    for name, tensor in file.tensors.items():
        assert tensor.blocks.tobytes() == np.full(3, ord(name), np.float32).tobytes()
    return file


@pytest.mark.parametrize(
    "names",
    [
        ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        ["M-00001-OF-00002.GGUF", "M-00002-OF-00002.GGUF"],
        ["m-1-of-2.gguf", "m-2-of-2.gguf"],
        ["m-00001-of-00002", "m-00002-of-00002"],
        ["m-00002-of-00002.gguf", "m-00001-of-00002.gguf"],  # swapped: the headers count
        ["m-of-1-of-2.x.gguf", "m-of-2-of-2.x.gguf"],
    ],
)
def test_files_of_a_model_are_found_by_number_and_ordered_by_header(tmp_path, names):
    for path in split(tmp_path, names, ["ab", "c"]):
        file = check_split(path, "abc")
        assert file.path.name == names[0]
        assert file.metadata["test.no"] == 0  # the first file's keys win


@pytest.mark.parametrize("groups", [["", "ab", "c"], ["abc", "", ""], ["a", "", "bc"]])
def test_files_without_tensors(tmp_path, groups):
    names = [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for path in split(tmp_path, names, groups):
        check_split(path, "abc")


def test_links_to_files_by_other_names(tmp_path):
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    for i, path in enumerate(split(tmp_path, names, ["ab", "c"])):
        shutil.move(path, tmp_path / f"blob{i}")
        path.symlink_to(f"blob{i}")
    check_split(tmp_path / names[1], "abc")


@pytest.mark.parametrize("count", [None, 0, 1])
def test_a_merged_file_may_have_the_name_of_one_of_several(tmp_path, count):
    """llama-gguf-split --merge sets the count to 0."""
    header = {"split.no": None if count is None else 0, "split.count": count}
    [path] = split(tmp_path, ["m-00001-of-00003.gguf"], ["abc"], file0=header)
    check_split(path, "abc")


def test_the_first_file_may_have_all_tensors_and_no_others_beside_it(tmp_path):
    names = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    first, second = split(tmp_path, names, ["abc", ""])
    second.unlink()
    check_split(first, "abc")


@pytest.mark.parametrize(
    ("names", "groups", "header", "message"),
    [
        (["part1.gguf", "part2.gguf"], ["a", "b"], {}, "part1.gguf is file 1 of the 2"),
        (
            ["m-1-of-2.gguf", "m-2-of-2.gguf"],
            ["a", "b"],
            {"split.count": 3},
            "m-2-of-2.gguf is file 2 of 2 .*m-1-of-2.gguf one of 3",
        ),
        (["m-1-of-2.gguf", "m-2-of-2.gguf"], ["a", "b"], {"split.no": 1}, "is file 2 of 2.*so is"),
        (["m-1-of-2.gguf", "m-2-of-2.gguf"], ["a", "b"], {"split.no": 9}, "is file 10 of 2"),
        (["m-1-of-2.gguf", "m-2-of-2.gguf"], ["a", "a"], {}, "'a' is in two files"),
        (
            ["m-1-of-2.gguf", "m-2-of-2.gguf"],
            ["a", "b"],
            {"split.tensors.count": 5},
            "2 tensors in 2 files, but the header says 5",
        ),
        (
            ["m-1-of-1.gguf"],
            ["a"],
            {"split.count": 65535, "split.tensors.count": 5},
            "no such file: .*m-2-of-1.gguf .one of the 65535",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, names, groups, header, message):
    path = split(tmp_path, names, groups, file0=header)[0]
    with pytest.raises(JaxsplitError, match=message) as error:
        open_gguf(path)
    assert str(tmp_path) in one_line(error)


def test_files_joined_by_cat_are_refused(tmp_path):
    paths = split(tmp_path, ["m-1-of-2.gguf", "m-2-of-2.gguf"], ["a", "b"])
    path = tmp_path / "joined.gguf"
    path.write_bytes(b"".join(p.read_bytes() for p in paths))
    with pytest.raises(JaxsplitError, match="--merge.*cat does not do") as error:
        open_gguf(path)
    one_line(error)


@pytest.mark.parametrize("value", [("INT32", -1), ("STRING", "two"), ("FLOAT32", 2.0)])
def test_a_count_of_files_that_is_no_count_is_refused(tmp_path, value):
    kind, count = value
    path = write(tmp_path / "m-1-of-2.gguf", [("split.count", KINDS[kind], None, count)])
    with pytest.raises(JaxsplitError, match=r"split.count is .*expected a number") as error:
        open_gguf(path)
    one_line(error)


# Paths


@pytest.mark.parametrize("opened", [open_gguf, open_model])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "the path is empty"),
        (b"model.gguf", r"b'model.gguf', expected a string"),
        (7, "is 7, expected a string"),
        (None, "is None, expected a string"),
        ("a\0b.gguf", "a character that no file name can have"),
        ("\ud800.gguf", "a character that no file name can have"),
        ("x" * 300, "cannot be read: File name too long"),
        ("x/" * 3000, "cannot be read: File name too long"),
        (__file__ + "/model.gguf", "cannot be read: Not a directory"),
        ("/dev/zero", "is no regular file"),
        ("no such\nmodel.gguf", r"no such file: no such\\nmodel.gguf"),
    ],
)
def test_paths_that_cannot_be_opened_are_one_line(opened, path, message):
    with pytest.raises(JaxsplitError, match=message) as error:
        opened(path)
    one_line(error)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(JaxsplitError, match="is no regular file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_links_that_lead_nowhere_or_in_circles_are_refused(tmp_path):
    (tmp_path / "broken.gguf").symlink_to("missing")
    (tmp_path / "circle.gguf").symlink_to("circle.gguf")
    with pytest.raises(JaxsplitError, match=r"no such file: .*broken.gguf"):
        open_gguf(tmp_path / "broken.gguf")
    with pytest.raises(JaxsplitError, match=r"circle.gguf cannot be read: .*symbolic links"):
        open_gguf(tmp_path / "circle.gguf")


@pytest.mark.parametrize("given", [str, Path])
def test_the_home_directory_is_found(tmp_path, monkeypatch, given):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "x.gguf", [], {"a": np.ones(4, np.float32)})
    assert open_gguf(given("~/x.gguf")).path == path
    assert user_path("~nobody at all/x") == Path("~nobody at all/x")
    monkeypatch.chdir(tmp_path)
    path.rename(tmp_path / "~x.gguf")
    assert open_gguf(given("~x.gguf")).tensors


def test_no_permission_is_one_line(tmp_path, monkeypatch):
    """Root may read everything: the operating system's answer is given in its place."""
    folder = tmp_path / "locked"
    folder.mkdir()
    path = write(folder / "x.gguf", [], {"a": np.ones(4, np.float32)})
    folder.chmod(0)
    if os.geteuid() == 0:

        def refuse(self, **_):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "stat", refuse)
    try:
        with pytest.raises(JaxsplitError, match=r"x.gguf cannot be read: Permission") as error:
            open_gguf(path)
        one_line(error)
    finally:
        os.chmod(folder, 0o700)


def test_errors_of_the_operating_system_are_one_line_each():
    for number, action in ((5, "read"), (28, "written"), (2, "written")):
        message = f"a/b cannot be {action}: {os.strerror(number)}"
        with pytest.raises(JaxsplitError, match=re.escape(message)), os_errors(Path("a/b"), action):
            raise OSError(number, os.strerror(number))


# Refusals


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.gguf", None, "no such file"),
        ("empty.gguf", b"", "not a GGUF file|is empty"),
        ("short.gguf", b"GG", "not a GGUF file.*GG"),
        ("photo.gguf", JPEG, r"not a GGUF file.*\\xff\\xd8"),
        ("page.gguf", b"<!doctype html><html></html>", "not a GGUF file.*<!do"),
        (
            "version.gguf",
            b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
            "version 99; supported are 2 and 3",
        ),
        (
            "old.gguf",
            b"GGUF" + struct.pack("<III", 1, 0, 0),
            "version 1; supported.*newer converter",
        ),
        (
            "new.gguf",
            b"GGUF" + struct.pack("<IQQ", 4, 0, 0),
            "version 4; supported.*update jaxsplit",
        ),
        ("null.gguf", b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version 0; supported"),
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


def text(value):
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def header(keys=(), tensors=(), counts=None, data=b""):
    """A file's bytes, of packed keys and tensors; `counts` are what it says of them instead."""
    counts = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + data


def array(key, item, count, data=b""):
    return text(key) + struct.pack("<IIQ", KINDS.ARRAY, item, count) + data


def tensor(name="t", dims=(4,), kind=0, offset=0, count=None):
    count = len(dims) if count is None else count
    packed = struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)
    return text(name) + packed


def number(key, value, kind="UINT32"):
    return text(key) + struct.pack("<I", KINDS[kind]) + struct.pack("<I", value)


def test_what_the_next_tests_write_opens(tmp_path):
    path = tmp_path / "a.gguf"
    values = np.arange(8, dtype=np.float32)
    tensors = [tensor("a"), tensor("b", (2, 2), offset=32), tensor("scalar", (), offset=64)]
    path.write_bytes(header([number("k", 7)], tensors, data=values.tobytes() + bytes(68)))
    file = open_gguf(path)
    assert file.metadata["k"] == 7
    assert file.tensors["a"].blocks.tobytes() == values[:4].tobytes()
    assert [t.shape for t in file.tensors.values()] == [(4,), (2, 2), (1,)]


ENDLESS = {
    "tensors": header(counts=(2**40, 0)),
    "keys": header(counts=(0, 2**40)),
    "both": header(counts=(2**64 - 1, 2**64 - 1)),
    "one tensor more": header([], [tensor()], (2, 0), bytes(16)),
    "key": header([struct.pack("<Q", 2**60) + b"key"]),
    "text": header([text("k") + struct.pack("<IQ", KINDS.STRING, 2**63)]),
    "numbers": header([array("k", KINDS.UINT64, 2**60)]),
    "bytes": header([array("k", KINDS.UINT8, 2**64 - 1)]),
    "texts": header([array("k", KINDS.STRING, 2**60)]),
    "items that fit": header([array("k", KINDS.UINT8, 2**25, bytes(2**25))]),
    "text that fits": header([text("k") + struct.pack("<I", KINDS.STRING) + text(bytes(2**25))]),
    "name": header([], [struct.pack("<Q", 2**32)]),
    "dimensions": header([], [tensor(count=2**31)]),
    "five dimensions": header([], [tensor(dims=(1,) * 5)], data=bytes(4)),
    "size": header([], [tensor(dims=(2**63,))], data=bytes(64)),
    "size beyond 64 bits": header([], [tensor(dims=(2**32, 2**32, 4))], data=bytes(64)),
    "offset": header([], [tensor(offset=2**63)], data=bytes(64)),
    "last byte": header([], [tensor()], data=bytes(15)),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_sizes_are_checked_before_anything_is_built(tmp_path, name):
    path = tmp_path / "a.gguf"
    path.write_bytes(ENDLESS[name])
    start = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(JaxsplitError, match="is truncated or damaged: ") as error:
        open_gguf(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(path) in one_line(error)
    assert peak < 2**20
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header([number("k", 1), number("k", 2)]), "the key 'k' is there twice"),
        (header([], [tensor(), tensor(offset=32)], data=bytes(64)), "tensor 't' is there twice"),
        (header([], [tensor(), tensor("u")], data=bytes(64)), "'u' lies over tensor 't'"),
        (header([], [tensor(offset=4)], data=bytes(64)), "'t' starts at 4, no multiple of 32"),
        (header([], [tensor(dims=(4, 0))], data=bytes(64)), r"'t' has shape \(0, 4\): no weights"),
        (header([], [tensor(dims=(31,), kind=8)], data=bytes(64)), "'t' has rows of 31 weights"),
        (header([text("k") + struct.pack("<I", 77)]), "'k' has type 77, which is no GGUF type"),
        (header([array("k", 13, 1, bytes(8))]), "'k' has type 13, which is no GGUF type"),
        (header([array("k", KINDS.ARRAY, 2**60)]), "'k' is an array of arrays"),
        (
            header([array("k", KINDS.ARRAY, 1, struct.pack("<IQ", KINDS.ARRAY, 1) * 20_000)]),
            "'k' is an array of arrays",
        ),
        (
            header([], [tensor("a\nb", (4,)), tensor("a\nb", (4,))], data=bytes(64)),
            r"tensor 'a\\nb' is there twice",
        ),
        *(
            (
                header([number("general.alignment", value, kind)], [tensor()], data=bytes(99)),
                r"general.alignment is .*, expected a power of two",
            )
            for value, kind in (
                (0, "UINT32"),
                (12, "UINT32"),
                (-1 % 2**32, "INT32"),
                (1, "FLOAT32"),
            )
        ),
        (
            header([number("general.alignment", 2**31)], [tensor()], data=bytes(99)),
            "'t' would end at byte 2,147,483,664",
        ),
    ],
)
def test_headers_that_cannot_be_are_refused(tmp_path, content, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(JaxsplitError, match=message) as error:
        open_gguf(path)
    assert str(path) in one_line(error)
    assert len(one_line(error)) < 2500


def test_an_architecture_that_is_no_name_is_refused(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(header([array("general.architecture", KINDS.STRING, 1, text("llama"))]))
    with pytest.raises(JaxsplitError, match=r"general.architecture is \['llama'\]") as error:
        model_config(open_gguf(path))
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
