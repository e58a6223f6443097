"""BERT4Rec on TorchRec: an EmbeddingCollection, the encoder, and a loss over scored items.

    batch.features  "item"      -> rows of all positions  -> encoder -> hidden [M, D]
                    "candidate" -> rows to score with ----------------> head -> loss

TorchRec's pipelines trace ``forward``: it calls the item table once, on the unchanged batch, then
modules without TorchRec.

Shapes: M masked positions, D width, V items.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor
from torchrec.types import DataType

from model.execution import ExecutionPlan
from model.network.config import EncoderConfig, HeadConfig
from model.network.dense_step import DenseStep, StepInput
from model.network.distillation import Teachers
from model.network.encoder import Encoder
from model.network.head import CatalogSlice, ScoringHead
from model.network.initial_rows import NORMAL_STD
from pipeline.batches.features import CANDIDATE, ITEM, Lookup
from pipeline.batches.times import TimeSpan
from pipeline.batches.train_batch import PackedBatch, TrainBatch

# FBGEMM's kernels train these and float8 tables, not bfloat16 ones.
TABLE_PRECISIONS = {"fp32": DataType.FP32, "fp16": DataType.FP16}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the shapes of the weights."""

    num_items: int
    max_len: int
    encoder: EncoderConfig
    head: HeadConfig
    table_precision: str = "fp32"
    span: TimeSpan | None = None  # of the times, with ``encoder.use_times``


class ItemTable(EmbeddingCollection):
    """The tables of items; sharded, one of ``model/tables``."""

    def forward(self, batch: Lookup) -> dict[str, JaggedTensor]:
        """Rows [T, D] and [C, D] of the features "item" and "candidate" of a batch."""
        return super().forward(batch.features)


class BERT4Rec(nn.Module):
    """Predicts the masked items of histories; this rank scores those of ``catalog``.

    Args:
        seed: of the initial weights, equal on all ranks.
        table_device: "meta" leaves the tables for the sharding to initialise, rank by rank.
        left_only: histories are evaluated with left context only, as all training rows were.
    """

    def __init__(
        self,
        config: ModelConfig,
        catalog: CatalogSlice,
        seed: int = 0,
        plan: ExecutionPlan | None = None,
        teachers: Teachers | None = None,
        table_device: str = "cpu",
        left_only: bool = False,
    ) -> None:
        super().__init__()
        plan = plan or ExecutionPlan()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embeddings = ItemTable(tables=_tables(config), device=torch.device(table_device))
            self.encoder = Encoder(config.encoder, config.max_len, config.span)
        self.head = ScoringHead(config.head, catalog, config.num_items)
        self.dense_step = DenseStep(self.encoder, self.head, plan, teachers)
        self.autocast, self.left_only = plan.precision == "bf16", left_only

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Set the rows of all tables, float32 [V + 2, D], but those of zeros."""
        known = rows.any(dim=1)
        for table in self.embeddings.embeddings.values():
            table.weight[known] = rows[known].to(table.weight.dtype)

    def forward(self, batch: PackedBatch | TrainBatch) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and float32 [2]: this rank's sum of losses and number of positions."""
        rows = self.embeddings(batch)
        return self.score(rows[ITEM].values(), rows[CANDIDATE].values(), batch.unpacked)

    def score(self, items: Tensor, candidates: Tensor, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """The same, from looked-up rows: [T, D] of the items, [C, D] of the candidates."""
        # TorchRec would have to sum lengths for the offsets of ``rows``.
        layout = batch.row_offsets, batch.masked, batch.left_only, batch.steps_ago
        scored = batch.targets, batch.negatives, batch.log_counts, batch.all_targets
        given = StepInput(*layout, *scored, batch.ids, batch.times)
        # Without autocast's cache of weights: a CUDA graph would keep pointers into it.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            return self.dense_step(items, candidates, given, batch.longest, batch.equal_shapes)


def _tables(config: ModelConfig) -> list[EmbeddingConfig]:
    """The item table, and one for scoring unless the head is tied; rows 0: padding, V + 1: mask."""
    tied = config.head.head == "tied"
    features = {"item": [ITEM, CANDIDATE]} if tied else {"item": [ITEM], "output": [CANDIDATE]}
    return [
        EmbeddingConfig(
            name=name,
            num_embeddings=config.num_items + 2,
            embedding_dim=config.encoder.emb_dim,
            feature_names=names,
            data_type=TABLE_PRECISIONS[config.table_precision],
            init_fn=partial(nn.init.normal_, std=NORMAL_STD),
        )
        for name, names in features.items()
    ]
