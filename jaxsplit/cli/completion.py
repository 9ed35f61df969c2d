"""Print a script that completes commands, flags and choices in a shell.

  jaxsplit completion bash > ~/.local/share/bash-completion/completions/jaxsplit
  jaxsplit completion fish > ~/.config/fish/completions/jaxsplit.fish

For zsh, write it to a file _jaxsplit in a folder of $fpath.
"""

import dataclasses
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

from jaxsplit.cli.help import description, shown_flags
from jaxsplit.cli.main import COMMANDS
from jaxsplit.config import LoadConfig, SamplingConfig
from jaxsplit.errors import JaxsplitError


@dataclasses.dataclass(frozen=True)
class _Flag:
    """A flag of a command.

    Attributes:
      name: without dashes.
      short: one letter, or "".
      takes_value: not a switch.
      choices: its values; empty: any, such as a file.
      help: a few words.
    """

    name: str
    short: str
    takes_value: bool
    choices: Sequence[str]
    help: str


@dataclasses.dataclass(frozen=True)
class _Command:
    """A sub-command: its name, what it does, its flags, and what its arguments may be."""

    name: str
    help: str
    flags: Sequence[_Flag]
    arguments: Sequence[str]


def _config_choices() -> Mapping[str, Sequence[str]]:
    """Of flags that are fields of a config, which checks them itself."""
    from jaxsplit.sharding import SPLIT_MODES

    return {
        field.name: field.metadata["choices"] or ()
        for config in (LoadConfig, SamplingConfig)
        for field in dataclasses.fields(config)
    } | {"split_mode": (*SPLIT_MODES, "auto")}


def _commands() -> list[_Command]:
    choices = _config_choices()
    found = []
    for name, command in COMMANDS.items():
        before = set(flags.FLAGS)
        module = importlib.import_module(command.module)
        arguments = SHELLS if command.module == __name__ else ()
        own = [_flag(flag, choices.get(flag.name, ())) for flag in shown_flags(module)]
        found.append(_Command(name, command.help, own, tuple(arguments)))
        for defined in set(flags.FLAGS) - before:  # commands have flags of the same name
            delattr(flags.FLAGS, defined)
    return found


def _flag(flag: flags.Flag, choices: Sequence[str]) -> _Flag:
    if isinstance(flag, flags.EnumFlag):
        choices = flag.parser.enum_values
    about = textwrap.shorten(description(flag), 60, placeholder=" …")
    return _Flag(flag.name, flag.short_name or "", not flag.boolean, choices, about)


def _bash_words(command: _Command) -> Iterator[str]:
    """What may be typed: `--name`, `--name=` of a flag with a value, `--name=value` of choices."""
    yield from command.arguments
    yield "--help"
    for flag in command.flags:
        if flag.takes_value:
            yield from (f"--{flag.name}={choice}" for choice in flag.choices or [""])
        else:
            yield from (f"--{flag.name}", f"--no{flag.name}")
        if flag.short:
            yield f"-{flag.short}"


_BASH = r"""
_jaxsplit() {
  local line=${COMP_LINE:0:COMP_POINT} words="" word prefix="" files=""
  word=${line##* }  # bash ends words at = too
  if ((COMP_CWORD == 1)) || [[ ${COMP_WORDS[1]} == help ]]; then
    COMPREPLY=($(compgen -W "NAMES help --help --version" -- "$word"))
    return
  fi
  case ${COMP_WORDS[1]} in
CASES
  esac
  if [[ $word == *=* ]]; then
    [[ $COMP_WORDBREAKS == *=* ]] || prefix=${word%%=*}=
    words=$(printf "%s\n" $words | sed -n "s/^${word%%=*}=//p")
    [[ -n $words ]] || files=yes
    word=${word#*=}
  else
    words=$(printf "%s\n" $words | sed "s/=.*/=/" | uniq)
    [[ $word == -* ]] || files=yes
  fi
  COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$word"))
  if [[ ${COMPREPLY[*]} == *= ]]; then
    compopt -o nospace
  elif [[ -z ${COMPREPLY[*]} && -n $files ]]; then
    compopt -o filenames
    mapfile -t COMPREPLY < <(compgen -P "$prefix" -f -- "$word")
  fi
}
complete -F _jaxsplit jaxsplit
"""


def bash() -> str:
    """The script for bash."""
    cases = [f"    {c.name}) words={shlex.quote(' '.join(_bash_words(c)))} ;;" for c in _commands()]
    script = _BASH.replace("NAMES", " ".join(COMMANDS)).replace("CASES", "\n".join(cases))
    return script.strip()


def _zsh_text(text: str) -> str:
    return re.sub(r"([\\\[\]:])", r"\\\1", text)


def _zsh_specs(command: _Command) -> Iterator[str]:
    """The arguments of `_arguments`."""
    yield "--help[show this help]"
    for flag in command.flags:
        about = f"[{_zsh_text(flag.help)}]"
        values = f":{flag.name}:({' '.join(flag.choices)})" if flag.choices else ":file:_files"
        if flag.takes_value:
            yield f"*--{flag.name}=-{about}{values}"
        else:
            yield from (f"--{flag.name}{about}", f"--no{flag.name}{about}")
        if flag.short:
            yield f"*-{flag.short}{about}{values}"
    yield f"*:argument:({' '.join(command.arguments)})" if command.arguments else "*:file:_files"


def zsh() -> str:
    """The script for zsh."""
    commands = _commands()
    names = [shlex.quote(f"{c.name}:{_zsh_text(c.help)}") for c in commands]
    cases = [f"  {c.name}) _arguments {shlex.join(_zsh_specs(c))} ;;" for c in commands]
    return "\n".join(
        [
            "#compdef jaxsplit",
            f"local -a commands=({' '.join(names)})",
            "local command=$words[2]",
            "if ((CURRENT == 2)) || [[ $command == help ]]; then",
            "  _describe command commands",
            "  return",
            "fi",
            "shift words",
            "((CURRENT--))",
            "case $command in",
            *cases,
            "esac",
        ]
    )


def fish() -> str:
    """The script for fish."""
    lines = []
    for command in _commands():
        first = "complete -c jaxsplit -n __fish_use_subcommand"
        lines.append(f"{first} -f -a {command.name} -d {shlex.quote(command.help)}")
        here = f"complete -c jaxsplit -n '__fish_seen_subcommand_from {command.name}'"
        if command.arguments:
            lines.append(f"{here} -f -a {shlex.quote(' '.join(command.arguments))}")
        for flag in command.flags:
            names = [f"-l {flag.name}"] + ([f"-s {flag.short}"] if flag.short else [])
            if flag.choices:
                names.append(f"-x -a {shlex.quote(' '.join(flag.choices))}")
            elif flag.takes_value:
                names.append("-r -F")
            lines.append(f"{here} {' '.join(names)} -d {shlex.quote(flag.help)}")
            if not flag.takes_value:
                lines.append(f"{here} -l no{flag.name} -d {shlex.quote(flag.help)}")
    return "\n".join(lines)


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def main(argv: list[str]) -> None:
    """Prints the script of a shell."""
    if not argv or argv[0] not in SHELLS:
        known = ", ".join(SHELLS)
        raise JaxsplitError(f"give a shell, as in jaxsplit completion bash; shells are {known}")
    print(SHELLS[argv[0]]())
