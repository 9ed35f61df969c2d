"""Checkpoint directories: what one mesh writes, any mesh restores."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, last_tokens, make_recipe, quick_environment

import jaxsplit
from jaxsplit.architectures import model_config
from jaxsplit.engine import SamplingConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import open_gguf
from jaxsplit.llm import open_model
from jaxsplit.weights.checkpoint import is_checkpoint, open_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parent.parent
TOKENS = np.random.default_rng().integers(0, 160, 20).tolist()


def convert(path, out, **options):
    file = open_gguf(path)
    save_checkpoint(file, model_config(file), out, **options)
    return out


def chosen(path, devices, **options):
    """Logits, and ids that follow a prompt."""
    lm = jaxsplit.load(path, devices=devices, dtype="float32", ctx_size=64, **options)
    lm.closed_batch.start(TOKENS, SamplingConfig(temperature=0.0))
    tokens = [*last_tokens(lm.closed_batch), *lm.closed_batch.loop(12, 12)[0].tolist()]
    return lm.logits(TOKENS), tokens


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file of several types, and the checkpoint made of it."""
    path = DATA / "quant" / "quant-mix-Q4_K_M.gguf"
    return path, convert(path, tmp_path_factory.mktemp("checkpoints") / "mixed")


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_a_checkpoint_is_the_same_model_on_any_mesh(mixed, devices):
    """Evenly split, padded, and with heads that are copied and blocks that are cut."""
    path, checkpoint = mixed
    logits, tokens = chosen(path, devices)
    restored, restored_tokens = chosen(checkpoint, devices)
    assert np.array_equal(restored, logits)
    assert restored_tokens == tokens


@pytest.mark.parametrize(("heads", "devices"), [((9, 3), 4), ((6, 1), 2)])
def test_heads_that_do_not_divide_are_restored(recipe_gguf, tmp_path, heads, devices):
    recipe = make_recipe(f"stored-{heads[0]}", heads=heads[0], kv_heads=heads[1])
    path = recipe_gguf(recipe, {"norm.weight": "F32", ".weight": "Q8_0"})
    checkpoint = convert(path, tmp_path / "checkpoint")
    assert np.array_equal(chosen(checkpoint, devices)[0], chosen(path, devices)[0])


@pytest.mark.parametrize(
    "name", ["llama-bias", "llama-tied-ropefreqs", "phi3", "deepseek2-nomla", "qwen35moe"]
)
def test_parts_of_tensors_stacks_and_vectors_are_restored(recipe_gguf, tmp_path, name):
    path = recipe_gguf(name)
    checkpoint = convert(path, tmp_path / name)
    expected, restored = (
        jaxsplit.load(source, devices=3, dtype="float32", ctx_size=64).logits(TOKENS)
        for source in (path, checkpoint)
    )
    assert np.array_equal(restored, expected)


@pytest.mark.parametrize("devices", [1, 3])
def test_norms_and_biases_of_quantized_types_are_restored(recipe_gguf, tmp_path, devices):
    ends = ("exps.bias", "norm.weight", "attn_output.bias", "attn_q.bias")
    path = recipe_gguf("gpt-oss", dict.fromkeys(ends, "Q8_0"))
    checkpoint = convert(path, tmp_path / "checkpoint")
    assert open_checkpoint(checkpoint).tensors["blk.0.attn_norm.weight"].type == "Q8_0"
    expected, restored = (
        jaxsplit.load(source, devices=devices, dtype="float32", ctx_size=64).logits(TOKENS)
        for source in (path, checkpoint)
    )
    assert np.array_equal(restored, expected)


def test_dequantized_checkpoints(mixed, tmp_path):
    path, _ = mixed
    checkpoint = convert(path, tmp_path / "dequantized", weights="bfloat16")
    types = {tensor.type for tensor in open_checkpoint(checkpoint).tensors.values()}
    assert types == {"BF16", "F32"}
    assert np.array_equal(chosen(checkpoint, 2)[0], chosen(path, 2, weights="bfloat16")[0])


def test_metadata_survive(mixed):
    path, checkpoint = mixed
    file, stored = open_gguf(path), open_checkpoint(checkpoint)
    assert stored.metadata == file.metadata
    assert model_config(stored) == model_config(file)
    config = json.loads((checkpoint / "config.json").read_text())
    assert [layer["mixer"]["heads"] for layer in config["blocks"].values()] == [4]


