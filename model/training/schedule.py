"""The learning rate as a function of the position in training.

The rate rises to its peak, then falls linearly or by a cosine to zero, or stays constant; all of it
is multiplied by --gamma every --decay_step epochs.
"""

import math

from model.training.config import TrainingConfig


def lr_factor(config: TrainingConfig, progress: float, epoch: int) -> float:
    """The learning rate as a share of its peak.

    Args:
        progress: share of all training samples consumed before this step, in [0, 1).
        epoch: from 0.
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
