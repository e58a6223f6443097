"""Users whose held-out item one rank ranks at once.

Shapes: B users, N negatives of each, S seen items of all.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipeline.batches.features import tensors_of, with_candidates


@dataclass(eq=False)
class EvalBatch:
    """One rank's B targets to rank; each row ends with the mask token in the target's place.

    In an evaluation a row's seen items are distinct. A user with several targets has as many rows,
    one after the other. Only the first in a batch has the history, the others the mask token alone.

    ``num_rows`` and ``longest`` are as in ``TrainBatch``; tensors are int64 unless said.
    """

    features: KeyedJaggedTensor  # key "item"; a row is a user's last known items and the mask token
    masked: Tensor  # [B], the flat position of each row's mask token
    targets: Tensor  # [B], the held-out item
    users: Tensor  # [B], number in the sequence store; -1: a filler row, not counted
    is_first: Tensor  # bool [B], whether it is the first target of its user
    negatives: Tensor  # [B, N], distinct items the user never rated; 0 where there are too few
    seen: Tensor  # [S], items of the whole history before the targets, without these
    seen_offsets: Tensor  # [B + 1]; row b has seen[seen_offsets[b]:seen_offsets[b + 1]]
    num_rows: int
    longest: int
    encoded_row: Tensor | None = None  # [B], the row that has the history; None: each its own
    times: Tensor | None = None  # [T, 2], as in ``TrainBatch``; a mask token has its target's

    def to(self, device: torch.device, non_blocking: bool = False) -> "EvalBatch":
        """A copy on ``device``, with the key "candidate": the table needs both features.

        It has no ids: candidates are looked up once for all batches.
        """
        parts = tensors_of(self).items()
        moved = {name: part.to(device, non_blocking=non_blocking) for name, part in parts}
        moved["features"] = with_candidates(moved["features"], (1, 1))
        return replace(self, **moved)

    def pin_memory(self) -> "EvalBatch":
        """A copy in page-locked memory; without CUDA, this batch."""
        if not torch.cuda.is_available():
            return self
        return replace(self, **{name: part.pin_memory() for name, part in tensors_of(self).items()})
