"""The training loop: epochs of pipelined steps, evaluation, checkpoints.

    for the epochs up to the next evaluation, without a break
        TrainLoader -> TrainPipelineSparseDist.progress -> loss, every --log_every steps to the log
        every --checkpoint_every minutes, and when a signal says stop: a checkpoint
        evaluate on validation; a checkpoint if it is the best; stop if nothing improves
    load the best checkpoint, evaluate on test

The learning rate, dropout and data order are functions of (seed, position in training), so a run
that is interrupted and resumed is the run that was not, bit by bit on as many ranks.
"""

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel

from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.position import Position
from model.distributed import Ranks, seed_dropout
from model.evaluation.evaluate import Result
from model.step.optimizers import Optimizers, set_table_steps
from model.step.pipelines import train_pipeline
from model.training.agreement import CHECK_LOSS, NOTHING, SAVE, STOP, Orders
from model.training.progress import Feed, Interval, Pace, StepNote
from model.training.run_log import RunLog
from model.training.schedule import TrainingConfig, lr_factor
from pipeline.errors import UserError
from pipeline.training.loader import TrainLoader

T = TypeVar("T")

# Model selection: full ranking on validation, since sampled metrics may prefer a worse model.
SELECT = ("full", "NDCG@10")


class Trainer:
    """Trains a sharded model.

    Args:
        model: with its ``optimizers``, from :mod:`model.step.optimizers`.
        loader: this rank's training batches.
        validate: evaluates the model on the validation split, on all ranks; its argument is put
            around the batches. None: nothing is left to validate on, the last model is the best.
        position: where to begin, from a checkpoint or new.
        seed: of dropout.
        after_step: called after every step, on all ranks.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizers: Optimizers,
        loader: TrainLoader,
        validate: Callable[[Callable[[Iterable[T]], Iterator[T]]], Result] | None,
        checkpoints: Checkpoints,
        log: RunLog,
        config: TrainingConfig,
        ranks: Ranks,
        seed: int,
        position: Position,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.optimizers, self.loader = model, optimizers, loader
        self.validate, self.checkpoints, self.log = validate, checkpoints, log
        self.config, self.ranks, self.seed, self.position = config, ranks, seed, position
        self.after_step = after_step
        self.pipeline = train_pipeline(model, optimizers, ranks.device)
        timeout = timedelta(minutes=config.rank_timeout)
        self.orders, self._pace = Orders(ranks, timeout), Pace(ranks.device, timeout)
        self.checkpoints.prepare()
        self._total = config.num_epochs * loader.num_samples

    def run(self) -> Position:
        """Train to the end, ``--max_steps`` or until nothing improves; returns the last position.

        Its ``best_step`` is 0 where ``--max_steps`` came before the first evaluation.

        Raises:
            UserError: a loss is not finite, a rank does not answer, a checkpoint cannot be written.
            SystemExit: stopped by a signal, after a checkpoint; the code is 128 + its number.
        """
        try:
            with self.orders:
                while not self._is_over():
                    self._train_epochs()
                    if self._is_cut():
                        break
                    self._end_epochs()
                self.checkpoints.finish()
        except UserError:
            with suppress(UserError):
                self.checkpoints.finish()  # what is being written is from before, and good
            raise
        except RuntimeError as error:
            if explained := self.orders.explain(error, self.position.step):
                raise explained from error
            raise
        # Not after a failure: a GPU that waits for another one is not done with its graph.
        self.pipeline.release()
        if self._is_cut():
            self.log.say(f"ended after step {self.position.step}, as --max_steps says")
        elif not self.position.best_step:
            raise UserError(
                "no checkpoint of an evaluated model could be written: make room, then go on with "
                "--resume auto"
            )
        return self.position

    def _is_over(self) -> bool:
        stale = self.config.patience is not None and self.position.stale >= self.config.patience
        return stale or self.position.epoch >= self.config.num_epochs

    def _is_cut(self) -> bool:
        limit = self.config.max_steps
        return limit is not None and self.position.step >= limit

    def _next_stop(self) -> int:
        """The epoch before which to evaluate, or to end."""
        config, epoch = self.config, self.position.epoch
        if self.validate is None:
            return config.num_epochs
        return min(config.num_epochs, (epoch // config.eval_every + 1) * config.eval_every)

    def _train_epochs(self) -> None:
        """The rest of the current epoch and those up to the next evaluation.

        Ends with an empty, detached pipeline: to fill it again, and to trace the model, takes as
        long as several steps.
        """
        stop = self._next_stop()
        steps = self.loader.steps_left(self.position.sample)
        steps += (stop - self.position.epoch - 1) * self.loader.steps_per_epoch
        if self.config.max_steps is not None:
            steps = min(steps, self.config.max_steps - self.position.step)
        if steps <= 0:
            return
        self.model.train()
        feed, interval = Feed(self.loader, self.position, steps, stop), Interval()
        for left in reversed(range(steps)):
            self._step(feed, interval)
            self.after_step()
            order = self.orders.exchange(self._wish(interval))
            if left == 0 or self.position.step % self.config.log_every == 0 or order:
                self._pace.catch_up()
                values = interval.reduce()
                values["data_wait_ms"] = 1000 * feed.waited / len(interval.steps)
                self.log.write(self.position.step, self.position.epoch, values)
                interval, feed.waited = Interval(), 0.0
            self._obey(order)
        self.pipeline.detach()

    def _step(self, feed: Feed, interval: Interval) -> None:
        """One optimizer step; the pipeline still holds the next batches afterwards."""
        before = self.position
        if before.sample == self.loader.num_samples:
            before = replace(before, epoch=before.epoch + 1, sample=0)
        progress = (before.epoch * self.loader.num_samples + before.sample) / self._total
        factor = lr_factor(self.config, progress, before.epoch)
        self.optimizers.set_lr(factor)
        seed_dropout(self.ranks.device, hash((self.seed, before.step, self.ranks.rank)))
        losses = self.pipeline.progress(feed)
        self._pace.keep()
        windows, sample = feed.held.popleft()
        self.position = replace(before, step=before.step + 1, sample=sample)
        lr = factor * self.optimizers.peak_lr
        note = StepNote(self.position.step, before.epoch, before.sample, sample, lr)
        interval.add(losses, windows, note)
        self.log.advance()

    def _wish(self, interval: Interval) -> int:
        """What this rank wants all to do next."""
        # On CUDA looking at the loss would wait for the step: there the log's turn has to do.
        if self.ranks.device.type == "cpu" and not math.isfinite(interval.losses[-1][0]):
            return CHECK_LOSS
        return SAVE if self.ranks.is_first and self.checkpoints.is_due else NOTHING

    def _obey(self, order: int) -> None:
        if order in (NOTHING, CHECK_LOSS):
            return
        saved = self._save(wait=order > STOP)
        if order > STOP:
            position, name = self.position, signal.Signals(order - STOP).name
            self.log.say(
                f"stopped by {name} at step {position.step} (epoch {position.epoch}, sample "
                f"{position.sample}){', saved' * saved}: go on with --resume auto"
            )
            raise SystemExit(128 + order - STOP)

    def _save(self, wait: bool = True) -> bool:
        """Write a checkpoint, unless there is nothing worth writing; or begin to, without waiting.

        The batches that the pipeline holds do not matter: they have not touched the weights.

        Raises:
            UserError: a weight is not finite, or the checkpoint cannot be written.
        """
        broken = torch.zeros((), device=self.ranks.device)
        for parameter in self.model.parameters():
            broken += ~torch.isfinite(parameter.detach().sum())
        dist.all_reduce(broken)
        if broken:
            raise UserError(
                f"weights are not finite any more after step {self.position.step}: lower --lr or "
                "raise --warmup_share; earlier checkpoints are intact"
            )
        return self.checkpoints.save(self.model, self.optimizers, self.position, wait)

    def _end_epochs(self) -> None:
        """Evaluate, save, and turn to the next epoch."""
        before = self.position
        if self.validate is None:
            self.position = replace(before, best_step=before.step)
        else:
            self._evaluate(self.validate)
        self.position = replace(self.position, epoch=before.epoch + 1, sample=0)
        better = self.position.best_step != before.best_step
        if (better or self._is_over()) and not self._save() and better:
            self.position = replace(self.position, best=before.best, best_step=before.best_step)

    def _interruptible(self, batches: Iterable[T]) -> Iterator[T]:
        """Between batches of an evaluation, which is done again after a resume, obey a signal."""
        for batch in batches:
            if (order := self.orders.exchange()) > STOP:
                self._obey(order)
            yield batch

    def _evaluate(self, validate: Callable[..., Result]) -> None:
        """Validate, log, and note whether this is the best model so far."""
        started = time.perf_counter()
        result = validate(self._interruptible)
        set_table_steps(self.model, self.position.step)
        protocol, metric = SELECT
        value = result[protocol][metric]
        position = self.position
        better = value > position.best
        self.position = replace(
            position,
            best=value if better else position.best,
            best_step=position.step if better else position.best_step,
            stale=0 if better else position.stale + 1,
        )
        values = {
            f"validation/{protocol}/{name}": number
            for protocol in ("sampled", "full")
            for name, number in result[protocol].items()
        }
        values["validation/seconds"] = time.perf_counter() - started
        self.log.write(position.step, position.epoch, values)
        self.log.say(
            f"epoch {position.epoch}: validation NDCG@10 full {value:.4f}"
            f"{' (best so far)' if better else ''}, sampled {result['sampled'][metric]:.4f}; "
            f"HR@10 full {result['full']['HR@10']:.4f}, sampled {result['sampled']['HR@10']:.4f}"
        )
