"""What the user reads: errors to fix, warnings, output. Another exception that escapes is a bug."""

import errno
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

# The reader of a pipe, or the terminal, has ended.
_NO_READER = (errno.EPIPE, errno.EIO)
# What lets a file be written again; of another failure, such as EIO, the cause alone is told.
REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "make it writable",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
}


class UserError(ValueError):
    """A mistake in a flag, a file or a run folder.

    The message is one line: what is wrong, where (``file:line`` or ``--flag``), what to do. The
    scripts print only this line and end every rank with exit code 2.
    """


def printable(text: str) -> str:
    """One line: control characters, which may be a file's commands to the terminal, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str, file: IO[str] | None = None) -> None:
    """Print lines on stdout, or another file; without a reader they are lost."""
    try:
        print("\n".join(map(printable, text.split("\n"))), file=file, flush=True)
    except OSError as error:
        if error.errno not in _NO_READER:
            raise


def warn(text: str) -> None:
    """Print one line on stderr."""
    say(f"warning: {printable(text)}", sys.stderr)


def warn_once() -> Callable[[str], None]:
    """A function like `warn` that prints equal lines once, of what is read several times."""
    told: set[str] = set()

    def warn_new(text: str) -> None:
        if text not in told:
            told.add(text)
            warn(text)

    return warn_new


def first_remedy(error: BaseException | None) -> str | None:
    """What lets the file be written that ``error``, or its cause, is about; None: not known."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return None if error is None else REMEDIES.get(error.errno or 0)


def is_read_only(error: BaseException | None) -> bool:
    """Whether ``error``, or its cause, is that a place takes no files from this user."""
    return first_remedy(error) in (REMEDIES[errno.EROFS], REMEDIES[errno.EACCES])


def remedy(error: BaseException | None, then: str) -> str:
    """``then``, after what to do about the cause: "make room, then <then>"."""
    first = first_remedy(error)
    return f"{first}, then {then}" if first else then


def exit_with_message(message: str, printed: Callable[[], None] = lambda: None) -> NoReturn:
    """Print one line on stderr and end this process with exit code 2.

    Usually all ranks fail in the same way: only rank 0 prints at once. The others wait for torchrun
    to end them, and print if it does not, because then rank 0 did not fail.

    Args:
        printed: called after the line is printed.
    """
    if _rank():
        time.sleep(3)
    print_mistake(message)
    printed()
    os._exit(2)


def print_mistake(message: str) -> None:
    """Print one line on stderr that names the script, and the rank if it is not 0."""
    rank = f"rank {_rank()}: " if _rank() else ""
    with suppress(OSError):  # the exit code tells it too
        script = Path(sys.argv[0])
        name = script.parent.name if script.name == "__main__.py" else script.name  # python -m
        say(f"{name}: {rank}{printable(message)}", sys.stderr)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))
