"""Perplexity and Kullback-Leibler divergence, against an independent float64 computation."""

import json
import math
import re
import sys
import zipfile

import numpy as np
import pytest
from absl.testing import flagsaver
from helpers import DATA, command_module
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.cli import program
from jaxsplit.errors import JaxsplitError
from jaxsplit.perplexity import (
    PERCENTILES,
    LogitsWriter,
    SavedLogits,
    divergence,
    evaluate,
    score,
    split_text,
)

pytestmark = pytest.mark.usefixtures("quick_module")

TEXT = "The quick brown fox, it is said, tells the hello to all the lazy dogs.\n" * 3
CONTEXT = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("perplexity")


@pytest.fixture(scope="module")
def models(folder):
    """Two models, of which the second has noise in its output matrix."""
    rng = np.random.default_rng(1)
    vocab = 263
    head = rng.normal(size=(vocab, 64), scale=0.4).astype(np.float32)
    noise = rng.normal(size=head.shape, scale=0.02).astype(np.float32)
    return [
        write_tiny_model(folder / f"{name}.gguf", tensors={"output.weight": weight})
        for name, weight in (("base", head), ("other", head + noise))
    ]


@pytest.fixture(scope="module")
def lms(models):
    return [jaxsplit.load(path, devices=1, ctx_size=CONTEXT) for path in models]


@pytest.fixture(scope="module")
def text_file(folder):
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path


