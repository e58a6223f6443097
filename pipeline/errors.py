"""Errors that the user can fix, and warnings; any other exception that escapes is a bug."""

import sys


class UserError(ValueError):
    """A mistake in a flag, a file or a run folder.

    The message is one line: what is wrong, where (``file:line`` or ``--flag``), what to do. The
    scripts print only this line and end every rank with exit code 2.
    """


def warn(text: str) -> None:
    """Print a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
