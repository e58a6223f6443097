"""Start a script: first its flags, then everything that is slow to import."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import UserError, exit_with_message

C = TypeVar("C")


def start_script(read_flags: Callable[[], C], main: Callable[[C], None]) -> None:
    """Run ``main(read_flags())``; a user's mistake becomes one line on stderr and exit code 2.

    torch and TorchRec take seconds to import. Both functions import them late, so that ``--help``
    and an error in a flag appear at once.
    """
    try:
        flags = read_flags()
    except UserError as error:
        exit_with_message(str(error))
    from model.distributed import run_script

    run_script(lambda: main(flags))
