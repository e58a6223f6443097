"""From a plain BERT4Rec to the distributed model and its optimizers.

    --mode dmp   DistributedModelParallel: tables sharded as planned, updated inside the backward
                 pass by FBGEMM's fused optimizer; the encoder is replicated
    --mode ddp   the whole model replicated, gradients of the tables all-reduced like the rest

The order follows TorchRec's golden training example: module -> plan -> DistributedModelParallel ->
optimizers -> train pipeline.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import (
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.types import ShardingPlan
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from model.bert4rec import BERT4Rec
from model.distributed import Ranks
from model.step.averaging import AveragingOptimizer, Unwrapped, begin_as_first_rank
from model.step.graphs import GraphedOptimizer
from model.tables.gathered_rows import gather_rows
from model.tables.lone_rank import look_up_at_home
from model.tables.sharding_plan import (
    FUSED_OPTIMIZERS,
    ShardingConfig,
    check_device,
    embedding_optimizer,
    plan_tables,
)
from model.tables.table_shard import Lookup, own_shard
from pipeline.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the encoder and the learning rate that both optimizers share."""

    lr: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(
        default=0.01, metadata={"help": "decoupled weight decay on the encoder's matrices"}
    )
    beta2: float = field(default=0.98, metadata={"help": "Adam's decay of squared gradients"})
    max_grad_norm: float = field(
        default=5.0, metadata={"help": "clip the norm of the encoder's gradients; 0 does not"}
    )

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} must not be negative: {getattr(self, name)}")
        if not 0 < self.beta2 < 1:
            raise UserError(f"--beta2 must be in (0, 1), not {self.beta2}")


def shard(
    model: BERT4Rec,
    config: ShardingConfig,
    dense: OptimizerConfig,
    rows: int,
    ranks: Ranks,
    lookup: Lookup | None = None,
) -> DistributedModelParallel:
    """Distribute ``model`` over the ranks.

    Args:
        rows: rows of a training batch on one rank, for the planner's cost model.
        lookup: how rows come to where they are needed; None leaves it to TorchRec.

    Raises:
        UserError: no plan fits the memory, or the device cannot have such tables.
    """
    check_device(config, ranks.device)
    lookup = lookup or Lookup()
    fused = {
        "optimizer": FUSED_OPTIMIZERS[embedding_optimizer(config, ranks.device)],
        "learning_rate": embedding_lr(config, dense, ranks.device),
        "eps": 1e-8,
        "beta1": 0.9,
        "beta2": dense.beta2,
    }
    if ranks.device.type == "cuda":  # all ids are of the catalog; a step has few launches to spare
        fused["bounds_check_mode"] = BoundsCheckMode.NONE
    sharder = EmbeddingCollectionSharder(fused_params=fused)
    plan = ShardingPlan(plan={})
    if config.mode == "dmp":
        plan = plan_tables(model, config, sharder, rows, ranks)
    wrapped_by_ddp = config.mode == "ddp" and ranks.world_size > 1
    distributed = DistributedModelParallel(
        model,
        device=ranks.device,
        plan=plan,
        sharders=[sharder],
        data_parallel_wrapper=None if wrapped_by_ddp else Unwrapped(),
    )
    if lookup.own:
        catalog = model.head.catalog if lookup.in_place else None
        optimizer = embedding_optimizer(config, ranks.device)
        model.table_shard = own_shard(distributed, catalog, optimizer, ranks)
        if lookup.in_place:
            model.dense_step.score_in_place(model.table_shard.candidates)
    if lookup.gathered:
        model.dense_step.exchange = gather_rows(distributed, model.head.num_items + 2, ranks)
    if ranks.world_size == 1:
        look_up_at_home(distributed)
    elif not wrapped_by_ddp:
        begin_as_first_rank(list(replicated(distributed).values()))
    return distributed