def test_an_interrupted_conversion_leaves_nothing(mixed, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(mixed[0], tmp_path / "out", progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_touched(mixed, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(JaxsplitError, match="exists already"):
        convert(mixed[0], tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "mine"


@pytest.fixture(scope="module")
def stored(recipe_gguf, tmp_path_factory):
    """A checkpoint, which tests copy and damage, and the relative paths of its files."""
    checkpoint = convert(recipe_gguf("llama"), tmp_path_factory.mktemp("stored") / "checkpoint")
    found = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*"))
    return checkpoint, [path for path in found if (checkpoint / path).is_file()]


@pytest.fixture
def copied(stored, tmp_path):
    return Path(shutil.copytree(stored[0], tmp_path / "checkpoint"))


def check_refused(path, message):
    with pytest.raises(JaxsplitError, match=message) as error:
        jaxsplit.load(path, devices=1)
    text = str(error.value)
    assert str(path) in text and "convert again" in text and "\n" not in text and len(text) < 500


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "folder"])
def test_each_part_that_is_missing_or_cut_is_named(stored, copied, damage):
    """Before anything is loaded."""
    checkpoint, files = stored
    assert len(files) > 15
    for name in files:
        path, content = copied / name, (checkpoint / name).read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        elif damage != "missing":
            path.write_bytes({"empty": b"", "cut": content[:-1], "longer": content + b"x"}[damage])
        if name.name == "config.json":  # for people
            open_checkpoint(copied)
        elif name.name == "model.json" and damage == "folder":
            with pytest.raises(JaxsplitError, match=r"checkpoint cannot be read: Is a directory"):
                open_checkpoint(copied)
        else:
            check_refused(copied, f"{name.name} (is missing|has|is damaged)")
        shutil.rmtree(path) if damage == "folder" else path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert open_checkpoint(copied).tensors


def test_missing_folders_are_named(copied):
    shutil.rmtree(copied / "tensors" / "blk.1")
    check_refused(copied, "is incomplete: tensors/blk.1.* is missing")
    (copied / "tensors" / "blk.1").write_text("a file")
    check_refused(copied, "is incomplete: tensors/blk.1.* is missing")
    shutil.rmtree(copied / "tensors")
    check_refused(copied, "is incomplete: tensors/blk.0 is missing")


def test_unfinished_checkpoints_are_told_from_other_directories(copied, tmp_path):
    (copied / "model.json").unlink()
    assert is_checkpoint(copied)
    check_refused(copied, "is incomplete: model.json is missing")
    (tmp_path / "empty").mkdir()
    assert not is_checkpoint(tmp_path / "empty") and not is_checkpoint(tmp_path / "missing")
    with pytest.raises(JaxsplitError, match="a .gguf file or a checkpoint directory is needed"):
        open_model(tmp_path / "empty")


# Orbax leaves reads behind that find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_without_a_list_of_files_are_read(stored, copied):
    """Of versions that made none; what is missing is noticed when it is read."""
    header = json.loads((copied / "model.json").read_text())
    sizes = header.pop("files")
    (copied / "model.json").write_text(json.dumps(header))
    assert open_checkpoint(copied).tensors.keys() == open_checkpoint(stored[0]).tensors.keys()
    largest = max((name for name in sizes if name.startswith("blk.1")), key=sizes.get)
    (copied / "tensors" / largest).write_bytes(b"")
    check_refused(copied, "tensors/blk.1 is damaged")


def changed(key, *row):
    return lambda header: header["tensors"].__setitem__(key, list(row))


NORM = "blk.0.attn_norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.update(format=99), "has checkpoint format 99, this version reads 2"),
        (lambda header: header.pop("format"), "model.json is damaged .'format'"),
        (lambda header: header.pop("tensors"), "model.json is damaged .'tensors'"),
        (lambda header: header.update(tensors=[1]), "model.json is damaged"),
        (lambda header: header.update(metadata=7), "model.json is damaged"),
        (lambda header: header.update(files=[7]), "model.json is damaged"),
        (changed(NORM, "F32", [128]), "model.json is damaged"),
        (changed(NORM, "F31", [128], "blk.0"), f"model.json is damaged .*{NORM}"),
        (changed(NORM, "F32", [-128], "blk.0"), f"model.json is damaged .*{NORM}"),
        (changed(NORM, "F32", ["128"], "blk.0"), f"model.json is damaged .*{NORM}"),
        (changed(NORM, "F32", [], "blk.0"), f"model.json is damaged .*{NORM}"),
        (changed(NORM, "Q4_K", [128], "blk.0"), f"model.json is damaged .*{NORM}"),
        (changed(NORM, "F32", [128], "../../etc"), f"model.json is damaged .*{NORM}"),
        (changed(NORM, "F32", [128], 7), "model.json is damaged"),
        (changed(NORM, "F32", [128], "blk.7"), "tensors/blk.7 is missing"),
        (changed(NORM, "F32", [128], "blk.1"), f"blk.1 is damaged .tensor '{NORM}' is missing"),
        (changed(NORM, "F16", [128], "blk.0"), r"blk.0 is damaged .*shape \(128, 4\), expected"),
        (
            changed("output.weight", "F32", [160, 128], "blk.0"),
            "blk.0 is damaged .tensor 'output.weight' is missing",
        ),
    ],
)
def test_headers_that_do_not_fit_are_refused(copied, change, message):
    """An array of another shape, too, which Orbax would pad or cut."""
    header = json.loads((copied / "model.json").read_text())
    change(header)
    (copied / "model.json").write_text(json.dumps(header))
    check_refused(copied, message)


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"\xff", b"[" * 10**5])
def test_headers_that_are_no_json_are_refused(copied, content):
    (copied / "model.json").write_bytes(content)
    check_refused(copied, "model.json is damaged")


