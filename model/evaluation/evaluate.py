"""Evaluation of held-out items, exact on any number of ranks.

Both protocols are computed:
    sampled  the target against 100 items the user never rated, drawn by popularity (the paper's)
    full     the target against the whole catalog without the items the user rated before

If seen items are kept (``EvalLoader``), both protocols rank them like all other items. Several
targets of a user are ranked like other users, and settled to ranks in one list at the end.

Each rank scores the users of all ranks against its own slice of the catalog, part by part
(``catalog_scores.py``), in two passes: the first finds the scores of targets and negatives, the
second counts the items that score at least as high as the target:

    hidden [U, D] x slice [C, D] -> scores [U, C] -> items ahead, summed over slices -> ranks [U]

Shapes: U users of a block, of all ranks, each as often as it has targets; C items of a part of this
rank's slice; D width; N negatives; S seen items of all U users; V items.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.evaluation.catalog_scores import CatalogScores, Scored, popularity_penalty
from model.evaluation.listed import ListedItems
from model.evaluation.metrics import (
    CUTOFFS,
    metric_names,
    metric_sums,
    named_means,
    names_of_several,
    one_list,
    sums_of_several,
)
from model.evaluation.users import EncodedUsers, encode
from model.network.head import CatalogSlice
from model.tables.distribute import unwrap
from pipeline.batches.eval_batch import EvalBatch

# Bounds the users x items that are scored at once: 256 MiB of float32.
MAX_SCORES = 2**26

Result = dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """What this rank found of the T targets of its own users, in the order of its batches."""

    # int64 [2 or 4, T]: the target's rank in both protocols, sampled first, then those by
    # popularity; 1 = best.
    ranks: Tensor
    scores: Tensor  # float32 [T], of the targets
    users: Tensor | None  # int64 [T], whose targets; None: each of another user
    fewer: Tensor  # float64 [], number of users with fewer negatives than demanded
    listed: ListedItems | None  # what the users' best items are


def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    popularity: Tensor,
    discount: float = 0.0,
    earlier: Result | None = None,
    negatives: int = 0,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Result:
    """Metrics of ``model``, and of ranking by popularity, over all users of all ranks.

    Args:
        earlier: an earlier result for the same users, whose popularity metrics are reused.
        cutoffs: of the metrics, ascending.
        model, batches, popularity, discount, negatives: as of :func:`rank_users`.

    Returns:
        As :func:`summed`.
    """
    ranked = rank_users(
        model, batches, popularity, discount, negatives, by_popularity=earlier is None
    )
    result = summed(ranked, cutoffs)
    return result if earlier is None else result | {"popularity": earlier["popularity"]}


@torch.no_grad()
def rank_users(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    popularity: Tensor,
    discount: float = 0.0,
    negatives: int = 0,
    by_popularity: bool = True,
    list_lengths: Sequence[int] = (),
) -> Ranking:
    """Rank the targets of this rank's users.

    Args:
        model: a BERT4Rec, possibly sharded; its train pipeline must be detached.
        batches: this rank's users; every rank must have the same number of batches.
        popularity: int64 [V + 2] training count of each item.
        discount: subtract this times log(1 + count) from every item's logit.
            From one of count 0, whose logit was never trained, as much as from the most popular.
        negatives: of each user, as demanded: users with fewer are counted.
        by_popularity: rank by ``popularity``, too.
        list_lengths: ascending; find each user's best items, too.
    """
    with exact(model):
        bert = unwrap(model)
        device = next(bert.encoder.parameters()).device
        counts = popularity.to(device, torch.float32)
        lowered = None
        if discount:
            lowered = popularity_penalty(counts) * (discount / bert.head.scale)
        catalog = CatalogScores(bert, device, lowered)
        listed = None
        if list_lengths:
            listed = ListedItems(len(popularity) - 2, list_lengths, lowered, device)
        found, several = _RankedBlocks(device), False
        owners: list[Tensor] = []
        for batch in batches:
            owners.append(batch.users[batch.users >= 0])
            several |= batch.encoded_row is not None
            users = encode(bert, batch.to(device, non_blocking=True))
            for block in users.blocks(max(1, MAX_SCORES // catalog.part_items)):
                ranked = _block_ranks(block, catalog, counts if by_popularity else None)
                found.add(block, *ranked, negatives)
                if listed is not None:
                    listed.add(block, catalog)
        return found.ranking(torch.cat(owners) if several else None, listed)


class _RankedBlocks:
    """Ranks of the targets of all blocks so far, on the device: the host reads them at the end."""

    def __init__(self, device: torch.device) -> None:
        self._ranks: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._own: list[Tensor] = []
        self._fewer = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, block: EncodedUsers, ranks: Tensor, scores: Tensor, negatives: int) -> None:
        """Add a block with its ranks and scores, as of :func:`_block_ranks`.

        Args:
            negatives: of each user, as demanded.
        """
        self._ranks.append(ranks)
        self._scores.append(scores)
        self._own.append(block.own)
        self._fewer += (((block.negatives > 0).sum(dim=1) < negatives) & block.first).sum()

    def ranking(self, owners: Tensor | None, listed: ListedItems | None) -> Ranking:
        """The ranking of this rank's own targets, those of a user settled to ranks in one list.

        Args:
            owners: int64 [T], whose targets they are, on the host; None: each of another user.
        """
        is_own = torch.cat(self._own)
        ranks = torch.cat(self._ranks, dim=1)[:, is_own]
        if owners is not None:
            settled = one_list(ranks.cpu().numpy(), owners.numpy())
            ranks = torch.from_numpy(settled).to(ranks.device)
        return Ranking(ranks, torch.cat(self._scores)[is_own], owners, self._fewer, listed)


def _block_ranks(
    users: EncodedUsers, catalog: CatalogScores, counts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ranks of a block's targets, int64 [2 or 4, U] as in `Ranking`, and their scores [U].

    Args:
        counts: float32 [V + 2], by which popularity ranks; None: it does not.
    """
    *ranks, scores = target_ranks(users, catalog.scored(users.hidden), catalog.shared)
    if counts is not None:
        counted = catalog.counted(counts, len(users.hidden))
        ranks += target_ranks(users, counted, catalog.shared)[:2]
    return torch.stack(ranks), scores


