"""Runs CUDA C++ kernels on the CPU, compiled by g++: `cuda_host.h` takes the place of the GPU."""

import ctypes
import functools
import hashlib
import math
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

COMPILER = shutil.which("g++")
_AFTER = 1 << 16  # bytes
_FOLDER = Path(tempfile.mkdtemp(prefix="jaxsplit-cuda-host-"))


_lock = threading.Lock()
# Each kernel has its own shared memory, under whatever name.
_OPTIONS = ["-std=c++20", "-O1", "-fPIC", "-fno-gnu-unique", "-Wno-unknown-pragmas"]


def run(launch):
    """The results of what `cuda_call` would launch, as NumPy arrays."""
    path = _FOLDER / (hashlib.sha256(launch.source.encode()).hexdigest() + ".so")
    if not path.exists():
        rest = launch.source[launch.source.index('#line 1 "types.cuh"') :]
        entry = (
            'extern "C" void run_kernel(void** pointers, const int* grid, int threads) {\n'
            f"  launch({launch.name}, pointers, grid, threads);\n}}\n"
        )
        source = path.with_suffix(".cpp")
        source.write_text(f'#include "cuda_host.h"\n{rest}\n{entry}')
        _compile_header()
        _compile(source, "-shared", f"-I{_FOLDER}", "-o", path)
    arrays = [np.ascontiguousarray(x) for x in launch.operands]
    # Not a number, unless it is written; what follows a result must stay so.
    buffers = [np.full(_bytes(r) + _AFTER, 255, np.uint8) for r in launch.results]
    results = [
        buffer[: _bytes(r)].view(r.dtype).reshape(r.shape)
        for buffer, r in zip(buffers, launch.results, strict=True)
    ]
    # Results that overwrite an operand begin as a copy of it.
    for operand, result in launch.aliases.items():
        results[result] = arrays[operand] = arrays[operand].copy()
    pointers = (ctypes.c_void_p * (len(arrays) + len(results)))(
        *(x.ctypes.data for x in (*arrays, *results))
    )
    grid = (ctypes.c_int * 3)(*launch.grid)
    with _lock:  # shared memory is static
        ctypes.CDLL(str(path)).run_kernel(pointers, grid, launch.threads)
    assert all((buffer[-_AFTER:] == 255).all() for buffer in buffers), "written past a result"
    return results


def _bytes(shape):
    return math.prod(shape.shape) * shape.dtype.itemsize


@functools.cache
def _compile_header():
    """Once: it takes longer than most kernels."""
    header = Path(__file__).with_suffix(".h")
    _compile("-x", "c++-header", header, "-o", _FOLDER / "cuda_host.h.gch")


def _compile(*arguments):
    done = subprocess.run([COMPILER, *_OPTIONS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
