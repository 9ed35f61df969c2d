"""The one exception that users see."""

_MAX_LENGTH = 2000  # the longest lists of what is supported have 1000


class JaxsplitError(Exception):
    """Something the user can fix: a file, a flag, a mesh.

    The message is one line that names what is at fault, what was found and what would work.
    The command line prints it and exits with status 2; library callers may catch it.

    Args:
      message: text. Characters that cannot be printed on a line, such as line ends in the name of
        a tensor, are escaped; of a very long text the middle is left out.
    """

    def __init__(self, message: str):
        if len(message) > _MAX_LENGTH:
            half = _MAX_LENGTH // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))
