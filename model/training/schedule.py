"""How long to train, and the learning rate as a function of the position in training.

The rate rises to its peak, then falls linearly or by a cosine to zero, or stays constant; all of it
is multiplied by --gamma every --decay_step epochs.
"""

import math
from dataclasses import dataclass, field

from pipeline.errors import UserError


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
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": "end right after this step, with nothing more evaluated or saved: to try a "
            "set-up or measure its speed"
        },
    )
    rank_timeout: float = field(
        default=10.0, metadata={"help": "minutes to wait for the other ranks before giving up"}
    )

    def __post_init__(self) -> None:
        for name in ("num_epochs", "decay_step", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.rank_timeout < 1e6:
            raise UserError(f"--rank_timeout must be positive minutes, not {self.rank_timeout}")
        for name in ("patience", "max_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, not {value}")
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"--warmup_share must be in [0, 1), not {self.warmup_share}")
        if not 0 < self.gamma <= 1:
            raise UserError(f"--gamma must be in (0, 1], not {self.gamma}")
        if self.lr_schedule not in ("linear", "cosine", "constant"):
            raise UserError(f"--lr_schedule must be linear, cosine or constant: {self.lr_schedule}")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run, if ``--patience`` does not end it."""
        steps = self.num_epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)


def lr_factor(config: TrainingConfig, progress: float, epoch: int) -> float:
    """The learning rate as a share of its peak.

    Args:
        progress: share of all training samples consumed before this step, in [0, 1).
        epoch: current epoch, from 0.
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
