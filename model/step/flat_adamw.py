"""AdamW whose parameters, moments and gradients are views of one tensor each.

For steps that are one CUDA graph: two kernels clip and update (``model/step/adamw_kernels.py``).
The state is that of ``torch.optim.AdamW``: checkpoints are the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.step.adamw_kernels import Moments, update
from model.step.averaging import JoinedGradients
from model.step.clipping import NormSums


def split_by_decay(
    parameters: list[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those with weight decay: matrices; and the others: biases, norms."""
    matrices = [p for p in parameters if p.ndim > 1]
    return matrices, [p for p in parameters if p.ndim <= 1]


class FlatAdamW(torch.optim.AdamW):
    """AdamW on CUDA of float32 parameters, which it moves into one tensor.

    A step joins the gradients in ``gradients``, clips them and adds their norm to ``norms``.

    Args:
        decayed, others: parameters with weight decay, and without.
        lr: float32 scalar, which kernels read.
        limit: of the L2 norm of all gradients as one vector; 0: none.
    """

    def __init__(
        self,
        decayed: list[nn.Parameter],
        others: list[nn.Parameter],
        lr: Tensor,
        weight_decay: float,
        betas: tuple[float, float],
        limit: float,
    ) -> None:
        groups = [(decayed, weight_decay), (others, 0.0)]
        super().__init__(
            [{"params": params, "weight_decay": decay} for params, decay in groups if params],
            betas=betas,
            eps=1e-8,
            capturable=True,
        )
        for group in self.param_groups:  # torch would compare a given one, and wait for it
            group["lr"] = lr
        self._decay, self._limit = weight_decay, limit or float("inf")
        parameters = [*decayed, *others]
        self.gradients = JoinedGradients(parameters)
        flat = self.gradients.flat
        self._weights, self._first, self._second = (torch.zeros_like(flat) for _ in range(3))
        self._steps = flat.new_zeros(len(parameters))
        self._betas = torch.tensor(betas, dtype=torch.float64, device=flat.device)
        self.norms = NormSums(flat.device)
        kept = zip(
            parameters,
            *map(self.gradients.views, (self._weights, self._first, self._second)),
            self._steps,
            strict=True,
        )
        for parameter, weight, first, second, step in kept:
            weight.copy_(parameter.detach())
            parameter.data = weight
            self.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self._decayed = self.gradients.size(len(decayed))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        self.gradients.join()
        self._steps += 1
        group = self.param_groups[0]
        moments = Moments(
            self._weights,
            self.gradients.flat,
            self._first,
            self._second,
            group["lr"],
            1 - self._betas ** self._steps[0].double(),
        )
        rest = self._limit, self._decayed, self._decay, group["betas"], group["eps"]
        update(moments, self.norms.values, *rest)
