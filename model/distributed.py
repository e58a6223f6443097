"""The ranks of a run: how they start, and share what rank 0 computes."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pipeline.errors import UserError, first_remedy, say, warn

T = TypeVar("T")

_starts = 0  # calls of `start` in this process


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


def separate_group(ranks: Ranks) -> dist.ProcessGroup:
    """A group of all ranks for collectives that overlap those of the default group.

    Collectives of one communicator run one after the other, whatever their streams.
    """
    backend = "nccl" if ranks.device.type == "cuda" else None
    return dist.new_group(timeout=ranks.timeout, backend=backend)


def narrow_group(ranks: Ranks) -> dist.ProcessGroup:
    """A group of all ranks for small messages that overlap the step's kernels.

    A waiting collective occupies one multiprocessor of a GPU, not two dozen as by NCCL's default.
    """
    if ranks.device.type != "cuda":
        return separate_group(ranks)
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
def writing(path: object, flag: str = "", advise: bool = True) -> Iterator[None]:
    """An OSError becomes a UserError, which `from_first_rank` raises on all ranks.

    Args:
        flag: that names the place; another one of its values is another place.
        advise: False: who catches the UserError says what to do about a full disk.
    """
    try:
        yield
    except OSError as error:
        place, first = f"{flag} {path}".lstrip(), first_remedy(error) if advise else None
        other = f"or name another place with {flag}" if flag else "then try again"
        advice = f"; {first}, {other}" if first else ""
        raise UserError(f"{place} cannot be written: {error.strerror or error}{advice}") from error
