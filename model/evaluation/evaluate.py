"""Leave-one-out evaluation, exact on any number of ranks.

Two protocols, always both:
    sampled  the target against 100 items the user never rated, drawn by popularity (the paper's)
    full     the target against the whole catalog without the items the user has seen before

Sharded tables stay sharded. Each rank scores the users of all ranks against its own slice of the
catalog; what crosses the network are hidden vectors, the scores of targets and negatives, and
counts of items that score at least as high as the target:

    hidden [U, D] x slice [C, D] -> scores [U, C] -> items ahead, summed over slices -> ranks [U]

A large slice is looked up and scored in parts (``catalog_scores.py``), twice: for the scores
of targets and negatives, and to count.

Shapes: U users of all ranks in one block, C items of this rank's slice, or of a part of it, D
width, N negatives.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.bert4rec import BERT4Rec
from model.evaluation.catalog_scores import CatalogScores, Scored
from model.evaluation.metrics import format_table, means, metric_sums
from model.losses.sharded_softmax import all_gather_rows
from model.network.head import CatalogSlice
from model.step.optimizers import unwrap
from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import ITEM
from pipeline.errors import UserError
from pipeline.files import write_json

# Bounds the block of users x items that is scored at once: 256 MiB of float32.
MAX_SCORES = 2**26

Result = dict[str, Any]


@dataclass
class _Questions:
    """What is asked of one batch: [U, ...] over all ranks where the catalog is shared."""

    hidden: torch.Tensor  # float32 [U, D]
    targets: torch.Tensor  # int64 [U]
    negatives: torch.Tensor  # int64 [U, N], 0 = none
    seen: torch.Tensor  # int64 [S], 0 = none
    seen_row: torch.Tensor  # int64 [S], the user of each seen item
    own: torch.Tensor  # bool [U], this rank's real users

    def block(self, start: int, stop: int) -> "_Questions":
        """Users ``start`` ... ``stop - 1``."""
        if stop - start == self.targets.numel():
            return self
        inside = (self.seen_row >= start) & (self.seen_row < stop)
        return _Questions(
            self.hidden[start:stop],
            self.targets[start:stop],
            self.negatives[start:stop],
            self.seen[inside],
            self.seen_row[inside] - start,
            self.own[start:stop],
        )


def evaluate(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    popularity: torch.Tensor | None = None,
    max_scores: int = MAX_SCORES,
    discount: float = 0.0,
    earlier: Result | None = None,
) -> Result:
    """Metrics of ``model``, and of ranking by popularity, over all users of all ranks.

    Args:
        model: a BERT4Rec, possibly sharded; its train pipeline must be detached.
        batches: this rank's users; every rank must have the same number of batches.
        popularity: int64 [V + 2] training count of each item; None leaves its rows out.
        max_scores: bound of users x items held at once.
        discount: logits are lowered by this times the logarithm of the item's count, which needs
            ``popularity``.
        earlier: what the same users' evaluation gave before: popularity's rows are still the same.

    Returns:
        ``{"users": n, "sampled": {"HR@10": ...}, "full": {...}, "popularity": {...}}``, equal on
        every rank.
    """
    assert popularity is not None or not discount
    bert = unwrap(model)
    was_training = model.training
    model.eval()
    device = next(bert.encoder.parameters()).device
    # Of each block of users. What they add up to is asked at the end: a device that has to answer
    # in between keeps the host from going on.
    ranks: list[torch.Tensor] = []
    own: list[torch.Tensor] = []
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            counts = None if popularity is None else popularity.to(device, torch.float32)
            lowered = None
            if discount:
                lowered = (counts + 1).log() * (discount / bert.head.scale)
            catalog = CatalogScores(bert, device, lowered)
            for batch in batches:
                asked = _ask(bert, batch.to(device, non_blocking=True))
                for block in _blocks(asked, max(1, max_scores // catalog.part_items)):
                    given = [catalog.scored(block.hidden)]
                    if counts is not None and earlier is None:
                        given.append(catalog.counted(counts, len(block.hidden)))
                    each = [target_ranks(block, scored, catalog.shared) for scored in given]
                    ranks.append(torch.stack([*chain(*each)]))
                    own.append(block.own)
            rankings = torch.cat(ranks, dim=1)[:, torch.cat(own)]  # sampled, full, of each scored
            sums = torch.stack([metric_sums(ranking) for ranking in rankings])
    finally:
        torch.set_float32_matmul_precision(precision)
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(sums)
    result: Result = {"users": int(sums[0, -1])}
    result |= {"sampled": means(sums[0]), "full": means(sums[1])}
    if earlier is not None:
        result["popularity"] = earlier["popularity"]
    elif popularity is not None:
        result["popularity"] = {"sampled": means(sums[2]), "full": means(sums[3])}
    return result


def _ask(bert: BERT4Rec, batch: EvalBatch) -> _Questions:
    """Encode a batch's users and, where the catalog is shared, gather those of all ranks."""
    rows = bert.embeddings(batch.features)[ITEM]
    offsets = rows.offsets()[: batch.num_rows + 1]
    left_only = offsets.new_ones(batch.num_rows, dtype=torch.bool) if bert.left_only else None
    with torch.autocast("cuda", torch.bfloat16, enabled=bert.autocast):
        hidden = bert.encoder(rows.values(), offsets, batch.masked, batch.longest, left_only)
    hidden = bert.head.project(hidden)
    seen_row = torch.repeat_interleave(
        torch.arange(hidden.shape[0], device=hidden.device),
        batch.seen_offsets.diff(),
        output_size=batch.seen.numel(),
    )
    own = batch.users >= 0
    if not bert.head.catalog.shared:
        return _Questions(hidden, batch.targets, batch.negatives, batch.seen, seen_row, own)
    everyone, sizes = all_gather_rows(hidden)
    longest, rank = max(sizes), dist.get_rank()
    seen, seen_sizes = all_gather_rows(batch.seen)
    seen_row, _ = all_gather_rows(seen_row)
    first_row = torch.arange(len(sizes), device=seen.device) * longest
    own_everywhere = own.new_zeros(len(sizes) * longest)
    own_everywhere[rank * longest : rank * longest + sizes[rank]] = own
    return _Questions(
        everyone,
        all_gather_rows(batch.targets)[0],
        all_gather_rows(batch.negatives)[0],
        seen,
        seen_row + first_row.repeat_interleave(max(seen_sizes)),
        own_everywhere,
    )


