"""The fused optimizer of the tables and AdamW of everything else, on one schedule."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from model.distributed import Ranks, separate_group
from model.execution import ExecutionPlan
from model.step.averaging import AveragingOptimizer, JoinedGradients
from model.step.clipping import ClippingOptimizer, NormSums
from model.step.config import OptimizerConfig
from model.step.flat_adamw import FlatAdamW, split_by_decay
from model.step.graphed_optimizer import GraphedOptimizer
from model.tables.distribute import replicated, unwrap


class _Dense(NamedTuple):
    """AdamW of the replicated parameters, ``stepped`` with what else a step does before it."""

    adamw: KeyedOptimizer
    stepped: KeyedOptimizer
    norms: NormSums | None


class Optimizers:
    """Both optimizers of a distributed model, with one ``step``.

    ``norms``: sums of the gradients' norm for the log; None without a limit of it.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        plan: ExecutionPlan,
        config: OptimizerConfig,
        ranks: Ranks,
    ) -> None:
        self._plan, self._config = plan, config
        self.peak_lr = config.lr  # the encoder's
        self.table_lr = 0.0  # of the next step
        self.tables = model.fused_optimizer
        parameters = replicated(model)
        # In ddp the tables are ordinary parameters with a separate learning rate.
        self._table_ids = {id(p) for n, p in parameters.items() if n.startswith("embeddings.")}
        # The encoder's learning rate, where the graph of an optimizer's step reads it.
        self._graphed_lr: Tensor | None = None
        if plan.has_static_gradients:
            self._graphed_lr = torch.tensor(config.lr, device=ranks.device)
        # Writes the learning rates, the encoder's too, where a graph of whole steps reads them.
        self._table = unwrap(model).embeddings if plan.graphs == "step" else None
        made = self._of_torch if self._table is None else self._flat
        self.dense, self._stepped, self.norms = made(parameters, ranks)
        self._has_gradients = False
        self.combined = CombinedOptimizer([("tables", self.tables), ("dense", self._stepped)])

    def _flat(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> _Dense:
        """For CUDA graphs of whole steps."""
        config, limit = self._config, self._config.max_grad_norm
        assert self._table is not None and not self._table_ids
        groups, lr = split_by_decay([*parameters.values()]), self._table.step_on_device.encoder_lr
        lr.fill_(config.lr)
        flat = FlatAdamW(*groups, lr, config.weight_decay, config.betas, limit)
        adamw = stepped = KeyedOptimizerWrapper(parameters, lambda _: flat)
        if self._plan.agrees_on_sizes:
            # In the graph it runs beside the exchange of the table's gradients.
            stepped = AveragingOptimizer(adamw, flat.gradients, separate_group(ranks))
        return _Dense(adamw, stepped, flat.norms if limit else None)

    def _of_torch(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> _Dense:
        """For other plans."""
        plan, limit = self._plan, self._config.max_grad_norm
        stepped: KeyedOptimizer
        adamw = stepped = KeyedOptimizerWrapper(
            parameters, lambda params: self._adamw(params, ranks.device)
        )
        joined = norms = None
        if plan.agrees_on_sizes or plan.exchange == "torchrec":  # averaged here, not by DDP
            joined = JoinedGradients([*parameters.values()])
        if limit:
            stepped = clipping = ClippingOptimizer(adamw, limit, joined)
            norms = clipping.norms
        if self._graphed_lr is not None:
            for group in adamw.param_groups:
                group["lr"] = self._graphed_lr
            stepped = GraphedOptimizer(stepped, [*parameters.values()])
        if joined is not None:
            stepped = AveragingOptimizer(stepped, joined)
        return _Dense(adamw, stepped, norms)

    def _adamw(self, params: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
        decayed, others = split_by_decay([p for p in params if id(p) not in self._table_ids])
        tables = [p for p in params if id(p) in self._table_ids]
        groups = [(decayed, self._config.weight_decay), (others, 0.0), (tables, 0.0)]
        return torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for group, decay in groups if group],
            lr=self._config.lr,
            betas=self._config.betas,
            eps=1e-8,
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
        )

    def __str__(self) -> str:
        if self._plan.is_replicated:
            return f"AdamW, lr {self._config.lr:g}, of tables {self._plan.table_lr:g}"
        tables = f"tables {self._plan.table_optimizer}, lr {self._plan.table_lr:g}"
        return f"encoder AdamW, lr {self._config.lr:g}, {tables}"

    def set_lr(self, factor: float) -> None:
        """Set all learning rates to ``factor`` times their peaks, effective at the next step."""
        self.table_lr = factor * self._plan.table_lr
        for group in self.tables.param_groups:
            group["lr"] = self.table_lr
        if self._table is not None:
            self._table.encoder_lr = factor * self._config.lr
            return
        if self._graphed_lr is not None:
            self._graphed_lr.fill_(factor * self._config.lr)
            return
        for group in self.dense.param_groups:
            is_table = id(group["params"][0]) in self._table_ids
            group["lr"] = self.table_lr if is_table else factor * self._config.lr

    def zero_grad(self) -> None:
        """Drop the last step's gradients; TorchRec passes the tables their learning rate here."""
        self.tables.zero_grad()
        if self._has_gradients:
            self._stepped.zero_grad(set_to_none=self._plan.graphs == "step")
            self._has_gradients = False

    def step(self) -> None:
        """Update everything but the tables, which the backward pass has updated."""
        self._stepped.step()
        self._has_gradients = True

    def materialise_state(self) -> None:
        """Create AdamW's state by a step with zero gradients; load a checkpoint afterwards."""
        self.dense.init_state()
        self.dense.zero_grad(set_to_none=True)
