"""Checkpoints: complete or absent, loadable at any number of ranks and in any sharding.

    runs/mine/checkpoints/
        step-00001200/      torch.distributed.checkpoint files: weights and optimizer state
            manifest.json   position in training, flags, versions; sizes and checksums of the files
        step-00001350/
        damaged-00001500/   found to be damaged by a resume, which went on from the one before

Written as a database writes: into a folder aside, every file synced, the manifest last, then one
rename and a sync of the parent (model.writer). A folder with the final name is complete or was
damaged later, and a resume reads every byte of it before trusting it. In the middle of an epoch
training waits for a copy of its state alone, which a thread writes while it goes on. There is no
loader or generator state to store: order, masks and dropout are functions of (seed, epoch, sample,
step).

Nothing in these folders can run code when it is loaded (model.safe_reader).
"""

import contextlib
import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed import DistributedModelParallel

from model.checkpoints.manifest import DamagedError, read_manifest, verify
from model.checkpoints.position import Position
from model.checkpoints.safe_reader import SafeReader
from model.checkpoints.writer import CheckpointWriter, Underway, host_copy
from model.distributed import GONE, Ranks, from_first_rank
from model.step.optimizers import Optimizers
from model.tables.upstream import drop_cached_rows, set_table_steps
from pipeline.errors import UserError
from pipeline.files import aside_of, remove_folder

