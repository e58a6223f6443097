"""Worker: train and evaluate the same tiny model with every distribution.

    torchrun --nproc_per_node 2 tests/workers/sharded.py FOLDER

Rank 0 writes FOLDER/<world size>.pt, the answers of every function below. All batches are the
global batches of 8 windows, whatever the number of ranks; every epoch's last one is a single
window, so that one of two ranks gets a filler row.
"""

import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from model.checkpoints import export as export_module
from model.checkpoints.checkpoints import Checkpoints
from model.checkpoints.export import Trained
from model.checkpoints.exported import WEIGHTS
from model.checkpoints.position import Position
from model.checkpoints.safe_reader import SafeReader
from model.checkpoints.weights_file import Part, WeightsFile
from model.distributed import ALONE, Ranks, from_first_rank, start
from model.ending import exit_rank
from model.evaluation import catalog_scores
from model.evaluation.ranked_users import RankedUsers
from model.evaluation.users import encode
from model.execution import ExecutionPlan
from model.network.attributes import AttributeSums
from model.network.config import EncoderConfig, HeadConfig
from model.run.build import (
    build_model,
    build_plain_model,
    evaluator,
    first_rows,
    num_attributes,
    train_loader,
)
from model.run.execution import plan_execution
from model.run.measure import measure
from model.settings.config import OutputConfig, RunConfig
from model.step.averaging import AveragingOptimizer, JoinedGradients
from model.step.config import OptimizerConfig
from model.step.optimizers import Optimizers
from model.step.pipelines import StepPipeline, train_pipeline
from model.tables.config import ShardingConfig
from model.tables.distribute import replicated, unwrap
from model.tables.upstream import set_table_steps
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.features import (
    ATTRIBUTE,
    CANDIDATE,
    ITEM,
    Ids,
    jagged_items,
    with_candidates,
)
from pipeline.evaluation.config import HoldoutConfig
from pipeline.evaluation.holdout import EvalLoader
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.training.config import LoaderConfig, MaskConfig, NegativesConfig, WindowConfig
from pipeline.training.loader import TrainLoader
from tests.workers.replayed import as_on_cuda

NUM_ITEMS, MAX_LEN, GLOBAL_BATCH, LR = 21, 6, 8, 0.1
EPOCHS = 7
WAYS = {
    "row_wise": ShardingConfig("dmp", "row_wise", "sgd", LR),
    "table_wise": ShardingConfig("dmp", "table_wise", "sgd", LR),
    "column_wise": ShardingConfig("dmp", "column_wise", "sgd", LR),
    "ddp": ShardingConfig("ddp"),
}


