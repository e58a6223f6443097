"""How a rank's process ends: well, by a user's mistake, or because another rank has ended."""

import errno
import logging
import os
import re
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
import torch.distributed as dist

from pipeline.errors import REMEDIES, UserError, exit_with_message, print_mistake, remedy, say

_FAILURE = "failure"  # the store's key of the first failure of a rank
_TOLD = f"told on {socket.gethostname()}"  # its key: how many ranks were ended before they printed
_PRINTED = f"printed on {socket.gethostname()}"  # its key once this host has shown a failure's line

# Warnings of libraries about their own code, shown at every start; they would hide ours.
_WARNINGS = (
    (FutureWarning, "`broadcast_buffers` is deprecated"),  # TorchRec wrapping in DDP
    (FutureWarning, "Please use DTensor instead"),  # torch checkpointing TorchRec's shards
    (FutureWarning, r"`torch\.distributed\.\w+_tensor` is deprecated"),  # torch 2.13
    (UserWarning, "Warning: Profiler clears events at the end of each cycle"),
    (UserWarning, "torch.distributed is disabled, unavailable or uninitialized"),  # exporting
    # TorchRec 1.6 with torch 2.11
    (UserWarning, "`_get_pg_default_device` will be deprecated"),
    (UserWarning, "Multiple backends are registered with this ProcessGroup"),
    (UserWarning, r"(?s).*\[FBGEMM_GPU\] NOTE: The training optimizer 'adam'"),
)
# Only a write fails so.
_OF_WRITING = REMEDIES.keys() - {errno.EACCES, errno.EPERM}
_NO_MEMORY = re.compile(r"can't allocate memory|Maximum allowed dimension|array is too big", re.I)
# Messages of gloo and NCCL when another rank has ended, to explain an error to the user.
GONE = re.compile(r"closed by peer|connection (reset|refused|closed)|broken pipe", re.IGNORECASE)


class LostRankError(UserError):
    """Another rank has ended or is stuck: this one is not the cause.

    Args:
        is_known: the message names the other rank, which only this rank knows.
    """

    def __init__(self, message: str, is_known: bool = False) -> None:
        super().__init__(message)
        self.is_known = is_known


def failure_of_another_rank() -> str | None:
    """What the first rank that failed has stored, e.g. "rank 1 failed: KeyError: 7"."""
    with suppress(RuntimeError, ValueError):  # the store has ended with its process
        store = _store()
        if store.check([_FAILURE]):
            return store.get(_FAILURE).decode()
    return None


def _tell_other_ranks(reason: str) -> None:
    with suppress(RuntimeError, ValueError):
        _store().compare_set(_FAILURE, "", f"rank {dist.get_rank()} failed: {reason}")


def _note_printed() -> None:
    """Ranks that fail as a consequence need not repeat the line of the cause."""
    with suppress(RuntimeError, ValueError):
        _store().set(_PRINTED, "")


def _is_printed() -> bool:
    with suppress(RuntimeError, ValueError):
        return _store().check([_PRINTED])
    return False


@contextmanager
def _told_at_the_end(message: str) -> Iterator[None]:
    """If torchrun ends the other ranks before their turn to print, one of them prints the line.

    Torchrun does so at once where rank 0, whose turn is first, was killed.
    """

    def print_and_end(*_: object) -> None:
        if not _is_printed() and _is_first_to_tell():
            print_mistake(message)
            _note_printed()
        os._exit(2)

    before = signal.signal(signal.SIGTERM, print_and_end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_first_to_tell() -> bool:
    with suppress(RuntimeError, ValueError):
        return _store().add(_TOLD, 1) == 1
    return True


def _store() -> dist.Store:
    # Private: the only way to the store of the default group.
    return dist.distributed_c10d._get_default_store()


def exit_rank(code: int = 0) -> NoReturn:
    """End this rank's process without finalizing the interpreter.

    A gloo thread frees the tensors of the last collective late; during finalization this aborts
    the process (torch 2.13), and the job would count as failed. NCCL communicators are not
    destroyed: that waits for the other ranks, without end while a CUDA graph communicates.
    """
    if _has_nccl():
        with suppress(RuntimeError):  # another rank has ended
            torch.cuda.synchronize()
            dist.all_reduce(torch.zeros(1))  # afterwards no rank reads this rank's memory
    elif dist.is_initialized():
        dist.destroy_process_group()
    with suppress(OSError):  # the reader of the output (e.g. head) may have ended
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _has_nccl() -> bool:
    return _has_other_ranks() and torch.cuda.is_available()


def _has_other_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def run_script(main: Callable[[], object], if_too_large: str = "use more ranks") -> None:
    """Run a script's ``main``; a user's mistake becomes one line on stderr and exit code 2.

    Args:
        if_too_large: what to do if there is not enough memory.
    """
    try:
        main()
        exit_rank()
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except SystemExit as end:
        exit_rank(int(end.code or 0))
    except Exception as error:
        message = _users_to_fix(error, if_too_large)
        is_lost = message is None and GONE.search(str(error))
        if _has_other_ranks() and (is_lost or isinstance(error, LostRankError)):
            if _is_printed() and not (isinstance(error, LostRankError) and error.is_known):
                os._exit(2)
            message = message or failure_of_another_rank() or "another rank ended: see its error"
            with _told_at_the_end(message):
                exit_with_message(message, _note_printed)
        elif _has_other_ranks():
            _tell_other_ranks(message or f"{type(error).__name__}: {error}")
        if message is None:
            say(traceback.format_exc().rstrip(), sys.stderr)
            os._exit(1)
        exit_with_message(message, _note_printed)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _users_to_fix(error: Exception, if_too_large: str) -> str | None:
    """The message about an error, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY.search(reason):
        return f"not enough memory ({reason}): {if_too_large}"
    if isinstance(error, OSError) and error.errno in _OF_WRITING:
        what = error.filename or "output"
        return f"{what} cannot be written: {error.strerror}; {remedy(error, 'try again')}"
    return None


def silence_libraries() -> None:
    """Drop only the messages listed above, so that new ones are still shown."""
    # Private: TensorBoard's writer thread, _AsyncWriterThread. Its traceback is redundant, because
    # the next write raises the error.
    show = threading.excepthook
    threading.excepthook = lambda failed: (
        None if type(failed.thread).__name__ == "_AsyncWriterThread" else show(failed)
    )
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(
        lambda record: not record.getMessage().startswith("is_fx_tracing will return true")
    )
