"""Item vectors to start from: what occurs together in histories is near from the first step.

    pairs of items -> positive PMI [V, V], sparse -> truncated SVD -> vectors [V, D] of one length

An item's vector factorises how much more often others occur near it than by chance (Levy and
Goldberg 2014: positive pointwise mutual information, the counts of contexts to the power 3/4, the
singular values to 1/2). Vectors are five times as long as a normal draw: head and encoder read
directions alone, and Adam turns longer vectors more slowly. Dot products read lengths; for them a
vector is as long as the draw.

Shapes: V items, D width, P pairs.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.cooccurrence import Pairs

# Of the table, V x D: the SVD holds several matrices of this size, some 2 GiB with the pairs.
MOST_VALUES = 1 << 26
NORMAL_STD = 0.02
_LONGER = 5
_CONTEXT_POWER = 0.75
# Columns beyond the width, and passes: the error of the randomised SVD (arXiv 0909.4061).
_EXTRA_COLUMNS, _PASSES = 16, 4


def initial_rows(
    pairs: Pairs, num_items: int, width: int, seed: int, cosine: bool, device: torch.device
) -> Tensor:
    """Rows of the item table: float32 [V + 2, D] on the CPU, zeros for items that are near none.

    Args:
        seed: of the SVD's random vectors.
        cosine: the scores are cosines.
        device: where it is computed.
    """
    rows = torch.zeros(num_items + 2, width)
    if not len(pairs.low):
        return rows
    rank = min(width + _EXTRA_COLUMNS, num_items)
    start = torch.randn(num_items, rank, generator=torch.Generator().manual_seed(seed))
    on_cuda = device.type == "cuda"
    given = _positive_pmi(pairs, num_items), start
    matrix, start = (part.to(device, torch.float64 if on_cuda else torch.float32) for part in given)
    left, values = _truncated_svd(matrix, start)
    vectors = (left * values.sqrt())[:, :width].cpu()
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    # A vector this much shorter than others is of roundings: its item has no positive PMI.
    known = lengths > 1e-4 * lengths.max()
    length = NORMAL_STD * width**0.5 * (_LONGER if cosine else 1)
    vectors = torch.where(known, vectors / lengths * length, 0.0)
    # CUDA adds a sparse product in any order. Rounded from float64, runs start from the same bits.
    rows[1:-1, : vectors.shape[1]] = vectors.half() if on_cuda else vectors
    return rows


def _truncated_svd(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Left vectors [V, K] and singular values [K] of a sparse matrix, by subspace iteration.

    ``torch.svd_lowrank`` does the same in three times the time.

    Args:
        start: [V, K], random.
    """
    transposed = matrix.t().coalesce()
    basis = torch.linalg.qr(torch.sparse.mm(matrix, start))[0]
    for _ in range(_PASSES):
        basis = torch.linalg.qr(torch.sparse.mm(transposed, basis))[0]
        basis = torch.linalg.qr(torch.sparse.mm(matrix, basis))[0]
    small = torch.linalg.qr(torch.sparse.mm(transposed, basis), mode="r").R
    _, values, right = torch.linalg.svd(small)  # of [K, K], with the same values
    return basis @ right.T, values


def _positive_pmi(pairs: Pairs, num_items: int) -> Tensor:
    """Sparse float32 [V, V]: log of a pair's count by that of chance, where it is above 0."""
    row = np.concatenate([pairs.low, pairs.high]) - 1
    column = np.concatenate([pairs.high, pairs.low]) - 1
    weight = np.concatenate([pairs.weight, pairs.weight])
    of_item = np.bincount(row, weight, num_items)
    of_context = of_item**_CONTEXT_POWER
    pmi = np.log(weight * of_context.sum() / (of_item[row] * of_context[column]))
    above = pmi > 0
    place = torch.from_numpy(np.stack([row[above], column[above]]))
    values = torch.from_numpy(pmi[above].astype(np.float32))
    size = num_items, num_items
    # Torch warns unless the checks are switched on or off.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        return torch.sparse_coo_tensor(place, values, size).coalesce()
