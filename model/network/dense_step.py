"""A training step after the lookup: encoder, then the head's loss; on CUDA through CUDA graphs.

    rows of all positions [T, D] -> encoder -> hidden [M, D] -+-> head -> loss
    rows of the candidates [C, D] ----------------------------+

Shapes: T positions of all rows, M masked positions, C candidates, A attributes, D width.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.execution import ExecutionPlan
from model.kernels.graphed_call import GraphedCall
from model.losses.sharded_softmax import NO_TEACHERS, Beside, TeacherTargets
from model.network.attributes import AttributeSums
from model.network.distillation import Teachers
from model.network.encoder import Encoder, Layout
from model.network.head import Scored, ScoringHead


class StepInput(NamedTuple):
    """A batch without its embeddings: arguments of :class:`Encoder` and :class:`ScoringHead`.

    ``ids``, int64 [T + ...], for teachers and attributes, begin with the items of the positions.
    """

    offsets: Tensor
    masked: Tensor
    left_only: Tensor | None
    steps_ago: Tensor | None
    targets: Tensor
    negatives: Tensor | None
    log_counts: Tensor | None
    all_targets: Tensor | None
    ids: Tensor | None
    times: Tensor | None = None

    @property
    def layout(self) -> Layout:
        return self.offsets, self.masked, self.left_only, self.steps_ago, self.times

    @property
    def scored(self) -> Scored:
        return Scored(self.targets, self.negatives, self.log_counts, self.all_targets)


class DenseStep(nn.Module):
    """Loss of looked-up rows; owns no parameter: the model registers ``encoder`` and ``head``."""

    def __init__(
        self,
        encoder: Encoder,
        head: ScoringHead,
        plan: ExecutionPlan,
        teachers: Teachers | None = None,
        attributes: AttributeSums | None = None,
    ) -> None:
        super().__init__()
        # Tuples, so that they are not registered twice.
        self._parts, self._attributes = (encoder, head), (attributes,)
        self._plan, self._teachers = plan, teachers
        self._graphed: GraphedCall | None = None

    def release(self) -> None:
        """Drop the CUDA graphs; a communicator cannot be closed while a graph sends through it."""
        if self._graphed is not None:
            self._graphed.release()

    def forward(
        self,
        items: Tensor,
        candidates: Tensor,
        given: StepInput,
        longest: int | None,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The head's loss and report.

        Args:
            added: [A, D], rows of the attributes; None: the items have none.
        """
        if added is not None:
            items, candidates = self._with_attributes(items, candidates, given, added)
        may_replay = self.training and given.masked.numel() > 0
        graphs = self._plan.graphs if may_replay else "none"
        encoder, head = self._parts
        # Backward passes of attributes' sums and of other lookups read the candidates' gradient.
        by_table_alone = self._plan.lookup == "own" and added is None
        beside = head.start(candidates, in_backward=by_table_alone)
        if graphs == "encoder":
            hidden = self._graph()(items, *given.layout)
        else:  # under capture only the shapes may decide
            hidden = encoder(items, *given.layout, longest=None if graphs == "step" else longest)
        return self._loss(hidden, candidates, given, len(items), beside)

    def _with_attributes(
        self, items: Tensor, candidates: Tensor, given: StepInput, added: Tensor
    ) -> tuple[Tensor, Tensor]:
        (attributes,), (_, head) = self._attributes, self._parts
        assert attributes is not None and given.ids is not None
        items = attributes.of_positions(items, added, given.ids[: len(items)])
        if given.negatives is not None:
            scored = torch.cat([given.targets, given.negatives])
            return items, attributes.of_items(candidates, added, scored)
        return items, attributes.of_range(candidates, added, head.catalog.low)

    def _graph(self) -> GraphedCall:
        """Created at the first call, when the parameters are on their device."""
        if self._graphed is None:
            encoder, _ = self._parts
            hooked = not self._plan.has_static_gradients
            self._graphed = GraphedCall(encoder, encoder, hooked)
        return self._graphed

    def _loss(
        self,
        hidden: Tensor,
        candidates: Tensor,
        given: StepInput,
        positions: int,
        beside: Beside | None,
    ) -> tuple[Tensor, Tensor]:
        _, head = self._parts
        teachers = NO_TEACHERS
        if self._teachers is not None:
            assert given.ids is not None
            ids, models = given.ids[:positions], self._teachers.models
            logits = [teacher(ids, given.layout) for teacher in models]
            teachers = TeacherTargets(logits, self._teachers.share)
        sizes = None
        if self._plan.agrees_on_sizes and head.catalog.shared:
            sizes = [len(given.masked)] * dist.get_world_size()
        return head(hidden, candidates, given.scored, teachers, sizes, beside)
