"""Checkpoints: complete or absent, loadable at any number of ranks and in any sharding.

    runs/mine/checkpoints/
        step-00001200/      torch.distributed.checkpoint files: weights and optimizer state
            state.json      step, epoch, sample, metrics; written last
        best.json           {"step": 1200, "NDCG@10": 0.19}, replaced in one step

A checkpoint is written into a folder aside and renamed when every rank is done and its files are
synced, so a folder with the final name is complete. There is no loader or generator state to
store: order, masks and dropout are functions of (seed, epoch, sample).
"""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed import DistributedModelParallel

from model.ranks import Ranks
from model.sharding import Optimizers
from pipeline.errors import UserError

_NAME = re.compile(r"step-(\d{8,})")


@dataclasses.dataclass(frozen=True)
class Position:
    """Where training stands: what to do next, and what was best so far.

    Attributes:
        step: optimizer steps done.
        epoch: epoch that goes on or begins next.
        sample: samples of that epoch already trained, over all ranks.
        best: best value of the selection metric so far, and the step it belongs to.
        stale: evaluations since then.
    """

    step: int = 0
    epoch: int = 0
    sample: int = 0
    best: float = float("-inf")
    best_step: int = 0
    stale: int = 0


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run_dir: the run folder.
        keep_last: how many of the newest to keep; the best is kept besides.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep_last: int = 1) -> None:
        self.folder = run_dir / "checkpoints"
        self._ranks, self._keep_last = ranks, keep_last

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def best_step(self) -> int | None:
        """Step of the best checkpoint, if one was named and is there."""
        try:
            step = json.loads((self.folder / "best.json").read_text())["step"]
        except (OSError, ValueError, KeyError):
            return None
        return step if step in self.steps() else None

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step-{step:08d}"

    def save(
        self, model: DistributedModelParallel, optimizers: Optimizers, position: Position
    ) -> Path:
        """Write the checkpoint of ``position.step``; every rank must call it."""
        final = self.path(position.step)
        aside = final.with_name(f".{final.name}.part")
        if self._ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        state = {"model": model.state_dict(), "optimizer": optimizers.combined.state_dict()}
        dcp.save(state, checkpoint_id=aside)
        if self._ranks.is_first:
            write_json(aside / "state.json", dataclasses.asdict(position))
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            _sync(self.folder)
            if position.best_step == position.step:
                write_json(
                    self.folder / "best.json", {"step": position.step, "value": position.best}
                )
            self._prune()
        dist.barrier()
        return final

    def _prune(self) -> None:
        keep = {*self.steps()[-self._keep_last :], self.best_step()}
        for step in self.steps():
            if step not in keep:
                # Out of sight first: a half-deleted folder must not look like a checkpoint.
                doomed = self.path(step).rename(self.folder / f".old-{step}")
                shutil.rmtree(doomed)

    def resume(
        self, model: DistributedModelParallel, optimizers: Optimizers, step: int
    ) -> Position:
        """Load weights and optimizer state of ``step`` in place; any number of ranks.

        Raises:
            UserError: the checkpoint belongs to a model of another shape.
        """
        optimizers.materialise_state()
        state = {"model": model.state_dict(), "optimizer": optimizers.combined.state_dict()}
        self._load(state, step)
        optimizers.combined.set_optimizer_step(step)  # FBGEMM keeps Adam's step out of the state
        fields = json.loads((self.path(step) / "state.json").read_text())
        return Position(**fields)

    def load_weights(self, model: nn.Module, step: int) -> None:
        """Load the weights alone, in place.

        Raises:
            UserError: the checkpoint belongs to a model of another shape.
        """
        self._load({"model": model.state_dict()}, step)

    def _load(self, state: dict[str, Any], step: int) -> None:
        path = self.path(step)
        try:
            dcp.load(state, checkpoint_id=path)
        except (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(
                f"{path} does not fit this model: it was written with other flags, or its files "
                f"are damaged ({_cause(error)}); use another --run_dir or the run's own flags"
            ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside, sync, rename: the file is the old one or the new one, never a half."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _sync(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cause(error: Exception) -> str:
    """The first meaningful line of a possibly nested error."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0]