def by_hand(lm, ids, bos=None):
    """Log-probabilities of all tokens, and the token, of each that is scored; one by one."""
    scored = []
    for start in range(0, len(ids) - CONTEXT + 1, CONTEXT):
        chunk = ids[start : start + CONTEXT]
        fed = chunk if bos is None else [bos, *chunk[1:]]
        logits = lm.logits(fed).astype(np.float64)
        for at in range(CONTEXT // 2, CONTEXT - 1):
            row = [float(value) for value in logits[at]]
            whole = max(row) + math.log(math.fsum(math.exp(value - max(row)) for value in row))
            scored.append(([value - whole for value in row], chunk[at + 1]))
    return scored


def mean_and_error(values):
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return mean, math.sqrt(variance / (len(values) - 1))


@pytest.mark.parametrize("bos", [None, 5])
def test_perplexity_is_that_of_a_plain_computation(lms, bos):
    ids = lms[0].tokenizer.encode(TEXT)
    assert len(ids) % CONTEXT  # the rest is left out
    result = evaluate(lms[0].logits, split_text(ids, CONTEXT, bos))
    scored = by_hand(lms[0], ids, bos)
    nll, error = mean_and_error([-row[token] for row, token in scored])
    assert result.tokens == len(scored) == result.chunks * (CONTEXT // 2 - 1)
    assert result.perplexity.value == pytest.approx(math.exp(nll), rel=1e-12)
    assert result.perplexity.error == pytest.approx(math.exp(nll) * error, rel=1e-9)
    assert result.divergence is None


def test_perplexity_is_that_of_the_reference(smollm2_path):
    """llama.cpp's log-probabilities of the tokens of a text, in one chunk."""
    data = np.load(DATA / "smollm2" / "text.npz")
    tokens, log_probs = data["english_tokens"], data["english_logprobs"]
    context = len(tokens)
    scored = log_probs[context // 2 :]  # of the token after each
    lm = jaxsplit.load(smollm2_path, devices=1, ctx_size=256)
    result = evaluate(lm.logits, split_text(tokens.tolist(), context, None))
    assert result.tokens == len(scored) == context - 1 - context // 2
    assert result.perplexity.value == pytest.approx(math.exp(-scored.mean()), rel=1e-3)
    error = scored.std() / math.sqrt(len(scored) - 1)
    assert result.perplexity.error == pytest.approx(math.exp(-scored.mean()) * error, rel=1e-2)


def test_odd_contexts_and_short_texts():
    chunks = split_text(range(20), 7, None)
    assert chunks.tolist() == [[*range(7)], [*range(7, 14)]]
    assert split_text(range(20), 7, 9, 1).tolist() == [[9, *range(1, 7)]]
    logits = np.random.default_rng(0).normal(size=(7, 20)).astype(np.float32)
    assert evaluate(lambda _: logits, chunks).tokens == 2 * 3
    with pytest.raises(JaxsplitError, match=r"the text has 20 tokens, a chunk 21; .*ctx_size="):
        split_text(range(20), 21, None)
    with pytest.raises(JaxsplitError, match=r"a chunk of 3 tokens is too short; set ctx_size=4"):
        split_text(range(20), 3, None)


def test_the_divergence_is_that_of_a_plain_computation(lms, folder):
    """To what float16 keeps of log-probabilities: 2**-12 of each, at random."""
    ids = lms[0].tokenizer.encode(TEXT)
    chunks = split_text(ids, CONTEXT, None)
    path = str(folder / "plain.npz")
    with LogitsWriter(path, chunks, 263, {}) as out:
        base = evaluate(lms[0].logits, chunks, out=out)
    found = evaluate(lms[1].logits, chunks, base=SavedLogits(path)).divergence
    ps, qs = by_hand(lms[0], ids), by_hand(lms[1], ids)
    kl = [
        math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        for (p, _), (q, _) in zip(ps, qs, strict=True)
    ]
    mean, error = mean_and_error(kl)
    assert mean > 1e-3
    assert found.kl.value == pytest.approx(mean, rel=5e-3)
    assert found.kl.error == pytest.approx(error, rel=2e-2)
    for percent, expected in zip(PERCENTILES, np.percentile(kl, PERCENTILES), strict=True):
        assert found.percentiles[percent] == pytest.approx(expected, rel=5e-2, abs=1e-4)
    same = [np.argmax(p) == np.argmax(q) for (p, _), (q, _) in zip(ps, qs, strict=True)]
    assert 0 < found.same_top.value < 1
    assert (found.same_top.value, found.same_top.error) == pytest.approx(mean_and_error(same))
    assert found.base == base.perplexity
    pairs = zip(ps, qs, strict=True)
    change, error = mean_and_error([p[token] - q[token] for (p, token), (q, _) in pairs])
    assert found.ratio.value == pytest.approx(math.exp(change), rel=1e-9)
    assert found.ratio.error == pytest.approx(math.exp(change) * error, rel=1e-6)


def test_a_model_does_not_differ_from_itself(lms, folder):
    chunks = split_text(lms[0].tokenizer.encode(TEXT), CONTEXT, None)
    path = str(folder / "itself.npz")
    with LogitsWriter(path, chunks, 263, {}) as out:
        evaluate(lms[0].logits, chunks, out=out)
    found = evaluate(lms[0].logits, chunks, base=SavedLogits(path)).divergence
    assert (found.kl.value, found.kl.error) == (0.0, 0.0)
    assert set(found.percentiles.values()) == {0.0}
    assert (found.ratio.value, found.ratio.error, found.same_top.value) == (1.0, 0.0, 1.0)


def test_improbable_tokens_are_no_fault():
    """A probability may be 0 in float16's range, and in float64's."""
    logits = np.array([[0.0, -1e5, -800.0], [0.0, -1e30, 3.0]], np.float32)
    scores = score(logits, np.array([1, 2]))
    assert scores.nll == pytest.approx([1e5, math.log1p(math.exp(-3))])
    assert np.isfinite(scores.log_probs).all()
    shifted = score(logits[:, ::-1], np.array([0, 1])).log_probs
    assert np.isfinite(divergence(scores.log_probs, shifted)).all()
    assert not divergence(scores.log_probs, scores.log_probs).any()
    with pytest.raises(JaxsplitError, match="not finite: try dtype=float32"):
        score(np.array([[0.0, np.nan]], np.float32), np.array([0]))


def test_the_file_is_what_its_description_says(lms, folder):
    chunks = split_text(lms[0].tokenizer.encode(TEXT), CONTEXT, None)
    path = folder / "described.npz"
    with LogitsWriter(str(path), chunks, 263, {65: "A"}) as out:
        evaluate(lms[0].logits, chunks, out=out)
    arrays = np.load(path)
    scored = CONTEXT // 2 - 1
    assert {name: (arrays[name].dtype.name, arrays[name].shape) for name in arrays} == {
        "meta": ("uint8", arrays["meta"].shape),
        "log_probs": ("float16", (len(chunks), scored, 263)),
        "tokens": ("int32", chunks.shape),
        "nll": ("float64", (len(chunks), scored)),
        "top": ("int32", (len(chunks), scored)),
    }
    meta = json.loads(arrays["meta"].tobytes())
    assert meta == {"format": 1, "vocab": 263, "texts": {"65": "A"}}
    total = np.exp(np.float64(arrays["log_probs"])).sum(-1)
    np.testing.assert_allclose(total, 1, atol=2**-9)


def test_a_file_appears_only_when_it_is_complete(lms, folder):
    chunks = split_text(lms[0].tokenizer.encode(TEXT), CONTEXT, None)
    path = folder / "failed.npz"

    def fail(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), LogitsWriter(str(path), chunks, 263, {}) as out:
        evaluate(fail, chunks, out=out)
    assert not [found.name for found in folder.glob("failed*")]


# The program


@pytest.fixture(scope="module")
def command():
    with command_module("perplexity") as module:
        yield module


@pytest.fixture
def run(command, models, lms, capsys, monkeypatch):
    """`run(*flags, model=0)`: exit status, standard output and standard error."""

    def call(*arguments, model=0):
        load = {str(path): lm for path, lm in zip(models, lms, strict=True)}
        monkeypatch.setattr(jaxsplit, "load", lambda path, **_: load[str(path)])
        common = [f"--model={models[model]}", "--compilation_cache=none", "--quiet"]
        monkeypatch.setattr(sys, "argv", ["perplexity", *common, *map(str, arguments)])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            program.run(command.main)
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def test_two_models_are_compared(run, folder, text_file, lms):
    saved = folder / "saved.npz"
    size = f"--ctx_size={CONTEXT}"
    code, out, err = run(f"--file={text_file}", f"--save_logits={saved}", size, "--json")
    assert (code, err) == (0, "")
    first = json.loads(out)
    scored = by_hand(lms[0], lms[0].tokenizer.encode(TEXT.removesuffix("\n")))
    nll, _ = mean_and_error([-row[token] for row, token in scored])
    assert first["perplexity"]["value"] == pytest.approx(math.exp(nll))
    code, out, err = run(f"--kl_divergence={saved}", "--json", model=1)
    assert (code, err) == (0, "")
    second = json.loads(out)
    assert second["divergence"]["base"] == first["perplexity"]
    assert second["divergence"]["kl"]["value"] > 1e-3
    # With the text, the result is the same, and a part of it can be compared.
    assert run(f"--kl_divergence={saved}", f"--file={text_file}", "--json", model=1)[1] == out
    code, part, _ = run(f"--kl_divergence={saved}", "--chunks=2", "--json", model=1)
    assert json.loads(part)["chunks"] == 2
    assert run(f"--kl_divergence={saved}", "--chunks=2", "--one_by_one", model=1)[0] == 0
    lines = run(f"--kl_divergence={saved}", model=1)[1]
    assert re.search(r"^perplexity +\d+\.\d{4} ± \d+\.\d{4}$", lines, re.MULTILINE)
    assert re.search(r"^same likeliest token +\d+\.\d\d ± \d+\.\d\d %$", lines, re.MULTILINE)


def test_what_does_not_fit_is_refused(run, folder, text_file, lms):
    chunks = split_text(lms[0].tokenizer.encode(TEXT), CONTEXT, None)
    good = folder / "good.npz"
    with LogitsWriter(str(good), chunks, 263, {int(chunks[0, 0]): "T"}) as out:
        evaluate(lms[0].logits, chunks, out=out)
    other, vocab, longer = (folder / f"{name}.npz" for name in ("other", "vocab", "longer"))
    for path, ids, size, texts in (
        (other, chunks, 263, {7: "of another model"}),
        (vocab, chunks, 99, {}),
        (longer, np.repeat(chunks, 2, 1), 263, {}),
    ):
        rows = ids.shape[1] // 2 - 1
        scores = score(np.zeros((rows, size), np.float32), np.zeros(rows, np.int64))
        with LogitsWriter(str(path), ids, size, texts) as out:
            for _ in ids:
                out.add(scores)
    text = folder / "other.txt"
    text.write_text("x" + TEXT[1:])
    short = folder / "short.txt"
    short.write_text("short")
    cut, photo = folder / "cut.npz", folder / "photo.npz"
    cut.write_bytes(good.read_bytes()[:-100])
    photo.write_bytes(b"\xff\xd8" + bytes(1000))
    flipped = bytearray(good.read_bytes())
    flipped[zipfile.ZipFile(good).getinfo("log_probs.npy").header_offset + 5000] ^= 255
    (folder / "flipped.npz").write_bytes(flipped)
    damaged = r"is not a complete file of --save_logits= \(.*\); save them again"
    cases = [
        ([], r"no text is given; use --file=TEXT"),
        ([f"--file={folder / 'missing.txt'}"], r"no such file: .*missing.txt"),
        ([f"--file={short}"], r"the text has 5 tokens, a chunk 32; give a longer text"),
        ([f"--file={text_file}", "--chunks=0"], r"--chunks=0 leaves nothing to read"),
        ([f"--kl_divergence={folder / 'missing.npz'}"], r"no such file: .*missing.npz"),
        ([f"--kl_divergence={cut}"], damaged),
        ([f"--kl_divergence={photo}"], damaged),
        ([f"--kl_divergence={folder / 'flipped.npz'}"], damaged),
        ([f"--kl_divergence={vocab}"], r"of a vocabulary of 99 tokens, the model has 263"),
        ([f"--kl_divergence={other}"], r"of another vocabulary: token 7 is 'of another model'"),
        ([f"--kl_divergence={longer}"], r"has chunks of 64 tokens, the context 32; set --ctx_size"),
        ([f"--kl_divergence={longer}", f"--file={text_file}"], r"chunks of 64 tokens, not 32"),
        (
            [f"--kl_divergence={good}", f"--file={text}"],
            r"is of another text: token 0 of chunk 0 is \d+ there, \d+ here",
        ),
        (
            [f"--file={text_file}", f"--save_logits={folder}/no/a.npz"],
            r"a.npz cannot be written: No such file or directory",
        ),
    ]
    for arguments, message in cases:
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), (arguments, err)
        assert re.fullmatch(rf"jaxsplit: .*{message}.*\n", err), (arguments, err)
