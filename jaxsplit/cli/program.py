"""What all command lines share: streams, interrupts, errors for people, a progress bar."""

import contextlib
import functools
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NoReturn, TextIO

from absl import app, flags, logging

from jaxsplit.cli.help import HelpFlag, with_flags
from jaxsplit.errors import JaxsplitError


def run(main: Callable[[list[str]], None] | str, *, arguments: int = 0) -> None:
    """Parses the flags and runs a program; what the user can fix becomes one line and status 2.

    Args:
      main: takes the arguments that are not flags; or the name of a module with this function and
        its flags, which is imported here, where an interrupt is handled.
      arguments: how many of them it takes.
    """

    def guarded(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries report each step otherwise
        try:
            if len(argv) - 1 > arguments:
                raise JaxsplitError(
                    f"unexpected argument {argv[arguments + 1]!r}; --help lists the flags"
                )
            _refuse_empty_flags()
            program(argv[1:])
            sys.stdout.flush()
        except JaxsplitError as error:
            note(f"jaxsplit: {with_flags(str(error))}")
            _leave(2)
        except KeyboardInterrupt:
            _leave(130)
        except BrokenPipeError:
            _leave_unread()
        except OSError as error:
            where = error.filename or "standard output"
            note(f"jaxsplit: {where}: {error.strerror or error}")
            _leave_unread()
        except Exception as error:
            failed = _is_runtime_error(error)
            reason = str(error).splitlines()[0] if failed else ""
            if failed and "RESOURCE_EXHAUSTED" in reason:
                message = "try a shorter --ctx_size or more devices; jaxsplit.plan tells what fits"
                note(f"jaxsplit: a device's memory is full ({reason}); {message}")
            elif not _one_of_several():
                raise
            elif failed:
                note(f"jaxsplit: another process has ended or cannot be reached ({reason})")
            else:
                traceback.print_exc()
            _leave(1)

    _open_missing_streams()
    with _leave_on_interrupt():
        if isinstance(main, str):
            module = importlib.import_module(main)
            program = module.main
        else:
            module, program = sys.modules[main.__module__], main
        app.run(guarded, flags_parser=functools.partial(_parse_flags, module))


def note(message: str) -> None:
    """Writes a line to standard error, if anybody reads it."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = _null()


def _null() -> TextIO:
    return os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")


def _open_missing_streams() -> None:
    """Opens the null device where a standard stream is closed: files opened later would take its
    number, and native libraries would write their messages into them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = _null()


@contextlib.contextmanager
def _leave_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once with status 130.

    Python runs signal handlers between two instructions of the main thread, which may be compiling
    for long, and drops what they raise in callbacks of the garbage collector. So a thread waits for
    the signal's number, which the interpreter writes to a pipe at once, and ends the process.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGINT:
                _interrupted()
        os.close(reading)

    threading.Thread(target=wait, daemon=True).start()
    handler = signal.signal(signal.SIGINT, lambda *_: _interrupted())
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, handler)
        os.close(writing)  # ends the thread


@contextlib.contextmanager
def interrupts_raise() -> Iterator[threading.Event]:
    """Within, Ctrl-C raises `KeyboardInterrupt` instead of ending the process.

    Python drops what is raised in a callback of the garbage collector, and JAX has one. So the
    event that is yielded is set, too.
    """
    interrupted = threading.Event()
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        yield interrupted
        return

    def handle(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    wakeup = signal.set_wakeup_fd(-1)
    handler = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(wakeup)


def local_model(model: str, name: str = "--model") -> str:
    """The path of a model that a flag names, fetched from the Hugging Face Hub if need be.

    The Hub's library has progress bars of its own, and removes half a file when it is interrupted.
    """
    from jaxsplit.hub import find_model

    with interrupts_raise():
        return str(find_model(model, name))


_cleanup: list[Callable[[], object]] = []


def on_interrupt(action: Callable[[], object]) -> None:
    """Has something done before an interrupt ends the process, which runs no `finally`."""
    _cleanup.append(action)


def _interrupted() -> None:
    for action in _cleanup:
        action()
    if os.isatty(2):
        os.write(2, b"\x1b[?25h\n")  # shows the cursor, which progress bars hide
    os._exit(130)


def _refuse_empty_flags() -> None:
    """A value is empty where a shell variable is not set; no flag means anything by it."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        values = flag.value if isinstance(flag.value, list) else [flag.value]
        if flag.present and "" in values:
            raise JaxsplitError(f"--{name}= is empty; give it a value, or leave the flag out")


def text_alone_on_stdout() -> None:
    """Standard output is for the program's text: what native libraries write there goes to standard
    error."""
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")


def _is_runtime_error(error: Exception) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(error, jax.errors.JaxRuntimeError)


def _one_of_several() -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(status: int) -> NoReturn:
    """Ends a failed program. One of several processes does not wait for the others, which would
    wait for it; they end when they miss it."""
    if _one_of_several():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _leave_unread() -> NoReturn:
    """Ends a program whose text cannot be written; nor can what is left of it, at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _leave(1)


def _parse_flags(module: ModuleType, argv: list[str]) -> list[str]:
    flags.DEFINE_flag(HelpFlag(module))
    try:
        if sys.stdout is None:
            raise flags.Error("standard output is closed: there is nowhere to write to")
        if empty := [arg for arg in argv[1:] if arg.lstrip("-") == "flagfile="]:
            raise flags.Error(f"{empty[0]} is empty; give it a file, or leave it out")
        return flags.FLAGS(argv)
    except SystemExit:  # --help has been printed, which is no failure
        sys.exit(0)
    except BrokenPipeError:
        _leave_unread()
    except OSError as error:
        note(f"jaxsplit: {error.filename or 'standard output'}: {error.strerror or error}")
        _leave_unread()
    except flags.Error as error:
        reason = " ".join(str(error).split())
        note(f"jaxsplit: {reason}; --help lists the flags")
        sys.exit(2)


@contextlib.contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A progress bar in bytes on standard error; nothing if that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*columns, TransferSpeedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextlib.contextmanager
def counting_bar(label: str, total: int | None, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A bar of things done, on standard error; nothing if that is not a terminal.

    Args:
      label: shown beside the bar.
      total: how many there are; None: not known.
      quiet: show nothing.

    Yields:
      takes `completed`, how many are done, and `description`, a new label.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True, quiet=quiet or not sys.stderr.isatty())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield functools.partial(bar.update, bar.add_task(label, total=total))
