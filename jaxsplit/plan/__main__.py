"""Memory, cost and predicted speed of a model on a mesh, before either is there.

  python -m jaxsplit.plan --model=FILE.gguf --devices=4 --device_kind="RTX 3090"

Only the file's header is read. Without --mesh, all split modes are compared, the best first. Exit
status: 0, or 2 with one line that says what to fix.
"""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.plan")
