"""Leave-one-out evaluation, exact on any number of ranks.

Both protocols are computed:
    sampled  the target against 100 items the user never rated, drawn by popularity (the paper's)
    full     the target against the whole catalog without the items the user rated before

Each rank scores the users of all ranks against its own slice of the catalog, part by part
(``catalog_scores.py``), in two passes: the first finds the scores of targets and negatives, the
second counts the items that score at least as high as the target:

    hidden [U, D] x slice [C, D] -> scores [U, C] -> items ahead, summed over slices -> ranks [U]

Shapes: U users of a block, of all ranks; C items of a part of this rank's slice; D width; N
negatives; S seen items of all U users; V items.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.bert4rec import BERT4Rec
from model.evaluation.catalog_scores import CatalogScores, Scored
from model.evaluation.metrics import means, metric_sums
from model.losses.sharded_softmax import all_gather_rows
from model.network.head import CatalogSlice
from model.tables.distribute import unwrap
from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import ITEM

# Bounds the users x items that are scored at once: 256 MiB of float32.
MAX_SCORES = 2**26

Result = dict[str, Any]


@dataclass
class EncodedUsers:
    """Users of a batch (of all ranks if the catalog is sharded) and the items to rank."""

    hidden: Tensor  # float32 [U, D]
    targets: Tensor  # int64 [U]
    negatives: Tensor  # int64 [U, N], 0 = none
    own: Tensor  # bool [U], this rank's real users
    seen: Tensor  # int64 [S], 0 = none
    seen_row: Tensor  # int64 [S], the user of each seen item; any user for 0

    def blocks(self, size: int) -> Iterator["EncodedUsers"]:
        """Blocks of at most ``size`` users; the same number on every rank."""
        users = self.targets.numel()
        if 0 < users <= size:
            yield self
            return
        for start in range(0, users, size):
            block = slice(start, start + size)
            inside = (self.seen_row >= start) & (self.seen_row < start + size)
            each = self.hidden, self.targets, self.negatives, self.own
            hidden, targets, negatives, own = (part[block] for part in each)
            seen = self.seen[inside], self.seen_row[inside] - start
            yield EncodedUsers(hidden, targets, negatives, own, *seen)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    popularity: Tensor | None = None,
    max_scores: int = MAX_SCORES,
    discount: float = 0.0,
    earlier: Result | None = None,
    negatives: int = 0,
) -> Result:
    """Metrics of ``model``, and of ranking by popularity, over all users of all ranks.

    Args:
        model: a BERT4Rec, possibly sharded; its train pipeline must be detached.
        batches: this rank's users; every rank must have the same number of batches.
        popularity: int64 [V + 2] training count of each item; None leaves its metrics out.
        discount: subtract this times log(1 + count) from every item's logit; needs ``popularity``.
            From one of count 0, whose logit was never trained, as much as from the most popular.
        earlier: an earlier result for the same users, whose popularity metrics are reused.
        negatives: of each user, as demanded: users with fewer are counted.

    Returns:
        ``{"users": n, "sampled": {"HR@10": ...}, "full": ..., "popularity": ...}`` on every rank;
        "fewer_negatives": number of users, if there are any.
    """
    assert popularity is not None or not discount
    with exact(model):
        bert = unwrap(model)
        device = next(bert.encoder.parameters()).device
        counts = None if popularity is None else popularity.to(device, torch.float32)
        lowered = None
        if counts is not None and discount:
            penalty = (counts + 1).log()
            penalty = torch.where(counts > 0, penalty, penalty.max())
            lowered = penalty * (discount / bert.head.scale)
        catalog = CatalogScores(bert, device, lowered)
        # Reduced only at the end, so that the host does not wait for the device in between.
        ranks: list[Tensor] = []  # [2 or 4, users]: sampled, full, popularity's two
        own: list[Tensor] = []
        fewer = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            users = encode(bert, batch.to(device, non_blocking=True))
            for block in users.blocks(max(1, max_scores // catalog.part_items)):
                scorings = [catalog.scored(block.hidden)]
                if counts is not None and earlier is None:
                    scorings.append(catalog.counted(counts, len(block.hidden)))
                each = [target_ranks(block, scored, catalog.shared) for scored in scorings]
                ranks.append(torch.stack([*chain(*each)]))
                own.append(block.own)
                fewer += (((block.negatives > 0).sum(dim=1) < negatives) & block.own).sum()
        ranked = torch.cat(ranks, dim=1)[:, torch.cat(own)]
        sums = torch.stack([metric_sums(each) for each in ranked])
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(fewer)
    result: Result = {"users": int(sums[0, -1]), "sampled": means(sums[0]), "full": means(sums[1])}
    if earlier is not None:
        result["popularity"] = earlier["popularity"]
    elif popularity is not None:
        result["popularity"] = {"sampled": means(sums[2]), "full": means(sums[3])}
    if fewer:
        result["fewer_negatives"] = int(fewer)
    return result


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and float32 products are not rounded to TF32."""
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)


