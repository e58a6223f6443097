"""The parts of a run that train.py and eval.py both build from its config.

store = prepare(config.data)
model = build_model(config, store.num_items, ranks)    sharded, with the seed's initial weights
"""

from collections.abc import Callable
from typing import Any

import torch
from torchrec.distributed import DistributedModelParallel

from model.bert4rec import BERT4Rec, ModelConfig
from model.distributed import Ranks
from model.evaluation.evaluate import Result, evaluate
from model.network.head import CatalogSlice, catalog_slice
from model.run.config import RunConfig
from model.step.optimizers import shard, unwrap
from model.tables.gathered_rows import agreement
from model.tables.table_shard import Lookup, choose_lookup
from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader
from pipeline.preparation.store import SequenceStore
from pipeline.training.loader import TrainLoader
from pipeline.training.negatives import SharedNegatives

# Tables above this many bytes are never built whole on one host: each rank makes its own shard.
WHOLE_TABLE_BYTES = 4 << 30


def build_plain_model(config: RunConfig, num_items: int, ranks: Ranks) -> BERT4Rec:
    """An unsharded model with the seed's initial weights, the same on every rank."""
    model_config = ModelConfig(
        num_items,
        config.windows.max_len,
        config.encoder,
        config.head,
        config.sharding.table_precision,
    )
    precision = config.output.precision
    autocast = precision == "bf16" or (precision == "auto" and ranks.device.type == "cuda")
    if autocast and ranks.device.type != "cuda":
        raise UserError("--precision bf16 needs CUDA: leave it out on CPU, where it is slower")
    huge = 4 * (num_items + 2) * config.encoder.emb_dim > WHOLE_TABLE_BYTES
    return BERT4Rec(
        model_config,
        scored_slice(config, num_items, ranks),
        seed=config.loader.seed,
        autocast=autocast,
        table_device="meta" if huge and config.sharding.mode == "dmp" else "cpu",
        left_only=config.mask.left_context_share == 1,
    )


def build_model(config: RunConfig, num_items: int, ranks: Ranks) -> DistributedModelParallel:
    """The model, sharded or replicated over the ranks."""
    model = shard_model(config, build_plain_model(config, num_items, ranks), ranks)
    if unwrap(model).autocast and config.output.acceleration != "none":
        # A replicated table gets its gradients from autograd, not from what the graphs write.
        hooked = config.sharding.mode == "ddp"
        alone = ranks.world_size == 1 and not hooked
        compiled = config.output.acceleration == "compile"
        shard = unwrap(model).table_shard
        capturable = shard is not None and shard.is_capturable
        unwrap(model).dense_step.accelerate(compiled, alone, hooked, capturable)
    return model


def shard_model(config: RunConfig, plain: BERT4Rec, ranks: Ranks) -> DistributedModelParallel:
    """``plain`` sharded or replicated over the ranks, as the config says."""
    rows = config.loader.train_batch_size
    lookup = _lookup(config, plain.head.num_items, ranks)
    return shard(plain, config.sharding, config.optimizer, rows, ranks, lookup)


def _lookup(config: RunConfig, num_items: int, ranks: Ranks) -> Lookup:
    longest = config.windows.max_len * (1 + config.mask.two_stream)
    positions, drawn = config.loader.train_batch_size * longest, 0
    if config.head.loss != "softmax":  # every position's target, and the negatives
        drawn = positions + config.negatives.train_negatives
    width = config.encoder.emb_dim
    given = config.sharding, config.head, num_items, width, positions, drawn
    return choose_lookup(*given, ranks)


def train_loader(config: RunConfig, store: SequenceStore, ranks: Ranks) -> TrainLoader:
    """This rank's training batches, each with the candidates that the rank scores."""
    catalog = scored_slice(config, store.num_items, ranks)
    low, high = catalog.low, catalog.high
    lookup = _lookup(config, store.num_items, ranks)
    if lookup.in_place:
        high = low  # nothing to look up: the table itself is scored
    return TrainLoader(
        store,
        config.windows,
        config.mask,
        config.loader,
        rank=ranks.rank,
        world_size=ranks.world_size,
        candidate_range=(low, high),
        negatives=_negatives(config, store),
        agree=agreement(ranks) if lookup.gathered else None,
    )


def _negatives(config: RunConfig, store: SequenceStore) -> SharedNegatives | None:
    """What draws the negatives of the loss, if it wants any."""
    if config.head.loss == "softmax":
        return None
    # One more of each: an item that nobody rated in training must be drawn sometimes.
    weights = store.train_item_counts[1:-1] + 1 if config.head.loss != "gbce" else None
    count, seed = config.negatives.train_negatives, config.loader.seed
    return SharedNegatives(count, store.num_items, seed, weights)


def scored_slice(config: RunConfig, num_items: int, ranks: Ranks) -> CatalogSlice:
    """The items that this rank scores."""
    sharded = config.sharding.mode == "dmp"
    return catalog_slice(num_items, ranks.rank, ranks.world_size, sharded)


def evaluator(
    config: RunConfig,
    model: DistributedModelParallel,
    store: SequenceStore,
    split: str,
    ranks: Ranks,
    discount: float = 0.0,
) -> Callable[..., Result]:
    """A function that evaluates ``model`` as it is when called, on every user of ``split``.

    Its argument, if given, is put around the batches, to do something between them. ``discount`` is
    that of popularity, see :func:`~model.evaluation.evaluate.evaluate`.
    """
    output = config.output
    loader = EvalLoader(
        store,
        split,
        config=config.holdout,
        max_len=config.windows.max_len,
        batch_size=output.val_batch_size if split == "validation" else output.test_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        candidate_range=(1, 1),  # the table wants both features; candidates are looked up once
    )
    popularity = torch.from_numpy(store.train_item_counts)
    earlier: list[Result] = []

    def run(around: Callable[..., Any] = iter) -> Result:
        known = earlier[-1] if earlier else None
        result = evaluate(model, around(loader), popularity, discount=discount, earlier=known)
        earlier[:] = [result]
        return result

    return run
