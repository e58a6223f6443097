"""The training loop: epochs of pipelined steps, evaluation, checkpoints.

    for each epoch
        TrainLoader -> TrainPipelineSparseDist.progress -> loss, every --log_every steps to the log
        drain the pipeline, evaluate on validation, write a checkpoint, stop if nothing improves
    load the best checkpoint, evaluate on test

The learning rate, dropout and data order are functions of (seed, position in training), so a run
that is interrupted and resumed is the run that was not.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel

from model.checkpoint import Checkpoints, Position
from model.evaluation import Result
from model.ranks import Ranks
from model.run_log import RunLog
from model.sharding import Optimizers, train_pipeline
from pipeline.batch import TrainBatch
from pipeline.errors import UserError
from pipeline.loader import TrainLoader

# Model selection: full ranking on validation, since sampled metrics may prefer a worse model.
SELECT = ("full", "NDCG@10")


@dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and how the learning rate moves."""

    num_epochs: int = field(default=20, metadata={"help": "passes over all windows"})
    warmup_share: float = field(
        default=0.03, metadata={"help": "share of training in which the learning rate rises"}
    )
    lr_schedule: str = field(
        default="linear",
        metadata={
            "help": "after warm-up: linear or cosine to zero, or constant",
            "choices": ("linear", "cosine", "constant"),
        },
    )
    decay_step: int = field(
        default=25, metadata={"help": "multiply the learning rate by --gamma every so many epochs"}
    )
    gamma: float = field(default=1.0, metadata={"help": "factor of --decay_step"})
    eval_every: int = field(default=1, metadata={"help": "epochs between evaluations"})
    patience: int | None = field(
        default=None,
        metadata={"help": "stop after so many evaluations without a better full NDCG@10"},
    )
    log_every: int = field(default=50, metadata={"help": "steps between lines of the log"})

    def __post_init__(self) -> None:
        for name in ("num_epochs", "decay_step", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"--patience must be at least 1, not {self.patience}")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"--warmup_share must be in [0, 1), not {self.warmup_share}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"--gamma must be in (0, 1], not {self.gamma}")
        if self.lr_schedule not in ("linear", "cosine", "constant"):
            raise UserError(f"--lr_schedule must be linear, cosine or constant: {self.lr_schedule}")


def lr_factor(config: TrainingConfig, progress: float, epoch: int) -> float:
    """Learning rate over its peak.

    Args:
        progress: share of all training samples consumed before this step, in [0, 1).
        epoch: running epoch, from 0.
    """
    stairs = config.gamma ** (epoch // config.decay_step)
    if progress < config.warmup_share:
        return stairs * (progress / config.warmup_share)
    rest = (progress - config.warmup_share) / (1 - config.warmup_share)
    if config.lr_schedule == "linear":
        return stairs * (1 - rest)
    if config.lr_schedule == "cosine":
        return stairs * (1 + math.cos(math.pi * rest)) / 2
    return stairs


class _Feed(Iterator[TrainBatch]):
    """The loader's batches; counts windows and the time spent waiting for the loader."""

    def __init__(self, batches: Iterator[TrainBatch]) -> None:
        self._batches = batches
        self.windows: deque[int] = deque()  # of the batches that the pipeline holds
        self.waited = 0.0

    def __next__(self) -> TrainBatch:
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        self.windows.append(batch.num_windows)
        return batch


class Trainer:
    """Trains a sharded model.

    Args:
        model: with its ``optimizers``, from :mod:`model.sharding`.
        loader: this rank's training batches.
        validate: evaluates the model on the validation split, on all ranks.
        position: where to begin, from a checkpoint or new.
        seed: of dropout.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        optimizers: Optimizers,
        loader: TrainLoader,
        validate: Callable[[], Result],
        checkpoints: Checkpoints,
        log: RunLog,
        config: TrainingConfig,
        ranks: Ranks,
        seed: int,
        position: Position,
    ) -> None:
        self.model, self.optimizers, self.loader = model, optimizers, loader
        self.validate, self.checkpoints, self.log = validate, checkpoints, log
        self.config, self.ranks, self.seed, self.position = config, ranks, seed, position
        self.pipeline = train_pipeline(model, optimizers.combined, ranks.device)
        self._total = config.num_epochs * loader.num_samples

    def run(self) -> Position:
        """Train to the end or until nothing improves; returns the last position."""
        while self.position.epoch < self.config.num_epochs and not self._is_stale():
            self._train_epoch()
            last = self.position.epoch == self.config.num_epochs
            if last or self.position.epoch % self.config.eval_every == 0:
                self._evaluate()
                self.checkpoints.save(self.model, self.optimizers, self.position)
        return self.position

    def _is_stale(self) -> bool:
        return self.config.patience is not None and self.position.stale >= self.config.patience

    def _train_epoch(self) -> None:
        """The rest of the current epoch; ends with an empty, detached pipeline."""
        self.model.train()
        epoch, step = self.position.epoch, self.position.step
        feed = _Feed(self.loader.epoch(epoch, self.position.sample))
        steps = self.loader.steps_left(self.position.sample)
        consumed = epoch * self.loader.num_samples + self.position.sample
        left = self.loader.num_samples - self.position.sample
        losses = torch.zeros(2, device=self.ranks.device)
        windows, since, logged = 0, time.perf_counter(), step
        for done in range(steps):
            factor = lr_factor(self.config, (consumed + done * left / steps) / self._total, epoch)
            self.optimizers.set_lr(factor)
            torch.manual_seed(hash((self.seed, step, self.ranks.rank)))
            losses += self.pipeline.progress(feed)
            windows += feed.windows.popleft()
            step += 1
            self.log.advance()
            if step % self.config.log_every == 0 or done + 1 == steps:
                loss, windows = self._reduce(losses, windows, step)
                seconds = time.perf_counter() - since
                values = {
                    "loss": loss,
                    "lr": factor * self.optimizers.peak_lr,
                    "records_per_second": windows / seconds,
                    "data_wait_ms": 1000 * feed.waited / (step - logged),
                }
                self.log.write(step, epoch, values)
                losses.zero_()
                windows, since, logged, feed.waited = 0, time.perf_counter(), step, 0.0
        self.pipeline.detach()
        self.position = replace(self.position, step=step, epoch=epoch + 1, sample=0)

    def _reduce(self, losses: torch.Tensor, windows: int, step: int) -> tuple[float, int]:
        """Mean loss per masked position and number of windows since the last line, all ranks.

        Raises:
            UserError: the loss is not finite.
        """
        totals = torch.cat([losses.double(), losses.new_tensor([windows]).double()])
        dist.all_reduce(totals)
        loss_sum, positions, all_windows = totals.tolist()
        if not math.isfinite(loss_sum):
            raise UserError(
                f"the loss became {loss_sum} by step {step}: lower --lr or raise --warmup_share; "
                f"earlier checkpoints are intact"
            )
        return loss_sum / max(positions, 1), int(all_windows)

    def _evaluate(self) -> None:
        """Validate, log, and note whether this is the best model so far."""
        started = time.perf_counter()
        result = self.validate()
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
        self.log.write(position.step, position.epoch - 1, values)
        self.log.say(
            f"epoch {position.epoch - 1}: validation NDCG@10 full {value:.4f}"
            f"{' (best so far)' if better else ''}, sampled {result['sampled'][metric]:.4f}; "
            f"HR@10 full {result['full']['HR@10']:.4f}, sampled {result['sampled']['HR@10']:.4f}"
        )
