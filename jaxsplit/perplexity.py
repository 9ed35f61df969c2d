"""Perplexity, and Kullback-Leibler divergence from the saved logits of another run.

The definition is that of llama.cpp's `llama-perplexity`: a text is cut into chunks of the context's
length, and of each chunk the tokens after the first half are scored, so that each has at least half
a context before it. All statistics are computed in float64.
"""

import contextlib
import dataclasses
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import os_errors, user_path

PERCENTILES = (100, 99.9, 99, 95, 90, 50, 10, 5, 1, 0)
_FORMAT = 1
_BLOCK = 1 << 22  # elements that a thread takes at a time, 32 MiB in float64
_THREADS = 8
_LOWEST = -60000.0  # of log-probabilities, which float16 has to hold


def split_text(tokens: Sequence[int], context: int, bos: int | None, limit: int = -1) -> np.ndarray:
    """Cuts a text into chunks.

    Args:
      tokens: ids of the text; those after the last whole chunk are left out.
      context: tokens of a chunk.
      bos: takes the place of the first token of each chunk; None: it stays.
      limit: chunks at most; -1: all.

    Returns:
      int32 `[chunks, context]`.

    Raises:
      JaxsplitError: the context or the text is too short.
    """
    if context < 4:
        raise JaxsplitError(f"a chunk of {context} tokens is too short; set ctx_size=4 at least")
    count = len(tokens) // context
    if count == 0:
        raise JaxsplitError(
            f"the text has {len(tokens)} tokens, a chunk {context}; give a longer text, or a "
            f"smaller ctx_size="
        )
    count = count if limit < 0 else min(count, limit)
    chunks = np.asarray(tokens[: count * context], np.int32).reshape(count, context)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is known of each scored token; arrays are `[tokens]`.

    Attributes:
      nll: negative log-likelihood of the token, in nats.
      top: the likeliest token.
      log_probs: float16 `[tokens, vocab]` log-probabilities of all tokens.
    """

    nll: np.ndarray
    top: np.ndarray
    log_probs: np.ndarray


def score(logits: np.ndarray, targets: np.ndarray) -> Scores:
    """Scores the tokens that follow.

    Args:
      logits: float32 `[tokens, vocab]`.
      targets: the token that follows each.

    Raises:
      JaxsplitError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        raise JaxsplitError("the model's logits are not finite: try dtype=float32")

    def one(rows: slice) -> tuple[np.ndarray, ...]:
        log_probs = _normalized(logits[rows])
        nll = -np.take_along_axis(log_probs, targets[rows, None], 1)[:, 0]
        rounded = np.maximum(log_probs, _LOWEST).astype(np.float16)
        return nll, logits[rows].argmax(1).astype(np.int32), rounded

    return Scores(*_in_blocks(one, *logits.shape))


