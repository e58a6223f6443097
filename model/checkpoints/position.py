"""The position in training, stored in every checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where training stands, and the best model so far."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # the current or next one, from 0
    sample: int = 0  # samples of that epoch already trained, over all ranks
    best: float = -1.0  # best value of the selection metric, -1 before the first evaluation
    best_step: int = 0  # the step with that value
    stale: int = 0  # evaluations since best_step
