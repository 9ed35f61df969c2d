"""Chat with a model on the terminal, through the chat template of its file.

  jaxsplit chat --model=FILE.gguf
  jaxsplit chat --model=FILE.gguf --system="Answer in one sentence." --stats

Enter sends a message, Alt-Enter or a backslash at the end of a line goes on to
the next one. Ctrl-C stops the answer, Ctrl-D ends the chat; /help lists the
commands. Without a terminal, each line of standard input is a message, and
standard output has the answers alone.
"""

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from jaxsplit.cli import options
from jaxsplit.cli.help import with_flags
from jaxsplit.cli.program import interrupts_raise, local_model, note, progress_bar
from jaxsplit.config import LoadConfig, SamplingConfig
from jaxsplit.errors import JaxsplitError

if TYPE_CHECKING:
    from jaxsplit.conversation import Conversation
    from jaxsplit.llm import LM

GROUPS = {
    "model": "Model and conversation",
    "stream_interval": "Program",
    **options.GROUPS,
}

_MODEL = options.define_model()
_SYSTEM = flags.DEFINE_string("system", None, "system message; \\n, \\t and \\\\ are escapes")
_N_PREDICT = flags.DEFINE_integer(
    "n_predict", -1, "tokens of an answer at most; -1: until it ends", lower_bound=-1
)
_STATS = flags.DEFINE_bool("stats", False, "tokens and rates after each answer")
_HISTORY = flags.DEFINE_string(
    "history", "auto", "file of earlier input; auto: in the user's state directory; none: off"
)
_SAMPLING = options.define(SamplingConfig, seed=-1)
_LOAD = options.define(LoadConfig)
_INTERVAL = flags.DEFINE_integer(
    "stream_interval",
    None,
    "tokens decoded on the devices before the text is printed (default: as many as take a tenth of "
    "a second, at most 32)",
    lower_bound=1,
)
_COMPILE_CACHE = options.define_compilation_cache()
_QUIET = flags.DEFINE_bool("quiet", False, "only answers and errors")

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters with which a text could command a terminal."""


class Chat:
    """The commands, and the turns of a conversation."""

    def __init__(self, lm: "LM", conversation: "Conversation", sampling: SamplingConfig):
        self._lm = lm
        self._conversation = conversation
        self._sampling = sampling
        self._answers = 0
        self._stats = "no answer yet"

    def take(self, text: str) -> bool:
        """Runs a command or answers a message; returns whether the chat goes on."""
        try:
            if not text.startswith("/"):
                if text.strip():
                    self._ask(text)
                return True
            name, *rest = text.split(maxsplit=1)
            if name not in COMMANDS:
                raise JaxsplitError(
                    f"{name} is not a command; commands are {', '.join(COMMANDS)}; a space before "
                    "it makes it a message"
                )
            return COMMANDS[name].run(self, "".join(rest).strip()) is not False
        except JaxsplitError as error:
            note(f"jaxsplit: {with_flags(str(error))}")
        except KeyboardInterrupt:
            note("")
        return True

    def _ask(self, text: str) -> None:
        messages = self._conversation.messages
        messages.append({"role": "user", "content": text})
        count = len(messages)
        try:
            self._answer()
        finally:
            if len(messages) == count:
                messages.pop()  # a message without an answer

    def _answer(self) -> None:
        """Streams the answer to the last message, which joins the conversation."""
        from jaxsplit.text.reasoning import ReasoningParser

        prompt = self._conversation.prompt()
        if len(prompt.ids) >= self._lm.engine.context:
            raise JaxsplitError(
                f"the conversation has {len(prompt.ids)} tokens, the context "
                f"{self._lm.engine.context}; /clear starts a new one, and a larger ctx_size= "
                "holds more, where the model was trained for it"
            )
        seed = ((self._sampling.seed or 0) + self._answers) % 2**32
        self._answers += 1
        stream = self._lm.stream(
            prompt.ids,
            _N_PREDICT.value,
            block=_INTERVAL.value,
            sampling=dataclasses.replace(self._sampling, seed=seed),
        )
        shown = ReasoningParser(prompt.text)
        show = _printer()
        try:
            with interrupts_raise() as interrupted:
                for piece in stream:
                    show(shown.push(piece))
                    if interrupted.is_set():
                        break
        except KeyboardInterrupt:
            pass
        finally:
            show(shown.flush())
            print(flush=True)
            if stream.tokens:
                self._conversation.add_answer(prompt, stream.tokens)
                used = len(prompt.ids) + len(stream.tokens)
                self._stats = (
                    f"[{stream.stop_reason or 'interrupted'}]  context {used} of "
                    f"{self._lm.engine.context} tokens | {stream.timings()}"
                )
        if stream.stop_reason == "context full":
            note("[context full: /clear starts a new conversation]")
        if _STATS.value:
            note(self._stats)

    def clear(self, _: str) -> None:
        """Starts a new conversation; the system message stays."""
        self._conversation.clear()

    def system(self, text: str) -> None:
        """Sets the system message; without TEXT, shows it."""
        if text:
            self._conversation.system = text
        else:
            note(self._conversation.system or "there is no system message")

    def regenerate(self, _: str) -> None:
        """Answers the last message again, with another seed."""
        before = [*self._conversation.messages]
        self._conversation.drop_answer()
        count = len(self._conversation.messages)
        try:
            self._answer()
        finally:
            if len(self._conversation.messages) == count:
                self._conversation.messages[:] = before

    def save(self, path: str) -> None:
        """Writes the messages as JSON, in OpenAI's format."""
        self._conversation.save(_given(path, "/save FILE.json"))
        note(f"saved {len(self._conversation.messages)} messages")

    def load(self, path: str) -> None:
        """Reads messages that /save or another program has written."""
        self._conversation.load(_given(path, "/load FILE.json"))
        note(f"loaded {len(self._conversation.messages)} messages")

    def stats(self, _: str) -> None:
        """Tokens and rates of the last answer."""
        note(self._stats)

    def help(self, _: str) -> None:
        """Lists the commands."""
        for name, command in COMMANDS.items():
            note(f"  {f'{name} {command.argument}':18}{(command.run.__doc__ or '').strip()}")

    def quit(self, _: str) -> bool:
        """Ends the chat, as Ctrl-D does."""
        return False