@dataclass
class Run:
    """A training's loss of each step over all ranks, and all weights at the end."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    pipelined: int = 0
    replayable: int = 0


def histories() -> SequenceStore:
    """13 users, 17 windows of at most 6 items: 3 steps an epoch, the last of one window."""
    generator = np.random.default_rng(2)
    lengths = [3, 4, 5, 8, 6, 7, 5, 12, 3, 16, 5, 13, 4]
    items = generator.integers(1, NUM_ITEMS + 1, size=sum(lengths))
    return SequenceStore.from_arrays(items, np.cumsum([0, *lengths]), NUM_ITEMS)


def config_of(
    sharding: ShardingConfig, ranks: Ranks, head: str = "tied", loss: str = "softmax"
) -> RunConfig:
    return RunConfig(
        windows=WindowConfig(max_len=MAX_LEN),
        loader=LoaderConfig(train_batch_size=GLOBAL_BATCH // ranks.world_size, seed=4),
        # 16 wide: column_wise makes two shards of 8, the fewest columns it may.
        encoder=EncoderConfig(16, 2, 1, dropout=0, item_dropout=0),
        head=HeadConfig(head, logit_temperature=0.2, loss=loss),
        negatives=NegativesConfig(train_negatives=12),
        sharding=sharding,
        optimizer=OptimizerConfig(lr=0.01),
        holdout=HoldoutConfig(seen="drop"),
        output=OutputConfig(test_batch_size=3),
    )


@dataclass(frozen=True)
class Built:
    """A model on its ranks, how it is executed, and the flags of both."""

    config: RunConfig
    ranks: Ranks
    plan: ExecutionPlan
    model: DistributedModelParallel
    num_attributes: int = 0

    @classmethod
    def of(
        cls,
        config: RunConfig,
        ranks: Ranks,
        attributes: ItemAttributes | None = None,
        **changes: Any,
    ) -> "Built":
        """The plan of a run, with ``changes``."""
        count = num_attributes(attributes)
        plan = replace(plan_execution(config, NUM_ITEMS, ranks, count), **changes)
        rows = first_rows(config, histories(), ranks)
        model = build_model(config, NUM_ITEMS, ranks, plan, rows=rows, attributes=attributes)
        return cls(config, ranks, plan, model, count)

    def optimizers(self) -> Optimizers:
        """Those of train.py."""
        return Optimizers(self.model, self.plan, self.config.optimizer, self.ranks)

    def loader(self) -> TrainLoader:
        given = self.config, histories(), self.ranks, self.plan
        return train_loader(*given, count=self.num_attributes)


def by_torchrec(ranks: Ranks) -> dict[str, Any]:
    """Changes of a plan: TorchRec and FBGEMM look up."""
    exchange = "none" if ranks.world_size == 1 else "torchrec"
    return {"lookup": "fbgemm", "exchange": exchange, "in_place": False}


def sgd(model: nn.Module) -> KeyedOptimizer:
    """Plain SGD for everything but the fused tables."""
    parameters = replicated(model)
    dense = KeyedOptimizerWrapper(parameters, lambda params: torch.optim.SGD(params, lr=LR))
    if any(model.plan.plan.values()) and dist.get_world_size() > 1:
        dense = AveragingOptimizer(dense, JoinedGradients(list(parameters.values())))
    return CombinedOptimizer([("tables", model.fused_optimizer), ("dense", dense)])


def mean_losses(reports: list[torch.Tensor]) -> list[float]:
    """Mean loss per position of each step, over all ranks."""
    sums = torch.stack(reports)
    dist.all_reduce(sums)
    return (sums[:, 0] / sums[:, 1]).tolist()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All rows of the tables, looked up, and the encoder's parameters."""
    bert = unwrap(model)
    rows = torch.arange(NUM_ITEMS + 2)
    features = with_candidates(jagged_items(rows, torch.tensor([len(rows)])), (1, 1))
    model.eval()
    with torch.no_grad():
        looked_up = bert.embeddings(Ids(features))
        found = {"table": looked_up[ITEM].values().clone()}
        if bert.attributes is not None:
            found["attributes"] = looked_up[ATTRIBUTE].values().clone()
    model.train()
    return found | {name: p.detach().clone() for name, p in bert.encoder.named_parameters()}


def pipelined(
    built: Built,
    optimizer: Any = None,
    before_step: Callable[[int], None] = lambda step: None,
    epochs: int = EPOCHS,
) -> Run:
    """Through the pipeline, as train.py does; without an ``optimizer`` by SGD."""
    ranks, model = built.ranks, built.model
    pipeline = train_pipeline(model, optimizer or sgd(model), built.plan, ranks.device)
    loader, reports = built.loader(), []
    for epoch in range(epochs):
        batches = loader.epoch(epoch)
        for _ in range(loader.steps_per_epoch):
            before_step(len(reports))
            reports.append(pipeline.progress(batches))
        modules = len(pipeline._pipelined_modules)
        pipeline.detach()
    shapes = 0
    if isinstance(pipeline, StepPipeline):
        shapes = getattr(pipeline.train_step, "replayable", 0)
    return Run(mean_losses(reports), weights_of(model), modules, shapes)


def plain_loop(model: nn.Module, optimizer: Any, loader: TrainLoader, device: torch.device) -> Run:
    """Forward, backward, step; no pipeline."""
    reports = []
    for epoch in range(EPOCHS):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            loss, report = model(batch.to(device))
            loss.backward()
            optimizer.step()
            reports.append(report)
    return Run(mean_losses(reports), weights_of(model))