def replicated(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """The parameters, by name, that every rank holds whole."""
    return dict(in_backward_optimizer_filter(model.named_parameters()))


def embedding_lr(config: ShardingConfig, optimizer: OptimizerConfig, device: torch.device) -> float:
    """The tables' peak learning rate.

    Adagrad divides by the root of all squared gradients so far, not of recent ones, so its steps
    shrink from the start; it wants a larger rate than Adam.
    """
    if config.embedding_lr is not None:
        return config.embedding_lr
    if config.mode == "dmp" and "adagrad" in embedding_optimizer(config, device):
        return 20 * optimizer.lr
    return optimizer.lr


class Optimizers:
    """The fused optimizer of the tables and AdamW of everything else, under one learning rate."""

    def __init__(
        self,
        model: DistributedModelParallel,
        sharding: ShardingConfig,
        config: OptimizerConfig,
        device: torch.device,
    ) -> None:
        self._peak = {"dense": config.lr, "tables": embedding_lr(sharding, config, device)}
        self.tables = model.fused_optimizer
        parameters = replicated(model)
        tables = {id(p) for name, p in parameters.items() if name.startswith("embeddings.")}

        def adamw(params: list[torch.Tensor]) -> torch.optim.Optimizer:
            dense = [p for p in params if id(p) not in tables]
            groups = [
                {"params": [p for p in dense if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [p for p in dense if p.ndim <= 1], "weight_decay": 0.0},
                {"params": [p for p in params if id(p) in tables], "weight_decay": 0.0},
            ]
            return torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.lr,
                betas=(0.9, config.beta2),
                eps=1e-8,
                fused=device.type == "cuda",
                capturable=device.type == "cuda",
            )

        self.dense = KeyedOptimizerWrapper(parameters, adamw)
        stepped: KeyedOptimizer = self.dense
        if config.max_grad_norm:
            stepped = GradientClippingOptimizer(
                self.dense, clipping=GradientClipping.NORM, max_gradient=config.max_grad_norm
            )
        self._table_ids = tables
        self._graphed_lr: torch.Tensor | None = None  # where a CUDA graph reads it
        step = unwrap(model).dense_step
        self._whole = step.is_whole
        if (step.is_graphed or step.is_whole) and not tables:
            self._graphed_lr = torch.tensor(config.lr, device=device)
            for group in self.dense.param_groups:
                group["lr"] = self._graphed_lr
        # Ranks that take the same steps through graphs average their gradients in one, too.
        wrappers = [AveragingOptimizer] * (sharding.mode == "dmp" and dist.get_world_size() > 1)
        if self._graphed_lr is not None and not step.is_whole:
            wrappers.insert(len(wrappers) * step.is_alike, GraphedOptimizer)
        for wrap in wrappers:
            stepped = wrap(stepped, list(parameters.values()))
        self._stepped = stepped
        self.combined = CombinedOptimizer([("tables", self.tables), ("dense", stepped)])
        self._description = f"AdamW, lr {config.lr:g}"
        if sharding.mode == "dmp":
            name = embedding_optimizer(sharding, device)
            self._description = (
                f"encoder AdamW, lr {config.lr:g}, tables {name}, lr {self._peak['tables']:g}"
            )

    def __str__(self) -> str:
        return self._description

    @property
    def peak_lr(self) -> float:
        """The encoder's learning rate at factor 1."""
        return self._peak["dense"]

    def set_lr(self, factor: float) -> None:
        """Set all learning rates to ``factor`` times their peaks, effective at the next step."""
        for group in self.tables.param_groups:
            group["lr"] = factor * self._peak["tables"]
        if self._graphed_lr is not None:
            self._graphed_lr.fill_(factor * self._peak["dense"])
            return
        for group in self.dense.param_groups:
            is_table = id(group["params"][0]) in self._table_ids
            group["lr"] = factor * self._peak["tables" if is_table else "dense"]

    def zero_grad(self) -> None:
        """Forget the last step's gradients; the tables are told their learning rate here."""
        self.tables.zero_grad()
        self._stepped.zero_grad(set_to_none=self._whole)

    def step(self) -> None:
        """Update everything but the tables, which the backward pass has updated."""
        self._stepped.step()

    def materialise_state(self) -> None:
        """Create AdamW's state tensors, so that a checkpoint can be loaded into them.

        Takes a step with zero gradients: the weights must be loaded afterwards.
        """
        self.dense.init_state()
        self.dense.zero_grad(set_to_none=True)


def drop_cached_rows(model: nn.Module) -> None:
    """Forget the rows that ``fused_uvm_caching`` keeps on the GPU: the tables were loaded anew."""
    for lookup in _lookups(model):
        lookup.purge()


def set_table_steps(model: nn.Module, step: int) -> None:
    """Tell the fused optimizers how many steps there were.

    Adam corrects its averages by this count. FBGEMM keeps it out of the state, and takes every
    lookup for a step, those of an evaluation too.
    """
    for lookup in _lookups(model):
        for table in lookup.modules():
            for counter in ("iter", "iter_cpu"):
                if isinstance(count := getattr(table, counter, None), torch.Tensor):
                    count.fill_(step)


def _lookups(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingCollection):
            yield from module._lookups


def unwrap(model: nn.Module) -> BERT4Rec:
    """The BERT4Rec inside the wrappers."""
    while not isinstance(model, BERT4Rec):
        model = model.module
    return model
