"""What all command lines share: errors for people, a progress bar."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from jaxsplit.errors import JaxsplitError


def run(main: Callable[[list[str]], None], *, arguments: int = 0) -> None:
    """Parses the flags and runs a program; what the user can mend becomes one line and status 2.

    Args:
      main: takes the arguments that are not flags.
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
            main(argv[1:])
        except JaxsplitError as error:
            print(f"jaxsplit: {error}", file=sys.stderr)
            _leave(2)
        except KeyboardInterrupt:
            _leave(130)
        except BrokenPipeError:
            _leave_unread()
        except Exception as error:
            failed = _is_runtime_error(error)
            reason = str(error).splitlines()[0] if failed else ""
            if failed and "RESOURCE_EXHAUSTED" in reason:
                message = "try a shorter --ctx_size or more devices; jaxsplit.plan tells what fits"
                print(f"jaxsplit: a device's memory is full ({reason}); {message}", file=sys.stderr)
            elif not _one_of_several():
                raise
            elif failed:
                message = f"another process has ended or cannot be reached ({reason})"
                print(f"jaxsplit: {message}", file=sys.stderr)
            else:
                traceback.print_exc()
            _leave(1)

    app.run(guarded, flags_parser=_parse_flags)


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


def _leave(status: int) -> None:
    """Ends a failed program. One of several processes does not wait for the others, which would
    wait for it; they end when they miss it."""
    if _one_of_several():
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _leave_unread() -> None:
    """Ends a program when the reader of its text has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _leave(1)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # --help has been printed, which is no failure
        sys.exit(0)
    except BrokenPipeError:
        _leave_unread()
    except flags.Error as error:
        reason = " ".join(str(error).split())
        print(f"jaxsplit: {reason}; --help lists the flags", file=sys.stderr)
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