def every_way(ranks: Ranks) -> dict[str, Run]:
    """SGD in each sharding, replicated, in a plain loop, untied, with a sampled loss, and more."""
    runs = {}
    for name, sharding in WAYS.items():
        runs[name] = pipelined(Built.of(config_of(sharding, ranks), ranks))
    for name in ("row_wise", "ddp"):
        built = Built.of(config_of(WAYS[name], ranks), ranks)
        runs[f"{name}, plain loop"] = plain_loop(
            built.model, sgd(built.model), built.loader(), ranks.device
        )
        linear = config_of(WAYS[name], ranks, head="linear")
        runs[f"{name}, linear"] = pipelined(Built.of(linear, ranks))
        sampled = config_of(WAYS[name], ranks, loss="sampled_softmax")
        runs[f"{name}, sampled"] = pipelined(Built.of(sampled, ranks))
    return runs | row_wise_otherwise(ranks)


def row_wise_otherwise(ranks: Ranks) -> dict[str, Run]:
    """Other exchanges, fake CUDA graphs, candidates looked up, TorchRec's and FBGEMM's lookup."""
    runs = {}
    exchanges = [{"exchange": "all_to_all"}] if ranks.world_size > 1 else []
    for name, loss in (("", "softmax"), (", sampled", "sampled_softmax")):
        config = config_of(WAYS["row_wise"], ranks, loss=loss)
        with as_on_cuda():
            built = Built.of(config, ranks, graphs="step")
            runs[f"row_wise, replayed{name}"] = pipelined(built)
        runs[f"row_wise, sent{name}"] = pipelined(Built.of(config, ranks, **by_torchrec(ranks)))
        for changes in exchanges:
            runs[f"row_wise, requested{name}"] = pipelined(Built.of(config, ranks, **changes))
            with as_on_cuda():
                built = Built.of(config, ranks, graphs="step", **changes)
                runs[f"row_wise, requested, replayed{name}"] = pipelined(built)
    config = config_of(WAYS["row_wise"], ranks)
    for changes in exchanges:
        built = Built.of(config, ranks, in_place=False, **changes)
        runs["row_wise, requested, looked up"] = pipelined(built)
    runs["row_wise, looked up"] = pipelined(Built.of(config, ranks, in_place=False))
    return runs


def halves(ranks: Ranks) -> dict[str, Run]:
    """Row-wise fp16 tables, of one head each."""
    heads = ("tied", "softmax"), ("tied", "sampled_softmax"), ("linear", "sampled_softmax")
    return {
        f"{head}, {loss}, {name}": run
        for head, loss in heads
        for name, run in by_exchange(ranks, config_of(HALF, ranks, head, loss)).items()
    }


HALF = replace(WAYS["row_wise"], embedding_optimizer="auto", table_precision="fp16")


@dataclass
class Saved:
    """A run of fp16 tables, saved after some steps: the table then, and losses of later steps."""

    run_dir: Path
    step: int
    table: torch.Tensor
    later: list[float]


def saved(ranks: Ranks, run_dir: Path) -> Saved:
    built = Built.of(config_of(HALF, ranks), ranks)
    optimizers = built.optimizers()
    before = pipelined(built, optimizers, epochs=3)
    step = len(before.losses)
    assert Checkpoints(run_dir, ranks).save(built.model, optimizers, Position(step=step))
    return Saved(run_dir, step, before.weights["table"], later_losses(built, optimizers, step))


def later_losses(built: Built, optimizers: Optimizers, step: int) -> list[float]:
    """After a checkpoint; evaluations have counted as steps."""
    set_table_steps(built.model, step)
    return pipelined(built, optimizers, epochs=2).losses


def linear(ranks: Ranks) -> dict[str, Run]:
    """Row-wise tables of a linear head, candidates in place, looked up and drawn."""
    runs = {}
    for loss in ("softmax", "sampled_softmax"):
        config = config_of(WAYS["row_wise"], ranks, "linear", loss)
        for name, run in by_exchange(ranks, config).items():
            runs[f"{loss}, {name}"] = run
    looked_up = Built.of(config_of(WAYS["row_wise"], ranks, "linear"), ranks, in_place=False)
    return runs | {"softmax, looked up": pipelined(looked_up)}


def by_exchange(ranks: Ranks, config: RunConfig) -> dict[str, Run]:
    """With each exchange, launched and as fake CUDA graphs."""
    runs = {}
    for exchange in ("gather", "all_to_all") if ranks.world_size > 1 else ("none",):
        runs[exchange] = pipelined(Built.of(config, ranks, exchange=exchange))
        with as_on_cuda():
            built = Built.of(config, ranks, exchange=exchange, graphs="step")
            runs[f"{exchange}, replayed"] = pipelined(built)
    return runs


