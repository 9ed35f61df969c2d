"""CUDA C++ to PTX: NVRTC, and a cache of what it has compiled.

The interface is NVIDIA's (NVRTC documentation, "API Reference"), reached through `ctypes`.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path

from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import cache_folder, write_whole

_OPTIONS = ("--std=c++17",)

_SPECIFIC = 9.0
"""Compute capability whose code runs on no other, as it has instructions of its own."""

_END = "// end\n"
"""Of a whole file in the cache."""

_lock = threading.Lock()  # NVRTC compiles one program at a time anyway


def compiles_for(capability: float) -> bool:
    """Whether NVRTC is installed, and compiles for a GPU."""
    return _library() is not None and min(_architectures()) <= round(10 * capability)


def compile_ptx(source: str, capability: float, name: str) -> str:
    """Compiles CUDA C++.

    Args:
      source: of a kernel, without includes.
      capability: compute capability of the GPU, such as 7.5. One that this NVRTC does not know yet
        gets code for the newest before it, which the driver translates.
      name: of the file, for errors.

    Returns:
      PTX.

    Raises:
      JaxsplitError: NVRTC is not installed, is too new for the GPU, or finds an error.
    """
    library = _library()
    if library is None:
        raise JaxsplitError(
            "kernels=cuda needs NVRTC, which jax[cuda12] and jax[cuda13] install; try kernels=auto"
        )
    architecture, specific = _architecture(capability), "a" if capability == _SPECIFIC else ""
    options = (*_OPTIONS, f"--gpu-architecture=compute_{architecture}{specific}")
    key = "\0".join([str(_version(library)), *options, source]).encode()
    path = cache_folder() / "ptx" / f"{hashlib.sha256(key).hexdigest()}.ptx"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (ptx := path.read_text()).endswith(_END):
            return ptx
    ptx = _compile(library, source, name, options)
    with contextlib.suppress(OSError):  # a cache that cannot be written is no error
        write_whole(path, ptx + _END)
    return ptx


def _compile(library: ctypes.CDLL, source: str, name: str, options: Sequence[str]) -> str:
    program = ctypes.c_void_p()
    given = [option.encode() for option in options]
    with _lock:
        _check(
            library,
            library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), 0, None, None
            ),
        )
        try:
            status = library.nvrtcCompileProgram(
                program, len(given), (ctypes.c_char_p * len(given))(*given)
            )
            if status:
                log = _text(library, program, "ProgramLog")
                raise JaxsplitError(
                    f"NVRTC cannot compile {name}: {log or _error(library, status)}"
                )
            return _text(library, program, "PTX")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
    return text.value.decode()


def _error(library: ctypes.CDLL, status: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library.nvrtcGetErrorString(status).decode()


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise JaxsplitError(f"NVRTC: {_error(library, status)}")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """NVRTC of the newest CUDA that is installed as a Python package, but no newer than the driver,
    which would not know its PTX; None: there is none."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [*(spec.submodule_search_locations or ())]
    found = [
        path
        for root in roots
        for path in Path(root).glob("**/libnvrtc.so.*")
        if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)
    ]
    usable = []
    for path in found:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(path))
            if (version := _version(library)) <= _driver_version():
                usable.append((version, library))
    return max(usable, key=lambda one: one[0])[1] if usable else None


def _version(library: ctypes.CDLL) -> tuple[int, int]:
    """Of NVRTC: major and minor."""
    numbers = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(*map(ctypes.byref, numbers)))
    return numbers[0].value, numbers[1].value


def _driver_version() -> tuple[float, float]:
    """Of the newest CUDA that the driver runs; infinity where there is no driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError):
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0:
            return version.value // 1000, version.value % 1000 // 10
    return math.inf, math.inf


@functools.cache
def _architectures() -> tuple[int, ...]:
    """That NVRTC compiles for, such as 75."""
    library, count = _library(), ctypes.c_int()
    assert library is not None
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    found = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(found))
    return tuple(found)


def _architecture(capability: float) -> int:
    wanted = round(10 * capability)
    usable = [found for found in _architectures() if found <= wanted]
    if not usable:
        library = _library()
        assert library is not None
        oldest, version = min(_architectures()), ".".join(map(str, _version(library)))
        raise JaxsplitError(
            f"NVRTC {version} compiles for compute capability {oldest / 10} and later, and this "
            f"GPU has {capability}: try jax[cuda12], or kernels=xla"
        )
    return max(usable)
