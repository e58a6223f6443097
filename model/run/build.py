"""The parts of a run that train.py and eval.py both build from its config.

store = prepared(config, ranks)                              the same on all ranks
model = build_model(config, store.num_items, ranks, plan)    sharded, the seed's initial weights
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed import DistributedModelParallel

from model.bert4rec import BERT4Rec, ModelConfig
from model.checkpoints.checkpoints import checkpoint_steps
from model.distributed import Ranks, from_first_rank
from model.evaluation.evaluate import Result, evaluate
from model.execution import ExecutionPlan
from model.network.distillation import Teachers
from model.network.head import CatalogSlice, catalog_slice, shard_rows
from model.network.initial_rows import MOST_VALUES, initial_rows
from model.nodes import prepared_data, shared_arrays
from model.settings.config import RunConfig
from model.settings.protocol import protocol_of
from model.tables.distribute import distribute
from model.tables.row_exchange import all_sizes
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.times import ItemTimes, TimeSpan
from pipeline.cooccurrence import pairs_of
from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.store import SequenceStore
from pipeline.training.loader import RankShare, TrainLoader
from pipeline.training.negatives import SharedNegatives

# Tables above this many bytes are never built whole on one host: each rank makes its own shard.
WHOLE_TABLE_BYTES = 4 << 30


def prepared(config: RunConfig, ranks: Ranks) -> SequenceStore:
    """The prepared data, read by every rank; UserError if a host has other data than rank 0's."""
    store = prepared_data(config.data, ranks)
    sizes = f"{store.num_items} items, {len(store.items)} ratings"
    about = [(store.catalog_fingerprint, sizes)] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(about, about[ranks.rank])
    for rank, other in enumerate(about):
        if other != about[0]:
            raise UserError(
                f"{config.data.name} of rank {rank} ({other[1]}) is not that of rank 0 "
                f"({about[0][1]}): give the same ratings and --cache_dir contents on all hosts"
            )
    return store


def build_plain_model(
    config: RunConfig,
    num_items: int,
    ranks: Ranks,
    plan: ExecutionPlan | None = None,
    teachers: Teachers | None = None,
    table_device: str = "",
    span: TimeSpan | None = None,
    attributes: ItemAttributes | None = None,
) -> BERT4Rec:
    """An unsharded model with the seed's initial weights, the same on every rank.

    Args:
        table_device: by default "meta" if the sharding makes tables of this size, else "cpu".
        span: of the times, with ``--use_times``.
        attributes: of the items, with ``--item_attributes``; None: of an export, whose items' rows
            are sums.
    """
    count = num_attributes(attributes)
    model_config = _model_config(config, num_items, span, count)
    huge = 4 * (num_items + 2 + count) * config.encoder.emb_dim > WHOLE_TABLE_BYTES
    is_sharded = config.sharding.mode == "dmp"
    return BERT4Rec(
        model_config,
        scored_slice(config, num_items, ranks, count),
        seed=config.loader.seed,
        plan=plan,
        teachers=teachers,
        table_device=table_device or ("meta" if huge and is_sharded else "cpu"),
        left_only=config.mask.left_context_share == 1,
        attributes=attributes,
    )


def first_rows(config: RunConfig, store: SequenceStore, ranks: Ranks) -> Tensor | None:
    """Rows that ``--table_init`` starts the tables from, made by rank 0; None: the model's own.

    A run that is resumed has those of its checkpoint.

    Raises:
        UserError: there are too many items.
    """
    if config.sharding.table_init == "normal":
        return None
    items, width, seed = store.num_items, config.encoder.emb_dim, config.loader.seed
    if items * width > MOST_VALUES:
        raise UserError(
            f"--table_init cooccurrence is for tables of at most {MOST_VALUES:,} values, not for "
            f"{items:,} items of width {width}: take --table_init normal, or a smaller --emb_dim"
        )

    def make() -> Tensor | None:
        if config.output.run_dir and checkpoint_steps(Path(config.output.run_dir)):
            return None
        pairs = pairs_of(store, seed, config.windows.train_on_validation)
        cosine = config.head.logit_temperature > 0
        return initial_rows(pairs, items, width, seed, cosine, ranks.device)

    return from_first_rank(ranks, make)


def _model_config(
    config: RunConfig, num_items: int, span: TimeSpan | None, count: int
) -> ModelConfig:
    sizes, precision = (num_items, config.windows.max_len), config.sharding.table_precision
    return ModelConfig(*sizes, config.encoder, config.head, precision, span, count)


def weightless_model(
    config: RunConfig, num_items: int, span: TimeSpan | None = None, count: int = 0
) -> BERT4Rec:
    """An unsharded model on the device "meta": only names, shapes and types of its weights.

    Args:
        count: of attributes.
    """
    model_config = _model_config(config, num_items, span, count)
    with torch.device("meta"):
        return BERT4Rec(model_config, catalog_slice(num_items, 0, 1, False), table_device="meta")


