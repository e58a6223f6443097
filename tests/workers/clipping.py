"""Worker: a training step with and without --max_grad_norm; rank 0 writes its gradients to FILE.

torchrun --nproc_per_node 2 tests/workers/clipping.py FILE
"""

import sys
from pathlib import Path

import numpy as np
import torch

from model.distributed import Ranks, start
from model.ending import run_script
from model.network.config import EncoderConfig
from model.run.build import build_model, train_loader
from model.run.execution import plan_execution
from model.settings.config import RunConfig
from model.step.config import OptimizerConfig
from model.step.optimizers import Optimizers
from model.step.pipelines import train_pipeline
from model.tables.config import ShardingConfig
from model.tables.distribute import replicated
from pipeline.preparation.store import SequenceStore
from pipeline.training.config import LoaderConfig, WindowConfig

NUM_ITEMS, GLOBAL_BATCH = 21, 8
WAYS = {
    "row_wise": ShardingConfig("dmp", "row_wise"),
    "table_wise": ShardingConfig("dmp", "table_wise"),
    "ddp": ShardingConfig("ddp"),
}
LIMITS = (0.0, 0.01, 100.0)  # none, less than the norm, more than it

Gradients = dict[tuple[str, float], dict[str, torch.Tensor]]


def step_gradients(ranks: Ranks, way: str, limit: float) -> dict[str, torch.Tensor]:
    """The gradient that AdamW got for each replicated parameter in the first step."""
    config = RunConfig(
        windows=WindowConfig(max_len=6),
        loader=LoaderConfig(train_batch_size=GLOBAL_BATCH // ranks.world_size, seed=4),
        encoder=EncoderConfig(16, 2, 1, dropout=0),
        sharding=WAYS[way],
        optimizer=OptimizerConfig(max_grad_norm=limit),
    )
    items = np.random.default_rng(2).integers(1, NUM_ITEMS + 1, size=8 * GLOBAL_BATCH)
    store = SequenceStore.from_arrays(items, np.arange(GLOBAL_BATCH + 1) * 8, NUM_ITEMS)
    plan = plan_execution(config, NUM_ITEMS, ranks)
    model = build_model(config, NUM_ITEMS, ranks, plan)
    optimizers = Optimizers(model, plan, config.optimizer, ranks)
    batches = train_loader(config, store, ranks, plan).epoch(0)
    train_pipeline(model, optimizers, plan, ranks.device).progress(batches)
    parameters = replicated(model).items()
    return {name.split("module.")[-1]: parameter.grad.clone() for name, parameter in parameters}


def all_gradients(ranks: Ranks) -> Gradients:
    return {(way, limit): step_gradients(ranks, way, limit) for way in WAYS for limit in LIMITS}


def main() -> None:
    torch.set_num_threads(1)
    ranks = start()
    found = all_gradients(ranks)
    if ranks.is_first:
        torch.save(found, Path(sys.argv[1]))


if __name__ == "__main__":
    run_script(main)
