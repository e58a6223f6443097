"""FlashAttention over rows of different lengths and kinds in one batch.

    projected [T, 3, H, W]  queries, keys, values of all positions -> rotate
      call 0   causal, over the rows with left context only, which come first
      call 1   both ways, over the other rows
      call 2   causal, from second streams (queries) to the rows with left context only (keys); a
               query row is one longer than its key row: a query's keys are strictly before it
    -> choose -> attended [T, H, W]

In each call the rows of the other calls are empty. Backward: the same calls, then ``join``.

A second stream's position also attends to itself. ``choose`` adds that. FlashAttention's backward
pass is correct for its keys, given output and log-sum-exp over all visible keys.

Shapes: B rows, T positions of all rows, H heads, W width of a head, V windows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.compiler import triton
from model.kernels.varlen_kernels import Calls, choose, join, rotate

# Head widths that FlashAttention has kernels for.
_WIDEST, _STEP = 256, 8


def takes(width: int) -> bool:
    """Whether there is a kernel for heads of this width."""
    return triton is not None and width <= _WIDEST and width % _STEP == 0


@dataclass(frozen=True)
class JaggedRows:
    """Boundaries and kinds of the rows."""

    starts: Tensor  # int32 [B + 1], where rows begin, and T
    longest: int  # an upper bound of the rows' lengths
    # Bool [V], which of the first V rows have left context only (these come first); None: no row.
    left_only: Tensor | None = None
    windows: int = 0  # V if rows V ... 2 V - 1 are second streams, else 0

    def bounds(self) -> Tensor:
        """int32 [3], the positions where call 1, call 2 and fillers begin."""
        ends = [self.windows, 2 * self.windows] if self.windows else [-1, -1]
        left = self.starts.new_zeros(1, dtype=torch.int64)
        if self.left_only is not None:
            left = self.left_only.sum()[None]
        return torch.cat([self.starts.index_select(0, left), *(self.starts[e][None] for e in ends)])

    def calls(self, bounds: Tensor) -> list[tuple[Tensor, Tensor, bool] | None]:
        """Starts of query rows and key rows, and whether causal, of each call; None: not needed."""
        left, others = bounds[0], bounds[1]
        both = self.starts.clamp(min=left, max=others)
        first = second = None
        if self.left_only is not None:
            rows = self.starts.clamp(max=left)
            first = (rows, rows, True)
        if self.windows:
            queries = self.starts[self.windows : 2 * self.windows + 1].contiguous()
            second = (queries, self.starts[: self.windows + 1].clamp(max=left), True)
        return [first, (both, both, False), second]


def attend(
    projected: Tensor, rows: JaggedRows, rotation: Tensor | None, steps_ago: Tensor
) -> Tensor:
    """Attention of every position to its visible positions: [T, H, W], zeros for fillers.

    Args:
        projected: half precision [T, 3, H, W] on CUDA, contiguous: queries, keys, values.
        rotation: float32 [R, 2, W / 2], cosines and sines that rotate queries and keys; or None.
        steps_ago: int64 [T], each position's row of ``rotation``.
    """
    return _Attend.apply(projected, rows, rotation, steps_ago)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rows: JaggedRows, rotation: Tensor | None, steps_ago: Tensor
    ) -> Tensor:
        rotated = projected if rotation is None else rotate(projected, rotation, steps_ago)
        bounds = rows.bounds()
        outputs: list[Any] = [None] * 3
        sums: list[Any] = [None] * 3
        ctx.states = [None] * 3
        for number, call in enumerate(rows.calls(bounds)):
            if call is not None:
                *row_starts, causal = call
                options = *row_starts, rows.longest, rows.longest, 0.0, causal, False
                outputs[number], sums[number], *states, _ = torch.ops.aten._flash_attention_forward(
                    *rotated.unbind(1), *options
                )
                ctx.states[number] = states
        output, log_sums = outputs[1], sums[1]
        if rows.left_only is not None:
            output, log_sums = choose(rotated, outputs, sums, bounds)
        ctx.save_for_backward(rotated, rotation, steps_ago, bounds, output, log_sums)
        ctx.rows = rows
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rotated, rotation, steps_ago, bounds, output, log_sums = ctx.saved_tensors
        grad, longest = grad.contiguous(), ctx.rows.longest
        given = grad, *rotated.unbind(1), output, log_sums
        found: Calls = []
        for call, states in zip(ctx.rows.calls(bounds), ctx.states, strict=True):
            if call is None:
                found += [None] * 3
                continue
            *row_starts, causal = call
            options = *row_starts, longest, longest, 0.0, causal, *states
            gradients = torch.ops.aten._flash_attention_backward(*given, *options)
            found += [gradient.contiguous() for gradient in gradients]
        gradient = join(rotated, found, output, log_sums, grad, bounds, rotation, steps_ago)
        return gradient, None, None, None
