"""`jaxsplit convert` as a program of its own."""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.convert")
