"""A training step after the lookup: encoder, then the head's loss; on CUDA through CUDA graphs.

    rows of all positions [T, D] -> encoder -> hidden [M, D] -+-> head -> loss
    rows of the candidates [C, D] ----------------------------+

Shapes: T positions of all rows, M masked positions, C candidates, D width.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from model.execution import ExecutionPlan
from model.kernels.graphed_call import GraphedCall
from model.network.distillation import Teachers
from model.network.encoder import Encoder
from model.network.head import ScoringHead


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

    @property
    def layout(self) -> tuple[torch.Tensor | None, ...]:
        """What the encoder needs."""
        return self[:4]


class DenseStep(nn.Module):
    """Loss of looked-up rows; owns no parameter.

    Args:
        encoder, head: registered by the model, whose names their weights keep.
        plan: which graphs to use in training.
        teachers: models whose logits the loss aims at besides the targets.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: ScoringHead,
        plan: ExecutionPlan,
        teachers: Teachers | None = None,
    ) -> None:
        super().__init__()
        self._parts = (encoder, head)  # a tuple, so that they are not registered twice
        self._plan, self._teachers = plan, teachers
        self._graphed: GraphedCall | None = None

    def release(self) -> None:
        """Drop the CUDA graphs; a communicator cannot be closed while a graph sends through it."""
        if self._graphed is not None:
            self._graphed.release()

    def forward(
        self,
        items: torch.Tensor,
        candidates: torch.Tensor,
        given: StepInput,
        longest: int,
        equal_shapes: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's loss and report.

        Args:
            items: [T, D].
            candidates: [C, D].
            longest: as of :class:`Encoder`.
            equal_shapes: the batch has the same shapes on all ranks.
        """
        encoder, _ = self._parts
        graphs = self._plan.graphs if self._may_replay(given, equal_shapes) else "none"
        if self._teachers is None:
            given = given._replace(ids=None)
        if graphs == "dense":
            loss, report = self._graph()(items, candidates, *given)
            return loss, report.clone()
        if graphs == "encoder":
            (hidden,) = self._graph()(items, *given.layout)
        elif graphs == "step":  # by shapes alone: this call may be under capture
            hidden = encoder.encode(items, *given.layout)
        else:
            offsets, masked, *rest = given.layout
            hidden = encoder(items, offsets, masked, longest, *rest)
        return self._loss(hidden, candidates, given, len(items))

    def _may_replay(self, given: StepInput, equal_shapes: bool) -> bool:
        return self.training and equal_shapes and given.masked.numel() > 0

    def _graph(self) -> GraphedCall:
        """Made at the first call, when the parameters are on their device."""
        if self._graphed is None:
            encoder, _ = self._parts
            whole = self._plan.graphs == "dense"
            self._graphed = GraphedCall(
                self._encode_and_score if whole else encoder.encode,
                encoder,
                hooked=not self._plan.has_static_gradients,
                is_loss=whole,
            )
        return self._graphed

    def _encode_and_score(
        self, items: torch.Tensor, candidates: torch.Tensor, *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        encoder, _ = self._parts
        given = StepInput(*tensors)
        hidden = encoder.encode(items, *given.layout)
        return self._loss(hidden, candidates, given, len(items))

    def _loss(
        self, hidden: torch.Tensor, candidates: torch.Tensor, given: StepInput, positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _, head = self._parts
        logits, share = [], 0.0
        if self._teachers is not None:
            logits = self._teachers(given.ids[:positions], *given.layout)
            share = self._teachers.share
        sizes = None
        if self._plan.exchange == "gather" and head.catalog.shared:
            sizes = [len(given.masked)] * dist.get_world_size()
        return head(
            hidden,
            candidates,
            given.targets,
            given.negatives,
            given.log_counts,
            logits,
            share,
            sizes,
        )
