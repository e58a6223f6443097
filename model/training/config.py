"""Flags of the training loop: length, learning rate schedule, evaluation, log and profile."""

import math
from dataclasses import dataclass

from pipeline.config import Config, flag


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How long to train, and the learning rate schedule."""

    num_epochs: int = flag(20, "passes over all training windows", at_least=1)
    warmup_share: float = flag(
        0.03, "share of training in which the learning rate rises from 0", at_least=0, below=1
    )
    lr_schedule: str = flag(
        "linear",
        "learning rate after warm-up; linear and cosine fall to zero",
        choices=("linear", "cosine", "constant"),
    )
    decay_step: int = flag(25, "epochs after which --gamma is applied once more", at_least=1)
    gamma: float = flag(1.0, "learning rate factor every --decay_step epochs", above=0, at_most=1)
    eval_every: int = flag(1, "epochs between two evaluations on validation", at_least=1)
    patience: int | None = flag(
        None, "evaluations without better full NDCG@10 before the end (default: never)", at_least=1
    )
    log_every: int = flag(50, "steps between two lines of the log", at_least=1)
    max_steps: int | None = flag(
        None,
        "steps to end after: the last is saved, and evaluated if an evaluation is due; the best "
        "model so far, if one was evaluated, is tested and exported (default: no limit)",
        at_least=1,
    )
    rank_timeout: float = flag(10.0, "minutes to wait for other ranks", at_least=0.01, below=10**6)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run, if ``--patience`` does not end it."""
        steps = self.num_epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def lr_factor(self, progress: float, epoch: int) -> float:
        """The learning rate of a step as a share of its peak.

        ``progress``: share of all training samples consumed before, in [0, 1); ``epoch``: from 0.
        """
        stairs = self.gamma ** (epoch // self.decay_step)
        if progress < self.warmup_share:
            return stairs * (progress / self.warmup_share)
        rest = (progress - self.warmup_share) / (1 - self.warmup_share)
        if self.lr_schedule == "linear":
            return stairs * (1 - rest)
        if self.lr_schedule == "cosine":
            return stairs * (1 + math.cos(math.pi * rest)) / 2
        return stairs


@dataclass(frozen=True)
class ProfileConfig(Config):
    """Profile of training steps."""

    profile: int = flag(
        0, "steady steps to record in <run folder>/profile (TensorBoard, Perfetto)", at_least=0
    )