def test_no_permission_is_one_line(copied, monkeypatch):
    """Root may read everything: the operating system's answer is given in its place."""
    copied.chmod(0)
    if os.geteuid() == 0:

        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(JaxsplitError, match="checkpoint cannot be read: Permission denied"):
        open_model(copied)
    copied.chmod(0o700)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "is empty"),
        ("x" * 300, "cannot be written: File name too long"),
        (f"{__file__}/out", "cannot be written: Not a directory"),
    ],
)
def test_directories_that_cannot_be_written_are_refused(mixed, out, message):
    with pytest.raises(JaxsplitError, match=message):
        convert(mixed[0], out)


def test_a_link_is_not_overwritten(mixed, tmp_path):
    (tmp_path / "out").symlink_to("missing")
    with pytest.raises(JaxsplitError, match="exists already"):
        convert(mixed[0], tmp_path / "out")


def test_a_full_disk_is_seen_first(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    with pytest.raises(JaxsplitError, match=r"needs at least [\d,]{7,} bytes, 1,000 are free"):
        convert(mixed[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
@pytest.mark.parametrize("limit", [0, 1000, 20_000])
def test_a_disk_that_gets_full_is_one_line_and_leaves_nothing(mixed, tmp_path, limit):
    """A limit of the size of files stands for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(JaxsplitError, match="out cannot be written: File too large") as error:
            convert(mixed[0], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=quick_environment(),
    )


def test_the_converters_as_programs(mixed, tmp_path):
    out = tmp_path / "out"
    done = run("converters/gguf_to_orbax.py", f"--model={mixed[0]}", f"--out={out}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote {out}\n")
    again = run("converters/gguf_to_orbax.py", f"--model={mixed[0]}", f"--out={out}")
    assert again.returncode == 2
    assert again.stderr.startswith(f"jaxsplit: {out} exists already")
    for path in (mixed[0], out):
        shown = json.loads(run("converters/gguf_info.py", path, "--json").stdout)
        assert shown["architecture"] == "llama"
        assert shown["types"]["Q4_K"]["tensors"] == 13
        assert list(shown["config"]["blocks"]) == ["0-1"]
        assert shown["config"]["blocks"]["0-1"]["mixer"]["heads"] == 4
        assert "Q6_K" in run("converters/gguf_info.py", path).stdout
    for path in (tmp_path / "missing.gguf", ""):
        refused = run("converters/gguf_info.py", path)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    refused = run("converters/gguf_to_orbax.py", f"--model={out}", f"--out={tmp_path / 'again'}")
    assert "is a checkpoint directory already" in refused.stderr
