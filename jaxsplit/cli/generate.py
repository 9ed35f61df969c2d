"""Generate text from a GGUF file on a device mesh.

  jaxsplit generate --model=FILE.gguf --prompt="Once upon a time"
  jaxsplit generate --model=FILE.gguf --chat --prompt="Why is the sky blue?"

Text goes to standard output, everything else to standard error. With --prompts,
many requests run together, and each result is a JSON line of --out; the same
command goes on where it was stopped. Exit status: 0; 2 with one line that says
what to fix; 1 if lines of --prompts have failed.
"""

import codecs
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from jaxsplit.cli import batch, options
from jaxsplit.cli.help import with_flags
from jaxsplit.cli.processes import Processes
from jaxsplit.cli.program import local_model, note, progress_bar
from jaxsplit.config import LoadConfig, SamplingConfig
from jaxsplit.errors import JaxsplitError

if TYPE_CHECKING:
    from jaxsplit.llm import LM

GROUPS = {
    "model": "Model and prompt",
    "n_predict": "Text",
    "coordinator": "Several processes",
    "stream_interval": "Program",
    **options.GROUPS,
}

_MODEL = options.define_model()
_PROMPT = flags.DEFINE_string("prompt", None, "the prompt; \\n, \\t and \\\\ are escapes")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "read the prompt from a file; -: stdin")
_PROMPTS = flags.DEFINE_string(
    "prompts",
    None,
    'run many requests: a JSON object a line, such as {"id": 1, "prompt": "..."}, with messages '
    "instead of prompt, or with options by the names of their flags; -: stdin",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "file for the results of --prompts, which it continues (default: standard output)",
)
_CHAT = flags.DEFINE_bool("chat", False, "put the prompt into the model's chat template")
_SYSTEM = flags.DEFINE_string("system", None, "system message, with --chat; escapes as in --prompt")
_PARSE_SPECIAL = flags.DEFINE_bool(
    "parse_special", False, "special tokens may be written in the prompt"
)
options.define_old("special", "parse_special")
_SHOW_SPECIAL = flags.DEFINE_enum(
    "show_special",
    "template",
    ["template", "all", "none"],
    "special tokens that the text shows: those with which the model's chat template marks thinking "
    "and tool calls, all, or none",
)
_N_PREDICT = flags.DEFINE_integer("n_predict", -1, "tokens to generate; -1: until the text ends")
_STOP = flags.DEFINE_multi_string(
    "stop", [], "end the text before this string (can be repeated); escapes as in --prompt"
)
_SAMPLING = options.define(SamplingConfig, seed=-1)
_LOAD = options.define(LoadConfig)
_PROCESSES = Processes()
_INTERVAL = flags.DEFINE_integer(
    "stream_interval",
    None,
    "tokens decoded on the devices before the text is printed (default: as many as take a tenth of "
    "a second, at most 32)",
    lower_bound=1,
)
options.define_old("decode_block", "stream_interval")
_COMPILE_CACHE = options.define_compilation_cache()
_AUTO = flags.DEFINE_bool("auto", False, "the same as --split_mode=auto")
_QUIET = flags.DEFINE_bool("quiet", False, "only the text and errors")


def _prompt() -> str:
    if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
        raise JaxsplitError("--prompt and --prompt_file are both given; leave one out")
    if _PROMPT_FILE.value is not None:
        return _decoded(_read_prompt_file(_PROMPT_FILE.value))
    if _PROMPT.value is None:
        raise JaxsplitError('no prompt is given; use --prompt="..." or --prompt_file=FILE')
    return options.unescaped(_PROMPT.value)


def _batch(prompts: str) -> batch.Batch:
    """The requests of --prompts."""
    for flag in (_PROMPT, _PROMPT_FILE):
        if flag.value is not None:
            raise JaxsplitError(f"--prompts and --{flag.name} are both given; leave one out")
    given = {
        "n_predict": _N_PREDICT.value,
        "stop": [options.unescaped(stop) for stop in _STOP.value],
        "parse_special": _PARSE_SPECIAL.value,
        "show_special": _SHOW_SPECIAL.value,
        "block": _INTERVAL.value,
        **options.values(_SAMPLING),
    }
    system = None if _SYSTEM.value is None else options.unescaped(_SYSTEM.value)
    out = "-" if _OUT.value is None else _OUT.value
    return batch.Batch(prompts, out, given, chat=_CHAT.value, system=system)


