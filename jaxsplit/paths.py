"""Paths as people give them, and what the operating system says of them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxsplit.errors import JaxsplitError


def user_path(path: str | os.PathLike[str], name: str = "the path") -> Path:
    """A path that a person gave, with `~` expanded.

    Args:
      path: text or a path object.
      name: the flag or argument, for messages.

    Raises:
      JaxsplitError: it is empty, of another type, or no path can have its characters.
    """
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str):
        raise JaxsplitError(f"{name} is {text!r}, expected a string or a pathlib.Path")
    if not text:
        raise JaxsplitError(f"{name} is empty; give a file or a directory")
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise JaxsplitError(f"{name} {text!r} has a character that no file name can have")
    return Path(os.path.expanduser(text))


def cache_folder() -> Path:
    """Where files of the user are that can be made again."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "jaxsplit"


def write_whole(path: Path, text: str) -> None:
    """Writes a whole file or none.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


@contextlib.contextmanager
def os_errors(path: Path, action: str = "read") -> Iterator[None]:
    """Turns errors of the operating system into one line that names the path."""
    try:
        yield
    except OSError as error:
        if action == "read" and isinstance(error, FileNotFoundError):
            raise JaxsplitError(f"no such file: {error.filename or path}") from error
        raise JaxsplitError(f"{path} cannot be {action}: {error.strerror or error}") from error
