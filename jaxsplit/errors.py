"""The one exception that users see."""


class JaxsplitError(Exception):
    """Something the user can mend: a file, a flag, a mesh.

    The message is one line that names what is at fault, what was found and what would work.
    The command line prints it and exits with status 2; library callers may catch it.

    Args:
      message: text; characters that cannot be printed on a line, such as line ends in the name of
        a tensor, are escaped.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
