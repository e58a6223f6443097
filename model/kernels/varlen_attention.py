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

Shapes: B rows, L longest row, T positions of all rows, H heads, W width of a head, V windows.
"""

from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import varlen_kernels as kernels
from model.kernels.compiler import launch, triton

# Head widths that FlashAttention has kernels for.
_WIDEST, _STEP = 256, 8


def takes(width: int) -> bool:
    """Whether there is a kernel for heads of this width."""
    return triton is not None and width <= _WIDEST and width % _STEP == 0


class RowLayout:
    """The rows of a jagged batch, and which positions attend to which.

    Positions are counted from the row's end: index 0 is the newest item.

    Args:
        offsets: int64 [B + 1], starts of the rows in the packed positions.
        num_positions: T, known on the host.
        longest: L, at least the length of every row.
        left_only: bool [V], whether each of the first V rows has only left context (a position
            attends to itself and earlier ones); these rows come first. None: no row has.
        steps_ago: int64 [T], position indices, if the batch has second streams. Then rows
            V ... 2 V - 1 are second streams, each one position longer than its window's row v:
            position t attends to itself and to the first t positions of row v; no other position
            attends to it. None: the index is the distance from the row's end.
    """

    def __init__(
        self,
        offsets: Tensor,
        num_positions: int,
        longest: int,
        left_only: Tensor | None = None,
        steps_ago: Tensor | None = None,
    ) -> None:
        self.offsets, self.rows, self.longest = offsets, offsets.numel() - 1, longest
        self.left_only = left_only
        self.positions = num_positions
        self.steps_ago = self.from_end if steps_ago is None else steps_ago
        self.rotation: Tensor | None = None  # that of :meth:`turned`
        # V where there are second streams, else 0.
        self.windows = 0 if steps_ago is None or left_only is None else left_only.numel()

    def turned(self, rotation: Tensor) -> "RowLayout":
        """The same with rotations of positions, float [T, 2, W / 2], in place of the layers'."""
        layout = copy(self)
        layout.rotation = rotation
        return layout

    @cached_property
    def row(self) -> Tensor:
        """int64 [T], the row of each position."""
        # T from the host: no synchronisation.
        return torch.repeat_interleave(self.offsets.diff(), output_size=self.positions)

    @cached_property
    def place(self) -> Tensor:
        """int64 [T]: 0, 1, ..."""
        return torch.arange(self.positions, device=self.offsets.device)

    @cached_property
    def from_end(self) -> Tensor:
        """int64 [T], the distance of each position from its row's end."""
        if triton is None or not self.offsets.is_cuda or not self.rows:
            return self.offsets[1:][self.row] - self.place - 1
        found = self.offsets.new_empty(self.positions)
        launch(kernels.from_end, (self.rows,), self.offsets, found)
        return found

    # The calls of FlashAttention, the same in every layer.

    @cached_property
    def starts(self) -> Tensor:
        """The offsets, int32."""
        return self.offsets.int()

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [3], where call 1, call 2 and fillers begin."""
        starts = self.starts
        ends = [self.windows, 2 * self.windows] if self.windows else [-1, -1]
        left = starts.new_zeros(1, dtype=torch.int64)
        if self.left_only is not None:
            left = self.left_only.sum()[None]
        return torch.cat([starts.index_select(0, left), *(starts[end][None] for end in ends)])

    @cached_property
    def calls(self) -> dict[int, tuple[Tensor, Tensor, bool]]:
        """Starts of query rows and key rows, and whether causal, of each call that is needed."""
        starts, left, others = self.starts, self.bounds[0], self.bounds[1]
        both = starts.clamp(min=left, max=others)
        calls = {1: (both, both, False)}
        if self.left_only is not None:
            rows = starts.clamp(max=left)
            calls = {0: (rows, rows, True), **calls}
        if self.windows:
            queries = starts[self.windows : 2 * self.windows + 1].contiguous()
            calls[2] = queries, starts[: self.windows + 1].clamp(max=left), True
        return calls


def attend(projected: Tensor, layout: RowLayout, rotation: Tensor | None, row: Tensor) -> Tensor:
    """Attention of every position to its visible positions: [T, H, W], zeros for fillers.

    Args:
        projected: half precision [T, 3, H, W] on CUDA, contiguous: queries, keys, values.
        rotation: float32 [R, 2, W / 2], cosines and sines that rotate queries and keys; or None.
        row: int64 [T], that of ``rotation`` for each position.
    """
    return _Attend.apply(projected, layout, rotation, row)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, layout: RowLayout, rotation: Tensor | None, row: Tensor
    ) -> Tensor:
        rotated = projected
        positions, _, heads, width = projected.shape
        if rotation is not None:
            rotated = torch.empty_like(projected)
            given, sizes = (projected, rotation, row), (heads * width, width // 2)
            launch(kernels.rotate, (positions,), *given, rotated, *sizes)
        bounds = layout.bounds
        outputs: list[Any] = [None] * 3
        sums: list[Any] = [None] * 3
        ctx.states = {}
        for number, (*row_starts, causal) in layout.calls.items():
            options = *row_starts, layout.longest, layout.longest, 0.0, causal, False
            outputs[number], sums[number], *states, _ = torch.ops.aten._flash_attention_forward(
                *rotated.unbind(1), *options
            )
            ctx.states[number] = states
        results = outputs[1], sums[1]
        if layout.left_only is not None:
            output = torch.empty_like(rotated[:, 0], memory_format=torch.contiguous_format)
            results = output, torch.empty(heads, positions, device=rotated.device)
            calls, sizes = (tuple(outputs), tuple(sums)), (heads, width)
            rest = bounds, results, positions, width**-0.5, *sizes
            launch(kernels.choose, (positions,), rotated, calls, *rest)
        ctx.save_for_backward(rotated, rotation, row, *results)
        ctx.layout = layout
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rotated, rotation, row, *results = ctx.saved_tensors
        layout: RowLayout = ctx.layout
        grad, longest = grad.contiguous(), layout.longest
        found: list[Any] = [[None] * 3] * 3  # of queries, keys and values, for each call
        for number, (*row_starts, causal) in layout.calls.items():
            options = *row_starts, longest, longest, 0.0, causal, *ctx.states[number]
            gradients = torch.ops.aten._flash_attention_backward(
                grad, *rotated.unbind(1), *results, *options
            )
            found[number] = [gradient.contiguous() for gradient in gradients]
        positions, _, heads, width = rotated.shape
        gradient, kinds = torch.empty_like(rotated), tuple(zip(*found, strict=True))
        given = *results, grad, layout.bounds, rotation, row
        sizes = heads, width // 2
        rest = given, gradient, positions, width**-0.5, *sizes
        launch(kernels.join, (positions,), rotated, kinds, *rest)
        return gradient, None, None, None
