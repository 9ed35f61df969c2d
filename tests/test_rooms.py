"""The rooms of the package: imports point downward only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jaxsplit

PACKAGE = Path(jaxsplit.__file__).parent

# From the top to the bottom; rooms of one line may not import one another.
ROOMS = """
__init__ generate gguf lm serve
cli
server
conversation perplexity
bench
llm
plan
engine
weights
architectures
models
ops
comm
context
cache
quant
sharding
formats text hub
config pallas cuda
arguments paths
lazy errors
"""
RANKS = {
    room: rank for rank, line in enumerate(reversed(ROOMS.split("\n"))) for room in line.split()
}


def imports(path: Path) -> Iterator[str]:
    """Modules below `jaxsplit` that a file imports, also inside functions, except for types."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (n.removeprefix("jaxsplit.") for n in names if n.startswith("jaxsplit."))


def room(module: str) -> str:
    """The room of a module; what `python -m` runs belongs to none, and opens the command lines."""
    return "generate" if module.endswith("__main__") else module.split(".")[0]


def files() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


def test_every_room_has_its_place():
    found = {room(module) for module, _ in files()}
    assert found == set(RANKS)


def test_kernels_are_known_to_their_own_operation_only():
    """To its `api`, above all; other operations and rooms use that."""
    wrong = [
        f"{module} imports {name}"
        for module, path in files()
        for name in imports(path)
        if (backend := re.search(r"^(ops\.\w+)\.triton_", name))
        and not module.startswith(backend[1])
    ]
    assert not wrong, "\n".join(wrong)


def test_models_know_what_operations_do_and_not_how():
    known = {"api", "spec", "layout", "rope"}
    wrong = [
        f"{module} imports {name}"
        for module, path in files()
        for name in imports(path)
        if module.startswith("models.")
        and name.startswith("ops.")
        and not known & set(name.split(".")[2:])
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_point_downward():
    wrong = [
        f"{module} imports {name}"
        for module, path in files()
        for name in imports(path)
        if room(name) in RANKS
        and room(name) != room(module)
        and RANKS[room(name)] >= RANKS[room(module)]
    ]
    assert not wrong, "\n".join(wrong)
