"""Rows of items with those of their attributes (``pipeline/batches/attributes.py``) added.

    rows of items [N, D] + rows of all attributes [A, D], summed item by item -> [N, D]

Both the positions of histories and the scored items get the sums: items that share attributes are
close as inputs and as targets. The rows stay separate in the table and in its optimizer. In
training, a share of the positions has the attributes alone: they have to do without the own rows of
rare items, which fit noise.

Shapes: N items, A attributes, P most attributes of an item, V items of the catalog, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.segment_sum import SortedIndex, accumulate, add_rows, sort_index
from pipeline.batches.attributes import ItemAttributes


class AttributeSums(nn.Module):
    """Adds attributes' rows to items' rows; no parameters.

    Args:
        item_dropout: share of the positions without their item's own row, in training.
    """

    places: Tensor  # int32 [V + 2, P]
    own: Tensor | None  # bool [V + 2]; None: all True

    def __init__(self, attributes: ItemAttributes, item_dropout: float = 0.0) -> None:
        super().__init__()
        self._count, self._item_dropout = attributes.count, item_dropout
        # By the range of items, (low, N): what :meth:`of_range` needs for its backward passes.
        self._sorted: dict[tuple[int, int], SortedIndex | None] = {}
        # Not among the weights: they are made of the catalog. On the default device.
        self.register_buffer("places", torch.tensor(attributes.places), persistent=False)
        own = None if attributes.own.all() else torch.tensor(attributes.own)
        self.register_buffer("own", own, persistent=False)

    def of_positions(self, rows: Tensor, added: Tensor, items: Tensor) -> Tensor:
        """As :meth:`of_items`, with dropout of own rows in training."""
        if not (self.training and self._item_dropout):
            return self.of_items(rows, added, items)
        places = self.places.index_select(0, items)
        kept = torch.rand(len(items), device=rows.device) >= self._item_dropout
        has_none = places[:, 0] == self._count  # the mask token, too
        return _Sums.apply(rows, added, places, self._whose_own(items, kept | has_none), None)

    def of_items(self, rows: Tensor, added: Tensor, items: Tensor) -> Tensor:
        """Sums [N, D] of the rows of ``items``, int64 [N], and those ``added`` [A, D]."""
        places = self.places.index_select(0, items)
        return _Sums.apply(rows, added, places, self._whose_own(items), None)

    def of_range(self, rows: Tensor, added: Tensor, low: int) -> Tensor:
        """As :meth:`of_items`, of the items ``low`` ... ``low + N - 1``; training has one range."""
        items, key = slice(low, low + len(rows)), (low, len(rows))
        places, own = self.places[items], None if self.own is None else self.own[items]
        if added.requires_grad and key not in self._sorted:
            self._sorted[key] = _sorted_rows(places, len(added))
        return _Sums.apply(rows, added, places, own, self._sorted.get(key))

    def _whose_own(self, items: Tensor, kept: Tensor | None = None) -> Tensor | None:
        """Of which items the own rows count: bool [N]; None: of all.

        Args:
            kept: bool [N], the positions whose own rows dropout leaves; None: all.
        """
        if self.own is None:
            return kept
        own = self.own.index_select(0, items)
        return own if kept is None else own & kept


class _Sums(torch.autograd.Function):
    """The sums; their backward pass adds in a fixed order: the same bits in every run."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        added: Tensor,
        places: Tensor,
        own: Tensor | None,
        index: SortedIndex | None,
    ) -> Tensor:
        """float [N, D].

        Args:
            rows: [N, D].
            added: [A, D].
            places: int32 [N, P], numbers of attributes, A for none.
            own: bool [N], whose rows count; None: all.
            index: of ``places``, for the backward pass; None: made there.
        """
        ctx.save_for_backward(places, own)
        ctx.count, ctx.index = len(added), index
        with_none = torch.cat([added, added.new_zeros(1, added.shape[1])])
        sums = F.embedding_bag(places, with_none, mode="sum")
        return sums.add_(rows if own is None else torch.where(own[:, None], rows, 0.0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        places, own = ctx.saved_tensors
        of_added = gradient.new_zeros(ctx.count + 1, gradient.shape[1])  # the last: of none
        index = ctx.index or _sorted_rows(places, ctx.count)
        if index is None:
            for column in places.long().unbind(1):
                accumulate(of_added, column, gradient)
        else:
            add_rows(of_added[:-1], index, gradient.contiguous())
        of_rows = gradient if own is None else torch.where(own[:, None], gradient, 0.0)
        return of_rows, of_added[:-1], None, None, None


def _sorted_rows(places: Tensor, count: int) -> SortedIndex | None:
    """Which of the N rows have each of ``count`` attributes; None where there are no kernels."""
    index = sort_index(places.flatten().long(), count)
    if index.order is None:
        return None
    # Instead of P copies of each row.
    return SortedIndex(index.index, count, index.keys, index.order // places.shape[1])
