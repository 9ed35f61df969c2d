"""Tilings that `jaxsplit bench --tune` has found to be the fastest on this machine.

A kernel divides its work by a tiling, a dataclass of integers. Where a caller names none, and this
table has one for the problem, the kernel takes it instead of its usual one. The table is a file of
the user, by compute capability, kernel and problem.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxsplit.context import current_context
from jaxsplit.paths import cache_folder, os_errors, write_whole
from jaxsplit.quant.qtensor import QTensor

Table = dict[str, dict[str, dict[str, int]]]
"""Fields of tilings, by kernel and problem."""

_Filled = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
_Kernel = TypeVar("_Kernel", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call of a kernel without a tiling.

    Attributes:
      kernel: name of the kernel.
      key: what it is called with, as text: types, shapes and options.
      run: the kernel; takes `tiling`.
      args, options: what it is called with; arrays as `jax.ShapeDtypeStruct`.
      candidates: tilings that may be tried.
      filled: arguments and options as they are timed, given random ones.
    """

    kernel: str
    key: str
    run: Callable[..., Any] = dataclasses.field(compare=False)
    args: tuple[Any, ...] = dataclasses.field(compare=False)
    options: Mapping[str, Any] = dataclasses.field(compare=False)
    candidates: Sequence[Any] = dataclasses.field(compare=False)
    filled: _Filled = dataclasses.field(compare=False)


_collected: contextvars.ContextVar[dict[Problem, None] | None] = contextvars.ContextVar(
    "collected", default=None
)


@contextlib.contextmanager
def collected() -> Iterator[dict[Problem, None]]:
    """The problems, as keys, of what is traced inside the block."""
    problems: dict[Problem, None] = {}
    token = _collected.set(problems)
    try:
        yield problems
    finally:
        _collected.reset(token)


def tunable(
    candidates: Callable[..., Sequence[Any]],
    filled: _Filled = lambda args, options: (args, options),
) -> Callable[[_Kernel], _Kernel]:
    """Decorates a kernel that takes `tiling`.

    Args:
      candidates: tilings that may be tried, given the kernel's other arguments; none: such a
        problem is not tuned.
      filled: arguments as they are timed, given random ones.
    """

    def decorate(kernel: _Kernel) -> _Kernel:
        run = functools.partial(with_tiling, kernel, candidates, filled)
        return functools.wraps(kernel)(run)  # pyright: ignore[reportReturnType]

    return decorate


def with_tiling(
    kernel: Callable[..., Any],
    candidates: Callable[..., Sequence[Any]],
    filled: _Filled,
    /,
    *args: Any,
    tiling: Any = None,
    **options: Any,
) -> Any:
    """Calls a kernel with the tiling of the table, if it is given none."""
    policy, problems = current_context().policy, _collected.get()
    name = kernel.__module__.rpartition(".")[2]
    found = table(policy.cuda).get(name, {})
    if policy.cuda and tiling is None and (found or problems is not None):
        key, possible = _text((args, options)), candidates(*args, **options)
        if problems is not None and possible:
            shapes, settings = jax.tree.map(_like, (args, options))
            problems[Problem(name, key, kernel, shapes, settings, possible, filled)] = None
        if key in found:  # perhaps by another version, with other tilings
            fits = (t for t in possible if dataclasses.asdict(t) == found[key])
            tiling = next(fits, None)
    return kernel(*args, tiling=tiling, **options)


def path_of_tables() -> Path:
    """The file of all tables."""
    return cache_folder() / "tilings.json"


@functools.cache
def table(capability: float) -> Table:
    """The table for GPUs of a compute capability; empty if none has been written."""
    found = _tables().get(str(capability)) if capability else {}
    kernels = found.items() if isinstance(found, dict) else ()
    return {kernel: problems for kernel, problems in kernels if isinstance(problems, dict)}


def write(capability: float, problem: Problem, tiling: Any) -> None:
    """Puts a tiling into the table for GPUs of a compute capability; None: removes any.

    Raises:
      JaxsplitError: the file cannot be written.
    """
    own = table(capability)
    of_kernel = own.setdefault(problem.kernel, {})
    of_kernel.pop(problem.key, None)
    if tiling is not None:
        of_kernel[problem.key] = dataclasses.asdict(tiling)
    path = path_of_tables()
    with os_errors(path, "written"):
        text = json.dumps(_tables() | {str(capability): own}, indent=1)
        write_whole(path, text + "\n")
    table.cache_clear()


def _tables() -> dict[str, Table]:
    try:
        found = json.loads(path_of_tables().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _like(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x


def _text(x: Any) -> str:
    if isinstance(x, QTensor):
        kind = "trellis " if x.layout.trellis else "table " if x.layout.table is not None else ""
        planes = " ".join(_text(leaf) for leaf in jax.tree.leaves(x))
        return f"({kind}{planes})"
    if isinstance(x, Mapping):
        return " ".join(f"{name}={_text(value)}" for name, value in x.items())
    if isinstance(x, list | tuple):
        return " ".join(map(_text, x))
    if isinstance(x, jax.Array | jax.ShapeDtypeStruct):
        return f"{x.dtype.name}[{','.join(map(str, x.shape))}]"
    if not dataclasses.is_dataclass(x):
        return str(jnp.dtype(x) if hasattr(x, "dtype") else x)
    if (leaves := jax.tree.leaves(x)) != [x]:
        return f"({' '.join(map(_text, leaves))})"
    changed = [f.name for f in dataclasses.fields(x) if getattr(x, f.name) != f.default]
    return f"({' '.join(f'{name}={getattr(x, name)}' for name in changed)})"
