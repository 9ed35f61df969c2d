"""`jaxsplit plan` as `python -m jaxsplit.plan`."""

from jaxsplit.cli.program import run

if __name__ == "__main__":
    run("jaxsplit.cli.plan")