class _Command(NamedTuple):
    run: Callable[[Chat, str], Any]
    argument: str = ""


COMMANDS = {
    "/clear": _Command(Chat.clear),
    "/system": _Command(Chat.system, "[TEXT]"),
    "/regen": _Command(Chat.regenerate),
    "/save": _Command(Chat.save, "FILE.json"),
    "/load": _Command(Chat.load, "FILE.json"),
    "/stats": _Command(Chat.stats),
    "/help": _Command(Chat.help),
    "/quit": _Command(Chat.quit),
}


def _given(path: str, usage: str) -> str:
    if not path:
        raise JaxsplitError(f"a file is needed: {usage}")
    return path


def _interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def _printer() -> Callable[[list[tuple[bool, str]]], None]:
    """What shows the pieces of an answer: on a terminal, reasoning is dim."""
    if not _interactive():

        def show(pieces: list[tuple[bool, str]]) -> None:
            print("".join(text for _, text in pieces), end="", flush=True)

        return show
    from rich.console import Console

    console = Console()

    def show_styled(pieces: list[tuple[bool, str]]) -> None:
        for is_reasoning, text in pieces:
            style = "dim" if is_reasoning else None
            console.out(_CONTROL.sub("\ufffd", text), style=style, highlight=False, end="")

    return show_styled


def _messages(read: Callable[[bool], str]) -> Iterator[str]:
    """Messages and commands that a person enters. A line that ends with a backslash goes on.

    Args:
      read: reads a line, told whether it goes on with the one before; raises `EOFError`.
    """
    while True:
        text = ""
        try:
            while (line := read(bool(text))).endswith("\\"):
                text += line[:-1] + "\n"
        except EOFError:
            if text:
                yield text
            return
        except KeyboardInterrupt:
            if not _interactive():
                raise
            note("Ctrl-D or /quit ends the chat")
            continue
        yield text + line


def _plain_reader(_: bool) -> str:
    """The next line of standard input.

    Raises:
      EOFError: there is none.
    """
    line = "" if sys.stdin is None else sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _terminal_reader() -> Callable[[bool], str]:
    """What reads a line from a terminal, with editing and a history."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError:
        raise JaxsplitError(
            "chat on a terminal needs prompt_toolkit; install it with: pip install prompt_toolkit"
        ) from None

    class Kept(FileHistory):
        """A chat goes on where its history cannot be read or written."""

        def load_history_strings(self) -> list[str]:
            try:
                return list(super().load_history_strings())
            except OSError:
                return []

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    path = _history_file()
    history: History = InMemoryHistory() if path is None else Kept(str(path))
    session: PromptSession[str] = PromptSession(
        history=history,
        key_bindings=keys,
        multiline=True,  # pasted text may have several lines
        completer=WordCompleter(list(COMMANDS), sentence=True),
        complete_while_typing=False,
        prompt_continuation="… ",
    )
    return lambda goes_on: session.prompt("… " if goes_on else "> ", handle_sigint=False)


def _history_file() -> Path | None:
    """The file of earlier input, which only the user can read; None: there is none."""
    if _HISTORY.value == "none":
        return None
    import platformdirs

    from jaxsplit.paths import user_path

    if _HISTORY.value == "auto":
        path = Path(platformdirs.user_state_dir("jaxsplit", appauthor=False)) / "chat_history"
    else:
        path = user_path(_HISTORY.value, "--history")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        note(f"jaxsplit: input is not kept: --history={path}: {error.strerror or error}")
        return None
    return path


def main(_: list[str]) -> None:
    """Chats as the flags say."""
    options.use_compilation_cache(_COMPILE_CACHE.value)
    import jaxsplit
    from jaxsplit.conversation import Conversation

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sampling = SamplingConfig(**options.values(_SAMPLING))
    config = LoadConfig(**options.values(_LOAD))
    read = _terminal_reader() if _interactive() else _plain_reader
    model = None if _MODEL.value is None else local_model(_MODEL.value)
    with progress_bar("loading", quiet=_QUIET.value) as progress:
        lm = jaxsplit.load(model, config=config, progress=progress)
    conversation = Conversation(lm)
    if _SYSTEM.value is not None:
        conversation.system = options.unescaped(_SYSTEM.value)
    lm.chat_text([{"role": "user", "content": "Hello"}])  # a file without a template ends here
    if not _QUIET.value:
        note(with_flags(lm.describe()))
        if _interactive():
            note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
    chat = Chat(lm, conversation, sampling)
    with interrupts_raise():
        for text in _messages(read):
            if not chat.take(text):
                break
