"""The same as `jaxsplit bench`, from a checkout."""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.bench")
