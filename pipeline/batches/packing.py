"""A step's tensors in one allocation, so that one copy moves them all to the device.

Parts of 8-byte words are concatenated; the two rows of ``train_batch.py``::

    words     7 11 9 4 11 | 3 2     | 3 2     | 0 3 5   | 1 4
    sizes     values 5      targets 2 lengths 2 offsets 3 masked 2

For small batches, launching a copy of each part would take longer than the copies. A bool is stored
as a word of 0 or 1, floats in pairs, so that each part is a view of the words.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise, repeat

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Packed:
    """The parts of one step: names and sizes (in words), in the order of ``words``."""

    words: Tensor
    names: tuple[str, ...]
    sizes: list[int]

    def parts(self) -> dict[str, Tensor]:
        """Views of the words, int64, by name."""
        return dict(zip(self.names, torch.split_with_sizes(self.words, self.sizes), strict=True))


def pack(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], pin_memory: bool = False
) -> Iterator[Packed]:
    """Pack the same parts of S steps, all into one allocation.

    Args:
        parts: for each part, the integers or bools of all steps (floats: from :func:`float_pairs`)
            and int64 [S + 1], where each step begins.
        pin_memory: use page-locked memory.
    """
    sizes = np.stack([np.diff(splits) for _, splits in parts.values()], axis=1)
    pieces = [
        [array[first:after] for first, after in pairwise(splits.tolist())]
        for array, splits in parts.values()
    ]
    words = torch.empty(int(sizes.sum()), dtype=torch.int64, pin_memory=pin_memory)
    np.concatenate([*chain.from_iterable(zip(*pieces, strict=True))], out=words.numpy())
    steps = words.split(sizes.sum(axis=1).tolist())
    return map(Packed, steps, repeat(tuple(parts)), sizes.tolist())


def float_pairs(rows: np.ndarray) -> np.ndarray:
    """Float32 [S, K] as words [S, K / 2 rounded up], for :func:`pack`."""
    padded = np.zeros((len(rows), rows.shape[1] + rows.shape[1] % 2), dtype=np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.view(np.int64)


def as_floats(words: Tensor, count: int) -> Tensor:
    """The ``count`` float32 that :func:`float_pairs` stored."""
    return words.view(torch.float32)[:count]


def as_bools(words: Tensor) -> Tensor:
    """The bools that were packed: the lowest byte of each word."""
    return words.view(torch.bool)[::8]
