"""The training loop: epochs of pipelined steps, evaluation, checkpoints.

    for all epochs up to the next evaluation
        TrainLoader -> pipeline.progress -> loss, logged every --log_every steps
        a checkpoint every --checkpoint_every minutes and on SIGTERM or SIGINT
    evaluate on validation; a checkpoint if it is the best; stop if nothing improves

The learning rate, dropout and data order are functions of the seed and the position in training:
a resumed run equals an uninterrupted one bit by bit, on the same number of ranks.
"""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel

from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.position import Position
from model.distributed import Ranks, seed_dropout
from model.evaluation.evaluate import Result
from model.step.optimizers import Optimizers
from model.tables.upstream import set_table_steps
from model.training.agreement import CHECK_LOSS, NOTHING, SAVE, STOP, Agreement
from model.training.config import TrainingConfig
from model.training.progress import HostThrottle, LogWindow
from model.training.run_log import At, RunLog
from pipeline.batches.train_batch import PackedBatch
from pipeline.errors import UserError
from pipeline.evaluation.config import SELECTING
from pipeline.training.loader import TrainLoader

T = TypeVar("T")


class Pipeline(Protocol):
    """Runs training steps; may hold batches ahead of them (:mod:`model.step.pipelines`)."""

    def progress(self, batches: Iterator[PackedBatch]) -> torch.Tensor:
        """One step; float32 [2], its sum of losses and its number of masked positions."""

    def detach(self) -> None:
        """Release the model for evaluation; no batch may be left."""

    def release(self) -> None:
        """Free CUDA graphs."""


