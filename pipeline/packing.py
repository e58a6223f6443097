"""A step's tensors in one piece of memory, so that one copy takes them all to the device.

Parts of 8-byte words lie one behind the other; the two rows of ``pipeline/batch.py``::

    words     7 11 9 4 11 | 3 2     | 3 2     | 0 3 5   | 1 4
    sizes     values 5      targets 2 lengths 2 offsets 3 masked 2

Copying each part by itself would cost the host a launch a part, which for small batches is more
than the copies take. What is not made of 8-byte integers is stored so that it can be seen where it
lies: a bool is a word of 0 or 1, floats come in pairs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False)
class Packed:
    """The parts of one step.

    Attributes:
        words: int64 [the sum of sizes].
        sizes: words of each part, in the order in which they lie there.
    """

    words: Tensor
    sizes: dict[str, int]

    def parts(self) -> dict[str, Tensor]:
        """Each part, int64, where it lies."""
        return dict(zip(self.sizes, self.words.split([*self.sizes.values()]), strict=True))


def pack(parts: dict[str, list[np.ndarray]], pin_memory: bool = False) -> list[Packed]:
    """Pack the same parts of S steps, all into one allocation.

    Args:
        parts: of each part its pieces, one a step: 1-dimensional arrays of integers or bools, or
            what :func:`float_pairs` made.
        pin_memory: into page-locked memory.
    """
    pieces = [piece for step in zip(*parts.values(), strict=True) for piece in step]
    sizes = [len(piece) for piece in pieces]
    words = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=pin_memory)
    np.concatenate(pieces, out=words.numpy())
    count = len(parts)
    by_step = [sizes[first : first + count] for first in range(0, len(sizes), count)]
    steps = words.split([sum(each) for each in by_step])
    return [
        Packed(step, dict(zip(parts, each, strict=True)))
        for step, each in zip(steps, by_step, strict=True)
    ]


def float_pairs(rows: np.ndarray) -> Iterable[np.ndarray]:
    """Each float32 row of [S, K] as words, for :func:`pack`."""
    padded = np.zeros((len(rows), rows.shape[1] + rows.shape[1] % 2), dtype=np.float32)
    padded[:, : rows.shape[1]] = rows
    return padded.view(np.int64)


def as_floats(words: Tensor, count: int) -> Tensor:
    """The ``count`` float32 that :func:`float_pairs` put there."""
    return words.view(torch.float32)[:count]


def as_bools(words: Tensor) -> Tensor:
    """The bools that were packed: the lowest byte of each word."""
    return words.view(torch.bool)[::8]
