"""Eight CPU devices stand in for accelerators; models are small or tiny.

`pytest -m gpu tests/gpu` runs on GPUs instead (docs/testing.md).
"""

import atexit
import gc
import json
import os
import shutil
import sys
import tempfile
import zlib
from pathlib import Path

# Read when jax is imported, before pytest offers its options.
if "gpu" not in sys.argv or "JAXSPLIT_GPU_LANE_ON_CPU" in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# What one test has compiled serves the others, those of other workers too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxsplit-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest
from helpers import quick_options, recipe, write_recipe
from jax._src import compiler

import jaxsplit
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.llm import demo_model


def pytest_collection_finish():
    """What was imported and collected stays: the garbage collector need not look at it again. Tests
    make little garbage, and much that looks like it: traced programs. Each module ends with a
    collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session")
def recipe_gguf(tmp_path_factory):
    """`recipe_gguf(recipe or name, quantize=None)`: the path of its GGUF file, written once."""
    folder = tmp_path_factory.mktemp("recipes")

    def path(source: dict | str, quantize: dict[str, str] | None = None) -> Path:
        source = recipe(source) if isinstance(source, str) else source
        content = zlib.crc32(json.dumps([source, quantize]).encode())
        file = folder / f"{source['name']}-{content:08x}.gguf"
        if not file.exists():
            write_recipe(source, file, quantize)
        return file

    return path


@pytest.fixture(scope="session")
def load():
    """`load(path, **options)`: a tiny model in float32, loaded once; `kernels`: as on GPUs, with
    kernels that are interpreted."""
    loaded = {}

    def get(path: Path, *, kernels: bool = False, **options) -> jaxsplit.LM:
        key = (path, kernels, str(sorted(options.items())))
        if key not in loaded:
            options = {"dtype": "float32", "ctx_size": 256, "slots": 1, **options}
            options.setdefault("cache_tokens", options["slots"] * options["ctx_size"])
            options |= {"kernels": "interpret"} if kernels else {}
            loaded[key] = jaxsplit.load(path, **options)
        return loaded[key]

    return get


@pytest.fixture
def interpreter():
    """Kernels that the test calls itself are interpreted."""
    with forward_context(policy=MatmulPolicy(kernels=True, interpret=True)):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Frees what was compiled: each program takes memory maps, of which a process has 65530."""
    yield
    jax.clear_caches()
    gc.collect()


def _compile_quickly():
    """Programs are compiled, not optimized: for tests that compile far longer than they run. Those
    of the package, too, and operations that run one by one."""
    original, quick = compiler.get_compile_options, quick_options()

    def compile_options(*args, env_options_overrides=None, **kwargs):
        options = quick | dict(env_options_overrides or {})
        return original(*args, env_options_overrides=options, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", compile_options)
        yield


quick_compilation = pytest.fixture(_compile_quickly)
quick_module = pytest.fixture(_compile_quickly, scope="module")  # its fixtures compile, too


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The demo model."""
    return demo_model()
