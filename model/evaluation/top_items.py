"""The exact k best items of each user, in parts of the catalog and over ranks.

    part [C, D] of this rank's slice -> scores [U, C] -> maxima of chunks -> best chunks -> items
    best of all parts -> best of all ranks

A score and its item are one whole number, so that the k largest are the same in any order of
computation; of equal scores, the item that is first in the catalog is first. The k largest items of
a part are in its k chunks with the largest maxima: only these are searched further. Scores of the
found items, and a few more, are computed again in float64 and rounded to float32: they do not
depend on the sizes of the matrix products, which differ with the number of ranks.

Shapes: U users of a block, C items of a part with the padding to whole chunks, D width, V items.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.evaluation.chunk_maxima import chunk_maxima
from model.evaluation.users import EncodedUsers
from model.losses.sharded_softmax import all_gather_rows
from model.network.head import CatalogSlice

CHUNK = 64
# Items beyond k whose scores are computed again: rounding may have put them behind.
SPARE = 8
_LOW_BITS = (1 << 32) - 1


def keys_of(scores: Tensor, items: Tensor) -> Tensor:
    """int64 that increase with the float32 ``scores`` and, for equal ones, decrease with ``items``.

    Args:
        items: int64, 0 ... 2**32 - 1.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | (_LOW_BITS - items)


def items_of(keys: Tensor) -> Tensor:
    """The items of :func:`keys_of`."""
    return _LOW_BITS - (keys & _LOW_BITS)


def scores_of(keys: Tensor) -> Tensor:
    """The scores of :func:`keys_of`."""
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def whole_chunks(rows: Tensor) -> Tensor:
    """Rows of a part [C, D], padded with zeros to whole chunks, by at least one row."""
    return F.pad(rows, (0, 0, 0, CHUNK - len(rows) % CHUNK))


def top_items(
    users: EncodedUsers,
    parts: Iterable[tuple[CatalogSlice, Tensor]],
    added: Tensor,
    k: int,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """The best items of each user, best first: int64 [U, k], 0 = none, and float32 scores [U, k].

    Args:
        users: their ``seen`` items are left out.
        parts: of this rank's slice of the catalog, with their scoring rows in whole chunks.
        added: float32 [V + 2], added to the items' scores; -inf leaves an item out.
        shared: whether other ranks have the rest of the catalog.
    """
    found: list[Tensor] = []
    for part, rows in parts:
        if part.high > part.low:
            found = [_merged([*found, _best_of_part(users, part, rows, added, k)], k)]
    # -inf and the last item: behind every item.
    nothing = keys_of(torch.tensor(-torch.inf), torch.tensor(_LOW_BITS)).item()
    missing = k - sum(each.shape[1] for each in found)
    best = torch.cat([*found, users.seen.new_full((len(users.hidden), missing), nothing)], dim=1)
    if shared:
        gathered, sizes = all_gather_rows(best)
        best = _merged([*gathered.view(len(sizes), len(best), k)], k)
    scores = scores_of(best)
    return items_of(best).masked_fill(scores == -torch.inf, 0), scores


def _merged(found: list[Tensor], k: int) -> Tensor:
    """The largest keys of all parts or ranks, at most k: int64 [U, <= k], descending."""
    if len(found) == 1:
        return found[0]
    keys = torch.cat(found, dim=1)
    return keys.topk(min(k, keys.shape[1])).values


def _best_of_part(
    users: EncodedUsers, part: CatalogSlice, rows: Tensor, added: Tensor, k: int
) -> Tensor:
    """Keys of a part's best items, at most k: int64 [U, <= k], descending."""
    items = part.high - part.low
    added = F.pad(added[part.low : part.high], (0, len(rows) - items), value=-torch.inf)
    scores = torch.addmm(added, users.hidden, rows.T)
    column = users.seen - part.low
    column = torch.where((column >= 0) & (column < items), column, items)  # or the padding
    scores[users.seen_row, column] = added[items]  # -inf; for a number the host would wait
    keys = _largest(scores, min(k + SPARE, scores.shape[1]))
    column = items_of(keys)
    again = (users.hidden.double()[:, None] * rows[column].double()).sum(dim=2) + added[column]
    again = torch.where(scores_of(keys) == -torch.inf, -torch.inf, again).float()
    return keys_of(again, column + part.low).topk(min(k, keys.shape[1])).values


def _largest(scores: Tensor, k: int) -> Tensor:
    """Keys of the k largest of each row and their columns: int64 [U, k], descending.

    Args:
        scores: float32 [U, C], C a multiple of CHUNK.
    """
    columns = torch.arange(scores.shape[1], device=scores.device)
    chunks = scores.view(len(scores), -1, CHUNK)
    if chunks.shape[1] <= k:
        return keys_of(scores, columns).topk(k).values
    maxima = keys_of(chunk_maxima(scores, CHUNK), columns[: chunks.shape[1]])
    chosen = items_of(maxima.topk(k).values)[:, :, None]
    picked = chunks.gather(1, chosen.expand(-1, -1, CHUNK)).flatten(1)
    columns = (chosen * CHUNK + columns[:CHUNK]).flatten(1)
    return keys_of(picked, columns).topk(k).values
