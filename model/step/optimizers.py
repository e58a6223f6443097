"""The fused optimizer of the tables and AdamW of everything else, on one schedule."""

import torch
from torch import Tensor
from torchrec.distributed import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from model.distributed import Ranks, separate_group
from model.execution import ExecutionPlan
from model.step.averaging import AveragingOptimizer, JoinedGradients
from model.step.clipping import ClippingOptimizer
from model.step.config import OptimizerConfig
from model.step.graphed_optimizer import GraphedOptimizer
from model.tables.distribute import replicated


class Optimizers:
    """Both optimizers of a distributed model, with one ``step``."""

    def __init__(
        self,
        model: DistributedModelParallel,
        plan: ExecutionPlan,
        config: OptimizerConfig,
        ranks: Ranks,
    ) -> None:
        self._plan, self._config, self._ranks = plan, config, ranks
        device = ranks.device
        self.peak_lr = config.lr  # the encoder's
        self.table_lr = 0.0  # of the next step
        self.tables = model.fused_optimizer
        parameters = replicated(model)
        # In ddp the tables are ordinary parameters with a separate learning rate.
        self._table_ids = {id(p) for n, p in parameters.items() if n.startswith("embeddings.")}
        self.dense = KeyedOptimizerWrapper(parameters, lambda params: self._adamw(params, device))
        joined = None
        if plan.agrees_on_sizes or plan.exchange == "torchrec":  # averaged here, not by DDP
            joined = JoinedGradients(list(parameters.values()))
        stepped: KeyedOptimizer = self.dense
        self.clipping: ClippingOptimizer | None = None
        if config.max_grad_norm:
            self.clipping = ClippingOptimizer(self.dense, config.max_grad_norm, device, joined)
            stepped = self.clipping
        self._graphed_lr: Tensor | None = None  # where a CUDA graph reads it
        if plan.graphs == "step" or (plan.has_static_gradients and not self._table_ids):
            self._graphed_lr = torch.tensor(config.lr, device=device)
            for group in self.dense.param_groups:
                group["lr"] = self._graphed_lr
        self._stepped = self._wrapped(stepped, list(parameters.values()), joined)
        self._has_gradients = False
        self.combined = CombinedOptimizer([("tables", self.tables), ("dense", self._stepped)])

    def _adamw(self, params: list[Tensor], device: torch.device) -> torch.optim.Optimizer:
        dense = [p for p in params if id(p) not in self._table_ids]
        tables = [p for p in params if id(p) in self._table_ids]
        groups = [
            ([p for p in dense if p.ndim > 1], self._config.weight_decay),
            ([p for p in dense if p.ndim <= 1], 0.0),
            (tables, 0.0),
        ]
        return torch.optim.AdamW(
            [{"params": group, "weight_decay": decay} for group, decay in groups if group],
            lr=self._config.lr,
            betas=(0.9, self._config.beta2),
            eps=1e-8,
            fused=device.type == "cuda",
            capturable=device.type == "cuda",
        )

    def _wrapped(
        self,
        optimizer: KeyedOptimizer,
        parameters: list[torch.nn.Parameter],
        joined: JoinedGradients | None,
    ) -> KeyedOptimizer:
        """Add averaging over ranks and a CUDA graph to the optimizer, as planned."""
        plan = self._plan
        if self._graphed_lr is not None and plan.graphs != "step":
            optimizer = GraphedOptimizer(optimizer, parameters)
        if joined is not None:
            # In a graph of the whole step, it runs beside the exchange of the table's gradients.
            group = separate_group(self._ranks) if plan.graphs == "step" else None
            optimizer = AveragingOptimizer(optimizer, joined, group)
        return optimizer

    def __str__(self) -> str:
        if self._plan.is_replicated:
            return f"AdamW, lr {self._config.lr:g}"
        tables = f"tables {self._plan.table_optimizer}, lr {self._plan.table_lr:g}"
        return f"encoder AdamW, lr {self._config.lr:g}, {tables}"

    def set_lr(self, factor: float) -> None:
        """Set all learning rates to ``factor`` times their peaks, effective at the next step."""
        self.table_lr = factor * self._plan.table_lr
        for group in self.tables.param_groups:
            group["lr"] = self.table_lr
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
