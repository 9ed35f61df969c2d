"""Prompts in a file of JSON lines, generated together: `jaxsplit generate --prompts=FILE.jsonl`."""

import codecs
import contextlib
import dataclasses
import functools
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxsplit.arguments import checked_number
from jaxsplit.cli.program import counting_bar
from jaxsplit.config import SamplingConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import os_errors, user_path

if TYPE_CHECKING:
    from jaxsplit.engine import Generation, TokenLogprob
    from jaxsplit.llm import LM

OPTIONS = (
    "n_predict",
    "stop",
    "stop_ids",
    "ignore_eos",
    "parse_special",
    "show_special",
    "priority",
    "timeout",
    "prompt_logprobs",
    "share_prefix",
    "grammar",
    "lora",
    *(field.name for field in dataclasses.fields(SamplingConfig)),
)
"""Of `LM.submit`, that a line may have."""

_KEYS = ("id", "prompt", "messages", *OPTIONS)

_AHEAD = 256
"""Requests that are submitted at a time, at least: enough for the scheduler to choose from."""

_MAX_LINE = 64 * 2**20
"""Bytes of a line."""

_RATE_SECONDS = 0.25
"""Between two updates of the token rate."""

Id = str | int


@dataclasses.dataclass
class Totals:
    """What has been done so far.

    Attributes:
      skipped, finished, failed: requests: with a result of an earlier run, a result, an error.
      prompt_tokens, cached_tokens, completion_tokens: of those finished; cached ones were not read
        again.
      tokens: generated so far, those of unfinished requests included.
      seconds, compile_seconds: since the first request was submitted; and of these, compiling.
    """

    skipped: int = 0
    finished: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Generated tokens in a second, without the time for compilation."""
        seconds = self.seconds - self.compile_seconds
        return self.tokens / seconds if seconds > 0 else 0.0

    def __str__(self) -> str:
        skipped = f" and {self.skipped} done before" if self.skipped else ""
        return (
            f"{self.finished + self.failed} requests{skipped}, {self.failed} errors | "
            f"{self.seconds:.2f} s, compiling {self.compile_seconds:.2f} s | "
            f"prompts {self.prompt_tokens} tokens, {self.cached_tokens} of them cached | "
            f"generated {self.completion_tokens} tokens, {self.rate:.1f} tokens/s"
        )


class Results:
    """The file of results: one JSON object a line, written as soon as a request ends.

    A file that exists is continued: a last line without its end is cut off, and lines with errors
    are removed, so that their requests are tried again.

    Args:
      path: of the file; `-`: standard output.

    Attributes:
      path: of the file, None for standard output.
      done: ids that the file has results of.

    Raises:
      JaxsplitError: the file cannot be read or written, or has other lines than results.
    """

    def __init__(self, path: str):
        self.path: Path | None = None
        self.done: set[Id] = set()
        if path == "-":
            self._file: BinaryIO = sys.stdout.buffer
            return
        self.path = user_path(path, "--out")
        if self.path.is_file():
            with os_errors(self.path):
                kept, failed = self._read()
            with os_errors(self.path, "written"):
                os.truncate(self.path, kept)
                if failed:
                    _remove_errors(self.path)
        with os_errors(self.path, "written"):
            self._file = self.path.open("ab")

    def _read(self) -> tuple[int, bool]:
        """Bytes of whole lines, and whether errors are among these."""
        assert self.path is not None
        kept, failed = 0, False
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = _object(line)
                    id = _id(entry, None)
                    if not entry.keys() & {"text", "error"}:
                        raise JaxsplitError("it has neither text nor error")
                except JaxsplitError as error:
                    raise JaxsplitError(
                        f"--out={self.path}: line {number} is no result: {error}; give another file"
                    ) from None
                kept += len(line)
                if "error" in entry:
                    failed = True
                else:
                    self.done.add(id)
        return kept, failed

    def write(self, entry: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
          JaxsplitError: the file cannot be written.
        """
        line = json.dumps(entry, ensure_ascii=False) + "\n"
        # A lone surrogate becomes the escape that JSON has for it, too.
        with contextlib.nullcontext() if self.path is None else os_errors(self.path, "written"):
            self._file.write(line.encode("utf-8", "backslashreplace"))
            self._file.flush()


def _remove_errors(path: Path) -> None:
    """Replaces a file of results by one without its errors, at once."""
    path = path.resolve()
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as target, open(path, "rb") as source:
            target.writelines(line for line in source if "error" not in _object(line))
        shutil.copymode(path, name)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


