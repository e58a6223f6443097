"""Write one checkpoint with all ranks.

    .step-00001200.part/
        .metadata  __0_0.distcp  __1_0.distcp     weights and optimizer state, synced by each rank
        manifest.json                             rank 0, after all ranks
    step-00001200/                                one rename

The ranks use a separate process group, so that a thread can write during training: two threads on
one group would mix up their messages.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torchrec.distributed.types import ShardedTensor

from model.checkpoints.manifest import DamagedError, check_size, describe_files, write_manifest
from model.checkpoints.position import Position
from model.checkpoints.safe_reader import files_of, read_index
from model.distributed import Ranks, from_first_rank, writing
from pipeline.errors import UserError
from pipeline.files import aside_of, publish, remove_leftovers


class CheckpointWriter:
    """Writes checkpoints; created, and ``write`` called, on all ranks."""

    def __init__(self, ranks: Ranks, recorded: Mapping[str, Any]) -> None:
        self._ranks, self._recorded = ranks, recorded
        self._group = dist.new_group(backend="gloo", timeout=ranks.timeout)

    def write(self, final: Path, state: dict[str, Any], position: Position) -> None:
        """Write ``state`` into the folder ``final``, which is complete once it exists.

        If it cannot be written, all ranks raise a CheckpointException, OSError or UserError.
        """
        aside = aside_of(final)

        @writing(final, advise=False)
        def make_room() -> None:
            final.parent.mkdir(exist_ok=True)
            remove_leftovers(final.parent)
            aside.mkdir()

        @writing(final, advise=False)
        def complete() -> None:
            _check_complete(aside, files)
            write_manifest(aside, manifest)
            publish(aside, final)

        from_first_rank(self._ranks, make_room, self._group)
        dcp.save(
            state,
            checkpoint_id=aside,
            storage_writer=_Files(aside),
            process_group=self._group,
        )
        files = self._describe(aside)
        manifest = {
            "position": dataclasses.asdict(position),
            "recorded": dict(self._recorded),
            "world_size": self._ranks.world_size,
            "files": files,
        }
        from_first_rank(self._ranks, complete, self._group)

    def _describe(self, aside: Path) -> dict[str, dict[str, int]]:
        """Sizes and checksums of all files; each rank reads the files that it has written."""
        outcome: dict[str, Any]
        try:
            # Private: DCP's file names are __RANK_N.distcp and, on rank 0, .metadata.
            outcome = describe_files(aside, f"__{self._ranks.rank}_*")
            if self._ranks.is_first:
                outcome |= describe_files(aside, ".metadata")
        except OSError as error:
            outcome = {"error": (error.errno, error.strerror or str(error))}
        outcomes: list[dict[str, Any]] = [{}] * self._ranks.world_size
        dist.all_gather_object(outcomes, outcome, group=self._group)
        if failures := [outcome["error"] for outcome in outcomes if "error" in outcome]:
            raise OSError(*failures[0])
        return {name: about for outcome in outcomes for name, about in outcome.items()}


class _Files(dcp.FileSystemWriter):
    """DCP's files; a tensor that cannot be written is the OSError, not torch's error after it."""

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _check_complete(aside: Path, files: dict[str, dict[str, int]]) -> None:
    """UserError unless rank 0 sees the files that all ranks have written."""
    try:
        for name, about in files.items():
            check_size(aside, name, about["size"])
        if missing := files_of(read_index(aside)) - files.keys():
            raise DamagedError(f"no rank has written {min(missing)}")
    except DamagedError as error:
        raise UserError(
            f"{aside} is incomplete: {error}; --run_dir must be on a file system that all hosts "
            "share"
        ) from error


def in_background(work: Callable[[], None]) -> Future[None]:
    """Run ``work`` in a thread; the future has its end and its error."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # CheckpointException is a BaseException
            future.set_exception(error)

    # A daemon: if the process ends first, the checkpoint does not get its final name.
    threading.Thread(target=run, daemon=True).start()
    return future


def host_copy(value: Any) -> Any:
    """A copy of a state dict in host memory; the two share no memory."""
    if isinstance(value, Mapping):
        return {name: host_copy(each) for name, each in value.items()}
    if isinstance(value, ShardedTensor):
        on_host = value.cpu()
        return copy.deepcopy(value) if on_host is value else on_host
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)
