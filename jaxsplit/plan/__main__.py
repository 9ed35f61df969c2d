"""What a model takes and does on a mesh, and how fast it should be, before it is loaded or bought.

  python -m jaxsplit.plan --model=FILE.gguf --devices=4 --device_kind="RTX 3090"

Only the file's header is read. Without --mesh, all split modes are compared, the best first. Exit
status: 0, or 2 with one line that says what to mend.
"""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.plan")