def _run(requests: batch.Batch, lm: "LM") -> None:
    """Runs the requests of --prompts."""
    with batch.progress(lambda: requests.lines, quiet=_QUIET.value) as show:
        totals = requests.run(lm, show)
    _note(f"{totals} | load {lm.load_seconds:.2f} s")
    if totals.failed:
        note(f"jaxsplit: lines of --prompts that failed: {totals.failed}; their results say why")
        sys.exit(1)


def _read_prompt_file(path: str) -> bytes:
    try:
        if path != "-":
            return Path(path).expanduser().read_bytes()
        if sys.stdin is None:
            raise JaxsplitError("--prompt_file=-: standard input is closed")
        return sys.stdin.buffer.read()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise JaxsplitError(f"--prompt_file={path} cannot be read: {reason}") from None


def _decoded(data: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark; U+FFFD for other bytes."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig", "replace")


def _note(message: str) -> None:
    if not _QUIET.value:
        note(message)


def main(_: list[str]) -> None:
    """Generates text as the flags say."""
    options.use_compilation_cache(_COMPILE_CACHE.value)
    import jax

    import jaxsplit

    several = _PROCESSES.start()
    is_coordinator = not several or jax.process_index() == 0
    several_prompts = _PROMPTS.value is not None
    if _OUT.value is not None and not several_prompts:
        raise JaxsplitError("--out needs --prompts")
    if several and several_prompts:
        raise JaxsplitError("--prompts is for one process; split the file to use several")
    prompt = _prompt() if is_coordinator and not several_prompts else ""
    if _SAMPLING["seed"].value == -1 and not several_prompts:  # there, each line draws its own
        flags.FLAGS["seed"].value = int.from_bytes(os.urandom(4), "little")
    if several:
        own = [_MODEL.name, _PROMPT_FILE.name, _COMPILE_CACHE.name, _QUIET.name]
        prompt = _PROCESSES.agree(__name__, own, prompt)
    if not is_coordinator:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        flags.FLAGS[_QUIET.name].value = True
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if _SYSTEM.value is not None and not _CHAT.value:
        raise JaxsplitError("--system needs --chat")
    sampling = SamplingConfig(**options.values(_SAMPLING))
    config = LoadConfig(**options.values(_LOAD))
    if _AUTO.value and config.split_mode not in ("graph", "auto"):
        raise JaxsplitError(f"--auto and --split_mode={config.split_mode}: leave one out")
    if _AUTO.value:
        config = dataclasses.replace(config, split_mode="auto")
    requests = None if _PROMPTS.value is None else _batch(_PROMPTS.value)
    model = None if _MODEL.value is None else local_model(_MODEL.value)
    with progress_bar("loading", quiet=_QUIET.value) as progress:
        lm = jaxsplit.load(model, config=config, progress=progress)
    if requests is not None:
        _note(with_flags(lm.describe()))
        _run(requests, lm)
        return
    prompt_ids: str | list[int] = prompt
    if _CHAT.value:
        system = [] if _SYSTEM.value is None else [options.unescaped(_SYSTEM.value)]
        messages = [{"role": "system", "content": text} for text in system]
        messages.append({"role": "user", "content": prompt})
        prompt_ids = lm.chat_prompt(messages)
    stream = lm.stream(
        prompt_ids,
        _N_PREDICT.value,
        stop=[options.unescaped(stop) for stop in _STOP.value],
        parse_special=_PARSE_SPECIAL.value,
        show_special=_SHOW_SPECIAL.value,
        block=_INTERVAL.value,
        sampling=sampling,
    )
    _note(with_flags(lm.describe()))
    if not _CHAT.value:
        print(prompt, end="", flush=True)
    for piece in stream:
        print(piece, end="", flush=True)
    print(flush=True)
    _note(f"[{stream.stop_reason}]  load {lm.load_seconds:.2f} s | {stream.timings()}")
