"""Vectors of items and users by a trained model, and the items whose vectors fit best.

In dmp each rank scores its shard of the catalog for all ranks' users, in ddp each scores its own;
what is returned is the same on every rank.

Shapes: U users, k items of each, D width, V items.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.distributed import Ranks
from model.evaluation.catalog_scores import CatalogScores
from model.evaluation.evaluate import MAX_SCORES, exact
from model.evaluation.top_items import CHUNK, SPARE, top_items, whole_chunks
from model.evaluation.users import EncodedUsers, encode
from model.losses.sharded_softmax import all_gather_rows
from model.tables.distribute import unwrap
from pipeline.batches.eval_batch import EvalBatch
from pipeline.errors import UserError

# On CUDA, one search of many items is less work than several of few, and the host has to launch 150
# kernels for each: at most 1 GiB of scores, of 256 users for a million items.
CUDA_SCORES, CUDA_PART_ITEMS = 1 << 28, 1 << 20
# Bytes of the device for each score: scores take a sixteenth of its memory.
_BYTES_A_SCORE = 64
# Matrix products are computed in blocks of as many users.
_TILE = 128


class Vectors:
    """Of a BERT4Rec that may be sharded over the ranks; a UserError if one is not finite.

    ``added`` of methods: float32 [V + 2], to add to scores.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._bert = unwrap(model)
        self.num_items: int = self._bert.head.num_items
        self.scale: float = self._bert.head.scale
        self._on_cuda, self._most_scores = ranks.device.type == "cuda", MAX_SCORES
        if self._on_cuda:
            memory = torch.cuda.get_device_properties(ranks.device).total_memory
            self._most_scores = min(CUDA_SCORES, memory // _BYTES_A_SCORE)

    @property
    def width(self) -> int:
        _, rows = next(iter(self._scored.rows_of_parts()))
        return rows.shape[1]

    def of_items(self) -> np.ndarray:
        """float32 [V, D], on one rank."""
        assert not self._scored.shared
        parts = self._scored.rows_of_parts()
        return torch.cat([rows[: part.high - part.low].cpu() for part, rows in parts]).numpy()

    def of_users(self, batches: Iterable[EvalBatch]) -> Iterator[np.ndarray]:
        """float32 [U, D] of each batch's users."""
        return (vectors for (vectors,) in self._on_host(batches, lambda users: (users.hidden,)))

    def best(
        self, batches: Iterable[EvalBatch], added: Tensor, k: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Items and scores of a batch of every rank, in the users' order: [U, k]."""
        found = self._on_host(batches, lambda users: self._best(users, added, k))
        return ((items, scores) for items, scores in found)

    def _on_host(
        self,
        batches: Iterable[EvalBatch],
        computed: Callable[[EncodedUsers], tuple[Tensor, ...]],
    ) -> Iterator[list[np.ndarray]]:
        """What is computed of each batch; read when the device has the work of the next one."""
        before: _HostCopy | None = None
        for batch in batches:
            with torch.no_grad(), exact(self._model):
                users = encode(self._bert, batch.to(self._ranks.device, non_blocking=True))
                launched = _HostCopy(_largest(users.hidden), *computed(users))
            if before is not None:
                yield before.checked()
            before = launched
        if before is not None:
            yield before.checked()

    def _best(self, users: EncodedUsers, added: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Items and scores of a batch of every rank, in the users' order: [U, k]."""
        scored = self._scored
        # Rows in float64, or the numbers of chunks, of each item found.
        found_each = 4 * (k + SPARE) * max(CHUNK, users.hidden.shape[1])
        block = max(1, self._most_scores // max(scored.part_items, found_each))
        if block > _TILE:
            block -= block % _TILE
        found = [
            top_items(each, scored.rows_of_parts(), added, k, scored.shared)
            for each in users.blocks(block)
        ]
        items, scores = (torch.cat(part) for part in zip(*found, strict=True))
        if not scored.shared and self._ranks.world_size > 1:
            items, scores = all_gather_rows(items)[0], all_gather_rows(scores)[0]
        return items, scores

    def similar(self, item: int, added: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The items, without itself, of largest cosine to a dense id's, and cosines: [1, k]."""
        with torch.no_grad(), exact(self._model):
            vector = torch.zeros(1, self.width, device=self._ranks.device)
            for part, rows in self._scored.rows_of_parts():
                if part.low <= item < part.high:
                    vector = rows[item - part.low][None].clone()
            if self._scored.shared:
                dist.all_reduce(vector)
            seen = torch.tensor([item], device=self._ranks.device)
            row = torch.zeros_like(seen)
            users = EncodedUsers(
                F.normalize(vector, dim=-1), row, row[:, None], row == 0, row == 0, seen, row
            )
            parts = ((part, F.normalize(r, dim=-1)) for part, r in self._scored.rows_of_parts())
            return top_items(users, parts, added, k, self._scored.shared)

    @cached_property
    def _scored(self) -> CatalogScores:
        """The rows of this rank's slice of the catalog."""
        with torch.no_grad(), exact(self._model):
            device, part_items = self._ranks.device, CUDA_PART_ITEMS if self._on_cuda else None
            scored = CatalogScores(self._bert, device, None, whole_chunks, part_items)
            for _, rows in scored.rows_of_parts():
                _check_finite(_largest(rows))
        return scored


class _HostCopy:
    """Copies of tensors on the host, ready when the device has done what it had to do so far.

    Args:
        largest: of the vectors that they were computed from, by :func:`_largest`.
    """

    def __init__(self, largest: Tensor, *tensors: Tensor) -> None:
        # On CUDA into page-locked memory: the host does not wait.
        self._largest, *self._copies = (
            each.to("cpu", non_blocking=True) for each in (largest, *tensors)
        )
        self._ready = torch.cuda.current_stream().record_event() if largest.is_cuda else None

    def checked(self) -> list[np.ndarray]:
        """The tensors; UserError if the vectors are not finite."""
        if self._ready is not None:
            self._ready.synchronize()
        _check_finite(self._largest)
        return [each.numpy() for each in self._copies]


def _largest(vectors: Tensor) -> Tensor:
    """The largest absolute value, []; NaN if one is."""
    return torch.linalg.vector_norm(vectors, torch.inf)


def _check_finite(largest: Tensor) -> None:
    if not torch.isfinite(largest):
        raise UserError(
            "the model gives vectors that are not finite numbers: it diverged in training, take "
            "another checkpoint"
        )
