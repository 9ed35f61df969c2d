"""Scripts that complete commands, flags and choices in shells."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jaxsplit.cli.main import COMMANDS
from jaxsplit.sharding import SPLIT_MODES

ROOT = Path(__file__).parent.parent
TRY = r"""
source "$1"
compopt() { :; }  # works only where the user has pressed Tab
COMP_LINE=$2; COMP_POINT=${#2}
line=$2; [[ $COMP_WORDBREAKS != *=* ]] || line=${2//=/ = }
COMP_WORDS=($line); [[ $2 != *" " ]] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_jaxsplit
printf "%s\n" "${COMPREPLY[@]}"
"""


def run(*command, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        **options,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The path of each shell's script."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        text = run(sys.executable, "-m", "jaxsplit", "completion", shell)
        (folder / shell).write_text(text, "utf-8")
    return folder


@pytest.fixture
def complete(scripts, tmp_path):
    """`complete(line)`: what bash offers where a line ends, in a folder with two files."""
    for name in ("tiny.gguf", "two words.gguf"):
        (tmp_path / name).touch()

    def offered(line, breaks=None):
        given = "" if breaks is None else f"COMP_WORDBREAKS='{breaks}'\n"
        out = run("bash", "-uc", given + TRY, "bash", scripts / "bash", line, cwd=tmp_path)
        return [found for found in out.splitlines() if found]

    return offered


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("jaxsplit gen", ["generate"]),
        ("jaxsplit help pl", ["plan"]),
        ("jaxsplit generate --split", ["--split_mode="]),
        ("jaxsplit generate --split_mode=", [*SPLIT_MODES, "auto"]),
        ("jaxsplit generate --show_special=a", ["all"]),
        ("jaxsplit generate --prompt=a --kernels=t", ["triton"]),
        ("jaxsplit generate --kernels=no_such", []),
        ("jaxsplit generate --no_such", []),
        ("jaxsplit generate --nocha", ["--nochat"]),
        ("jaxsplit plan --device_k", ["--device_kind="]),
        ("jaxsplit convert --weights=b", ["bfloat16"]),
        ("jaxsplit generate --model=ti", ["tiny.gguf"]),
        ("jaxsplit generate --model=", ["tiny.gguf", "two words.gguf"]),
        ("jaxsplit info tw", ["two words.gguf"]),
        ("jaxsplit completion z", ["zsh"]),
        ("jaxsplit generate --old_name_of_no_flag --decode_b", []),
    ],
)
def test_bash_completes(complete, line, expected):
    assert sorted(complete(line)) == sorted(expected)


def test_bash_completes_all_commands(complete):
    assert set(COMMANDS) <= set(complete("jaxsplit "))


def test_bash_completes_where_words_do_not_end_at_equals(complete):
    assert complete("jaxsplit generate --show_special=a", breaks=" ") == ["--show_special=all"]
    assert complete("jaxsplit generate --model=ti", breaks=" ") == ["--model=tiny.gguf"]


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_have_every_flag(scripts, command):
    shown = run(sys.executable, "-m", "jaxsplit", command, "--help")
    names = re.findall(r"^  (?:-\w, )?--(?:\[no\])?(\w+)", shown, re.MULTILINE)
    own = [name for name in names if name not in ("flagfile", "helpfull")]
    lines = {
        "bash": rf"^    {command}\) .*--{{}}\b",
        "zsh": rf"^  {command}\) .*--{{}}\b",
        "fish": rf"__fish_seen_subcommand_from {command}'.* -l {{}} ",
    }
    for shell, pattern in lines.items():
        text = (scripts / shell).read_text("utf-8")
        missing = [f for f in own if not re.search(pattern.format(f), text, re.MULTILINE)]
        assert not missing, shell


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_read_their_scripts(scripts, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    run(shell, "--no-execute" if shell == "fish" else "-n", scripts / shell)


def test_an_unknown_shell_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "jaxsplit", "completion", "tcsh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "jaxsplit: give a shell, as in jaxsplit completion bash; shells are bash, zsh, fish\n"
    )
