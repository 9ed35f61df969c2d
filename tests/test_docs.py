"""README and docs: links lead somewhere, flags exist, commands and Python run.

Every shell line of a fenced block that runs a program of this repository is executed, on a tiny
model and two CPU devices, and so is every block of Python. `<!-- not run: REASON -->` above a block
excepts it; `<!-- excerpt of FILE -->` says that the file has these lines.
"""

import os
import re
import shlex
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import quick_environment
from tiny import write_tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^ *(?:<!-- ([^\n]+) -->\n+)?( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL
)
PROGRAM = re.compile(
    r"(?:\w+=\S+ )*(?:srun )?"
    r"(jaxsplit(?= )|python -m (?:jaxsplit|pytest)|python (?=\w+/)|pytest|make(?= ))"
)


class Block(NamedTuple):
    """A fenced block: its page, its language, the comment above it, its text."""

    page: Path
    language: str
    mark: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.stem}: {self.text.strip().splitlines()[0][:40]}"

    @property
    def lines(self) -> list[str]:
        """Those that a shell sees."""
        return self.text.replace("\\\n", " ").splitlines()


BLOCKS = [
    Block(page, language, mark or "", textwrap.dedent(text))
    for page in PAGES
    for mark, _, language, text in FENCE.findall(page.read_text("utf-8"))
]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


# Flags


def commands() -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Program and arguments of each command in the pages, also within lines, and in docstrings."""
    lines = [line for block in BLOCKS for line in block.lines]
    for page in PAGES:
        lines += re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))
    for folder in ("jaxsplit/cli", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            docstring = path.read_text("utf-8").split('"""')[1]
            lines += re.findall(r"^  (.+)$", docstring.replace("\\\n", " "), re.MULTILINE)
    for line in lines:
        line = re.sub(r"^(?:\w+=\S+ )*(?:srun )?", "", line).partition(" -- ")[0]
        if found := re.match(r"jaxsplit ([a-z]+\b)(.*?)(?:&|#|$)", line):
            yield ("-m", "jaxsplit", found[1]), shlex.split(found[2])
        elif found := re.match(r"python -m (jaxsplit\.\w+)(.*?)(?:&|#|$)", line):
            yield ("-m", found[1]), shlex.split(found[2])
        elif found := re.match(r"(?:python )?(benchmarks/\w+\.py)(.*?)(?:&|#|$)", line):
            yield (found[1],), shlex.split(found[2])


