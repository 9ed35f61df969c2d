"""`jaxsplit generate` as `python -m jaxsplit.generate`."""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.generate")
