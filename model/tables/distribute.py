"""From a plain BERT4Rec to DistributedModelParallel.

--mode dmp   tables sharded as planned, updated inside the backward pass; the encoder is
             replicated, its gradients are averaged by ``step/averaging.py``
--mode ddp   the whole model replicated, all gradients averaged by DistributedDataParallel
"""

from typing import Any

import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.optimizers import in_backward_optimizer_filter

from model.bert4rec import BERT4Rec, ItemTable
from model.distributed import Ranks
from model.execution import ExecutionPlan
from model.tables import upstream
from model.tables.all_to_all import AllToAll
from model.tables.collections import ExchangedCollection, LocalCollection
from model.tables.config import ShardingConfig
from model.tables.cpu_adam import adam_on_cpu
from model.tables.item_table import ShardedItemTable
from model.tables.row_exchange import RowExchange
from model.tables.sharding_plan import FUSED_OPTIMIZERS, plan_tables


def distribute(
    model: BERT4Rec,
    plan: ExecutionPlan,
    config: ShardingConfig,
    beta2: float,
    batch_rows: int,
    ranks: Ranks,
) -> DistributedModelParallel:
    """Distribute ``model`` over the ranks; UserError if no sharding fits the memory.

    Args:
        beta2: of Adam, for the tables.
        batch_rows: rows of a training batch on one rank, for the planner's cost model.
    """
    fused = {
        "optimizer": FUSED_OPTIMIZERS[plan.table_optimizer],
        "learning_rate": plan.table_lr,
        "eps": 1e-8,
        "beta1": 0.9,
        "beta2": beta2,
    }
    if ranks.device.type == "cuda":  # ids are checked when data is prepared; save the launches
        fused["bounds_check_mode"] = BoundsCheckMode.NONE
    sharder = _sharder(model, plan, fused, ranks)
    shards = ShardingPlan(plan={})
    if not plan.is_replicated:
        shards = plan_tables(model, config, sharder, batch_rows, ranks)
    wrapped_by_ddp = plan.exchange == "all_reduce"
    distributed = DistributedModelParallel(
        model,
        device=ranks.device,
        plan=shards,
        sharders=[sharder],
        data_parallel_wrapper=None if wrapped_by_ddp else _NoWrapper(),
    )
    if ranks.world_size > 1 and not wrapped_by_ddp:
        for parameter in replicated(distributed).values():
            dist.broadcast(parameter.detach(), 0)
    return distributed


def _sharder(
    model: BERT4Rec, plan: ExecutionPlan, fused: dict[str, Any], ranks: Ranks
) -> EmbeddingCollectionSharder:
    if plan.lookup in ("fbgemm", "torch"):
        return _Sharder(fused, LocalCollection if ranks.world_size == 1 else ExchangedCollection)
    num_items, attributes = model.head.num_items, model.embeddings.num_attributes
    exchange = RowExchange(num_items, ranks, attributes)
    if plan.exchange == "all_to_all":
        graphs = ranks.device.type == "cuda" and plan.graphs != "none"
        exchange = AllToAll(num_items, ranks, graphs, attributes)
    return _Sharder(
        fused,
        ShardedItemTable,
        plan=plan,
        exchange=exchange,
        catalog=model.head.catalog,
        draws_candidates=model.head.config.loss != "softmax",
    )


class _Sharder(EmbeddingCollectionSharder):
    """TorchRec's sharder, which makes collections of this project's ``kind``."""

    def __init__(
        self, fused: dict[str, Any], kind: type[ShardedEmbeddingCollection], **made_with: Any
    ) -> None:
        super().__init__(fused)
        self._kind, self._made_with = kind, made_with

    @property
    def module_type(self) -> type[ItemTable]:
        return ItemTable

    def shard(
        self, module: Any, params: Any, env: Any, device: Any = None, module_fqn: str | None = None
    ) -> ShardedEmbeddingCollection:
        assert self.fused_params is not None and device is not None
        is_adam = self.fused_params["optimizer"] is FUSED_OPTIMIZERS["adam"]
        with adam_on_cpu(is_adam and device.type == "cpu"):
            return self._kind(module, params, env, self.fused_params, device, **self._made_with)


class _NoWrapper(DataParallelWrapper):
    """Keeps replicated parameters out of DDP: AveragingOptimizer averages their gradients."""

    def wrap(self, dmp: DistributedModelParallel, env: Any, device: Any) -> None:
        upstream.wrapped(dmp).to(device)


def replicated(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """The parameters, by name, that every rank holds whole."""
    return dict(in_backward_optimizer_filter(model.named_parameters()))


def unwrap(model: nn.Module) -> BERT4Rec:
    """The BERT4Rec inside the wrappers."""
    while not isinstance(model, BERT4Rec):
        model = model.get_submodule("module")
    return model


def describe_shards(model: DistributedModelParallel, world_size: int) -> str:
    """The sharding of each table, e.g. "item row_wise"; "" for replicas."""
    parts = []
    for module in model.plan.plan.values():
        for table, sharding in module.items():
            kind = "unsharded" if world_size == 1 else sharding.sharding_type
            place = sharding.compute_kernel.removeprefix("fused")
            parts.append(f"{table} {kind}{place and f' in {place[1:]}'}")
    return ", ".join(parts)
