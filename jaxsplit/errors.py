"""The one exception that users see."""


class JaxsplitError(Exception):
    """Something the user can mend: a file, a flag, a mesh.

    The message is one line that names what is at fault, what was found and what would work.
    The command line prints it and exits with status 2; library callers may catch it.
    """