_NAME = re.compile(r"step-(\d{8,})")
# The portable form of the best model in a run folder, written when training is over.
PORTABLE = "model"
# CheckpointException is no Exception. A bare RuntimeError while saving is a lost rank, which the
# training loop explains.
_SAVE_ERRORS = (dcp.api.CheckpointException, OSError, UserError)
_LOAD_ERRORS = (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, OSError)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how much of it to keep."""

    checkpoint_every: float = field(
        default=10.0,
        metadata={
            "help": "minutes between checkpoints; besides them, each better evaluation saves one"
        },
    )
    keep_last: int = field(
        default=2, metadata={"help": "newest checkpoints to keep besides the best"}
    )
    on_save_error: str = field(
        default="stop",
        metadata={
            "help": "when a checkpoint or the log cannot be written: stop, or go on with a warning",
            "choices": ("stop", "continue"),
        },
    )

    def __post_init__(self) -> None:
        if not self.checkpoint_every > 0:
            raise UserError(
                f"--checkpoint_every must be a positive number of minutes, not "
                f"{self.checkpoint_every}"
            )
        if self.keep_last < 1:
            raise UserError(f"--keep_last must be at least 1, not {self.keep_last}")
        if self.on_save_error not in ("stop", "continue"):
            raise UserError(f"--on_save_error must be stop or continue, not {self.on_save_error!r}")


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        run_dir: the run folder.
        recorded: JSON-able facts to put into every manifest: flags, versions.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        config: CheckpointConfig | None = None,
        recorded: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_dir, self.folder = run_dir, run_dir / "checkpoints"
        self._ranks, self._config = ranks, config or CheckpointConfig()
        self._recorded = recorded or {}
        self._tried = time.monotonic()
        self._writer: CheckpointWriter | None = None
        self._underway: Underway | None = None
        self._position = Position()

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in found if match)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step-{step:08d}"

    @property
    def is_due(self) -> bool:
        """Whether ``--checkpoint_every`` has passed since the last one; asked on rank 0.

        Also when the one under way has failed and training is to stop: saving will say so.
        """
        if self._underway is not None:
            if self._underway.is_alive():
                return False
            if self._underway.error is not None and self._config.on_save_error == "stop":
                return True
        return time.monotonic() - self._tried > 60 * self._config.checkpoint_every

    # Writing ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Get ready to save, which ``save`` does too; every rank must call it.

        To be called before training: the ranks meet, and would wait for a lost one to come, while
        nobody obeys signals, until all are killed.
        """
        if self._writer is None:
            self._writer = CheckpointWriter(self.folder, self._ranks, self._recorded)

    def save(
        self,
        model: DistributedModelParallel,
        optimizers: Optimizers,
        position: Position,
        wait: bool = True,
    ) -> bool:
        """Write the checkpoint of ``position.step``; every rank must call it.

        Args:
            wait: False copies the state, lets a thread write the copy, and returns; whether that
                works comes out at the next ``save`` or ``finish``.

        Returns:
            Whether it is there (or on its way); False only with ``--on_save_error continue``.

        Raises:
            UserError: it, or the one before, cannot be written. Earlier checkpoints are intact.
        """
        self.finish()
        self.prepare()
        state = {"model": model.state_dict(), "optimizer": optimizers.combined.state_dict()}
        self._position = position
        if wait:
            return self._settle(lambda: self._write(state, position))
        copied = host_copy(state)
        self._underway = Underway(lambda: self._write(copied, position))
        return True

    def finish(self) -> bool:
        """Wait for the checkpoint that is being written, if one is; every rank must call it.

        Returns, raises:
            As ``save``.
        """
        underway, self._underway = self._underway, None
        return underway is None or self._settle(underway.result)

    def _write(self, state: dict[str, Any], position: Position) -> None:
        try:
            self._writer.write(self.path(position.step), state, position)
            if self._ranks.is_first:
                self._clean(position)
        finally:
            self._tried = time.monotonic()

    def _settle(self, work: Callable[[], None]) -> bool:
        """Do with an error of writing what ``--on_save_error`` says."""
        final = self.path(self._position.step)
        try:
            work()
        except _SAVE_ERRORS as error:
            if self._ranks.is_first:
                shutil.rmtree(aside_of(final), ignore_errors=True)
            message = f"{final} cannot be written: {_cause(error)}; earlier checkpoints are intact"
            if self._config.on_save_error == "stop":
                raise UserError(f"{message}; make room, then go on with --resume auto") from error
            self._ranks.warn(f"{message}, training goes on")
            return False
        return True

    def _clean(self, position: Position) -> None:
        """Delete what is no longer kept."""
        # What is exported from earlier weights is no longer the model of this run.
        shutil.rmtree(self.run_dir / PORTABLE, ignore_errors=True)
        keep = {*self.steps()[-self._config.keep_last :], position.best_step}
        for step in set(self.steps()) - keep:
            remove_folder(self.path(step))

    # Reading ----------------------------------------------------------------------------------

    def resume(self, model: DistributedModelParallel, optimizers: Optimizers) -> Position:
        """Load the newest good checkpoint, if there is one; on all ranks, any number of them.

        A damaged one is named in a warning and set aside, and the one before is used.

        Returns:
            Where to go on: the beginning, if there is no checkpoint.

        Raises:
            UserError: the checkpoint belongs to a model of another shape.
        """
        position = from_first_rank(self._ranks, self._newest_good)
        if position is None:
            return Position()
        optimizers.materialise_state()
        state = {"model": model.state_dict(), "optimizer": optimizers.combined.state_dict()}
        self._load(state, position.step)
        drop_cached_rows(model)
        set_table_steps(model, position.step)
        self._ranks.say(f"resumed from {self.path(position.step)}")
        return position

    def _newest_good(self) -> Position | None:
        good = (step for step in reversed(self.steps()) if self._is_good(step))
        step = next(good, None)
        if step is None:
            return None
        position = _position(self.path(step))
        best = position.best_step
        if best and best != step and not (self.path(best).is_dir() and self._is_good(best)):
            self._ranks.warn(f"{self.path(best)}, the best model so far, is lost: {step} stands in")
            position = dataclasses.replace(position, best=-1.0, best_step=step, stale=0)
        return position

    def _is_good(self, step: int) -> bool:
        """Whether every byte is as it was written; a damaged one is renamed out of the way."""
        try:
            verify(self.path(step))
            _position(self.path(step))
        except DamagedError as error:
            self._ranks.warn(f"{self.path(step)} is damaged: {error}; it is not used")
            away = self.folder / f"damaged-{step:08d}"
            with contextlib.suppress(OSError):
                shutil.rmtree(away, ignore_errors=True)
                self.path(step).rename(away)
            return False
        return True

    def best_step(self) -> int | None:
        """Step of the best checkpoint, if there was an evaluation yet; on all ranks.

        Raises:
            UserError: it is damaged.
        """
        return from_first_rank(self._ranks, self._best_step)

    def _best_step(self) -> int | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):
                best = _position(self.path(step)).best_step
                break
        else:
            return None
        try:
            return verify(self.path(best))["position"]["step"] if best else None
        except DamagedError as error:
            raise UserError(
                f"{self.path(best)}, the best model of this run, is damaged: {error}; go on with "
                "training by --resume auto, or restore it"
            ) from error

    def load_weights(self, model: nn.Module, step: int) -> None:
        """Load the weights alone, in place.

        Raises:
            UserError: the checkpoint belongs to a model of another shape.
        """
        self._load({"model": model.state_dict()}, step)
        drop_cached_rows(model)

    def _load(self, state: dict[str, Any], step: int) -> None:
        path = self.path(step)
        try:
            dcp.load(state, storage_reader=SafeReader(path))
        except _LOAD_ERRORS as error:
            if GONE.search(str(error)):
                raise UserError(
                    f"another rank is gone while {path} was read: start again; train.py goes on "
                    "with --resume auto"
                ) from error
            raise UserError(
                f"{path} does not fit this model: it was written with other flags, or its files "
                f"are damaged ({_cause(error)}); use another --run_dir or the run's own flags"
            ) from error


def _position(folder: Path) -> Position:
    try:
        return Position(**read_manifest(folder)["position"])
    except TypeError as error:
        raise DamagedError(f"its position makes no sense ({error})") from error


def _cause(error: BaseException) -> str:
    """The first meaningful line of a possibly nested error."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]