def flags_of(*program: str) -> set[str]:
    """The flags that its `--help` lists."""
    done = subprocess.run(
        [sys.executable, *program, "--helpfull"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    pairs = re.findall(r"^\s+(?:-(\w),)?--(?:\[no\])?(\w+)", done.stdout, re.MULTILINE)
    return {"flagfile", "help", *(name for pair in pairs for name in pair if name)}


def test_flags_of_commands_exist():
    told = [(program, given) for program, given in commands() if any("-" in a for a in given)]
    assert len(told) > 20
    programs = {program for program, _ in told}
    with ThreadPoolExecutor(2) as pool:
        known = dict(zip(programs, pool.map(lambda p: flags_of(*p), programs), strict=True))
    for program, arguments in told:
        flags = {re.match(r"-+(\w+)", a)[1] for a in arguments if re.match(r"--?[a-z]", a)}
        assert flags <= known[program], (program, arguments)


def test_flags_in_tables_exist():
    known = flags_of("-m", "jaxsplit", "generate") | flags_of("-m", "jaxsplit", "serve")
    known |= {f"no{flag}" for flag in known}
    for name in ("options.md", "llama_cpp.md"):
        text = (ROOT / "docs" / name).read_text("utf-8")
        cells = re.findall(r"^\| (.+?) \| (.*?) \|", text, re.MULTILINE)
        column = 0 if name == "options.md" else 1
        flags = {f for cell in cells for f in re.findall(r"--(\w+)", cell[column])}
        assert len(flags) > 15
        assert flags <= known, name


# Commands


def script(block: Block) -> list[str]:
    """The block's own commands, few tokens each."""
    lines = []
    for line in block.lines:
        if PROGRAM.match(line) and not line.startswith("make "):
            line = re.sub(r"--n_predict=\d+", "--n_predict=4", line.partition("  #")[0].strip())
            demo = " --model=FILE.gguf --n_predict=4" if "--flagfile=" in line else ""
            lines.append(line + demo)
        elif line.startswith("export "):
            lines.append(line)
    if any(line.endswith("&") for line in lines):
        lines.append("wait")
    return lines


def scripts() -> dict[str, str]:
    """The commands of each page that are run, without those of the pages before."""
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for block in BLOCKS:
        if block.language in ("", "sh", "bash") and not block.mark.startswith("not run: "):
            lines = [line for line in script(block) if line not in seen]
            found.setdefault(block.page.stem, []).extend(lines)
            seen.update(lines)
    return {page: "\n".join(lines) for page, lines in found.items() if lines}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    return write_tiny_model(folder / "tiny.gguf", kind="Q8_0", metadata={"general.name": "tiny"})


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Two devices, and `python` and `jaxsplit` of this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in {"python": "", "jaxsplit": "-m jaxsplit"}.items():
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (folder / name).chmod(0o755)
    return quick_environment() | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
    }


@pytest.mark.parametrize(("page", "text"), scripts().items(), ids=scripts())
def test_commands_run(page, text, tiny, environment, tmp_path):
    """In a folder with the files that they name: models are the tiny one, texts the README."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        text = text.replace("localhost:1234", f"localhost:{free.getsockname()[1]}")
    for name in set(re.findall(r"=([\w.-]+\.gguf)", text)):
        (tmp_path / name).symlink_to(tiny)
    for name in set(re.findall(r"file=([\w.-]+\.(?:txt|raw))", text)):
        (tmp_path / name).symlink_to(ROOT / "README.md")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", text],
        cwd=tmp_path,
        env=environment,
        input="Hi.\n",  # of a chat
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip(), done.stderr[-3000:]


def test_make_targets_are_run_by_ci():
    """Which runs them, so that no test needs to."""
    targets = set()
    for page in PAGES:
        for found in re.findall(r"^make (\w+)|`make (\w+)`", page.read_text("utf-8"), re.MULTILINE):
            targets |= set(filter(None, found))
    assert "demo" in targets
    jobs = [ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "test.yml"]
    runs = "".join(path.read_text("utf-8") for path in jobs)
    assert targets <= set(re.findall(r"(?:\bmake|\btarget:) (\w+)\b", runs))


# Python


EXCERPTS = [block for block in BLOCKS if block.mark.startswith("excerpt")]


@pytest.mark.parametrize("block", EXCERPTS, ids=lambda block: block.name)
def test_excerpts_are_in_their_files(block):
    """Line for line; `…` stands for anything."""
    source = (ROOT / block.mark.removeprefix("excerpt of ")).read_text("utf-8")
    parts = map(re.escape, " ".join(block.text.split()).split("…"))
    assert re.search(".*?".join(parts), " ".join(source.split()))


SNIPPETS = [block for block in BLOCKS if block.language == "python" and not block.mark]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.name)
def test_python_runs(block, tiny, capsys):
    code = block.text.replace("model.gguf", str(tiny)).replace("n_predict=64", "n_predict=4")
    code = code.replace('?"}]))', '?"}]), n_predict=4)')
    exec(compile(code, "snippet", "exec"), {})


def test_blocks_are_run_or_marked():
    """Of languages that a test runs; a mark with a mistake in it excepts nothing."""
    for block in BLOCKS:
        assert block.language in ("", "sh", "bash", "python") or block.mark, block.name
        if block.mark:
            assert re.fullmatch(r"not run: .{10,}|excerpt of \S+", block.mark), block.name
    marks = [m for page in PAGES for m in re.findall(r"^ *<!--", page.read_text("utf-8"), re.M)]
    assert len(marks) == sum(bool(block.mark) for block in BLOCKS)
