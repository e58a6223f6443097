"""The position in training, stored in every checkpoint."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Where training stands, and the best model so far.

    Attributes:
        step: optimizer steps done.
        epoch: the current or next epoch, from 0.
        sample: samples of that epoch already trained, over all ranks; after the last one, its
            evaluation or the next epoch follows.
        best: best value of the selection metric, -1 before the first evaluation.
        best_step: the step with that value.
        stale: evaluations since ``best_step``.
    """

    step: int = 0
    epoch: int = 0
    sample: int = 0
    best: float = -1.0
    best_step: int = 0
    stale: int = 0
