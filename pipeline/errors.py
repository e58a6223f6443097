"""The one exception that is a user's to fix; everything else that escapes is a bug of ours."""

import sys


class UserError(ValueError):
    """A mistake in a flag, a file or a run folder.

    The message is one line that says what is wrong, where (``file:line`` or ``--flag``) and what
    to do about it. The scripts print it alone and end every rank with exit code 2.
    """


def warn(text: str) -> None:
    """Print a warning on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
