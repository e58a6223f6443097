"""The ranks of a run: how they start, share what rank 0 computes, and end after an error."""

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
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import REMEDIES, UserError, exit_with_message, remedy, say, warn

T = TypeVar("T")

_FAILURE = "failure"  # the store's key of the first failure of a rank
_PRINTED = f"printed on {socket.gethostname()}"  # its key once this host has shown a failure's line
_starts = 0  # calls of `start` in this process

# Warnings of libraries about their own code, shown at every start; they would hide ours.
_WARNINGS = (
    (FutureWarning, "`broadcast_buffers` is deprecated"),  # TorchRec wrapping in DDP
    (FutureWarning, "Please use DTensor instead"),  # torch checkpointing TorchRec's shards
    (FutureWarning, r"`torch\.distributed\.\w+_tensor` is deprecated"),  # torch 2.13
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
    """Another rank has ended or is stuck: this one is not the cause."""


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    timeout: timedelta = timedelta(minutes=10)  # for waiting for other ranks
    node: str = ""  # the name of this rank's host
    local_rank: int = 0  # among the ranks of the host

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and prints."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.is_first:
            say(text)

    def warn(self, text: str) -> None:
        if self.is_first:
            warn(text)

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' * (self.world_size > 1)} on {self.device.type}"


# One process without a process group.
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed dropout, faster than ``torch.manual_seed``, which seeds all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        # Private: default_generators, where torch.cuda.manual_seed finds a device's generator.
        torch.cuda.default_generators[device.index].manual_seed(seed)


def start(timeout: timedelta = timedelta(minutes=10)) -> Ranks:
    """Join torchrun's process group, or create one with only this process.

    A process may call it again, on all ranks: the group of its earlier training ends.
    """
    global _starts
    _starts += 1
    if dist.is_initialized():
        dist.destroy_process_group()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"--nproc_per_node is larger than the {torch.cuda.device_count()} GPUs of this "
                "host: start one process per GPU"
            )
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        # cuDNN's attention takes tens of milliseconds to build a plan for every new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        rank, world_size = _join(backend, timeout)
    except (dist.DistError, ValueError) as error:
        raise UserError(
            f"this rank cannot join the others ({str(error).splitlines()[0]}): start all ranks by "
            "torchrun, with the same --master_addr and port on every host"
        ) from error
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    # torchrun's number of the node; other launchers set none.
    node = os.environ.get("GROUP_RANK") or socket.gethostname()
    return Ranks(rank, world_size, local_world_size, device, timeout, node, local_rank)


def _join(backend: str, timeout: timedelta) -> tuple[int, int]:
    """Create the default process group; rank and number of ranks."""
    store: dist.Store = dist.HashStore()
    rank, world_size = 0, 1
    if "RANK" in os.environ:
        # All attempts of torchrun --max_restarts share one store (torch 2.13). Without a prefix an
        # attempt would read the addresses of the previous one and fail to connect.
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}, start {_starts}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return rank, world_size


def narrow_group(ranks: Ranks) -> dist.ProcessGroup:
    """A group of all ranks for small messages that overlap the step's kernels.

    A waiting collective occupies one multiprocessor of a GPU, not two dozen as by NCCL's default.
    """
    if ranks.device.type != "cuda":
        return dist.new_group(timeout=ranks.timeout)
    # Private: min_ctas, max_ctas (NCCL's multiprocessors) and _timeout have no public setter.
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = options.config.max_ctas = 1
    options._timeout = ranks.timeout
    return dist.new_group(timeout=ranks.timeout, backend="nccl", pg_options=options)


def from_first_rank(
    ranks: Ranks, work: Callable[[], T], group: dist.ProcessGroup | None = None
) -> T:
    """Run ``work`` on rank 0; return its result, or raise its UserError, on all ranks."""
    outcome: list[Any] = [None]
    if ranks.is_first:
        try:
            outcome = [work()]
        except UserError as error:
            outcome = [error]
    if ranks.world_size > 1:
        dist.broadcast_object_list(outcome, src=0, group=group, device=torch.device("cpu"))
    if isinstance(outcome[0], UserError):
        try:
            raise outcome[0]
        finally:
            del outcome  # else the error holds itself, by this frame, and a run folder's lock
    return outcome[0]


def raise_on_all(ranks: Ranks, error: Exception | None) -> None:
    """Raise what one rank has found on all ranks, a UserError before others; called on all."""
    errors: list[Exception | None] = [error]
    if ranks.world_size > 1:
        errors *= ranks.world_size
        dist.all_gather_object(errors, error)
    found = [each for each in errors if each is not None]
    if found:
        try:
            raise min(found, key=lambda each: not isinstance(each, UserError))
        finally:
            del error, errors, found  # as in `from_first_rank`


@contextmanager
def writing(what: str) -> Iterator[None]:
    """An OSError becomes a UserError, which `from_first_rank` raises on all ranks."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written: {error.strerror or error}") from error


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


def run_script(main: Callable[[], object]) -> None:
    """Run a script's ``main``; a user's mistake becomes one line on stderr and exit code 2."""
    silence_libraries()
    try:
        main()
        exit_rank()
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)
    except SystemExit as end:
        exit_rank(int(end.code or 0))
    except Exception as error:
        message = _users_to_fix(error)
        is_lost = message is None and GONE.search(str(error))
        if _has_other_ranks() and (is_lost or isinstance(error, LostRankError)):
            if _is_printed():
                os._exit(2)
            message = message or failure_of_another_rank() or "another rank ended: see its error"
        elif _has_other_ranks():
            _tell_other_ranks(message or f"{type(error).__name__}: {error}")
        if message is None:
            say(traceback.format_exc().rstrip(), sys.stderr)
            os._exit(1)
        exit_with_message(message, _note_printed)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _users_to_fix(error: Exception) -> str | None:
    """The message about an error, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY.search(reason):
        return (
            f"not enough memory ({reason}): lower --train_batch_size, --max_len, --emb_dim or "
            "--val_batch_size, or use more ranks"
        )
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