def build_model(
    config: RunConfig,
    num_items: int,
    ranks: Ranks,
    plan: ExecutionPlan,
    teachers: Teachers | None = None,
    span: TimeSpan | None = None,
    rows: Tensor | None = None,
    attributes: ItemAttributes | None = None,
) -> DistributedModelParallel:
    """The same, sharded or replicated over the ranks; its tables start from :func:`first_rows`."""
    plain = build_plain_model(
        config, num_items, ranks, plan, teachers, span=span, attributes=attributes
    )
    if rows is not None:
        plain.start_from(rows)
    batch_rows = config.loader.train_batch_size
    return distribute(plain, plan, config.sharding, config.optimizer.beta2, batch_rows, ranks)


def time_span(config: RunConfig, store: SequenceStore) -> TimeSpan | None:
    """Of the times of the data; None without ``--use_times``, UserError if there are no times."""
    if not config.encoder.use_times:
        return None
    return ItemTimes(store).span(config.windows.train_on_validation)


def item_attributes(config: RunConfig, catalog: Callable[[], Catalog]) -> ItemAttributes | None:
    """Of a catalog's items, which is read only if there are any; None: no ``--item_attributes``."""
    encoder = config.encoder
    if not encoder.item_attributes:
        return None
    return ItemAttributes.of(catalog(), encoder.item_attributes, encoder.attribute_separator)


def num_attributes(attributes: ItemAttributes | None) -> int:
    """A, 0 if there are none."""
    return 0 if attributes is None else attributes.count


def train_loader(
    config: RunConfig,
    store: SequenceStore,
    ranks: Ranks,
    plan: ExecutionPlan,
    teachers: Teachers | None = None,
    count: int = 0,
) -> TrainLoader:
    """This rank's training batches, each with the candidates that the rank scores.

    Args:
        count: of attributes.
    """
    use_times = config.encoder.use_times or (teachers is not None and teachers.use_times)
    catalog = scored_slice(config, store.num_items, ranks, count)
    block = shard_rows(store.num_items, ranks.world_size, count)
    return TrainLoader(
        store,
        config.windows,
        config.mask,
        config.loader,
        RankShare(
            ranks.rank,
            ranks.world_size,
            all_sizes=all_sizes(ranks) if plan.agrees_on_sizes else None,
            shard_rows=block if plan.exchange == "all_to_all" else None,
            shared=partial(shared_arrays, ranks),
            threads=_loader_threads(ranks),
        ),
        # In place, candidates are not looked up: the table itself is scored.
        candidate_range=(catalog.low, catalog.low if plan.in_place else catalog.high),
        negatives=_negatives(config, store),
        times=ItemTimes(store) if use_times else None,
    )


def _loader_threads(ranks: Ranks) -> int:
    """A third one only where a rank has cores to spare: NumPy holds Python's lock at times."""
    return 3 if (os.cpu_count() or 1) // ranks.local_world_size > 3 else 2


def _negatives(config: RunConfig, store: SequenceStore) -> SharedNegatives | None:
    if config.head.loss == "softmax":
        return None
    train_counts = store.train_item_counts[1:-1] if config.head.loss != "gbce" else None
    count, seed = config.negatives.train_negatives, config.loader.seed
    return SharedNegatives(count, store.num_items, seed, train_counts)


def scored_slice(config: RunConfig, num_items: int, ranks: Ranks, count: int = 0) -> CatalogSlice:
    """The items that this rank scores; ``count``: of attributes."""
    sharded = config.sharding.mode == "dmp"
    return catalog_slice(num_items, ranks.rank, ranks.world_size, sharded, count)


def eval_loader(config: RunConfig, store: SequenceStore, split: str, ranks: Ranks) -> EvalLoader:
    """This rank's users of ``split``, in batches."""
    output, protocol = config.output, protocol_of(config, store)
    return EvalLoader(
        store,
        split,
        config=config.holdout,
        max_len=config.windows.max_len,
        batch_size=output.val_batch_size if split == "validation" else output.test_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        keep_seen=protocol["seen"] == "keep",
        times=ItemTimes(store) if config.encoder.use_times else None,
    )


def evaluator(
    config: RunConfig,
    model: DistributedModelParallel,
    store: SequenceStore,
    split: str,
    ranks: Ranks,
    discount: float = 0.0,
) -> Callable[..., Result]:
    """A function that evaluates the current ``model`` on every user of ``split``.

    Its argument, if given, wraps the iterator of batches. ``discount``: of popularity.
    """
    loader = eval_loader(config, store, split, ranks)
    popularity = torch.from_numpy(store.train_item_counts)
    earlier: Result | None = None

    def run(around: Callable[..., Any] = iter) -> Result:
        nonlocal earlier
        earlier = evaluate(
            model,
            around(loader),
            popularity,
            discount=discount,
            earlier=earlier,
            negatives=config.holdout.eval_negatives,
            cutoffs=config.holdout.cutoffs,
        )
        return earlier

    return run