def unsharded(ranks: Ranks) -> dict[str, Run]:
    """No TorchRec wrapper, torch.optim.SGD; only on one rank."""
    runs = {}
    for name, options in (
        ("tied", {}),
        ("linear", {"head": "linear"}),
        ("sampled", {"loss": "sampled_softmax"}),
        ("linear, sampled", {"head": "linear", "loss": "sampled_softmax"}),
    ):
        config = config_of(WAYS["ddp"], ranks, **options)
        plan = plan_execution(config, NUM_ITEMS, ranks)
        model = build_plain_model(config, NUM_ITEMS, ranks, plan)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        loader = train_loader(config, histories(), ranks, plan)
        runs[name] = plain_loop(model, optimizer, loader, ranks.device)
    return runs


def attributes() -> ItemAttributes:
    """Of each item its number modulo 4, of all but the first three also one of three others."""
    items = np.arange(NUM_ITEMS + 2)
    places = np.stack([items % 4, np.where(items > 3, 4 + items % 3, 7)], axis=1)
    places[[0, -1]] = 7
    return ItemAttributes(places.astype(np.int32), 7, own=items != 5)  # item 5 has no row


LOSSES = {"": "softmax", ", sampled": "sampled_softmax"}


def with_attributes(ranks: Ranks) -> dict[str, Run]:
    """With attributes of the items, by SGD: in each sharding, exchange and lookup."""
    runs, own = {}, attributes()
    for name, loss in LOSSES.items():
        for way, sharding in WAYS.items():
            if not name or way in ("row_wise", "ddp"):
                built = Built.of(config_of(sharding, ranks, loss=loss), ranks, own)
                runs[f"{way}{name}"] = pipelined(built)
        config = config_of(WAYS["row_wise"], ranks, loss=loss)
        ways = {"looked up": {"in_place": False}, "sent": by_torchrec(ranks)}
        if ranks.world_size > 1:
            ways["requested"] = {"exchange": "all_to_all"}
            ways["requested, looked up"] = {"exchange": "all_to_all", "in_place": False}
        for way, changes in ways.items():
            runs[f"{way}{name}"] = pipelined(Built.of(config, ranks, own, **changes))
        for way in ("row_wise", "requested")[: ranks.world_size]:
            with as_on_cuda():
                built = Built.of(config, ranks, own, graphs="step", **ways.get(way, {}))
                runs[f"{way}, replayed{name}"] = pipelined(built)
    return runs


def unsharded_with_attributes(ranks: Ranks) -> dict[str, Run]:
    """Autograd alone sums and differentiates; only on one rank."""
    runs, own = {}, attributes()
    for name, loss in LOSSES.items():
        config = config_of(WAYS["ddp"], ranks, loss=loss)
        plan = plan_execution(config, NUM_ITEMS, ranks, own.count)
        model = build_plain_model(config, NUM_ITEMS, ranks, plan, attributes=own)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        with (
            patch.object(AttributeSums, "of_items", summed_by_autograd),
            patch.object(AttributeSums, "of_range", range_summed_by_autograd),
        ):
            loader = train_loader(config, histories(), ranks, plan)
            runs[name] = plain_loop(model, optimizer, loader, ranks.device)
    return runs


def summed_by_autograd(
    self: AttributeSums, rows: torch.Tensor, added: torch.Tensor, items: torch.Tensor
) -> torch.Tensor:
    known = torch.cat([added, torch.zeros(1, added.shape[1])])
    return rows * (items != 5)[:, None] + known[self.places[items].long()].sum(dim=1)


def range_summed_by_autograd(
    self: AttributeSums, rows: torch.Tensor, added: torch.Tensor, low: int
) -> torch.Tensor:
    return summed_by_autograd(self, rows, added, torch.arange(low, low + len(rows)))


