"""The source distribution and the wheel."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import jaxsplit

ROOT = Path(__file__).parents[1]
NEEDED = ["build", "check_wheel_contents", "setuptools", "twine"]


def run(*arguments, cwd=None, path=None):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is built from it.

    Both are built from a copy of the sources, without network.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install -e '.[dev]'")
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, sources)
    for folder in ("jaxsplit", "tests", "converters", "benchmarks", "configs", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "data")
        shutil.copytree(ROOT / folder, sources / folder, ignore=ignored)
    done = run("-m", "build", "--no-isolation", "--outdir", out, sources)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return sdist, wheel


def test_the_wheel_has_the_package_alone(built):
    names = zipfile.ZipFile(built[1]).namelist()
    version = jaxsplit.__version__
    assert {name.split("/")[0] for name in names} == {"jaxsplit", f"jaxsplit-{version}.dist-info"}
    sources = [p for end in ("py", "cu", "cuh") for p in (ROOT / "jaxsplit").rglob(f"*.{end}")]
    package = {path.relative_to(ROOT).as_posix() for path in sources}
    page = (ROOT / "jaxsplit" / "server" / "static").iterdir()
    package |= {"jaxsplit/py.typed", *(path.relative_to(ROOT).as_posix() for path in page)}
    assert {name for name in names if name.startswith("jaxsplit/")} == package


def test_the_source_distribution_builds_the_same(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "jaxsplit/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "converters"))]


def test_the_distributions_pass_the_checks_of_package_indexes(built):
    done = run("-m", "twine", "check", "--strict", *built)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("-m", "check_wheel_contents", built[1])
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_installed_wheel_has_the_command(built, tmp_path):
    arguments = ["--quiet", "--no-deps", "--no-index", "--target", tmp_path / "lib"]
    done = run("-m", "pip", "install", *arguments, built[1])
    assert done.returncode == 0, done.stderr
    command = tmp_path / "lib" / "bin" / "jaxsplit"
    done = run(command, "--version", cwd=tmp_path, path=tmp_path / "lib")
    assert (done.returncode, done.stdout) == (0, f"jaxsplit {jaxsplit.__version__}\n"), done.stderr
    done = run(command, "bench", "--help", cwd=tmp_path, path=tmp_path / "lib")
    assert done.stdout.startswith("Measure prefill and decode rates"), done.stderr
    shown = run(
        "-c", "import jaxsplit; print(jaxsplit.__file__)", cwd=tmp_path, path=tmp_path / "lib"
    )
    assert Path(shown.stdout.strip()).is_relative_to(tmp_path)
