"""Rows of items with those of their attributes (``pipeline/batches/attributes.py``) added.

    rows of items [N, D] + rows of all attributes [A, D], summed item by item -> [N, D]

Both the positions of histories and the scored items get the sums: items that share attributes are
close as inputs and as targets. The rows stay separate in the table and in its optimizer.

Shapes: N items, A attributes, P most attributes of an item, D width.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels.segment_sum import SortedIndex, add_rows, sort_index


class AttributeSums(nn.Module):
    """Adds attributes' rows to items' rows; no parameters.

    Args:
        places: int32 [V + 2, P], as in ``ItemAttributes``.
    """

    places: Tensor

    def __init__(self, places: np.ndarray) -> None:
        super().__init__()
        # Not part of the weights: made of the catalog.
        self.register_buffer("places", torch.from_numpy(places), persistent=False)

    def of_items(self, rows: Tensor, attributes: Tensor, items: Tensor) -> Tensor:
        """Rows [N, D] of ``items``, int64 [N]."""
        return _Sums.apply(rows, attributes, self.places.index_select(0, items))

    def of_range(self, rows: Tensor, attributes: Tensor, low: int) -> Tensor:
        """Rows [N, D] of the items ``low`` ... ``low + N - 1``."""
        return _Sums.apply(rows, attributes, self.places[low : low + len(rows)])


class _Sums(torch.autograd.Function):
    """Its backward pass adds in a fixed order; the gradient of ``rows`` is the sums' own tensor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, attributes: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(attributes)
        known = torch.cat([attributes, attributes.new_zeros(1, attributes.shape[1])])
        sums = rows.clone()
        for column in places.unbind(1):
            sums += known.index_select(0, column)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (places,) = ctx.saved_tensors
        index, each = sort_index(places.flatten().long(), ctx.count), places.shape[1]
        of_attributes = gradient.new_zeros(ctx.count, gradient.shape[1])
        if index.order is None:
            values = gradient.repeat_interleave(each, dim=0)
        else:  # the kernels read row order[i] / P instead of P copies of each row
            values = gradient.contiguous()
            index = SortedIndex(index.index, index.count, index.keys, index.order // each)
        add_rows(of_attributes, index, values)
        return gradient, of_attributes, None
