"""`jaxsplit serve` as `python -m jaxsplit.serve`."""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.serve")
