"""`--help`: what a program does, and its flags in groups, in 80 columns."""

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType

from absl import flags

_NAME_WIDTH = 26
_COMMON = [
    ("--flagfile=FILE", "read more flags from a file, one a line"),
    ("--helpfull", "also the flags of libraries"),
]
_PLACEHOLDERS = {"int": "N", "float": "X"}


class HelpFlag(flags.BooleanFlag):
    """The flag `--help`, in place of absl's."""

    def __init__(self, module: ModuleType):
        super().__init__("help", False, "show this help", short_name="h", allow_override=True)
        self._module = module

    def parse(self, argument: str | bool | None) -> None:
        if argument in (True, "true", "1"):
            print(help_text(self._module))
            sys.stdout.flush()
            sys.exit(0)


def help_text(module: ModuleType) -> str:
    """What `--help` prints: the docstring of a program's module, then its flags.

    Args:
      module: has the program's flags; its `GROUPS`, if it has them, give for the first flag of each
        group the group's name.
    """
    width = min(80, shutil.get_terminal_size().columns)
    headings = getattr(module, "GROUPS", {})
    groups: list[list[str]] = []
    for flag in shown_flags(module):
        if flag.name in headings or not groups:
            groups.append([f"{headings.get(flag.name, 'Flags')}:"])
        groups[-1] += _entry(_name(flag), description(flag), width)
    groups.append(["Common:"])
    for name, help in _COMMON:
        groups[-1] += _entry(name, help, width)
    return "\n\n".join([(module.__doc__ or "").strip(), *map("\n".join, groups)])


def with_flags(message: str) -> str:
    """A message of the library, whose arguments are flags here: `seed=x` is `--seed=x`."""
    names = "|".join(re.escape(name) for name in sorted(flags.FLAGS, key=len, reverse=True))
    return re.sub(rf"(?<![\w.$/-])({names})(?==)", r"--\1", message)


def shown_flags(module: ModuleType) -> Iterator[flags.Flag]:
    """The flags of a module in their order, without old names of flags."""
    for flag in flags.FLAGS.get_key_flags_for_module(module):
        if not (flag.help or "").startswith("the old name of"):
            yield flag


def _name(flag: flags.Flag) -> str:
    short = f"-{flag.short_name}, " if flag.short_name else ""
    if flag.boolean:
        return f"{short}--[no]{flag.name}"
    placeholder = _PLACEHOLDERS.get(flag.flag_type().removeprefix("multi "), "…")
    return f"{short}--{flag.name}={placeholder}"


def description(flag: flags.Flag) -> str:
    help = with_flags(" ".join((flag.help or "").split()))
    if isinstance(flag, flags.EnumFlag):
        help = f"{help.partition('>: ')[2]} ({' | '.join(flag.parser.enum_values)})"
    help = help.removesuffix("; repeat this option to specify a list of values")
    default = flag.default
    if default is None or default is False or default == [] or "(default:" in help:
        return help
    if isinstance(default, list):
        default = ",".join(map(str, default))
    return f"{help} (default: {str(default).lower() if flag.boolean else default})"


def _entry(name: str, description: str, width: int) -> list[str]:
    """The lines of a flag: its name, and its description in a column beside or below it."""
    indent = " " * _NAME_WIDTH
    lines = textwrap.wrap(
        description, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    if len(name) + 4 > _NAME_WIDTH or not lines:
        return [f"  {name}", *lines]
    return [f"  {name:{_NAME_WIDTH - 2}}" + lines[0][_NAME_WIDTH:], *lines[1:]]