def _blocks(asked: _Questions, step: int) -> Iterator[_Questions]:
    """Blocks of at most ``step`` users; as many on every rank."""
    users = asked.targets.numel()
    for start in range(0, users, step):
        yield asked.block(start, min(start + step, users))


def target_ranks(
    asked: _Questions, scored: Scored, shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target's rank among its negatives and among all unseen items.

    Written as "not lower" instead of "at least as high", so that NaN counts against the model.

    Args:
        scored: parts of this rank's slice with float32 scores [U, C].
        shared: other ranks have the rest of the catalog.

    Returns:
        int64 [U] and int64 [U], 1 = best.
    """
    picked = torch.cat([asked.targets[:, None], asked.negatives], dim=1)  # [U, 1 + N]
    picked_scores = torch.zeros(picked.shape, device=picked.device)
    for part, scores in scored:
        if scores.shape[1]:
            found, inside = _at(part, picked)
            picked_scores = torch.where(inside, scores.gather(1, found), picked_scores)
    if shared:
        dist.all_reduce(picked_scores)
    target = picked_scores[:, :1]
    ahead_sampled = ~(picked_scores[:, 1:] < target) & (asked.negatives > 0)

    ahead = torch.zeros_like(asked.targets)  # will count the target itself: ranks start at 1
    for part, scores in scored:
        if scores.shape[1]:
            ahead += (~(scores < target)).sum(dim=1)
            found, inside = _at(part, asked.seen)
            seen_ahead = ~(scores[asked.seen_row, found] < target[asked.seen_row, 0]) & inside
            ahead.index_add_(0, asked.seen_row, -seen_ahead.long())
    if shared:
        dist.all_reduce(ahead)
    return 1 + ahead_sampled.sum(dim=1), ahead


def _at(part: CatalogSlice, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The items' columns in a part that is not empty, and which of them are in it."""
    column = items - part.low
    inside = (column >= 0) & (column < part.high - part.low)
    return column.clamp(0, part.high - part.low - 1), inside


def report(split: str, result: Result, best_possible: dict[str, float] | None = None) -> str:
    """The metrics table of one split, both protocols, popularity beside the model."""
    rows: list[tuple[str, dict[str, float]]] = []
    labels = (
        ("sampled", "sampled (against unseen items by popularity)"),
        ("full", "full (all items, seen ones removed)"),
    )
    for protocol, label in labels:
        rows.append((label, result[protocol]))
        if "popularity" in result:
            rows.append((f"{protocol}, popularity alone", result["popularity"][protocol]))
    if best_possible:
        rows.append(("full, best possible on this data", best_possible))
    return f"{split}, {result['users']:,} users\n{format_table(rows)}"


def write_result(folder: Path, split: str, result: Result) -> Path:
    """Write ``eval_<split>.json`` into ``folder``, visible only when complete.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / f"eval_{split}.json"
    try:
        write_json(path, result)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path
