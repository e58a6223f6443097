"""Start a script: parse its flags before the slow imports."""

import gc
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import UserError, exit_with_message, warn

C = TypeVar("C")


class Stages:
    """Seconds of the stages of a start, by name, in order."""

    TITLE = "before training: "

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def end(self, stage: str) -> None:
        """A stage ends now; it began at the end of the one before."""
        now = time.perf_counter()
        self.seconds[stage], self._since = now - self._since, now

    def __str__(self) -> str:
        parts = (f"{stage} {seconds:.3f} s" for stage, seconds in self.seconds.items())
        return f"{self.TITLE}{', '.join(parts)}"

    @classmethod
    def parse(cls, line: str) -> dict[str, float]:
        """The stages of such a line."""
        parts = (part.split() for part in line.removeprefix(cls.TITLE).split(", "))
        return {stage: float(seconds) for stage, seconds, _ in parts}


def start_script(
    read_flags: Callable[[], C],
    main: Callable[[C], object],
    if_too_large: Callable[[C], str] = lambda flags: "use more ranks",
) -> None:
    """Run ``main(read_flags())``; a user's mistake becomes one line on stderr and exit code 2.

    ``read_flags`` does without torch, whose import takes seconds: errors in flags appear at once.
    ``if_too_large`` says what to do if there is not enough memory.
    """
    _prepare_streams()
    # Else a lost rank makes torch's C++ print stack traces above our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        flags = read_flags()
        run_script = _import_libraries()
    except UserError as error:
        exit_with_message(str(error))
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    run_script(lambda: main(flags), if_too_large(flags))


def _import_libraries() -> Callable[[Callable[[], object], str], None]:
    """TorchRec and what it imports; returns `model.ending.run_script`."""
    gc.disable()  # collections of garbage take a fifth of the imports' time
    try:
        from model.ending import run_script, silence_libraries

        silence_libraries()
        import torchrec.distributed  # noqa: F401
    except Exception as error:  # builds that do not fit each other raise many kinds
        cause = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"TorchRec cannot be imported ({type(error).__name__}: {cause}): activate the virtual "
            "environment (. .venv/bin/activate), or install as docs/operations.md says"
        ) from error
    gc.freeze()  # later collections leave out what the imports have made
    gc.enable()
    return run_script


def _prepare_streams() -> None:
    """A closed stream becomes the null device: else a file would get its descriptor.

    What stdout's encoding lacks is printed as escapes, as on stderr.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _end_with(launcher: int) -> None:
    """Wait until torchrun was killed, then send this rank SIGTERM, on which a training saves.

    The kernel's own such signal (PR_SET_PDEATHSIG) comes when the launcher's thread ends, too.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    warn(f"torchrun has ended: rank {os.environ['RANK']} ends too")
    os.kill(os.getpid(), signal.SIGTERM)
