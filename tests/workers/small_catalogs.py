"""Worker: catalogs of few items on several ranks, in every sharding, head and loss.

    torchrun --nproc_per_node 3 tests/workers/small_catalogs.py FOLDER EVERY

Rank 0 writes FOLDER/<world size>.json: losses of each step and metrics of every EVERYth case. All
batches are global ones of 12 windows: the answers do not depend on the number of ranks.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.distributed import Ranks, start
from model.ending import exit_rank
from model.network.config import LOSSES, EncoderConfig, HeadConfig
from model.run.build import build_model, evaluator, train_loader
from model.run.execution import plan_execution
from model.settings.config import OutputConfig, RunConfig
from model.step.config import OptimizerConfig
from model.step.pipelines import train_pipeline
from model.tables.config import SHARDINGS, ShardingConfig
from pipeline.preparation.store import SequenceStore
from pipeline.training.config import LoaderConfig, NegativesConfig, WindowConfig
from tests.workers.sharded import mean_losses, sgd

LR = 0.1
SHARDED = {kind: ShardingConfig("dmp", kind, "sgd", LR) for kind in (*SHARDINGS, "auto")}
WAYS = {**SHARDED, "ddp": ShardingConfig("ddp")}
CATALOGS = (1, 2, 3, 4, 5, 7)
CASES = list(product(CATALOGS, WAYS, LOSSES, ("tied", "linear")))


def histories(num_items: int) -> SequenceStore:
    """6 users of 5 items: one window each, one step an epoch; of three ranks one has no window."""
    items = np.arange(6 * 5) * 3 % num_items + 1
    return SequenceStore.from_arrays(items, np.arange(0, 31, 5), num_items)


def answer(ranks: Ranks, num_items: int, way: str, loss: str, head: str) -> dict[str, Any]:
    """Losses of two epochs, then the metrics of the test split."""
    store = histories(num_items)
    config = RunConfig(
        windows=WindowConfig(max_len=4),
        loader=LoaderConfig(train_batch_size=12 // ranks.world_size, seed=4),
        encoder=EncoderConfig(8, 2, 1, dropout=0),
        head=HeadConfig(head, logit_temperature=0.2, loss=loss),
        negatives=NegativesConfig(train_negatives=3),
        sharding=WAYS[way],
        optimizer=OptimizerConfig(lr=0.01),
        output=OutputConfig(test_batch_size=2),
    )
    plan = plan_execution(config, num_items, ranks)
    model = build_model(config, num_items, ranks, plan)
    pipeline = train_pipeline(model, sgd(model), plan, ranks.device)
    loader, reports = train_loader(config, store, ranks, plan), []
    for epoch in range(2):
        batches = loader.epoch(epoch)
        for _ in range(loader.steps_per_epoch):
            reports.append(pipeline.progress(batches))
        pipeline.detach()
    metrics = evaluator(config, model, store, "test", ranks)()
    return {"losses": mean_losses(reports), "full": metrics["full"], "sampled": metrics["sampled"]}


def answers(ranks: Ranks, every: int) -> dict[str, Any]:
    """By the case, e.g. "3 row_wise softmax tied"."""
    return {" ".join(map(str, case)): answer(ranks, *case) for case in CASES[::every]}


def main(folder: Path, every: int) -> None:
    torch.set_num_threads(1)
    ranks = start()
    found = answers(ranks, every)
    if ranks.is_first:
        (folder / f"{ranks.world_size}.json").write_text(json.dumps(found))
    exit_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
