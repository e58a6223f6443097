"""Writing one checkpoint: aside, synced, described, renamed; by all ranks together.

    .step-00001200.part/         every rank writes and syncs its files, and reads them for checksums
        manifest.json            rank 0, when all have
    step-00001200/               one rename

All that the ranks say to each other goes through a process group of its own. So a thread may write
while training uses the others; two threads in one group would mix up each other's messages.
"""

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from model.checkpoints.manifest import describe_files, write_manifest
from model.checkpoints.position import Position
from model.distributed import Ranks, from_first_rank
from pipeline.errors import UserError
from pipeline.files import aside_of, publish, remove_leftovers


class CheckpointWriter:
    """Writes checkpoints into a folder; every rank must make one, and call ``write`` alike.

    Args:
        recorded: JSON-able facts to put into every manifest.
    """

    def __init__(self, folder: Path, ranks: Ranks, recorded: Mapping[str, Any]) -> None:
        self.folder, self._ranks, self._recorded = folder, ranks, recorded
        self._group = dist.new_group(backend="gloo", timeout=ranks.timeout)

    def write(self, final: Path, state: dict[str, Any], position: Position) -> None:
        """Write ``state`` into the folder ``final``, which appears complete.

        Raises:
            CheckpointException, OSError, UserError: (on all ranks) it cannot be written.
        """
        aside = aside_of(final)
        self._on_first_rank(lambda: self._clear(aside))
        dcp.save(state, checkpoint_id=aside, process_group=self._group)
        files = self._describe(aside)
        self._on_first_rank(lambda: self._publish(aside, final, files, position))

    def _clear(self, aside: Path) -> None:
        """Make an empty folder to write into; remove what earlier interruptions left."""
        self.folder.mkdir(exist_ok=True)
        remove_leftovers(self.folder)
        aside.mkdir()

    def _describe(self, aside: Path) -> dict[str, dict[str, int]]:
        """All files' sizes and checksums, each rank having read its own."""

        def mine() -> dict[str, dict[str, int]]:
            files = describe_files(aside, f"__{self._ranks.rank}_*")
            return files | (describe_files(aside, ".metadata") if self._ranks.is_first else {})

        try:
            outcome: dict[str, Any] = mine()
        except OSError as error:
            outcome = {"error": str(error)}
        outcomes: list[dict[str, Any]] = [{}] * self._ranks.world_size
        dist.all_gather_object(outcomes, outcome, group=self._group)
        if failures := [outcome["error"] for outcome in outcomes if "error" in outcome]:
            raise OSError(failures[0])
        return {name: about for outcome in outcomes for name, about in outcome.items()}

    def _publish(self, aside: Path, final: Path, files: dict[str, Any], position: Position) -> None:
        write_manifest(
            aside,
            {
                "position": dataclasses.asdict(position),
                "recorded": dict(self._recorded),
                "world_size": self._ranks.world_size,
                "files": files,
            },
        )
        publish(aside, final)

    def _on_first_rank(self, work: Callable[[], None]) -> None:
        """Run on rank 0; its OSError is raised on every rank, so that none waits for it."""

        def reported() -> None:
            try:
                work()
            except OSError as error:
                raise UserError(error.strerror or str(error)) from error

        from_first_rank(self._ranks, reported, self._group)


class Underway(threading.Thread):
    """Work in a thread; its error, if any, is kept for whoever waits for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)  # what a dying process leaves unfinished has no name yet
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # CheckpointException is no Exception
            self.error = error

    def result(self) -> None:
        """Wait for the end of the work, and raise its error if it had one."""
        self.join()
        if self.error is not None:
            raise self.error


def host_copy(value: Any) -> Any:
    """A copy of a state dict in host memory, which training does not change any more."""
    if isinstance(value, Mapping):
        return {name: host_copy(each) for name, each in value.items()}
    if isinstance(value, ShardedTensor):
        return _sharded_copy(value)
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def _sharded_copy(value: ShardedTensor) -> ShardedTensor:
    """As ``ShardedTensor.cpu()``, but never the same memory."""
    metadata, shards = copy.deepcopy(value.metadata()), []
    for shard in metadata.shards_metadata:
        shard.placement._device = torch.device("cpu")
    for shard in value.local_shards():
        about = copy.deepcopy(shard.metadata)
        about.placement._device = torch.device("cpu")
        shards.append(Shard(shard.tensor.detach().to("cpu", copy=True), about))
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, sharded_tensor_metadata=metadata, process_group=value._process_group
    )
