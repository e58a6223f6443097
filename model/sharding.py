"""From a plain BERT4Rec to the distributed model and its optimizers.

    --mode dmp   DistributedModelParallel: tables sharded as planned, updated inside the backward
                 pass by FBGEMM's fused optimizer; the encoder is replicated
    --mode ddp   the whole model replicated, gradients of the tables all-reduced like the rest

The order follows TorchRec's golden training example: module -> plan -> DistributedModelParallel ->
optimizers -> train pipeline.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import (
    EmbeddingCollectionSharder,
    ShardedEmbeddingCollection,
)
from torchrec.distributed.model_parallel import DataParallelWrapper
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    KernelConfig,
    PlannerError,
    TopologyFactory,
    TrainerConfig,
)
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.clipping import GradientClipping, GradientClippingOptimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from model.bert4rec import TABLE_PRECISIONS, BERT4Rec
from model.ranks import Ranks
from pipeline.errors import UserError

logger = logging.getLogger(__name__)

SHARDINGS = ("row_wise", "table_wise", "column_wise")
COMPUTE_KERNELS = ("fused", "fused_uvm", "fused_uvm_caching")
FUSED_OPTIMIZERS = {
    "adam": EmbOptimType.ADAM,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


@dataclass(frozen=True)
class ShardingConfig:
    """How tables are spread over ranks and how they are updated."""

    mode: str = field(
        default="dmp",
        metadata={"help": "dmp: sharded tables; ddp: replicated", "choices": ("dmp", "ddp")},
    )
    sharding: str = field(
        default="row_wise",
        metadata={
            "help": "how dmp cuts the tables; auto leaves it to TorchRec's planner",
            "choices": (*SHARDINGS, "auto"),
        },
    )
    embedding_optimizer: str = field(
        default="auto",
        metadata={
            "help": "of the tables in dmp; auto: adam on CUDA, rowwise_adagrad on CPU "
            "(ddp: the tables share the encoder's Adam)",
            "choices": ("auto", *FUSED_OPTIMIZERS),
        },
    )
    embedding_lr: float | None = field(
        default=None,
        metadata={"help": "learning rate of the tables; default: --lr, 20 times it for Adagrad"},
    )
    table_precision: str = field(
        default="fp32",
        metadata={
            "help": "of the tables in dmp; half precision halves them, updates are rounded at "
            "random on CUDA",
            "choices": tuple(TABLE_PRECISIONS),
        },
    )
    compute_kernel: str = field(
        default="fused",
        metadata={
            "help": "where dmp keeps tables: fused in GPU memory, fused_uvm in the host's, "
            "fused_uvm_caching in the host's behind a cache on the GPU",
            "choices": COMPUTE_KERNELS,
        },
    )

    def __post_init__(self) -> None:
        for name, choices in (
            ("mode", ("dmp", "ddp")),
            ("sharding", (*SHARDINGS, "auto")),
            ("embedding_optimizer", ("auto", *FUSED_OPTIMIZERS)),
            ("table_precision", TABLE_PRECISIONS),
            ("compute_kernel", COMPUTE_KERNELS),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} must be one of {', '.join(choices)}")
        for name, plain in (("table_precision", "fp32"), ("compute_kernel", "fused")):
            if self.mode == "ddp" and getattr(self, name) != plain:
                raise UserError(
                    f"--{name} {getattr(self, name)} needs --mode dmp: ddp replicates the tables "
                    "as ordinary weights"
                )
        if self.embedding_lr is not None and self.embedding_lr < 0:
            raise UserError(f"--embedding_lr must not be negative: {self.embedding_lr}")


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
    model: BERT4Rec, config: ShardingConfig, optimizer: OptimizerConfig, rows: int, ranks: Ranks
) -> DistributedModelParallel:
    """Distribute ``model`` over the ranks.

    Args:
        rows: rows of a training batch on one rank, for the planner's cost model.

    Raises:
        UserError: no plan fits the memory, or the device cannot have such tables.
    """
    _check_device(config, ranks.device)
    sharder = EmbeddingCollectionSharder(
        fused_params={
            "optimizer": FUSED_OPTIMIZERS[embedding_optimizer(config, ranks.device)],
            "learning_rate": embedding_lr(config, optimizer, ranks.device),
            "eps": 1e-8,
            "beta1": 0.9,
            "beta2": optimizer.beta2,
        }
    )
    plan = ShardingPlan(plan={})
    if config.mode == "dmp":
        plan = _plan(model, config, sharder, rows, ranks)
    return DistributedModelParallel(
        model,
        device=ranks.device,
        plan=plan,
        sharders=[sharder],
        data_parallel_wrapper=None if ranks.world_size > 1 else _Alone(),
    )


class _Alone(DataParallelWrapper):
    """On one rank there is nobody to average gradients with: DDP would only cost time."""

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        dmp._dmp_wrapped_module.to(device)


def _check_device(config: ShardingConfig, device: torch.device) -> None:
    if device.type == "cuda":
        return
    if config.table_precision == "bf16":
        raise UserError(
            "--table_precision bf16 needs CUDA: FBGEMM has no such tables on CPU; use fp16"
        )
    if config.compute_kernel != "fused":
        raise UserError(
            f"--compute_kernel {config.compute_kernel} needs CUDA: on CPU, tables are in the "
            "host's memory anyway"
        )


def _plan(
    model: BERT4Rec,
    config: ShardingConfig,
    sharder: EmbeddingCollectionSharder,
    rows: int,
    ranks: Ranks,
) -> ShardingPlan:
    """The planner's choice within ``--sharding``; every rank computes the same one by itself."""
    allowed = list(SHARDINGS) if config.sharding == "auto" else [config.sharding]
    if ranks.world_size == 1:
        # Row by row or column by column, the one rank has all of it: whole, it is not sorted into
        # shards and back.
        allowed = ["table_wise"]
    # Without a word on kernels the planner may choose "dense", which is broken on CPU.
    constraints = {
        table.name: ParameterConstraints(
            sharding_types=allowed,
            compute_kernels=[config.compute_kernel],
            pooling_factors=[float(model.encoder.max_len)] * len(table.feature_names),
        )
        for table in model.embeddings.embedding_configs()
    }
    planner = EmbeddingShardingPlanner(
        topology=TopologyFactory.create_topology(
            trainer_config=TrainerConfig(
                world_size=ranks.world_size, local_world_size=ranks.local_world_size
            ),
            kernel_config=KernelConfig(compute_device=ranks.device.type),
        ),
        batch_size=rows,
        storage_reservation=FixedPercentageStorageReservation(0.15),
        constraints=constraints,
    )
    try:
        return planner.plan(model, [sharder])
    except PlannerError as error:
        raise UserError(
            f"--sharding {config.sharding} does not fit on {ranks.world_size} ranks: use more "
            f"ranks, a smaller --emb_dim or --sharding auto ({str(error).splitlines()[0]})"
        ) from error


