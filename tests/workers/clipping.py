"""Worker: a training step with and without --max_grad_norm; rank 0 writes its gradients to FILE.

torchrun --nproc_per_node 2 tests/workers/clipping.py FILE
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from model.distributed import Ranks, run_script, start
from model.tables.distribute import replicated
from tests.workers.sharded import WAYS, Built, config_of

WAYS_CLIPPED = ("row_wise", "table_wise", "ddp")
LIMITS = (0.0, 0.01, 100.0)


def gradients(ranks: Ranks, way: str, limit: float) -> dict[str, torch.Tensor]:
    """What AdamW stepped with in the first step: the gradient of each replicated parameter."""
    config = config_of(WAYS[way], ranks)
    config = replace(config, optimizer=replace(config.optimizer, max_grad_norm=limit))
    built = Built.of(config, ranks)
    optimizers = built.optimizers()
    optimizers.zero_grad()
    batch = next(built.loader().epoch(0))
    loss, _ = built.model(batch.to(ranks.device))
    loss.backward()
    optimizers.step()
    parameters = replicated(built.model).items()
    return {
        name.split("module.")[-1]: p.grad.clone() for name, p in parameters if p.grad is not None
    }


def answers(ranks: Ranks) -> dict[tuple[str, float], dict[str, torch.Tensor]]:
    return {(way, limit): gradients(ranks, way, limit) for way in WAYS_CLIPPED for limit in LIMITS}


def main() -> None:
    torch.set_num_threads(1)
    ranks = start()
    found = answers(ranks)
    if ranks.is_first:
        torch.save(found, Path(sys.argv[1]))


if __name__ == "__main__":
    run_script(main)