class Batch:
    """Requests of a file, and where their results go.

    Args:
      prompts: path of a file of JSON lines; `-`: standard input.
      out: path of the results; `-`: standard output.
      options: of the lines that do not set them: names are those of `OPTIONS`, and `block`.
      chat: put prompts into the model's chat template, as messages of the user.
      system: message that goes before messages without one.

    Attributes:
      totals: what has been done so far.

    Raises:
      JaxsplitError: a file cannot be used, or an option is out of range.
    """

    def __init__(
        self,
        prompts: str,
        out: str,
        options: Mapping[str, Any],
        *,
        chat: bool = False,
        system: str | None = None,
    ):
        checked_number("n_predict", options.get("n_predict", -1), int, -1, float("inf"))
        self._options, self._chat, self._system = dict(options), chat, system
        self._prompts = _opened(prompts)
        if out != "-" and _is_file(self._prompts, out):
            raise JaxsplitError(f"--prompts and --out={out} are the same file; give another one")
        self._results = Results(out)
        self.totals = Totals()
        self._seen: set[Id] = set()

    @property
    def lines(self) -> int | None:
        """Lines of the file; None: it is no file."""
        if not self._prompts.seekable():
            return None
        with os_errors(Path(self._prompts.name)):
            blocks = iter(functools.partial(self._prompts.read, 2**20), b"")
            count, last = 0, b"\n"
            for last in blocks:
                count += last.count(b"\n")
            self._prompts.seek(0)
        return count + (not last.endswith(b"\n"))

    def run(self, lm: "LM", show: Callable[[Totals], None] = lambda _: None) -> Totals:
        """Generates all texts.

        Args:
          lm: the model.
          show: called when the totals have changed.

        Raises:
          JaxsplitError: a file cannot be read or written any more. Faults of a line are written as
            its result.
        """
        limit = max(_AHEAD, 2 * lm.engine.slots)
        events: _Events = queue.SimpleQueue()
        room = threading.Semaphore(limit)
        reader = threading.Thread(target=_read, args=(self._prompts, events, room), daemon=True)
        reader.start()
        running: dict[int, _Running] = {}
        reading, clock = True, _Clock(self.totals)
        try:
            while reading or running:
                event = events.get()
                if event is None:
                    reading = False
                elif isinstance(event, Exception):
                    raise event
                elif isinstance(event, _Line):
                    clock.start()
                    one = self._begin(lm, event)
                    if one is None:
                        room.release()
                    else:
                        running[event.number] = one
                        one.generation.request.listen(functools.partial(events.put, event.number))
                        events.put(event.number)  # for news from before it listened
                elif event in running and self._advance(running[event]):
                    del running[event]
                    room.release()
                clock.update()
                show(self.totals)
        finally:
            for one in running.values():
                one.generation.cancel()
        return self.totals

    def _begin(self, lm: "LM", line: "_Line") -> "_Running | None":
        """Submits the request of a line; None: it is skipped, or has failed."""
        id: Id = line.number
        try:
            request = _object(line.text, first=line.number == 1)
            id = _id(request, line.number)
            if id in self._seen:
                raise JaxsplitError(f"id {json.dumps(id)} is that of an earlier line, too")
            self._seen.add(id)
            if id in self._results.done:
                self._results.done.remove(id)
                self.totals.skipped += 1
                return None
            if unknown := sorted(request.keys() - {*_KEYS}):
                raise JaxsplitError(
                    f"unknown option {', '.join(unknown)}; a line may have {', '.join(_KEYS)}"
                )
            prompt = self._prompt(lm, request)
            own = {name: request[name] for name in OPTIONS if name in request}
            return _Running(id, line.number, lm.submit(prompt, **(self._options | own)))
        except JaxsplitError as error:
            self._fail(id, line.number, str(error))
        except Exception as error:  # nothing that one line says ends the others
            self._fail(id, line.number, f"{type(error).__name__}: {error}")
        return None

    def _prompt(self, lm: "LM", request: Mapping[str, Any]) -> Any:
        """The prompt of a line: text or ids."""
        from jaxsplit.conversation import checked_message

        given = [key for key in ("prompt", "messages") if key in request]
        if len(given) != 1:
            what = "both prompt and messages" if given else "neither prompt nor messages"
            raise JaxsplitError(f"the line has {what}; give one of them")
        prompt, messages = request.get("prompt"), request.get("messages")
        if "prompt" in request:
            if not self._chat or not isinstance(prompt, str):
                return prompt
            messages = [{"role": "user", "content": prompt}]
        if not isinstance(messages, list) or not messages:
            raise JaxsplitError(
                'messages must be a list such as [{"role": "user", "content": "Hello"}]'
            )
        found = [checked_message(m, f"message {n}") for n, m in enumerate(messages, 1)]
        if self._system is not None and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": self._system})
        return lm.chat_prompt(found)

    def _advance(self, one: "_Running") -> bool:
        """Takes the news of a request, and writes its result once it has ended."""
        generation, totals = one.generation, self.totals
        try:
            while generation.finish_reason is None:
                event = generation.next_now()
                if event is None:
                    return False
                one.tokens += len(event.tokens)
                one.logprobs += event.logprobs
                totals.tokens += len(event.tokens)
        except JaxsplitError as error:
            self._fail(one.id, one.number, str(error))
            return True
        request = generation.request
        spec = request.spec
        entry = {
            "id": one.id,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "prompt_tokens": len(spec.prompt),
            "completion_tokens": one.tokens,
        }
        if spec.sampling.logprobs is not None:
            entry["logprobs"] = _as_json(one.logprobs)
        if spec.prompt_logprobs:
            entry["prompt_logprobs"] = _as_json(request.prompt_logprobs)
        self._results.write(entry)
        totals.finished += 1
        totals.prompt_tokens += len(spec.prompt)
        totals.cached_tokens += max(request.cached_tokens, 0)
        totals.completion_tokens += one.tokens
        return True

    def _fail(self, id: Id, number: int, error: str) -> None:
        self._results.write({"id": id, "line": number, "error": error})
        self.totals.failed += 1


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line of the file, its number counted from 1."""

    number: int
    text: bytes


@dataclasses.dataclass
class _Running:
    """A request that was submitted."""

    id: Id
    number: int
    generation: "Generation"
    tokens: int = 0
    logprobs: "list[TokenLogprob]" = dataclasses.field(default_factory=list)


_Events = queue.SimpleQueue[_Line | int | Exception | None]
"""A line that was read, the number of a line whose request has news, an error of reading, or None
at the end of the file."""


class _Clock:
    """Keeps the totals' seconds."""

    def __init__(self, totals: Totals):
        self._totals = totals
        self._started = self._compiled = 0.0

    def start(self) -> None:
        from jaxsplit.engine import compile_seconds

        if not self._started:
            self._started, self._compiled = time.perf_counter(), compile_seconds()

    def update(self) -> None:
        from jaxsplit.engine import compile_seconds

        if self._started:
            seconds = time.perf_counter() - self._started
            self._totals.seconds = seconds
            self._totals.compile_seconds = min(compile_seconds() - self._compiled, seconds)


