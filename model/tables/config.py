"""Flags of the embedding tables: how they are sharded, stored and updated."""

from dataclasses import dataclass

from pipeline.config import Config, flag
from pipeline.errors import UserError

SHARDINGS = ("row_wise", "table_wise", "column_wise")
EMBEDDING_OPTIMIZERS = ("adam", "rowwise_adagrad", "adagrad", "sgd")


@dataclass(frozen=True)
class ShardingConfig(Config):
    """How tables are spread over ranks, stored and updated."""

    mode: str = flag(
        "dmp", "embedding tables on ranks; dmp: sharded, ddp: replicated", choices=("dmp", "ddp")
    )
    sharding: str = flag(
        "row_wise",
        "how --mode dmp cuts the tables; auto: TorchRec's planner decides",
        choices=(*SHARDINGS, "auto"),
    )
    embedding_optimizer: str = flag(
        "auto",
        "optimizer of --mode dmp's tables; auto: adam, for fp16 rowwise_adagrad",
        choices=("auto", *EMBEDDING_OPTIMIZERS),
    )
    embedding_lr: float | None = flag(
        None,
        "peak learning rate of the tables (default: --lr, with Adagrad 20 x --lr)",
        at_least=0,
        limit=1e30,
    )
    table_init: str = flag(
        "normal",
        "first vectors of the items; cooccurrence: items that occur together are near each other",
        choices=("normal", "cooccurrence"),
    )
    table_precision: str = flag(
        "fp32", "precision of dmp tables; fp16 halves their memory", choices=("fp32", "fp16")
    )
    compute_kernel: str = flag(
        "fused",
        "memory of --mode dmp's tables; fused: GPU, fused_uvm: host, fused_uvm_caching: both",
        choices=("fused", "fused_uvm", "fused_uvm_caching"),
    )

    def check(self) -> None:
        for name, plain in (("table_precision", "fp32"), ("compute_kernel", "fused")):
            if self.mode == "ddp" and getattr(self, name) != plain:
                raise UserError(
                    f"--{name} {getattr(self, name)} needs --mode dmp: ddp replicates the tables "
                    "as ordinary weights"
                )
