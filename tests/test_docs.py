"""README and docs: links lead somewhere, flags exist, Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


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


def commands():
    """`(module, arguments)` of each command of this package in README and docs."""
    for page in PAGES:
        for _, block in FENCE.findall(page.read_text("utf-8")):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^jaxsplit ", "python -m jaxsplit.", line)
                found = re.match(r"python -m (jaxsplit\.\w+) (.*?)(?:&|#|$)", line)
                if found:
                    yield found[1], shlex.split(found[2])


def flags_of(module: str) -> set[str]:
    """The flags that its `--help` lists."""
    command = [sys.executable, "-m", "jaxsplit", module.removeprefix("jaxsplit."), "--helpfull"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return set(re.findall(r"^\s+(?:-\w,)?--(?:\[no\])?(\w+)", done.stdout, re.MULTILINE))


def test_flags_of_commands_exist():
    told = list(commands())
    assert len(told) > 10
    known = {module: flags_of(module) | {"flagfile"} for module in {m for m, _ in told}}
    for module, arguments in told:
        flags = {a[2:].partition("=")[0] for a in arguments if a.startswith("--")}
        assert flags <= known[module], (module, arguments)


def test_flags_in_tables_exist():
    known = flags_of("jaxsplit.generate") | {"flagfile"}
    for name in ("options.md", "llama_cpp.md"):
        text = (ROOT / "docs" / name).read_text("utf-8")
        cells = re.findall(r"^\| (.+?) \| (.*?) \|", text, re.MULTILINE)
        column = 0 if name == "options.md" else 1
        flags = {f for cell in cells for f in re.findall(r"--(\w+)", cell[column])}
        assert len(flags) > 15
        assert flags <= known, name


def snippets():
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text("utf-8")):
            if language == "python" and "import" in block:
                yield pytest.param(block, id=f"{page.stem} {block.split()[1]}")


@pytest.mark.parametrize("code", list(snippets()))
def test_python_runs(code, smollm2_path, capsys):
    code = code.replace("model.gguf", str(smollm2_path)).replace("n_predict=64", "n_predict=4")
    code = code.replace('?"}]))', '?"}]), n_predict=4)')
    exec(compile(code, "snippet", "exec"), {})