def divergence(base: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each row, KL(base || other), float64 `[tokens]`, in nats.

    Both are rounded in the same way and normalized again, so that the divergence is never negative,
    and 0 where they are equal.

    Args:
      base, other: float16 `[tokens, vocab]` log-probabilities.
    """

    def one(rows: slice) -> tuple[np.ndarray, ...]:
        p, q = _normalized(base[rows]), _normalized(other[rows])
        return (np.maximum(np.sum(np.exp(p) * (p - q), 1), 0.0),)

    return _in_blocks(one, *base.shape)[0]


def _normalized(logits: np.ndarray) -> np.ndarray:
    """The log-softmax of each row, float64."""
    x = logits.astype(np.float64)
    x -= x.max(1, keepdims=True)
    x -= np.log(np.sum(np.exp(x), 1, keepdims=True))
    return x


def _in_blocks(
    function: Callable[[slice], tuple[np.ndarray, ...]], rows: int, vocab: int
) -> list[np.ndarray]:
    """Arrays that a function computes of a few rows at a time, on several threads."""
    step = max(1, _BLOCK // vocab)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        parts = pool.map(function, (slice(at, at + step) for at in range(0, rows, step)))
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean, and its standard error, which assumes independent tokens."""

    value: float
    error: float

    @classmethod
    def mean(cls, values: np.ndarray) -> Self:
        return cls(float(np.mean(values)), math.sqrt(np.var(values) / max(len(values) - 1, 1)))

    def exp(self) -> "Estimate":
        """The estimate of `exp` of the mean, to first order."""
        return Estimate(math.exp(self.value), math.exp(self.value) * self.error)


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How a model differs from the one whose logits were saved.

    Attributes:
      base: perplexity of that model.
      ratio: perplexity of this model over it; the error knows that both read the same tokens.
      kl: mean KL(base || this), in nats.
      percentiles: of the tokens' divergence, by `PERCENTILES`.
      same_top: share of tokens where both models agree on the likeliest.
    """

    base: Estimate
    ratio: Estimate
    kl: Estimate
    percentiles: dict[float, float]
    same_top: Estimate


@dataclasses.dataclass(frozen=True)
class Result:
    """Of `evaluate`.

    Attributes:
      tokens: how many were scored.
      chunks: of how many chunks.
      perplexity: exp of their mean negative log-likelihood.
      divergence: from the base, if there is one.
    """

    tokens: int
    chunks: int
    perplexity: Estimate
    divergence: Divergence | None


def evaluate(
    logits: Callable[[list[int]], np.ndarray],
    chunks: np.ndarray,
    *,
    base: "SavedLogits | None" = None,
    out: "LogitsWriter | None" = None,
    progress: Callable[[int, float], None] = lambda done, perplexity: None,
) -> Result:
    """Runs a model over all chunks.

    Args:
      logits: of a list of tokens, float32 `[tokens, vocab]`: `LM.logits`.
      chunks: of `split_text`, int32 `[chunks, context]`.
      base: saved logits of the same chunks, to compare with.
      out: takes the logits.
      progress: called with the chunks done and the perplexity so far.

    Raises:
      JaxsplitError: a logit is not finite, or a file is damaged or cannot be written.
    """
    count, context = chunks.shape
    first = context // 2
    nll, kl, same = [], [], []
    saved = base.log_probs() if base is not None else None
    for n, chunk in enumerate(chunks):
        scores = score(logits(chunk.tolist())[first:-1], chunk[first + 1 :])
        nll.append(scores.nll)
        if out is not None:
            out.add(scores)
        if base is not None and saved is not None:
            kl.append(divergence(next(saved), scores.log_probs))
            same.append(base.top[n] == scores.top)
        progress(n + 1, math.exp(np.mean(nll)))
    ours = np.concatenate(nll)
    return Result(
        ours.size,
        count,
        Estimate.mean(ours).exp(),
        None
        if base is None
        else _compared(base.nll[:count].ravel(), ours, np.concatenate(kl), np.concatenate(same)),
    )


def _compared(
    base_nll: np.ndarray, nll: np.ndarray, kl: np.ndarray, same: np.ndarray
) -> Divergence:
    return Divergence(
        Estimate.mean(base_nll).exp(),
        Estimate.mean(nll - base_nll).exp(),
        Estimate.mean(kl),
        dict(zip(PERCENTILES, np.percentile(kl, PERCENTILES).tolist(), strict=True)),
        Estimate.mean(same.astype(np.float64)),
    )


class LogitsWriter:
    """Writes a logits file chunk by chunk; a context manager. The file appears when it is complete.

    The file is an uncompressed `.npz` archive, so that `numpy.load` opens it, too:

    - `meta`: uint8, JSON in UTF-8: `format` (1), `vocab`, and `texts`, the text of each token used
    - `log_probs`: float16 `[chunks, scored, vocab]`
    - `tokens`: int32 `[chunks, context]`, as they were read
    - `nll`: float64 `[chunks, scored]`, negative log-likelihoods of the tokens that were scored
    - `top`: int32 `[chunks, scored]`, the likeliest tokens
    """

    def __init__(self, path: str, chunks: np.ndarray, vocab: int, texts: Mapping[int, str]):
        """Starts a file.

        Args:
          path: of the file.
          chunks: int32 `[chunks, context]`.
          vocab: logits of a token.
          texts: of the tokens in the chunks.

        Raises:
          JaxsplitError: it cannot be written.
        """
        self._path = user_path(path, "save_logits")
        self.partial = self._path.with_name(self._path.name + ".partial")
        self._chunks, self._vocab, self._texts = chunks, vocab, texts
        self._nll: list[np.ndarray] = []
        self._top: list[np.ndarray] = []

    def __enter__(self) -> Self:
        count, context = self._chunks.shape
        shape = (count, context - 1 - context // 2, self._vocab)
        with os_errors(self._path, "written"):
            self._archive = zipfile.ZipFile(self.partial, "w")
            meta = {"format": _FORMAT, "vocab": self._vocab, "texts": self._texts}
            data = json.dumps(meta).encode()
            self._write("meta", np.frombuffer(data, np.uint8))
            self._member = self._archive.open("log_probs.npy", "w", force_zip64=True)
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._member, header)
        return self

    def add(self, scores: Scores) -> None:
        """Adds the next chunk.

        Raises:
          JaxsplitError: it cannot be written.
        """
        with os_errors(self._path, "written"):
            self._member.write(np.ascontiguousarray(scores.log_probs, "<f2").data.cast("B"))
        self._nll.append(scores.nll)
        self._top.append(scores.top)

    def _write(self, name: str, array: np.ndarray) -> None:
        with self._archive.open(f"{name}.npy", "w") as member:
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with os_errors(self._path, "written"):
                    self._member.close()
                    self._write("tokens", self._chunks)
                    self._write("nll", np.stack(self._nll))
                    self._write("top", np.stack(self._top))
                    self._archive.close()
                    os.replace(self.partial, self._path)
        finally:
            with contextlib.suppress(OSError, ValueError):  # of a full disk
                self._member.close()
                self._archive.close()
            self.discard()

    def discard(self) -> None:
        """Removes what has been written, unless it is complete."""
        with contextlib.suppress(OSError):
            os.unlink(self.partial)


class SavedLogits:
    """A logits file. Its log-probabilities are read chunk by chunk.

    Attributes:
      path: of the file.
      vocab: logits of a token.
      tokens: int32 `[chunks, context]`.
      nll: float64 `[chunks, scored]`.
      top: int32 `[chunks, scored]`.
    """

    def __init__(self, path: str):
        """Opens a file.

        Raises:
          JaxsplitError: it is missing, no logits file, damaged or of another version.
        """
        self.path: Path = user_path(path, "kl_divergence")
        with self._errors():
            self._archive = zipfile.ZipFile(self.path)
            meta = json.loads(self._read("meta").tobytes())
            if meta["format"] != _FORMAT:
                raise JaxsplitError(
                    f"{self.path} has format {meta['format']}, {_FORMAT} is supported; save the "
                    "logits again"
                )
            self.vocab = int(meta["vocab"])
            self._texts = {int(id): str(text) for id, text in meta["texts"].items()}
            self.tokens, self.nll, self.top = map(self._read, ("tokens", "nll", "top"))
            count, context = self.tokens.shape
            self._shape = (count, context - 1 - context // 2, self.vocab)
            if self.nll.shape != self._shape[:2] or self.top.shape != self._shape[:2]:
                raise ValueError("sizes contradict one another")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what a damaged file causes into one line."""
        try:
            with os_errors(self.path):
                yield
        except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError, AttributeError) as e:
            reason = " ".join(str(e).split())
            raise JaxsplitError(
                f"{self.path} is not a complete file of save_logits= ({reason}); save them again"
            ) from None

    def _read(self, name: str) -> np.ndarray:
        with self._archive.open(f"{name}.npy") as member:
            return np.lib.format.read_array(member, allow_pickle=False)

    def check(self, vocab: int, texts: Callable[[int], str], chunks: np.ndarray | None) -> None:
        """Checks that a model and a text are those of the file.

        Args:
          vocab: logits of a token.
          texts: the text of a token.
          chunks: of the text; None: none is given.

        Raises:
          JaxsplitError: the vocabulary or the tokens are others.
        """
        if vocab != self.vocab:
            raise JaxsplitError(
                f"{self.path} is of a vocabulary of {self.vocab} tokens, the model has {vocab}; "
                "save the logits of a model with the same vocabulary"
            )
        for id, text in self._texts.items():
            if not 0 <= id < vocab or texts(id) != text:
                raise JaxsplitError(
                    f"{self.path} is of another vocabulary: token {id} is {text!r} there; save the "
                    "logits of a model with the same vocabulary"
                )
        if chunks is None:
            return
        if chunks.shape[1] != self.tokens.shape[1]:
            raise JaxsplitError(
                f"{self.path} has chunks of {self.tokens.shape[1]} tokens, not {chunks.shape[1]}; "
                f"set ctx_size={self.tokens.shape[1]}"
            )
        if len(chunks) > len(self.tokens):
            raise JaxsplitError(
                f"{self.path} has {len(self.tokens)} chunks, the text {len(chunks)}; set "
                f"chunks={len(self.tokens)}"
            )
        different = np.argwhere(chunks != self.tokens[: len(chunks)])
        if different.size:
            n, at = different[0]
            raise JaxsplitError(
                f"{self.path} is of another text: token {at} of chunk {n} is "
                f"{self.tokens[n, at]} there, {chunks[n, at]} here; leave the text out, since the "
                "file has its tokens"
            )

    def log_probs(self) -> Iterator[np.ndarray]:
        """The log-probabilities of one chunk after the other, float16 `[scored, vocab]`.

        Raises:
          JaxsplitError: the file is damaged.
        """
        with self._errors(), self._archive.open("log_probs.npy") as member:
            np.lib.format.read_magic(member)
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            if shape != self._shape or fortran or dtype != np.dtype("<f2"):
                raise ValueError("sizes contradict one another")
            size = math.prod(shape[1:]) * dtype.itemsize
            for _ in range(shape[0]):
                data = member.read(size)
                if len(data) != size:
                    raise EOFError("log-probabilities are missing")
                yield np.frombuffer(data, dtype).reshape(shape[1:])