def embedding_optimizer(config: ShardingConfig, device: torch.device) -> str:
    """The tables' optimizer in dmp. FBGEMM has no fused Adam on CPU.

    Raises:
        UserError: Adam was asked for on CPU.
    """
    if config.embedding_optimizer == "auto":
        return "adam" if device.type == "cuda" else "rowwise_adagrad"
    if config.embedding_optimizer == "adam" and device.type == "cpu" and config.mode == "dmp":
        raise UserError(
            "--embedding_optimizer adam needs CUDA with --mode dmp: FBGEMM has no fused Adam on "
            "CPU; use rowwise_adagrad, or --mode ddp"
        )
    return config.embedding_optimizer


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
        parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
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
            )

        self.dense = KeyedOptimizerWrapper(parameters, adamw)
        stepped: KeyedOptimizer = self.dense
        if config.max_grad_norm:
            stepped = GradientClippingOptimizer(
                self.dense, clipping=GradientClipping.NORM, max_gradient=config.max_grad_norm
            )
        self.combined = CombinedOptimizer([("tables", self.tables), ("dense", stepped)])
        self._table_ids = tables
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
        for group in self.dense.param_groups:
            is_table = id(group["params"][0]) in self._table_ids
            group["lr"] = factor * self._peak["tables" if is_table else "dense"]

    def materialise_state(self) -> None:
        """Create AdamW's state tensors, so that a checkpoint can be loaded into them.

        Takes a step with zero gradients: the weights must be loaded afterwards.
        """
        self.dense.init_state()
        self.dense.zero_grad(set_to_none=True)


class _ReplicatedPipeline(TrainPipelineSparseDist):
    """The same pipeline for a model without sharded modules.

    There is no input distribution to take out of the forward pass, so there is nothing to trace;
    copies to the device still run a batch ahead.
    """

    def _pipeline_model(self, *args: object, **kwargs: object) -> None:
        self._pipelined_modules = []


def train_pipeline(
    model: DistributedModelParallel, optimizer: KeyedOptimizer, device: torch.device
) -> TrainPipelineSparseDist:
    """TorchRec's three-batch pipeline over ``model``; batches must be drained before ``detach``."""
    sharded = any(True for _ in _sharded_tables(model))
    pipeline = TrainPipelineSparseDist if sharded else _ReplicatedPipeline
    return pipeline(model, optimizer, device, execute_all_batches=True)


def _sharded_tables(model: DistributedModelParallel) -> Iterator[str]:
    for name, plan in model.plan.plan.items():
        yield from (f"{name}.{table}" for table in plan)


def describe_plan(model: DistributedModelParallel) -> str:
    """One line: what the plan did with each table."""
    lines = []
    for module in model.plan.plan.values():
        for table, sharding in module.items():
            lines.append(f"{table}: {sharding.sharding_type} {sharding.compute_kernel}")
    return ", ".join(lines) or "replicated"


def drop_cached_rows(model: nn.Module) -> None:
    """Forget the rows that ``fused_uvm_caching`` keeps on the GPU: the tables were loaded anew."""
    for module in model.modules():
        if isinstance(module, ShardedEmbeddingCollection):
            for lookup in module._lookups:
                lookup.purge()


def unwrap(model: nn.Module) -> BERT4Rec:
    """The BERT4Rec inside the wrappers."""
    while not isinstance(model, BERT4Rec):
        model = model.module
    return model
