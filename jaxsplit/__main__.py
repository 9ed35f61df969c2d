"""The command `jaxsplit` as `python -m jaxsplit`."""

from jaxsplit.cli.main import main

if __name__ == "__main__":
    main()