def own_optimizers(ranks: Ranks) -> dict[str, Run]:
    """The optimizers of train.py, under a learning rate that changes every step.

    Without a limit of the gradient norm, which in ddp is also one of the table's gradients. With a
    mask token in every window: a step without one has it on two ranks, in the filler row.
    """
    runs, mask = {}, MaskConfig(mask_token_share=1.0, random_item_share=0.0)
    others = [("table_wise", "linear", "normal"), ("row_wise", "tied", "cooccurrence")]
    for name, head, init in [*product(WAYS, ["tied"], ["normal"]), *others]:
        sharding = replace(
            WAYS[name], embedding_optimizer="auto", embedding_lr=None, table_init=init
        )
        config = config_of(sharding, ranks, head)
        no_limit = replace(config.optimizer, max_grad_norm=0.0)
        config = replace(config, mask=mask, optimizer=no_limit)
        built = Built.of(config, ranks)
        optimizers = built.optimizers()
        told = [each for each in (head, init) if each in ("linear", "cooccurrence")]
        runs[", ".join([name, *told])] = pipelined(
            built, optimizers, lambda step, o=optimizers: o.set_lr(1 - step / 30)
        )
    return runs


def at_factor(ranks: Ranks) -> dict[str, dict[float, Run]]:
    """One epoch at a constant factor of the learning rate."""
    found = {}
    for name in ("row_wise", "ddp"):
        config, found[name] = config_of(WAYS[name], ranks), {}
        for factor in (0.0, 0.5, 1.0):
            built = Built.of(config, ranks)
            optimizers = built.optimizers()
            found[name][factor] = pipelined(
                built,
                optimizers,
                # Only the first step: later ones start from other weights.
                lambda step, f=factor, o=optimizers: o.set_lr(f if step == 0 else 0.0),
                epochs=1,
            )
        found[name]["untouched"] = weights_of(Built.of(config, ranks).model)
    return found


