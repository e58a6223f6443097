"""BERT4Rec on TorchRec: an EmbeddingCollection, the encoder, and a loss over scored items.

    batch.features  "item"      -> rows of all positions  -> encoder -> hidden [M, D]
                    "candidate" -> rows to score with ----------------> head -> loss
                    "attribute" -> rows that are added to both, item by item

TorchRec's pipelines trace ``forward``: it calls the item table once, on the unchanged batch, then
modules without TorchRec.

Shapes: M masked positions, D width, V items, A attributes.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor
from torchrec.types import DataType

from model.execution import ExecutionPlan
from model.network.attributes import AttributeSums
from model.network.config import EncoderConfig, HeadConfig
from model.network.dense_step import DenseStep, StepInput
from model.network.distillation import Teachers
from model.network.encoder import Encoder
from model.network.head import CatalogSlice, ScoringHead
from model.network.initial_rows import NORMAL_STD
from pipeline.batches.attributes import ItemAttributes
from pipeline.batches.features import ATTRIBUTE, CANDIDATE, ITEM, Lookup, with_attributes
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
    num_attributes: int = 0


class ItemTable(EmbeddingCollection):
    """The tables of items; sharded, one of ``model/tables``.

    Args:
        attributes: the rows of attributes, a half-open range; None: there are none.
    """

    def __init__(
        self,
        tables: list[EmbeddingConfig],
        device: torch.device,
        attributes: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(tables=tables, device=device)
        self.attributes = attributes

    @property
    def num_attributes(self) -> int:
        """A."""
        return 0 if self.attributes is None else self.attributes[1] - self.attributes[0]

    def forward(self, batch: Lookup) -> dict[str, JaggedTensor]:
        """Rows [T, D], [C, D] and [A, D] of the features of a batch and of all attributes."""
        return super().forward(with_attributes(batch.features, self.attributes))


class BERT4Rec(nn.Module):
    """Predicts the masked items of histories; this rank scores those of ``catalog``.

    Args:
        seed: of the initial weights, equal on all ranks.
        table_device: "meta" leaves the tables for the sharding to initialise, rank by rank.
        left_only: histories are evaluated with left context only, as all training rows were.
        attributes: of the items, if the model has any; None: only its weights are wanted.
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
        attributes: ItemAttributes | None = None,
    ) -> None:
        super().__init__()
        plan = plan or ExecutionPlan()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first, count = config.num_items + 2, config.num_attributes
            self.embeddings = ItemTable(
                _tables(config),
                torch.device(table_device),
                (first, first + count) if count else None,
            )
            self.encoder = Encoder(config.encoder, config.max_len, config.span)
        self.head = ScoringHead(config.head, catalog, config.num_items)
        self.attributes: AttributeSums | None = None
        if attributes is not None:
            self.attributes = AttributeSums(attributes, config.encoder.item_dropout)
        self.dense_step = DenseStep(self.encoder, self.head, plan, teachers, self.attributes)
        self.autocast, self.left_only = plan.precision == "bf16", left_only

    @torch.no_grad()
    def start_from(self, rows: Tensor) -> None:
        """Set the first rows of all tables to float32 [V + 2, D], but for those of zeros."""
        known = rows.any(dim=1)
        for table in self.embeddings.embeddings.values():
            table.weight[: len(rows)][known] = rows[known].to(table.weight.dtype)

    def forward(self, batch: PackedBatch | TrainBatch) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and float32 [2]: this rank's sum of losses and number of positions."""
        rows = self.embeddings(batch)
        names = [ITEM, CANDIDATE, *([] if self.attributes is None else [ATTRIBUTE])]
        return self.score(batch.unpacked, *(rows[name].values() for name in names))

    def score(
        self, batch: TrainBatch, items: Tensor, candidates: Tensor, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, from looked-up rows.

        Args:
            items: [T, D].
            candidates: [C, D].
            added: [A, D], of the attributes; None: the items have none.
        """
        # TorchRec would have to sum lengths for the offsets of ``rows``.
        layout = batch.row_offsets, batch.masked, batch.left_only, batch.steps_ago
        scored = batch.targets, batch.negatives, batch.log_counts, batch.all_targets
        given = StepInput(*layout, *scored, batch.ids, batch.times)
        # Without autocast's cache of weights: a CUDA graph would keep pointers into it.
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast, cache_enabled=False):
            return self.dense_step(items, candidates, given, batch.longest, added)

    def item_rows(self, rows: dict[str, JaggedTensor], ids: Tensor) -> Tensor:
        """Rows [T, D] of the feature "item", whose ids are given, with their attributes' added."""
        items = rows[ITEM].values()
        if self.attributes is None:
            return items
        return self.attributes.of_items(items, rows[ATTRIBUTE].values(), ids[: len(items)])

    def candidate_rows(self, rows: dict[str, JaggedTensor], low: int) -> Tensor:
        """Rows [C, D] of the feature "candidate", of the items from ``low`` on, likewise."""
        candidates = rows[CANDIDATE].values()
        if self.attributes is None:
            return candidates
        return self.attributes.of_range(candidates, rows[ATTRIBUTE].values(), low)


def _tables(config: ModelConfig) -> list[EmbeddingConfig]:
    """The item table, and one for scoring unless the head is tied.

    Rows 0: padding, V + 1: mask, from V + 2 on: attributes.
    """
    tied = config.head.head == "tied"
    features = {"item": [ITEM, CANDIDATE]} if tied else {"item": [ITEM], "output": [CANDIDATE]}
    if config.num_attributes:
        assert tied, config.head
        features["item"].append(ATTRIBUTE)
    return [
        EmbeddingConfig(
            name=name,
            num_embeddings=config.num_items + 2 + config.num_attributes,
            embedding_dim=config.encoder.emb_dim,
            feature_names=names,
            data_type=TABLE_PRECISIONS[config.table_precision],
            init_fn=partial(nn.init.normal_, std=NORMAL_STD),
        )
        for name, names in features.items()
    ]