def _read(file: BinaryIO, events: _Events, room: threading.Semaphore) -> None:
    """Hands over the lines of a file, as there is room for them."""
    number = 0
    try:
        while text := file.readline(_MAX_LINE):
            number += 1
            if number == 1 and text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise JaxsplitError("--prompts: the file is in UTF-16; UTF-8 is needed")
            rest = text
            while len(rest) == _MAX_LINE and not rest.endswith(b"\n"):
                rest = file.readline(_MAX_LINE)
            if text.strip():
                room.acquire()
                events.put(_Line(number, text))
        events.put(None)
    except OSError as error:
        events.put(JaxsplitError(f"--prompts cannot be read: {error.strerror or error}"))
    except Exception as error:
        events.put(error)


def _opened(path: str) -> BinaryIO:
    """The file of prompts.

    Raises:
      JaxsplitError: it cannot be read.
    """
    if path == "-":
        if sys.stdin is None:
            raise JaxsplitError("--prompts=-: standard input is closed")
        # A buffer of its own: at exit, Python would wait for a thread that reads `sys.stdin`.
        return open(os.dup(sys.stdin.fileno()), "rb")
    file = user_path(path, "--prompts")
    with os_errors(file):
        return open(file, "rb")


def _is_file(file: BinaryIO, path: str) -> bool:
    """Whether a path is that of an open file."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), user_path(path, "--out").stat())
    return False


def _object(line: bytes, *, first: bool = False) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
      line: its bytes.
      first: it may begin with a byte order mark.

    Raises:
      JaxsplitError: it is something else.
    """
    if len(line) >= _MAX_LINE:
        raise JaxsplitError(f"the line has more than {_MAX_LINE} bytes")
    try:
        found = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise JaxsplitError(
            f"the line is not UTF-8: byte {error.start} is {line[error.start]:#x}"
        ) from None
    except json.JSONDecodeError as error:
        raise JaxsplitError(f"the line is not JSON: column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise JaxsplitError(f"the line is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise JaxsplitError(f"the line is JSON, but no object such as {_EXAMPLE}")
    return found


_EXAMPLE = '{"id": 1, "prompt": "Once upon a time"}'


def _id(entry: Mapping[str, Any], default: int | None) -> Id:
    """The id of a line.

    Raises:
      JaxsplitError: it is of another type.
    """
    id = entry.get("id")
    id = default if id is None else id
    if not isinstance(id, str | int) or isinstance(id, bool):
        raise JaxsplitError(f"id is {json.dumps(id)[:40]}; text or a whole number is needed")
    return id


def _as_json(logprobs: "Sequence[TokenLogprob]") -> list[dict[str, Any]]:
    return [dataclasses.asdict(one) for one in logprobs]


@contextlib.contextmanager
def progress(lines: Callable[[], int | None], *, quiet: bool) -> Iterator[Callable[[Totals], None]]:
    """A progress bar in requests, with the token rate; nothing if that is not a terminal.

    Args:
      lines: counts the requests, if anybody looks.
      quiet: nobody does.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with counting_bar("generating", lines(), quiet=quiet) as update:
        shown = 0.0

        def show(totals: Totals) -> None:
            nonlocal shown
            now = time.monotonic()
            if now < shown + _RATE_SECONDS:
                return
            shown = now
            errors = f", {totals.failed} errors" if totals.failed else ""
            update(
                completed=totals.skipped + totals.finished + totals.failed,
                description=f"{totals.rate:.1f} tokens/s{errors}",
            )

        yield show