def evaluation(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Metrics of the seed's initial weights: the same model on any number of ranks."""
    found = {}
    for name, sharding in WAYS.items():
        config = config_of(sharding, ranks)
        model = Built.of(config, ranks).model
        found[name] = evaluator(config, model, histories(), "test", ranks)()
        model = Built.of(config, ranks, attributes()).model
        found[f"{name}, attributes"] = evaluator(config, model, histories(), "test", ranks)()
        if name == "row_wise":
            # 21 items in parts of 5, of which a second rank has as many, one of them empty.
            with patch.object(catalog_scores, "PART_ITEMS", 5):
                found["in parts, attributes"] = evaluator(
                    config, model, histories(), "test", ranks
                )()
                model = Built.of(config, ranks).model
                found["in parts"] = evaluator(config, model, histories(), "test", ranks)()
    return found


MEASURED_AT = "1,3,10"
DAY = 86_400


def measured(ranks: Ranks) -> dict[str, tuple[dict[str, Any], RankedUsers]]:
    """All metrics of the seed's initial weights, with seen items dropped and kept."""
    found = {}
    for way, seen in product(("row_wise", "ddp"), ("drop", "keep")):
        config = config_of(WAYS[way], ranks)
        holdout = HoldoutConfig(eval_negatives=5, seen=seen, metrics_at=MEASURED_AT)
        config = replace(config, holdout=holdout)
        model = Built.of(config, ranks).model
        for parts, size in {"": catalog_scores.PART_ITEMS, ", in parts": 5}.items():
            with patch.object(catalog_scores, "PART_ITEMS", size):
                answer = measure(config, model, histories(), "test", ranks)
                found[f"{way}, {seen}{parts}"] = answer
    return found


def by_time() -> SequenceStore:
    """The same histories, each cut at random; a user may have several targets, or none."""
    store, generator = histories(), np.random.default_rng(6)
    parts = [np.sort(generator.integers(0, length + 1, 2)) for length in store.lengths()]
    store.ends = store.offsets[:-1] + np.stack(parts, axis=1)
    store.split = {"by": "time", "points": ["1", "2"], "times": [100 * DAY, 200 * DAY]}
    store.counts["times"] = {"unit": "s"}
    store.times = generator.integers(0, 300, len(store.items)) * DAY
    return store


def measured_by_time(ranks: Ranks) -> dict[str, tuple[dict[str, Any], RankedUsers]]:
    """The same with several targets of a user."""
    found = {}
    for way, seen in product(("row_wise", "ddp"), ("drop", "keep")):
        holdout = HoldoutConfig(eval_negatives=5, seen=seen, targets="all")
        data = DataConfig(split_time="1,2")
        config = replace(config_of(WAYS[way], ranks), holdout=holdout, data=data)
        model = Built.of(config, ranks).model
        found[f"{way}, {seen}"] = measure(config, model, by_time(), "test", ranks)
    return found


def scores(ranks: Ranks) -> torch.Tensor:
    """Of the same weights, float64 [users, items]; on one rank."""
    config = config_of(WAYS["ddp"], ranks)
    bert = unwrap(Built.of(config, ranks).model).eval()
    (batch,) = EvalLoader(histories(), "test", MAX_LEN, 100)
    with torch.no_grad():
        features = with_candidates(batch.features.to(ranks.device), (1, NUM_ITEMS + 1))
        rows = bert.head.project(bert.embeddings(Ids(features))[CANDIDATE].values())
        return encode(bert, batch.to(ranks.device)).hidden.double() @ rows.double().T


@dataclass
class Copied:
    """Weights in an export, offsets and shapes of the table's parts, and parts held at once."""

    weights: dict[str, torch.Tensor]
    parts: list[tuple[tuple[int, ...], list[int]]]
    held: int


def exported(ranks: Ranks) -> dict[str, Copied]:
    """The seed's initial weights, saved by all ranks and exported by the first one."""
    found, folder = {}, Path(from_first_rank(ranks, tempfile.mkdtemp))
    given = {name: (sharding, None) for name, sharding in WAYS.items()}
    given |= {f"{name}, attributes": (each, attributes()) for name, each in WAYS.items()}
    for name, (sharding, own) in given.items():
        config = config_of(sharding, ranks)
        built = Built.of(config, ranks, own)
        checkpoints = Checkpoints(folder / name, ranks)
        if ranks.is_first:
            (folder / name).mkdir()
        assert checkpoints.save(built.model, built.optimizers(), Position(step=1))
        if ranks.is_first:
            plain = build_plain_model(config, NUM_ITEMS, ALONE, table_device="meta")
            trained = Trained(plain, checkpoints.path(1), 1, {}, folder, folder, attributes=own)
            found[name] = copied(trained, folder / name)
    if ranks.is_first:
        shutil.rmtree(folder)
    return found


def copied(trained: Trained, folder: Path) -> Copied:
    alive: list[weakref.ref[torch.Tensor]] = []
    parts, held, read, put = [], [], SafeReader._read, WeightsFile.put

    def reading(*given: Any) -> torch.Tensor:
        alive.append(weakref.ref(part := read(*given)))
        held.append(sum(each() is not None for each in alive))
        return part

    def putting(file: WeightsFile, part: Part) -> None:
        if part.name.startswith("embeddings."):
            parts.append((part.offsets, list(part.values.shape)))
        put(file, part)

    with patch.object(SafeReader, "_read", reading), patch.object(WeightsFile, "put", putting):
        export_module._copy_weights(trained, folder)
    return Copied(load_file(folder / WEIGHTS), parts, max(held))


# 21 items are few even for these batches.
@patch("model.run.execution.ITEMS_A_POSITION", 0)
def answers(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """``folder`` keeps a checkpoint."""
    return {
        "every_way": every_way(ranks),
        "halves": halves(ranks),
        "linear": linear(ranks),
        "saved": saved(ranks, folder),
        "unsharded": unsharded(ranks) if ranks.world_size == 1 else {},
        "with_attributes": with_attributes(ranks),
        "initial_with_attributes": weights_of(
            Built.of(config_of(WAYS["ddp"], ranks), ranks, attributes()).model
        ),
        "unsharded_with_attributes": (
            unsharded_with_attributes(ranks) if ranks.world_size == 1 else {}
        ),
        "own_optimizers": own_optimizers(ranks),
        "at_factor": at_factor(ranks),
        "evaluation": evaluation(ranks),
        "measured": measured(ranks),
        "exported": exported(ranks),
        "measured_by_time": measured_by_time(ranks),
        "scores": scores(ranks) if ranks.world_size == 1 else None,
    }


def main(folder: Path) -> None:
    ranks = start()
    found = answers(ranks, folder)
    if ranks.is_first:
        torch.save(found, folder / f"{ranks.world_size}.pt")
    exit_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
