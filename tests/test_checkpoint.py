"""Checkpoint directories: what one mesh writes, any mesh restores."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import DATA, last_tokens, make_recipe

import jaxsplit
from jaxsplit.checkpoint import open_checkpoint, save_checkpoint
from jaxsplit.engine import SamplingConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import model_config, open_gguf

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
    lm.engine.start(TOKENS, SamplingConfig(temperature=0.0))
    tokens = [*last_tokens(lm.engine), *lm.engine.loop(12, 12)[0].tolist()]
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


def test_damaged_checkpoints_are_refused(recipe_gguf, tmp_path):
    checkpoint = convert(recipe_gguf("llama"), tmp_path / "checkpoint")
    header = checkpoint / "model.json"
    text = header.read_text()
    header.write_text(text[: len(text) // 2])
    with pytest.raises(JaxsplitError, match=r"model.json is damaged.*convert again"):
        jaxsplit.load(checkpoint)
    header.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(JaxsplitError, match="format 99"):
        jaxsplit.load(checkpoint)
    header.write_text(text)
    for file in (checkpoint / "tensors" / "blk.1").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(JaxsplitError, match=r"blk.1 is damaged.*convert again"):
        jaxsplit.load(checkpoint)


def run(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
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
    missing = run("converters/gguf_info.py", tmp_path / "missing.gguf")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
