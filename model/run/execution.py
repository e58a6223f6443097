"""Decides how a run is executed, from its flags, its catalog and its device."""

import torch

from model.distributed import Ranks
from model.execution import Exchange, ExecutionPlan, Graphs, Lookup, Precision
from model.kernels import varlen_attention
from model.settings.config import RunConfig
from model.tables.sharding_plan import fills_all_ranks, table_optimizer
from pipeline.errors import UserError

# If a catalog has fewer items than a step has positions, its lookup for scoring is cheap.
ITEMS_A_POSITION = 1
# Rows looked up for all ranks, up to which they are gathered: an all-to-all sends fewer bytes, but
# the host makes a request for each batch.
GATHERED_ROWS = 1 << 17


def plan_execution(
    config: RunConfig, num_items: int, ranks: Ranks, num_attributes: int = 0
) -> ExecutionPlan:
    """The plan of a run, the same on every rank; UserError if the device cannot do it."""
    precision, optimizer = for_device(config, ranks.device)
    replicated = config.sharding.mode == "ddp"
    exchange = _exchange(config, num_items, ranks, num_attributes)
    kept = config.sharding.compute_kernel == "fused"
    own = kept and not replicated and exchange != "torchrec"
    positions, _ = _positions_and_draws(config)
    in_place = own and config.head.loss == "softmax" and num_items >= ITEMS_A_POSITION * positions
    # FBGEMM has no Adam on CPU.
    by_library: Lookup = "fbgemm"
    if optimizer == "adam" and ranks.device.type == "cpu":
        by_library = "torch"
    graphs: Graphs = "none"
    has_fast_attention = varlen_attention.takes(config.encoder.emb_dim // config.encoder.nhead)
    if precision == "bf16" and config.output.acceleration != "none" and has_fast_attention:
        graphs = "step" if own else "encoder"
    return ExecutionPlan(
        lookup="replicated" if replicated else "own" if own else by_library,
        exchange=exchange,
        graphs=graphs,
        in_place=in_place,
        precision=precision,
        table_optimizer=optimizer,
        table_lr=table_lr(config, optimizer),
    )


def for_device(config: RunConfig, device: torch.device) -> tuple[Precision, str]:
    """Precision and tables' optimizer; UserError if the device cannot do it. Needs no data."""
    sharding = config.sharding
    if device.type != "cuda" and sharding.compute_kernel != "fused":
        raise UserError(
            f"--compute_kernel {sharding.compute_kernel} needs CUDA: on CPU, tables are in the "
            "host's memory anyway"
        )
    return _precision(config, device), table_optimizer(sharding)


def _precision(config: RunConfig, device: torch.device) -> Precision:
    if config.output.precision == "fp32":
        return "fp32"
    if config.output.precision == "bf16" and device.type != "cuda":
        raise UserError("--precision bf16 needs CUDA: leave it out on CPU, where it is slower")
    return "bf16" if device.type == "cuda" else "fp32"


def _exchange(config: RunConfig, num_items: int, ranks: Ranks, num_attributes: int) -> Exchange:
    sharding = config.sharding
    if ranks.world_size == 1:
        return "none"
    if sharding.mode == "ddp":
        return "all_reduce"
    row_wise = (sharding.sharding, sharding.compute_kernel) == ("row_wise", "fused")
    full = fills_all_ranks(num_items, ranks.world_size, num_attributes)
    if not (row_wise and full):
        return "torchrec"
    rows = sum(_positions_and_draws(config)) + num_attributes
    few = rows * ranks.world_size <= GATHERED_ROWS
    return "gather" if few and ranks.local_world_size == ranks.world_size else "all_to_all"


def _positions_and_draws(config: RunConfig) -> tuple[int, int]:
    """A rank's most positions in a training batch without padding, and drawn items to score."""
    longest = config.windows.max_len * (1 + config.mask.two_stream)
    positions = config.loader.train_batch_size * longest
    if config.head.loss == "softmax":
        return positions, 0
    return positions, positions + config.negatives.train_negatives  # the targets, and the negatives


def table_lr(config: RunConfig, optimizer: str) -> float:
    """The tables' peak learning rate.

    Adagrad divides by the root of the sum of all squared gradients so far: its steps shrink from
    the start, and it needs a larger rate than Adam.
    """
    if config.sharding.embedding_lr is not None:
        return config.sharding.embedding_lr
    factor = 20 if "adagrad" in optimizer else 1
    return factor * config.optimizer.lr
