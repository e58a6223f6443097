"""Errors that the user can fix, and warnings; any other exception that escapes is a bug."""

import os
import sys
import time
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a flag, a file or a run folder.

    The message is one line: what is wrong, where (``file:line`` or ``--flag``), what to do. The
    scripts print only this line and end every rank with exit code 2.
    """


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def exit_with_message(message: str) -> NoReturn:
    """Print one line on stderr and end this process with exit code 2.

    Usually all ranks fail in the same way: only rank 0 prints at once. The others wait for torchrun
    to end them, and print if it does not, because then rank 0 did not fail.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(3)
        message = f"rank {rank}: {message}"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    os._exit(2)
