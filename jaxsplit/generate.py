"""Generate text from a GGUF file on a device mesh.

  python -m jaxsplit.generate --model=FILE.gguf --prompt="Once upon a time"

Text goes to standard output, everything else to standard error. Flags can be kept in a file, one a
line: --flagfile=FILE. Exit status: 0, or 2 with one line that says what to fix.
"""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.generate")
