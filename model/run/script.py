"""Start a script: parse its flags before the slow imports."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import UserError, exit_with_message

C = TypeVar("C")


def start_script(read_flags: Callable[[], C], main: Callable[[C], None]) -> None:
    """Run ``main(read_flags())``; a user's mistake becomes one line on stderr and exit code 2.

    Both functions import torch and TorchRec late, so that errors in flags appear at once.
    """
    try:
        flags = read_flags()
    except UserError as error:
        exit_with_message(str(error))
    from model.distributed import run_script

    run_script(lambda: main(flags))