@dataclass(eq=False)
class Trainer:
    """Trains a sharded model from ``position``, which every step updates."""

    model: DistributedModelParallel
    optimizers: Optimizers
    pipeline: Pipeline
    loader: TrainLoader
    # Evaluates the validation split on all ranks; its argument wraps the iterator of batches. None
    # (no validation items are left): the last model is the best.
    validate: Callable[..., Result] | None
    checkpoints: Checkpoints
    log: RunLog
    config: TrainingConfig
    ranks: Ranks
    seed: int  # of dropout
    position: Position
    after_step: Callable[[], None]
    # Called on all ranks after an evaluation; what rank 0 shows of it, as Markdown.
    examples: Callable[[], str | None] = lambda: None
    # Called on all ranks after an evaluation, with the epoch, from 1, and the metrics.
    on_evaluation: Callable[[int, Result], None] | None = None

    def __post_init__(self) -> None:
        self._agreement = Agreement(self.ranks)
        self._throttle = HostThrottle(self.ranks.device, self.ranks.timeout)
        self._total = self.config.num_epochs * self.loader.num_samples
        self._window = LogWindow()
        # For each batch in the pipeline: its windows, and the epoch's samples consumed after it.
        self._held: deque[tuple[int, int]] = deque()

    def run(self) -> Position:
        """Train to the end, to ``--max_steps`` or until nothing improves; the last position.

        Its ``best_step`` is 0 if ``--max_steps`` ends training before any evaluation. A signal,
        after a checkpoint, raises SystemExit with 128 + its number.
        """
        began, saved = self.position, False
        try:
            with self._agreement:
                while not self._is_over():
                    self._train_epochs()
                    if self._is_cut() and not self._is_evaluation_due():
                        saved = self.position != began and self._save()
                        break
                    saved = self._end_epochs()
                    if self._is_cut():
                        break
                self.checkpoints.finish()
        except UserError:
            with suppress(UserError):
                self.checkpoints.finish()  # a background write holds an earlier, good step
            raise
        except RuntimeError as error:
            if explained := self._agreement.explain(error, self.position.step, self.checkpoints):
                raise explained from error
            raise
        # Not after a failure: the GPU may still wait for another GPU inside its graph.
        self.pipeline.release()
        if not self._is_over():
            self.log.say(f"ended after step {self.position.step} (--max_steps){', saved' * saved}")
        elif not self.position.best_step:
            raise UserError(
                "no checkpoint of an evaluated model could be written: mend what the warnings "
                "name, then go on with --resume auto"
            )
        return self.position

    def _is_over(self) -> bool:
        stale = self.config.patience is not None and self.position.stale >= self.config.patience
        return stale or self.position.epoch >= self.config.num_epochs

    def _is_cut(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.position.step >= limit

    def _evaluation_epoch(self) -> int:
        """How many epochs are over at the next evaluation, or at the end."""
        stop, every = self.config.num_epochs, self.config.eval_every
        if self.validate is not None:
            stop = min(stop, (self.position.epoch // every + 1) * every)
        return stop

    def _is_evaluation_due(self) -> bool:
        last = self.position.epoch + 1 == self._evaluation_epoch()
        return last and self.position.sample == self.loader.num_samples

    def _train_epochs(self) -> None:
        """Train the rest of the current epoch and the epochs up to the next evaluation.

        The pipeline is emptied only at the end: filling it again takes as long as several steps.
        """
        stop = self._evaluation_epoch()
        steps = self.loader.steps_left(self.position.sample)
        steps += (stop - self.position.epoch - 1) * self.loader.steps_per_epoch
        if self.config.max_steps is not None:
            steps = min(steps, self.config.max_steps - self.position.step)
        if steps <= 0:
            return
        self.model.train()
        epochs = self.loader.epoch(self.position.epoch, self.position.sample, stop)
        # Exactly ``steps``: the pipeline must be empty if training ends in the middle of an epoch.
        feed = self._feed(islice(epochs, steps))
        self._window = LogWindow()
        for left in reversed(range(steps)):
            self._step(feed)
            self.after_step()
            decision = self._agreement.exchange(self._request())
            if left == 0 or self.position.step % self.config.log_every == 0 or decision:
                self._throttle.wait_for_all()
                self._log_steps()
                self._window = LogWindow()
            self._carry_out(decision)
        self.pipeline.detach()

    def _log_steps(self) -> None:
        norms = self.optimizers.norms
        values = self._window.reduce(None if norms is None else norms.take(), self.checkpoints.kept)
        values["table_lr"] = self.optimizers.table_lr
        self.log.write_steps(self._at(), values)

    def _at(self) -> At:
        """Where training is, for the log."""
        position = self.position
        samples = position.epoch * self.loader.num_samples + position.sample
        return At(position.step, position.epoch + 1, samples)

    def _feed(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self._window.waited += time.perf_counter() - started
            self._held.append((batch.num_windows, self.loader.state_dict()["sample"]))
            yield batch

    def _step(self, feed: Iterator[PackedBatch]) -> None:
        before = self.position
        if before.sample == self.loader.num_samples:
            before = replace(before, epoch=before.epoch + 1, sample=0)
        progress = (before.epoch * self.loader.num_samples + before.sample) / self._total
        factor = self.config.lr_factor(progress, before.epoch)
        self.optimizers.set_lr(factor)
        seed_dropout(self.ranks.device, hash((self.seed, before.step, self.ranks.rank)))
        self._window.losses.append(self.pipeline.progress(feed))
        self._throttle.after_step()
        windows, sample = self._held.popleft()
        self.position = replace(before, step=before.step + 1, sample=sample)
        self._window.steps.append((before, self.position, factor * self.optimizers.peak_lr))
        self._window.windows += windows
        self.log.advance()

    def _request(self) -> int:
        # On CUDA, reading the loss would wait for the step: there it is checked when it is logged.
        if self.ranks.device.type == "cpu" and not math.isfinite(self._window.losses[-1][0]):
            return CHECK_LOSS
        return SAVE if self.ranks.is_first and self.checkpoints.is_due else NOTHING

    def _carry_out(self, decision: int) -> None:
        if decision in (NOTHING, CHECK_LOSS):
            return
        saved = self._save(wait=decision > STOP)
        if decision > STOP:
            position, number = self.position, decision - STOP
            self.log.say(
                f"stopped by {signal.Signals(number).name} at step {position.step} (epoch "
                f"{position.epoch + 1}, sample {position.sample}){', saved' * saved}: go on "
                f"with --run_dir {self.checkpoints.run_dir} --resume auto"
            )
            raise SystemExit(128 + number)

    def _save(self, wait: bool = True) -> bool:
        """Check that all weights are finite, then :meth:`Checkpoints.save`."""
        broken = torch.zeros((), device=self.ranks.device)
        for parameter in self.model.parameters():
            broken += ~torch.isfinite(parameter.detach().sum())
        dist.all_reduce(broken)
        if broken:
            raise UserError(
                f"weights are not finite any more after step {self.position.step}: lower --lr or "
                f"raise --warmup_share; {self.checkpoints.kept}"
            )
        return self.checkpoints.save(self.model, self.optimizers, self.position, wait)

    def _end_epochs(self) -> bool:
        """Evaluate, save a better or the last model, go to the next epoch; whether it saved."""
        before = self.position
        if self.validate is None:
            self.position = replace(before, best_step=before.step)
        else:
            self._evaluate(self.validate)
        self.position = replace(self.position, epoch=before.epoch + 1, sample=0)
        better = self.position.best_step != before.best_step
        saved = (better or self._is_over() or self._is_cut()) and self._save()
        if better and not saved:
            self.position = replace(self.position, best=before.best, best_step=before.best_step)
        return saved

    def _interruptible(self, batches: Iterable[T]) -> Iterator[T]:
        """Stop on a signal between the batches of an evaluation, which a resumed run repeats."""
        for batch in batches:
            if (decision := self._agreement.exchange()) > STOP:
                self._carry_out(decision)
            yield batch

    def _evaluate(self, validate: Callable[..., Result]) -> None:
        started = time.perf_counter()
        result = validate(self._interruptible)
        examples = self.examples()
        set_table_steps(self.model, self.position.step)
        sampled, full, step = result["sampled"], result["full"], self.position.step
        value = full[SELECTING]  # sampled metrics may prefer a worse model
        if better := value > self.position.best:
            self.position = replace(self.position, best=value, best_step=step, stale=0)
        else:
            self.position = replace(self.position, stale=self.position.stale + 1)
        seconds = time.perf_counter() - started
        self.log.write_evaluation(self._at(), result, seconds, examples)
        self.log.say(
            f"epoch {self.position.epoch + 1}: validation {SELECTING} full {value:.4f}"
            f"{' (best so far)' if better else ''}, sampled {sampled[SELECTING]:.4f}; "
            f"HR@10 full {full['HR@10']:.4f}, sampled {sampled['HR@10']:.4f}"
        )
        if self.on_evaluation is not None:
            self.on_evaluation(self.position.epoch + 1, result)
