"""A training step after the lookup: encoder, then the head's loss; on CUDA through CUDA graphs.

    rows of all positions [T, D] -> encoder -> hidden [M, D] -+-> head -> loss
    rows of the candidates [C, D] ----------------------------+

Shapes: T positions of all rows, M masked positions, C candidates, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from model.execution import ExecutionPlan
from model.network.encoder import Encoder
from model.network.head import ScoringHead
from model.losses.sharded_softmax import TeacherLogits


class StepInput(NamedTuple):
    """The tensors of a batch besides its embeddings; None where the batch has none.

    Attributes:
        offsets, masked, left_only, steps_ago: as of :class:`Encoder`.
        targets, negatives, log_counts: as of :class:`ScoringHead`.
        ids: int64 [T + ...], begins with the items of the positions; for teachers.
    """

    offsets: torch.Tensor
    masked: torch.Tensor
    left_only: torch.Tensor | None
    steps_ago: torch.Tensor | None
    targets: torch.Tensor
    negatives: torch.Tensor | None
    log_counts: torch.Tensor | None
    ids: torch.Tensor | None


class Teachers(NamedTuple):
    """Trained models whose logits the step aims at, and their share of the aim.

    Attributes:
        logits: the teachers' logits of (ids, offsets, masked, left_only, steps_ago).
        share: in (0, 1]; the targets have the rest.
    """

    logits: Callable[..., list[TeacherLogits]]
    share: float
