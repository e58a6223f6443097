"""The checkpoints of a run: complete or absent, loadable by any number of ranks and any sharding.

    runs/mine/checkpoints/
        step-00001200/      complete, or it would not have its name (writer.py)
        step-00001350/
        damaged-00001500/   damaged later: a resume checks every byte, and used the one before it

Within an epoch training pauses only while its state is copied; a thread writes the copy.
"""

import contextlib
import dataclasses
import pickle
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torchrec.distributed import DistributedModelParallel

from model.checkpoints.config import CheckpointConfig
from model.checkpoints.export import remove_export
from model.checkpoints.manifest import DamagedError, position_of, read_manifest, verify
from model.checkpoints.position import Position
from model.checkpoints.safe_reader import SafeReader, read_index, stored_weights
from model.checkpoints.weights import check_finite, check_fit
from model.checkpoints.writer import CheckpointWriter, host_copy, in_background
from model.distributed import Ranks, from_first_rank, raise_on_all
from model.ending import GONE
from model.step.optimizers import Optimizers
from model.tables.upstream import drop_cached_rows, set_table_steps
from pipeline.errors import UserError, remedy
from pipeline.files import aside_of, clear, remove_folder

_FOLDER, _NAME = "checkpoints", re.compile(r"step-(\d{8,})")
# Row-wise Adagrad has a number for each row of each part of a table's width.
_OTHER_CUT = re.compile(r"Size mismatch .* for optimizer\.state\.tables")
# The exported best model in a run folder, written when training is over.
PORTABLE = "model"
# CheckpointException is a BaseException. Not RuntimeError: while saving, it means that a rank is
# lost, which the training loop explains.
_SAVE_ERRORS = (dcp.api.CheckpointException, OSError, UserError)
_LOAD_ERRORS = (dcp.api.CheckpointException, RuntimeError, ValueError, KeyError, OSError)


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of all checkpoints in the folder of a run, ascending."""
    found = (_NAME.fullmatch(path.name) for path in (run_dir / _FOLDER).glob("step-*"))
    return sorted(int(match.group(1)) for match in found if match)


@dataclasses.dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one run folder; created on all ranks."""

    run_dir: Path
    ranks: Ranks
    config: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    # JSON-able facts for every manifest: flags, versions.
    recorded: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.run_dir / _FOLDER
        # Created here: during training, its creation would wait forever for a lost rank.
        self._writer = CheckpointWriter(self.ranks, self.recorded)
        self._last_write = time.monotonic()
        self._background: Future[None] | None = None
        self._final = self.folder  # folder of the last save
        self._newest = 0  # step of the newest one that is complete; 0: there is none

    def steps(self) -> list[int]:
        """Steps of all checkpoints, ascending."""
        return checkpoint_steps(self.run_dir)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    @property
    def kept(self) -> str:
        """Which checkpoint a run that fails now has left, a clause for its error."""
        kept = f"the checkpoint of step {self._newest} is intact"
        if not self._newest:
            kept = "there is no checkpoint yet"
        if self._background is not None and not self._background.done():
            kept += f", {self._final.name} is being written"
        return kept

    @property
    def advice(self) -> str:
        """What lets training go on after that, a clause for the same error."""
        return f"{'go on' if self._newest else 'start again'} with --resume auto"

    @property
    def is_due(self) -> bool:
        """Whether rank 0 should save: the interval is over, or ``save`` must raise an error."""
        if self._background is not None:
            if not self._background.done():
                return False
            if self._background.exception() and self.config.on_save_error == "stop":
                return True
        return time.monotonic() - self._last_write > 60 * self.config.checkpoint_every

    def save(
        self,
        model: DistributedModelParallel,
        optimizers: Optimizers,
        position: Position,
        wait: bool = True,
    ) -> bool:
        """Write the checkpoint of ``position.step``; called on all ranks.

        Without ``wait`` a thread writes a copy of the state; the next ``save`` or ``finish``
        reports the outcome. False: the write failed (only with ``--on_save_error continue``).
        """
        self.finish()
        state = _state(model, optimizers)
        self._final = self.path(position.step)
        if wait:
            return self._succeeds(lambda: self._write(state, position))
        copied = host_copy(state)
        self._background = in_background(lambda: self._write(copied, position))
        return True

    def finish(self) -> None:
        """Wait for the background write, if any; called on all ranks; raises like ``save``."""
        background, self._background = self._background, None
        if background is not None:
            self._succeeds(background.result)

    def _write(self, state: dict[str, Any], position: Position) -> None:
        try:
            if self.ranks.is_first:
                # The exported model is older than this checkpoint: eval.py must not take it.
                remove_export(self.run_dir / PORTABLE)
            self._writer.write(self.path(position.step), state, position)
            self._newest = position.step
            if self.ranks.is_first:
                outdated = self.steps()[: -self.config.keep_last]
                for step in set(outdated) - {position.best_step}:
                    remove_folder(self.path(step))
        finally:
            self._last_write = time.monotonic()

    def _succeeds(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except _SAVE_ERRORS as error:
            if self.ranks.is_first:
                clear(aside_of(self._final))
            reason = str(error)
            if not isinstance(error, UserError):
                reason = f"{self._final} cannot be written: {_cause(error)}"
            message = f"{reason}; {self.kept}"
            if self.config.on_save_error == "stop":
                then = remedy(_innermost(error), self.advice)
                raise UserError(f"{message}; {then}") from error
            self.ranks.warn(f"{message}, training goes on")
            return False
        return True

    def resume(self, model: DistributedModelParallel, optimizers: Optimizers) -> Position:
        """Load the newest undamaged checkpoint; called on all ranks.

        Without any checkpoint training begins. UserError: there are some, but all are damaged.
        """
        position = self._newest_good()
        if position is None:
            return Position()
        optimizers.materialise_state()
        self._load(_state(model, optimizers), position.step)
        drop_cached_rows(model)
        set_table_steps(model, position.step)
        self._newest = position.step
        self.ranks.say(f"resumed from {self.path(position.step)}")
        return position

    def _newest_good(self) -> Position | None:
        steps, damaged = from_first_rank(self.ranks, self.steps), dict[int, str]()
        checked = (self._checked(step, damaged) for step in reversed(steps))
        position = next(filter(None, checked), None)
        if position is None and damaged:
            newest = max(damaged)
            raise UserError(
                f"--resume auto: all checkpoints are damaged ({self.path(newest)}: "
                f"{damaged[newest]}): restore one, or delete {self.folder} to train from the "
                "beginning"
            )
        if position is None:
            return None
        best, step = position.best_step, position.step
        is_lost = best not in (0, step) and not (best in steps and self._checked(best, damaged))
        for each, reason in damaged.items():
            self.ranks.warn(f"{self.path(each)} is damaged: {reason}; it is not used")
            if self.ranks.is_first:
                clear(away := self.folder / f"damaged-{each:08d}")
                with contextlib.suppress(OSError):
                    self.path(each).rename(away)
        if is_lost:
            self.ranks.warn(f"{self.path(best)}, the best model, is lost: using step {step}")
            position = dataclasses.replace(position, best=-1.0, best_step=step, stale=0)
        return position

    def _checked(self, step: int, damaged: dict[int, str]) -> Position | None:
        """The position of a checkpoint; None if it is damaged, and ``damaged`` says why."""
        try:
            return self._verified(self.path(step))
        except DamagedError as error:
            damaged[step] = str(error)
            return None

    def _verified(self, path: Path) -> Position:
        """Position of a checkpoint, of whose files each rank verifies some."""
        rank, world_size = self.ranks.rank, self.ranks.world_size
        position, error = Position(), None
        try:
            # A folder that a rank does not see is not damaged.
            if rank and not path.is_dir():
                raise UserError(
                    f"rank {rank} does not see {path}: --run_dir must be on a file system that all "
                    "hosts share"
                )
            position = position_of(verify(path, slice(rank, None, world_size)))
            if path != self.path(position.step):
                raise DamagedError(f"its position is of step {position.step}")
        except (DamagedError, UserError) as found:
            error = found
        try:
            raise_on_all(self.ranks, error)
        finally:
            del error  # as in `from_first_rank`
        return position

    def epoch(self, step: int) -> int:
        """The epoch, from 1, in which a checkpoint's last step was."""
        position = position_of(read_manifest(self.path(step)))
        return position.epoch + (position.sample > 0)

    def best_step(self, checks_bytes: bool = True) -> int:
        """Step of the best checkpoint; called on all ranks; UserError without a good one.

        Args:
            checks_bytes: read all its files; False for whoever checks those that it reads.
        """
        best = from_first_rank(self.ranks, self._best_step)
        if checks_bytes:
            self.check_bytes(best)
        return best

    def check_bytes(self, best: int) -> None:
        """UserError if the best checkpoint was altered since it was written; on all ranks."""
        try:
            self._verified(self.path(best))
        except DamagedError as error:
            raise UserError(
                f"{self.path(best)}, the best model of this run, is damaged: {error}; go on with "
                "training by --resume auto, or restore it"
            ) from error

    def _best_step(self) -> int:
        best = 0
        for step in reversed(self.steps()):
            with contextlib.suppress(DamagedError):
                best = position_of(read_manifest(self.path(step))).best_step
                break
        if not best:
            raise UserError(
                f"{self.run_dir} has no evaluated model yet: train until the first evaluation"
            )
        return best

    def check_fit(self, plain: nn.Module, step: int) -> None:
        """UserError unless ``plain``, which may be on "meta", has the weights of a checkpoint."""
        unfit = None
        try:
            check_fit(stored_weights(read_index(self.path(step))), plain.state_dict())
        except (DamagedError, ValueError) as error:
            unfit = self._unfit(step, error)
        raise_on_all(self.ranks, unfit)

    def load_weights(self, model: nn.Module, step: int) -> None:
        """Load only the weights, in place; called on all ranks."""
        self._load({"model": model.state_dict()}, step)
        drop_cached_rows(model)

    def _load(self, state: dict[str, Any], step: int) -> None:
        """Load ``state`` in place; UserError if it does not fit, or weights are not finite."""
        path, unusable = self.path(step), None
        try:
            reader = SafeReader(path)
            check_fit(stored_weights(reader.index), state["model"])
        except (DamagedError, ValueError) as error:
            unusable = self._unfit(step, error)
        raise_on_all(self.ranks, unusable)
        try:
            dcp.load(state, storage_reader=reader)
        except _LOAD_ERRORS as error:
            if GONE.search(str(error)):
                raise UserError(
                    f"another rank ended while {path} was read: start again; train.py goes on "
                    "with --resume auto"
                ) from error
            if _OTHER_CUT.search(str(error)):
                raise UserError(
                    f"{path} has the tables' optimizer state in other parts: rowwise_adagrad with "
                    "--sharding column_wise needs the run's own sharding and number of ranks"
                ) from error
            raise self._unfit(step, error) from error
        try:
            check_finite(state["model"])
        except ValueError as error:
            unusable = UserError(
                f"{path} cannot be used: {error}; delete it, and --resume auto goes on from the "
                "one before"
            )
        raise_on_all(self.ranks, unusable)

    def _unfit(self, step: int, error: BaseException) -> UserError:
        return UserError(
            f"{self.path(step)} does not fit this model: it was written with other flags, or its "
            f"files are damaged ({_cause(error)}); use another --run_dir or the run's own flags"
        )


def _state(model: DistributedModelParallel, optimizers: Optimizers) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizers.combined.state_dict()}


def _innermost(error: BaseException) -> BaseException:
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def _cause(error: BaseException) -> str:
    """The first line of the innermost error's message."""
    error = _innermost(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, pickle.UnpicklingError):  # torch's message tells how to run its code
        return "a file of it holds other things than tensors"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
