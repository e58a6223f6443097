"""How the tables are cut and stored: TorchRec's sharding plan, and FBGEMM's fused optimizers.

row_wise      rank r holds rows [r * k, (r + 1) * k); the softmax is cut the same way
column_wise   every rank holds a part of each row's width
table_wise    one rank holds a whole table
"""

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.types import ShardingPlan

from model.bert4rec import BERT4Rec
from model.distributed import Ranks
from model.network.head import shard_rows
from model.tables.config import SHARDINGS, ShardingConfig
from pipeline.errors import UserError

FUSED_OPTIMIZERS = {
    "adam": EmbOptimType.ADAM,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


def plan_tables(
    model: BERT4Rec,
    config: ShardingConfig,
    sharder: EmbeddingCollectionSharder,
    rows: int,
    ranks: Ranks,
) -> ShardingPlan:
    """The planner's choice within ``--sharding``, computed on every rank."""
    allowed = list(SHARDINGS) if config.sharding == "auto" else [config.sharding]
    if ranks.world_size == 1:
        # A single rank holds whole tables: table_wise does not sort rows into shards and back.
        allowed = ["table_wise"]
    elif not fills_all_ranks(
        model.head.num_items, ranks.world_size, model.embeddings.num_attributes
    ):
        # FBGEMM looks up in no shard without rows.
        allowed = [kind for kind in allowed if kind != "row_wise"] or ["table_wise"]
    # Without compute_kernels the planner may choose "dense", which is broken on CPU.
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=allowed,
            compute_kernels=[config.compute_kernel],
            pooling_factors=[float(model.encoder.max_len)] * len(table.feature_names),
            min_partition=column_width(table.embedding_dim, ranks.world_size),
        )
        for table in model.embeddings.embedding_configs()
    }
    trainer = TrainerConfig(world_size=ranks.world_size, local_world_size=ranks.local_world_size)
    kernels = KernelConfig(compute_device=ranks.device.type)
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(trainer_config=trainer, kernel_config=kernels),
        batch_size=rows,
        storage_reservation=FixedPercentageStorageReservation(0.15),
        constraints=constraints,
    )
    try:
        return planner.plan(model, [sharder])
    except PlannerError as error:
        raise UserError(
            f"the tables and a batch of {rows:,} windows do not fit in the memory of {ranks}: use "
            "more ranks, a smaller --train_batch_size or --emb_dim, or another --sharding "
            f"({str(error).splitlines()[0]})"
        ) from error


def fills_all_ranks(num_items: int, world_size: int, num_attributes: int = 0) -> bool:
    """Whether every rank holds a row of a row-wise sharded table."""
    block = shard_rows(num_items, world_size, num_attributes)
    return block * (world_size - 1) < num_items + 2 + num_attributes


def column_width(width: int, world_size: int) -> int:
    """Width of a column-wise shard: an equal part for as many ranks as the kernels allow.

    They read four values at once. By default the planner makes no shard narrower than 128.
    """
    return next(
        part for part in range(4, width + 1, 4) if width % part == 0 and part * world_size >= width
    )


def table_optimizer(config: ShardingConfig) -> str:
    """The tables' optimizer, in ddp the encoder's; UserError for Adam of fp16 tables."""
    whole = config.table_precision == "fp32"
    if config.mode == "ddp":
        return "adam"
    if config.embedding_optimizer == "auto":
        return "adam" if whole else "rowwise_adagrad"
    if config.embedding_optimizer == "adam" and not whole:
        raise UserError(
            f"--embedding_optimizer adam needs --table_precision fp32, not "
            f"{config.table_precision}: use rowwise_adagrad"
        )
    return config.embedding_optimizer
