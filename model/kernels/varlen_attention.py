"""Attention over rows of different lengths and kinds in one batch, packed without padding.

    projected [T, 3, H, W]   queries, keys, values of all positions
      rows with left context only   a position sees itself and those before it in its row
      other rows                    a position sees its row
      second streams                a position sees itself and those before it in its window's row
      fillers                       a position sees itself
    -> attended [T, H, W]

The kernels (:mod:`model.kernels.varlen_kernels`) of a layer: one rotates queries and keys, if
positions are rotary, and one attends; backward, one computes the gradient of the queries, and one
those of keys and values. No score of a query and a key is stored, and no padding.

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

# Positions of a program's tile, and its warps. The keys of a row are read once for each of its
# tiles: tiles of long rows are larger. Of seven, (16, 1) to (128, 8), these were the fastest on an
# H200, or within 3 %, for rows of 4 to 170 positions and heads of 32 to 128; wider heads were not
# measured.
_SHORT, _LONG, _WIDE = (16, 1), (64, 4), (16, 4)
_LONG_ROW, _NARROW, _MIDDLE, _WIDEST = 128, 64, 128, 256


def takes(width: int) -> bool:
    """Whether the kernels take heads of this width."""
    return triton is not None and width <= _WIDEST and width % 2 == 0


def tile(positions: int, rows: int, width: int) -> tuple[int, int]:
    """Positions and warps of a program, for so many positions in so many rows."""
    if width > _MIDDLE:
        return _WIDE
    return _LONG if positions > rows * _LONG_ROW and width <= _NARROW else _SHORT


class RowLayout:
    """The rows of a jagged batch, and which positions attend to which.

    Position indices are counted from the row's end: index 0 is the newest item.

    Args:
        offsets: int64 [B + 1], starts of the rows in the packed positions.
        num_positions: T, known on the host.
        longest: L, at least the length of every row.
        left_only: bool [V], whether each of the first V rows, the windows, has only left context
            (a position attends to itself and earlier ones). None: no row has, and all are windows.
            Rows after windows and second streams are fillers, whose results nothing reads.
        steps_ago: int64 [T], position indices, if the batch has second streams. Then rows
            V ... 2 V - 1 are those of the windows: empty, or one position longer than the window's
            row v. Position t attends to itself and to the first t positions of row v; no other
            position attends to it. None: the index is the distance from the row's end.
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
        """The same with a rotation of each position, float [T, 2, W / 2], not the layers'."""
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
        """int64 [T], the place of each position in the packed positions: 0, 1, ..."""
        return torch.arange(self.positions, device=self.offsets.device)

    @cached_property
    def from_end(self) -> Tensor:
        """int64 [T], the distance of each position from its row's end."""
        if triton is None or not self.offsets.is_cuda or not self.rows:
            return self.offsets[1:][self.row] - self.place - 1
        found = self.offsets.new_empty(self.positions)
        launch(kernels.from_end, (self.rows,), self.offsets, found)
        return found

    @cached_property
    def spans(self) -> Tensor:
        """int32 [6, T], as of the kernel; the same in every layer."""
        found = self.offsets.new_zeros(6, self.positions, dtype=torch.int32)
        left_only, windows = self.left_only, self.rows
        if left_only is not None:  # in a batch, flags are apart from each other in memory
            left_only, windows = left_only.contiguous(), left_only.numel()
        if windows:
            given = self.offsets, left_only, found, self.positions, bool(self.windows)
            launch(kernels.spans, (windows,), *given)
        return found


def attend(projected: Tensor, layout: RowLayout, rotation: Tensor | None, row: Tensor) -> Tensor:
    """Attention of every position to its visible positions: [T, H, W].

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
        positions, _, heads, width = projected.shape
        rotated = projected
        if rotation is not None:
            rotated = torch.empty_like(projected[:, :2], memory_format=torch.contiguous_format)
            given, sizes = (projected, rotation, row), (heads * width, width // 2)
            launch(kernels.rotate, (positions,), *given, rotated, *sizes)
        output = projected.new_empty(positions, heads, width)
        log_sums = torch.empty(heads, positions, device=projected.device)
        vectors = rotated, projected
        _launch(kernels.attend, layout, vectors, output, log_sums)
        ctx.save_for_backward(*vectors, output, log_sums, rotation, row)
        ctx.layout = layout
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rotated, projected, output, log_sums, *turns = ctx.saved_tensors
        gradient = torch.empty_like(projected)
        results = output, log_sums, grad.contiguous(), torch.empty_like(log_sums)
        for kernel in (kernels.query_gradient, kernels.key_gradient):
            vectors = rotated, projected
            _launch(kernel, ctx.layout, vectors, results, tuple(turns), gradient)
        return gradient, None, None, None


def _launch(
    kernel: Any, layout: RowLayout, vectors: tuple[Tensor, Tensor], *arguments: Any
) -> None:
    """Launch a kernel for queries and keys [T, 2 or 3, H, W] and projections [T, 3, H, W]."""
    positions, vectors_each, heads, width = vectors[0].shape
    size, (count, warps) = heads * width, tile(positions, layout.rows, width)
    sizes = kernels.Sizes(
        size=size,
        line=vectors_each * size,
        half=width // 2,
        columns=max(16, triton.next_power_of_2(width // 2)),  # ``tl.dot`` takes no fewer than 16
        tile=count,
        parts=1 + bool(layout.windows),
    )
    grid = triton.cdiv(positions, count), heads
    given = vectors, layout.spans, *arguments, positions, width**-0.5
    launch(kernel, grid, *given, sizes, num_warps=warps)
