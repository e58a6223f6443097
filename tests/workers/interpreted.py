"""Worker: the kernels that sum equal ids, in Triton's interpreter, against float64.

TRITON_INTERPRET=1 python -m tests.workers.interpreted
"""

from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter

from model.kernels import segment_sum
from model.kernels.segment_sum import SortedIndex

_patch = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes bounds of loops of arrays [1], which NumPy no longer converts."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def check(rows: int, index: Tensor, width: int) -> None:
    """Sums that are stored and added, and a step of Adam; entries of ``rows`` or more are NaN."""
    keys, order = index.int().sort(stable=True)
    sorted_ = SortedIndex(index, rows, keys, order)
    values = torch.randn(len(index), width)
    values[index >= rows] = torch.nan
    parts = values.split([len(index) // 3, len(index) - len(index) // 3])
    inside = index < rows
    sums = torch.zeros(rows, width, dtype=torch.float64)
    sums.index_add_(0, index[inside], values[inside].double())
    touched = torch.zeros(rows, 1, dtype=torch.bool).index_fill_(0, index[inside], True)

    stored = torch.full((rows, width), 7.0)
    segment_sum._sum_runs(stored, stored[:0], sorted_, parts, "store")
    torch.testing.assert_close(stored.double(), sums.where(touched, 7.0), rtol=1e-5, atol=1e-5)

    first, last = torch.ones(rows - 1, width), torch.ones(1, width)
    segment_sum._sum_runs(first, last, sorted_, (values,), "add")
    found = torch.cat([first, last]).double()
    torch.testing.assert_close(found, sums + 1, rtol=1e-5, atol=1e-5)

    table, means, squares = (torch.full((rows, width), start) for start in (1.0, 0.1, 0.2))
    adam = means, squares, torch.tensor([0.01, 1.5]), 0.9, 0.98, 1e-8
    segment_sum._sum_runs(table, table[:0], sorted_, parts, "adam", adam, 0.5)
    mean, square = 0.09 + 0.05 * sums, 0.196 + 0.005 * sums**2
    moved = 1 - 0.01 * mean / (square.sqrt() * 1.5 + 1e-8)
    for part, after, before in ((means, mean, 0.1), (squares, square, 0.2), (table, moved, 1.0)):
        expected = after.where(touched, before)
        torch.testing.assert_close(part.double(), expected, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    interpreter._patch_lang_tensor = _with_index
    torch.manual_seed(3)
    # Tiles are chunks of 32: runs that end with one, within one, and after others.
    check(5, torch.tensor([0] * 64 + [1] * 3 + [2] * 2 + [3] * 140 + [4]).roll(50), 4)
    check(90, torch.randint(0, 100, (70,)), 4)
    check(2, torch.tensor([1]), 4)
    # Tiles of 4 or 8: a run ends in a chunk's first tile, the next one goes on in its second.
    check(6, torch.tensor([0] * 62 + [1] * 5 + [2] * 20 + [4, 4, 6])[torch.randperm(90)], 70)
    print("checked")