def encode(bert: BERT4Rec, batch: EvalBatch) -> EncodedUsers:
    """Encode a batch's users; if the catalog is sharded, gather the users of all ranks."""
    rows = bert.embeddings(batch)[ITEM]
    offsets = rows.offsets()[: batch.num_rows + 1]
    left_only = offsets.new_ones(batch.num_rows, dtype=torch.bool) if bert.left_only else None
    with torch.autocast("cuda", torch.bfloat16, enabled=bert.autocast):
        layout = offsets, batch.masked, left_only
        hidden = bert.encoder(rows.values(), *layout, longest=batch.longest)
    hidden = bert.head.project(hidden)
    counts = batch.seen_offsets.diff()
    seen_row = torch.repeat_interleave(counts, output_size=batch.seen.numel())
    targets, negatives, seen, own = batch.targets, batch.negatives, batch.seen, batch.users >= 0
    if bert.head.catalog.shared:
        hidden, sizes = all_gather_rows(hidden)
        targets, negatives, seen = (all_gather_rows(t)[0] for t in (targets, negatives, seen))
        first = dist.get_rank() * max(sizes)
        seen_row, _ = all_gather_rows(seen_row + first)
        own = F.pad(own, (first, len(hidden) - first - len(own)))
    return EncodedUsers(hidden, targets, negatives, own, seen, seen_row)


def target_ranks(users: EncodedUsers, scored: Scored, shared: bool) -> tuple[Tensor, Tensor]:
    """The target's rank among its negatives and among all unseen items, int64 [U] each, 1 = best.

    An item without a lower score than the target is ahead of it: NaN counts against the model.

    Args:
        shared: whether other ranks have the rest of the catalog.
    """
    picked = torch.cat([users.targets[:, None], users.negatives], dim=1)  # [U, 1 + N]
    picked_scores = torch.zeros(picked.shape, device=picked.device)
    for part, scores in scored():
        if scores.shape[1]:
            found, inside = _columns(part, picked)
            picked_scores = torch.where(inside, scores.gather(1, found), picked_scores)
    if shared:
        dist.all_reduce(picked_scores)
    target = picked_scores[:, :1]
    ahead_sampled = ~(picked_scores[:, 1:] < target) & (users.negatives > 0)

    ahead = torch.zeros_like(users.targets)  # counts the target itself: ranks start at 1
    for part, scores in scored():
        if scores.shape[1]:
            ahead += (~(scores < target)).sum(dim=1)
            found, inside = _columns(part, users.seen)
            seen_ahead = ~(scores[users.seen_row, found] < target[users.seen_row, 0]) & inside
            ahead.index_add_(0, users.seen_row, -seen_ahead.long())
    if shared:
        dist.all_reduce(ahead)
    return 1 + ahead_sampled.sum(dim=1), ahead


def _columns(part: CatalogSlice, items: Tensor) -> tuple[Tensor, Tensor]:
    """Each item's column in a non-empty part, and whether the part contains the item."""
    column = items - part.low
    inside = (column >= 0) & (column < part.high - part.low)
    return column.clamp(0, part.high - part.low - 1), inside