def summed(ranking: Ranking, cutoffs: Sequence[int] = CUTOFFS) -> Result:
    """Metrics over the users of all ranks, the same on every rank.

    Returns:
        ``{"users": n, "sampled": {"HR@10": ...}, "full": ..., "popularity": ...}``;
        "fewer_negatives": number of users, if there are any; "targets": their number, if a user
        may have several.
    """
    fewer, owners = ranking.fewer.clone(), ranking.users  # it is added up in place
    if owners is None:
        sums = torch.stack([metric_sums(each, cutoffs) for each in ranking.ranks])
    else:
        sums = torch.stack([sums_of_several(each, owners, cutoffs) for each in ranking.ranks])
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(fewer)
    names, targets = metric_names(cutoffs), None
    if owners is not None:
        names, targets, sums = names_of_several(cutoffs), int(sums[0, -1]), sums[:, :-1]
    sampled, full, *others = (named_means(each, names) for each in sums)
    result: Result = {"users": int(sums[0, -1]), "sampled": sampled, "full": full}
    if targets is not None:
        result["targets"] = targets
    if others:
        result["popularity"] = dict(zip(("sampled", "full"), others, strict=True))
    if fewer:
        result["fewer_negatives"] = int(fewer)
    return result


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and float32 products are not rounded to TF32."""
    was_training, precision = model.training, torch.get_float32_matmul_precision()
    if was_training:  # else a walk through its modules would change nothing
        model.eval()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        if was_training:
            model.train()


def target_ranks(
    users: EncodedUsers, scored: Scored, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The target's rank among its negatives and among all unseen items, int64 [U] each, 1 = best.

    And its score, float32 [U].

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
    return 1 + ahead_sampled.sum(dim=1), ahead, target[:, 0]


def _columns(part: CatalogSlice, items: Tensor) -> tuple[Tensor, Tensor]:
    """Each item's column in a non-empty part, and whether the part contains the item."""
    column = items - part.low
    inside = (column >= 0) & (column < part.high - part.low)
    return column.clamp(0, part.high - part.low - 1), inside
