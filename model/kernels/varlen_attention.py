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

from model.kernels import varlen_kernels as kernels
from model.kernels.compiler import triton

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

    def calls(self, bounds: Tensor) -> dict[int, tuple[Tensor, Tensor, bool]]:
        """Starts of query rows and key rows, and whether causal, of each call that is needed."""
        left, others = bounds[0], bounds[1]
        both = self.starts.clamp(min=left, max=others)
        calls = {1: (both, both, False)}
        if self.left_only is not None:
            rows = self.starts.clamp(max=left)
            calls = {0: (rows, rows, True), **calls}
        if self.windows:
            queries = self.starts[self.windows : 2 * self.windows + 1].contiguous()
            calls[2] = queries, self.starts[: self.windows + 1].clamp(max=left), True
        return calls


def attend(
    projected: Tensor, rows: JaggedRows, rotation: Tensor | None, steps_ago: Tensor
) -> Tensor:
    """Attention of every position to its visible positions: [T, H, W], zeros for fillers.

    Args:
        projected: half precision [T, 3, H, W] on CUDA, contiguous: queries, keys, values.
        rotation: float32 [R, 2, W / 2], cosines and sines that rotate queries and keys; or None.
        steps_ago: int64 [T], each position's row of ``rotation``.
    """
    if not len(projected):
        return projected[:, 0]
    return _Attend.apply(projected, rows, rotation, steps_ago)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, rows: JaggedRows, rotation: Tensor | None, steps_ago: Tensor
    ) -> Tensor:
        positions, _, heads, width = projected.shape
        rotated = projected
        if rotation is not None:
            rotated = torch.empty_like(projected)
            given, sizes = (projected, rotation, steps_ago), (heads * width, width // 2)
            kernels.rotate[(positions,)](*given, rotated, *sizes)
        bounds = rows.bounds()
        outputs: list[Any] = [None] * 3
        sums: list[Any] = [None] * 3
        ctx.states = {}
        for number, (*row_starts, causal) in rows.calls(bounds).items():
            options = *row_starts, rows.longest, rows.longest, 0.0, causal, False
            outputs[number], sums[number], *states, _ = torch.ops.aten._flash_attention_forward(
                *rotated.unbind(1), *options
            )
            ctx.states[number] = states
        results = outputs[1], sums[1]
        if rows.left_only is not None:
            output = torch.empty_like(rotated[:, 0], memory_format=torch.contiguous_format)
            results = output, torch.empty(heads, positions, device=rotated.device)
            calls, sizes = (tuple(outputs), tuple(sums)), (heads, width)
            kernels.choose[(positions,)](
                rotated, calls, bounds, results, positions, width**-0.5, *sizes
            )
        ctx.save_for_backward(rotated, rotation, steps_ago, bounds, *results)
        ctx.rows = rows
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rotated, rotation, steps_ago, bounds, *results = ctx.saved_tensors
        grad, longest = grad.contiguous(), ctx.rows.longest
        found: list[Any] = [[None] * 3] * 3  # of queries, keys and values, for each call
        for number, (*row_starts, causal) in ctx.rows.calls(bounds).items():
            options = *row_starts, longest, longest, 0.0, causal, *ctx.states[number]
            gradients = torch.ops.aten._flash_attention_backward(
                grad, *rotated.unbind(1), *results, *options
            )
            found[number] = [gradient.contiguous() for gradient in gradients]
        positions, _, heads, width = rotated.shape
        gradient, kinds = torch.empty_like(rotated), tuple(zip(*found, strict=True))
        given, sizes = (*results, grad, bounds, rotation, steps_ago), (heads, width // 2)
        kernels.join[(positions,)](rotated, kinds, given, gradient, positions, width**-0.5, *sizes)
        return gradient, None, None, None
