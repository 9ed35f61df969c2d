"""Run GGUF language models over all the accelerators of a machine, or of several.

  jaxsplit generate --model=FILE.gguf --prompt="Once upon a time"
  jaxsplit plan --model=FILE.gguf --devices=4 --device_kind="RTX 3090"

jaxsplit COMMAND --help lists the flags of a command.
"""

import dataclasses
import difflib
import sys
from collections.abc import Callable

from jaxsplit import __version__
from jaxsplit.cli.program import run
from jaxsplit.errors import JaxsplitError


@dataclasses.dataclass(frozen=True)
class Command:
    """A sub-command.

    Attributes:
      module: has its `main` and flags; imported when it runs, since commands have flags in common.
      help: what it does, in a line.
      arguments: how many arguments it takes that are not flags.
    """

    module: str
    help: str
    arguments: int = 0


COMMANDS = {
    "generate": Command("jaxsplit.cli.generate", "generate text from a model"),
    "chat": Command("jaxsplit.cli.chat", "talk with a model on the terminal"),
    "serve": Command("jaxsplit.cli.serve", "serve a model over HTTP"),
    "plan": Command("jaxsplit.cli.plan", "memory, cost and predicted speed of a model on devices"),
    "info": Command("jaxsplit.cli.info", "what is in a model file, or on this machine", 1),
    "bench": Command("jaxsplit.cli.bench", "measure prefill and decode rates"),
    "convert": Command("jaxsplit.cli.convert", "convert a GGUF file to a checkpoint directory"),
    "perplexity": Command("jaxsplit.cli.perplexity", "how well a model predicts a text"),
    "completion": Command("jaxsplit.cli.completion", "print a script that completes commands", 1),
}


def main() -> None:
    """Runs the command that the command line names."""
    name, arguments = "", sys.argv[1:]
    if arguments:
        name, *arguments = arguments
    if name == "help" and arguments:
        name, arguments = arguments[0], ["--help"]
    if name in COMMANDS:
        command = COMMANDS[name]
        sys.argv = [f"jaxsplit {name}", *arguments]
        run(command.module, arguments=command.arguments)
    else:
        sys.argv = ["jaxsplit"]
        run(_without_command(name))


def _without_command(name: str) -> Callable[[list[str]], None]:
    """What runs where no command is named first."""

    def show(_: list[str]) -> None:
        if name == "--version":
            print(f"jaxsplit {__version__}")
        elif name in ("", "help", "-h", "-help", "--help"):
            print(_help_text())
        else:
            raise JaxsplitError(_unknown(name))

    return show


def _help_text() -> str:
    commands = [f"  {name:12}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join([(__doc__ or "").rstrip(), "", "Commands:", *commands])


def _unknown(name: str) -> str:
    """The message for a first argument that names no command."""
    known = f"commands are {', '.join(COMMANDS)}"
    if name.startswith("-"):
        return f"{name} comes after a command, as in jaxsplit generate {name}; {known}"
    if name.endswith(".gguf"):
        return f"{name} is not a command; try jaxsplit generate --model={name}; {known}"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    guess = f"did you mean jaxsplit {near[0]}? " if near else ""
    return f"{name!r} is not a command; {guess}{known}; --help describes them"
