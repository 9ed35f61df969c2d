"""Measure how well a model predicts a text, and what a type or an option costs.

  jaxsplit perplexity --model=FILE.gguf --file=TEXT --save_logits=BASE.npz
  jaxsplit perplexity --model=OTHER.gguf --kl_divergence=BASE.npz

The definition is llama-perplexity's: the text is cut into chunks of --ctx_size
tokens, and the second half of each is scored. --kl_divergence compares with the
saved logits of another model, or of the same one with other options, such as
--prefill_dtype or --cache_dtype, on the tokens of that file.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from absl import flags

from jaxsplit.cli import options
from jaxsplit.cli.help import with_flags
from jaxsplit.cli.program import (
    counting_bar,
    local_model,
    note,
    on_interrupt,
    progress_bar,
)
from jaxsplit.config import LoadConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import os_errors, user_path

if TYPE_CHECKING:
    import numpy as np

    from jaxsplit.llm import LM
    from jaxsplit.perplexity import Estimate, LogitsWriter, Result, SavedLogits

GROUPS = {
    "model": "Model and text",
    "compilation_cache": "Program",
    **options.GROUPS,
}

_MODEL = options.define_model()
_FILE = flags.DEFINE_string("file", None, "file of the text; a line end at its end is left out")
_CHUNKS = flags.DEFINE_integer("chunks", -1, "read the first N chunks; -1: all", lower_bound=-1)
_SAVE = flags.DEFINE_string("save_logits", None, "write the logits to this file")
_BASE = flags.DEFINE_string("kl_divergence", None, "compare with the logits in this file")
_ONE_BY_ONE = flags.DEFINE_bool(
    "one_by_one", False, "read one token at a time, as in decoding, which --activations concerns"
)
_JSON = flags.DEFINE_bool("json", False, "print JSON")
_COMPILE_CACHE = options.define_compilation_cache()
_QUIET = flags.DEFINE_bool("quiet", False, "only the result and errors")
_CTX_SIZE = flags.DEFINE_integer(
    "ctx_size", 512, "tokens of a chunk; 0: the context of the model", lower_bound=0
)
_LOAD = options.define(LoadConfig, skip=["ctx_size", "slots"])


def main(_: list[str]) -> None:
    """Evaluates as the flags say."""
    from jaxsplit.perplexity import SavedLogits

    if _FILE.value is None and _BASE.value is None:
        raise JaxsplitError("no text is given; use --file=TEXT, or --kl_divergence=FILE")
    text = None if _FILE.value is None else _text(_FILE.value)
    base = None if _BASE.value is None else SavedLogits(_BASE.value)
    if base is not None and _FILE.value is None and not flags.FLAGS["ctx_size"].present:
        flags.FLAGS["ctx_size"].value = base.tokens.shape[1]
    options.use_compilation_cache(_COMPILE_CACHE.value)
    import jaxsplit

    config = LoadConfig(ctx_size=_CTX_SIZE.value, **options.values(_LOAD))
    model = None if _MODEL.value is None else local_model(_MODEL.value)
    with progress_bar("loading", quiet=_QUIET.value) as progress:
        lm = jaxsplit.load(model, config=config, progress=progress)
    if not _QUIET.value:
        note(with_flags(lm.describe()))
    chunks = _chunks(lm, text, base)
    result = _evaluated(lm, chunks, base)
    if _JSON.value:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        print("\n".join(_lines(result)))


def _text(path: str) -> bytes:
    file = user_path(path, "--file")
    with os_errors(file):
        return file.read_bytes().removesuffix(b"\n")


def _chunks(lm: "LM", text: bytes | None, base: "SavedLogits | None") -> "np.ndarray":
    """The tokens to read: those of the text, or of the saved logits."""
    from jaxsplit.perplexity import split_text

    context, tokenizer = lm.engine.context, lm.tokenizer
    if text is not None:
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        chunks = split_text(tokenizer.encode(text), context, bos, _CHUNKS.value)
        if base is not None:
            base.check(lm.config.vocab, tokenizer.token_text, chunks)
        return chunks
    assert base is not None
    base.check(lm.config.vocab, tokenizer.token_text, None)
    count, needed = base.tokens.shape
    if needed > context:
        raise JaxsplitError(
            f"{base.path} has chunks of {needed} tokens, the context {context}; set "
            f"ctx_size={needed}, if the model was trained for it"
        )
    return base.tokens if _CHUNKS.value < 0 else base.tokens[: min(count, _CHUNKS.value)]


def _evaluated(lm: "LM", chunks: "np.ndarray", base: "SavedLogits | None") -> "Result":
    """Runs the model over the chunks, with a progress bar."""
    from jaxsplit.perplexity import evaluate

    if not len(chunks):
        raise JaxsplitError("chunks=0 leaves nothing to read; give 1 at least")

    def logits(tokens: list[int]) -> "np.ndarray":
        return lm.logits(tokens, one_by_one=_ONE_BY_ONE.value)

    with _bar(len(chunks)) as show:
        if _SAVE.value is None:
            return evaluate(logits, chunks, base=base, progress=show)
        with _writer(lm, chunks, _SAVE.value) as out:
            return evaluate(logits, chunks, base=base, out=out, progress=show)


def _writer(lm: "LM", chunks: "np.ndarray", path: str) -> "LogitsWriter":
    from jaxsplit.perplexity import LogitsWriter

    texts = {id: lm.tokenizer.token_text(id) for id in sorted({*chunks.ravel().tolist()})}
    writer = LogitsWriter(path, chunks, lm.config.vocab, texts)
    on_interrupt(writer.discard)
    return writer


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int, float], None]]:
    """A progress bar in chunks, with the perplexity so far."""
    with counting_bar("perplexity", total, quiet=_QUIET.value) as update:
        yield lambda done, perplexity: update(
            completed=done, description=f"perplexity {perplexity:.4f}"
        )


def _lines(result: "Result") -> list[str]:
    """The result for people."""

    def line(name: str, value: "Estimate", digits: int, factor: int = 1, unit: str = "") -> str:
        mean, error = factor * value.value, factor * value.error
        return f"{name:22}{mean:12.{digits}f} ± {error:.{digits}f}{unit}"

    lines = [
        f"{result.tokens} tokens scored, of {result.chunks} chunks",
        line("perplexity", result.perplexity, 4),
    ]
    found = result.divergence
    if found is not None:
        lines += [
            line("perplexity, base", found.base, 4),
            line("ratio", found.ratio, 6),
            line("KL divergence, mean", found.kl, 6),
            *(
                f"  {_percentile(percent):20}{value:12.6f}"
                for percent, value in found.percentiles.items()
            ),
            line("same likeliest token", found.same_top, 2, 100, " %"),
        ]
    return lines


def _percentile(percent: float) -> str:
    names = {100.0: "maximum", 50.0: "median", 0.0: "minimum"}
    return names.get(percent, f"{percent:g} %")
