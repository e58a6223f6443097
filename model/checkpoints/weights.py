"""Checks of stored weights: of the model's names and shapes before it is built, and numbers.

Weights of another model, or that are no numbers, would be evaluated like any others.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.distributed.types import ShardedTensor


class StoredTensor(NamedTuple):
    """What a file says about a tensor."""

    shape: list[int]
    kind: str  # its type, for messages
    is_floating: bool


def check_fit(
    stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor | ShardedTensor]
) -> None:
    """ValueError unless the stored tensors are floats of the names and shapes of a state dict."""
    if different := wanted.keys() ^ stored.keys():
        raise ValueError(f"size mismatch: {min(different)} is only in one of both")
    for name, tensor in wanted.items():
        found = stored[name]
        if found.shape != list(tensor.shape):
            raise ValueError(f"size mismatch of {name}: {found.shape}, not {list(tensor.shape)}")
        if not found.is_floating:
            raise ValueError(f"{name} is of type {found.kind}: weights are floating-point numbers")


def local_parts(tensor: Tensor | ShardedTensor) -> list[tuple[Tensor, list[int]]]:
    """The parts of a tensor that this rank holds, and where each begins in the whole tensor."""
    if isinstance(tensor, ShardedTensor):
        shards = tensor.local_shards()
        return [(shard.tensor, list(shard.metadata.shard_offsets)) for shard in shards]
    return [(tensor, [0] * tensor.dim())]


def check_finite(weights: Mapping[str, Tensor | ShardedTensor]) -> None:
    """ValueError if a weight that this rank holds is NaN or infinite."""
    for name, tensor in weights.items():
        for part, _ in local_parts(tensor):
            # Unlike isfinite().all(), without a second table in memory.
            if part.numel() and not all(math.isfinite(x) for x in torch.aminmax(part.detach())):
                raise ValueError(f"{name} has values that are not finite")
