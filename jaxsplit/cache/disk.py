"""Prefixes on disk: pages and states by their keys, in a form that no mesh changes.

    DIR/MODEL/KEY.page     a page: keys and values of its tokens
    DIR/MODEL/KEY.state    rings and recurrent states after its last token

MODEL is a hash of the model's file and of the options that change keys and values, KEY that of
`page_key`. A file is a zip archive, uncompressed: each member an array, little-endian, in C order,
with zip's checksum; its comment is the file's name. It is complete when it has its name. Several
processes may share a directory.
"""

import contextlib
import logging
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import os_errors, user_path

_LOG = logging.getLogger(__name__)

_PAGE, _STATE, _UNFINISHED = ".page", ".state", ".tmp"
_STALE = 3600
"""Seconds after which an unfinished file is nobody's."""

_RESCAN = 30
"""Seconds after which other processes may have written files, or removed them."""

Arrays = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""Shape and dtype of each array."""


def check_directory(path: str | os.PathLike[str]) -> Path:
    """The directory.

    Raises:
      JaxsplitError: it is missing or cannot be written.
    """
    directory = user_path(path, "prompt_cache_dir")
    if not directory.is_dir():
        what = "is no directory" if directory.exists() else "does not exist"
        raise JaxsplitError(
            f"prompt_cache_dir={directory} {what}; make one with: mkdir -m 700 {directory}"
        )
    with os_errors(directory, "written"):
        tempfile.TemporaryFile(dir=directory).close()
    return directory


class PrefixDirectory:
    """Pages and states of one model in a directory. Thread-safe.

    Args:
      path: the directory, which must exist.
      model: the model's hash.
      capacity: bytes of all models' files together; the least recently used are removed.

    Raises:
      JaxsplitError: it is missing or cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], model: bytes, capacity: int):
        self.path, self.capacity = check_directory(path), capacity
        self._folder = self.path / model.hex()[:32]
        with os_errors(self.path, "written"):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        self._lock = threading.Lock()
        self._names: set[str] = set()
        self._scanned, self._since_scan = 0.0, 0
        self._failed = False
        self.nbytes = 0
        self.trim()

    def __contains__(self, key: bytes) -> bool:
        """Whether there is a page of this key, as far as is known."""
        return key.hex() + _PAGE in self._names

    def has_state(self, key: bytes) -> bool:
        """Whether there is a state of this key, as far as is known."""
        return key.hex() + _STATE in self._names

    @property
    def outdated(self) -> bool:
        """Whether `trim` should look again what other processes have done."""
        return time.monotonic() - self._scanned > _RESCAN

    def read(self, key: bytes, shapes: Shapes, *, state: bool = False) -> dict[str, np.ndarray]:
        """The arrays of a page or of a state.

        Args:
          key: of the page.
          shapes: of the arrays that are expected.
          state: the state is wanted.

        Raises:
          LookupError: there is no such file, or it is damaged, which is logged; it is removed.
        """
        path = self._file(key, state=state)
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.comment != path.name.encode():
                    raise ValueError("it was written under another name")
                found = {name: _array(archive, name, *shapes[name]) for name in shapes}
        except FileNotFoundError:
            self._names.discard(path.name)
            raise LookupError(path) from None
        except (OSError, MemoryError) as error:  # the file may be as it should
            _LOG.warning("%s cannot be read: %s", path, error or type(error).__name__)
            raise LookupError(path) from None
        except Exception as error:  # whatever a foreign file makes zipfile do
            self._names.discard(path.name)
            _LOG.warning("%s is damaged and is ignored: %s", path, error or type(error).__name__)
            with contextlib.suppress(OSError):
                path.unlink()
            raise LookupError(path) from None
        with contextlib.suppress(OSError):  # another server may have removed it meanwhile
            os.utime(path)
        return found

    def write(
        self, key: bytes, arrays: Arrays, *, state: bool = False, used: float | None = None
    ) -> None:
        """Writes a page or a state. If that fails, it is logged, once.

        Args:
          key: of the page.
          arrays: what it holds.
          state: it is a state.
          used: time of its last use; None: now.
        """
        path = self._file(key, state=state)
        unfinished = None
        try:
            handle, unfinished = self._unfinished()
            with open(handle, "wb") as file, zipfile.ZipFile(file, "w") as archive:
                archive.comment = path.name.encode()
                for name, array in arrays.items():
                    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                    archive.writestr(name, content.data)
            if used is not None:
                os.utime(unfinished, (used, used))
            size = os.path.getsize(unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            if unfinished is not None:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished)
            if not self._failed:
                _LOG.warning(
                    "%s: prefixes cannot be written: %s", self.path, error.strerror or error
                )
            self._failed = True
            return
        self._failed = False
        with self._lock:
            self._names.add(path.name)
            self.nbytes += size
            self._since_scan += size
            due = self.nbytes > self.capacity and self._since_scan > self.capacity / 64
        if due:
            self.trim()

    def use(self, keys: Sequence[bytes]) -> None:
        """Notes that a prefix is used. Its first pages are removed last: without them, the others
        are of no use."""
        now = time.time()
        for depth, key in enumerate(keys):
            for path in (self._file(key), self._file(key, state=True)):
                if path.name in self._names:
                    with contextlib.suppress(OSError):
                        os.utime(path, (now, used_at(now, depth)))

    def trim(self) -> None:
        """Lists the directory, and removes the least recently used files while there are too
        many bytes."""
        with self._lock:
            self._scanned, self._since_scan = time.monotonic(), 0
            total, files = 0, sorted(self._files())
            for _, size, _ in files:
                total += size
            # A bit more than needed, so that not every write has to look.
            target = self.capacity if total <= self.capacity else self.capacity * 31 // 32
            gone = set()
            for _, size, path in files:
                if total <= target:
                    break
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    gone.add(path)
                    total -= size
            self.nbytes = total
            own = os.fspath(self._folder)
            self._names = {
                os.path.basename(path)
                for _, _, path in files
                if path not in gone and os.path.dirname(path) == own
            }

    def _file(self, key: bytes, *, state: bool = False) -> Path:
        return self._folder / (key.hex() + (_STATE if state else _PAGE))

    def _unfinished(self) -> tuple[int, str]:
        """A new file of mode 0600."""
        return tempfile.mkstemp(dir=self._folder, suffix=_UNFINISHED)

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """When each file of all models was last used, its size, and its path."""
        old = time.time() - _STALE
        for folder in _entries(self.path):
            if not _is_model(folder):
                continue
            for entry in _entries(folder.path):
                with contextlib.suppress(OSError):
                    end, status = os.path.splitext(entry.name)[1], entry.stat(follow_symlinks=False)
                    if end == _UNFINISHED and status.st_mtime < old:
                        os.unlink(entry.path)
                    elif end in (_PAGE, _STATE):
                        yield status.st_mtime, status.st_size, entry.path


def used_at(now: float, depth: int) -> float:
    """The time of a page's use, earlier the deeper it is: the first pages of a prefix go last."""
    return now - depth * 1e-5


def _is_model(entry: os.DirEntry[str]) -> bool:
    """Whether it is a model's folder: other folders are left alone."""
    return len(entry.name) == 32 and not set(entry.name) - set("0123456789abcdef")


def _entries(path: Any) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """A member as an array.

    Raises:
      ValueError: it has another size. Other errors are those of `zipfile`.
    """
    info, array = archive.getinfo(name), np.empty(shape, dtype)
    if (info.file_size, info.compress_type) != (array.nbytes, zipfile.ZIP_STORED):
        raise ValueError(f"{name} has {info.file_size} bytes, expected {array.nbytes}")
    with archive.open(info) as member:  # it checks the checksum at its end
        buffer, at = array.reshape(-1).view(np.uint8).data, 0
        while at < len(buffer) and (count := cast(Any, member).readinto(buffer[at:])):
            at += count
        if at < len(buffer) or member.read(1):
            raise ValueError(f"{name} is truncated")
    return array
