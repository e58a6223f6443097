"""The models that a run learns from."""

import torch

from model.bert4rec import BERT4Rec
from model.distributed import Ranks
from model.network.distillation import Teacher, Teachers
from model.network.head import CatalogSlice
from model.run.build import scored_slice
from model.run.trained import TrainedRun
from model.settings.config import EvalFlags, RunConfig
from pipeline.batches.features import CANDIDATE, ITEM
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore


def load_teachers(
    config: RunConfig, store: SequenceStore, ranks: Ranks, precision: str, count: int = 0
) -> Teachers | None:
    """The models that ``--teachers`` names, unsharded on this rank's device; None without it.

    Args:
        precision: of their matrix products, "bf16" or "fp32".
        count: of attributes of the model that they teach.
    """
    models = []
    for folder in config.teaching.folders:
        run = TrainedRun(EvalFlags(checkpoint=folder))
        run.check_catalog(store, "take another of --teachers, trained on this data and its filters")
        if run.other_ratings(store):
            ranks.warn(
                f"--teachers {folder} was trained on other ratings of these items, or with another "
                "split: it may know the held-out ones, and metrics would be too good"
            )
        if (most := run.config.windows.max_len) < config.windows.max_len:
            raise UserError(
                f"--teachers {folder} reads windows of {most} items at most, and this run has "
                f"{config.windows.max_len}: give --max_len {most} or less, or take another teacher"
            )
        if run.config.windows.train_on_validation and not config.windows.train_on_validation:
            raise UserError(
                f"--teachers {folder} was trained on the validation items, which choose this "
                "run's best model: take another teacher, or --train_on_validation here too"
            )
        catalog = scored_slice(config, store.num_items, ranks, count)
        models.append(as_teacher(run.plain_model(), catalog, ranks.device, precision))
    return Teachers(models, config.teaching.teacher_share) if models else None


def as_teacher(
    model: BERT4Rec, catalog: CatalogSlice, device: torch.device, precision: str
) -> Teacher:
    """A whole model that teaches the scores of ``catalog``."""
    tables = {
        feature: model.embeddings.embeddings[table.name].weight.detach()
        for table in model.embeddings.embedding_configs()
        for feature in table.feature_names
    }
    return Teacher(
        model.encoder.to(device),
        model.head,
        items=tables[ITEM].to(device),
        candidates=tables[CANDIDATE][catalog.low : catalog.high].to(device),
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )
