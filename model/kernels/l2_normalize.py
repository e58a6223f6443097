"""Rows normalised to length 1 for cosine scores, and the gradient.

Plain torch makes four passes over memory for each; on CUDA each is one kernel and one pass.

Shapes: C rows, D width.
"""
# ruff: noqa: ANN001 - Triton would interpret a kernel's annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.compiler import launch, row_tiles, tl, triton

# Lower bound of the length by which a row is divided.
_SHORTEST = 1e-12


def sum_dtype(vectors: Tensor) -> torch.dtype:
    """The dtype of sums over ``vectors``: float32 at least."""
    return torch.promote_types(vectors.dtype, torch.float32)


def product_dtype(vectors: Tensor) -> torch.dtype:
    """The dtype of products of ``vectors``: autocast's, if it is on."""
    kind = vectors.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else vectors.dtype


def normalize_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [C, D] at length 1 in ``dtype``, and the inverses [C] of their lengths."""
    unit = torch.empty(rows.shape, dtype=dtype, device=rows.device)
    if _has_kernels(rows):
        inverse = torch.empty(len(rows), device=rows.device)
        _launch_by_rows(_normalize_rows, rows, unit, inverse)
        return unit, inverse
    inverse = torch.linalg.vector_norm(rows, dim=1, dtype=sum_dtype(rows))
    inverse = inverse.clamp_(min=_SHORTEST).reciprocal_()
    torch.mul(rows, inverse[:, None], out=unit)  # no float32 copy on the way to bfloat16
    return unit, inverse


def normalize_rows_gradient(mixed: Tensor, scale: Tensor, unit: Tensor, before: int = 0) -> Tensor:
    """The gradient for rows, [C, D] in the dtype of ``scale``, orthogonal to each row.

    Args:
        mixed: [C, D]; mixed x scale [C] is the gradient for ``unit`` divided by the rows' lengths.
        unit: [C, D], from :func:`normalize_rows`.
        before: values for which there is space before the gradient, for :func:`join_gradients`.
    """
    memory = torch.empty(before + unit.numel(), dtype=scale.dtype, device=unit.device)
    gradient = memory[before:].view(unit.shape)
    if _has_kernels(mixed) and scale.dtype == torch.float32:
        _launch_by_rows(_normalize_rows_gradient, mixed, scale.contiguous(), unit, gradient)
        return gradient
    torch.mul(mixed, scale[:, None], out=gradient)
    along = (gradient * unit).sum(dim=1, keepdim=True)
    return gradient.addcmul_(unit, along, value=-1)


def unit_rows(rows: Tensor) -> Tensor:
    """Float rows [C, D] at length 1, with their gradient."""
    return _Unit.apply(rows) if _has_kernels(rows) else F.normalize(rows, dim=-1)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        unit, inverse = normalize_rows(rows, rows.dtype)
        ctx.save_for_backward(unit, inverse)
        ctx.before = rows.storage_offset()
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, inverse = ctx.saved_tensors
        return normalize_rows_gradient(grad.contiguous(), inverse, unit, ctx.before)


def join_gradients(first: Tensor, second: Tensor) -> Tensor:
    """The gradient [T + C, D] of a tensor from the gradients of its two parts.

    The second is not copied if there is space for the first before it, as before a gradient of this
    module for rows that come after others in memory.
    """
    if not len(second):
        return first
    fits = second.is_contiguous() and second.storage_offset() == first.numel()
    if not fits or first.dtype != second.dtype:
        return torch.cat([first, second])
    shape = len(first) + len(second), *first.shape[1:]
    whole = second.as_strided(shape, second.stride(), 0)
    whole[: len(first)] = first
    return whole


def _has_kernels(rows: Tensor) -> bool:
    fits = rows.is_contiguous() and rows.numel() > 0 and rows.dtype != torch.float64
    fits = fits and rows.dim() == 2
    return triton is not None and rows.is_cuda and fits


def _launch_by_rows(kernel: Any, rows: Tensor, *others: Tensor) -> None:
    tiles, *tile = row_tiles(rows.shape, values=2048)
    launch(kernel, (tiles,), rows, *others, *rows.shape, *tile)


if triton is not None:
    _LEAST = tl.constexpr(_SHORTEST)

    @triton.jit
    def _normalize_rows(
        rows, unit, inverse, count, width, block: tl.constexpr, columns: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column = tl.arange(0, columns)
        at = row[:, None] * width + column
        inside = (row[:, None] < count) & (column < width)
        values = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(values * values, axis=1))
        shrunk = 1.0 / tl.maximum(length, _LEAST)
        tl.store(unit + at, values * shrunk[:, None], mask=inside)
        tl.store(inverse + row, shrunk, mask=row < count)

    @triton.jit
    def _normalize_rows_gradient(
        mixed, scale, unit, gradient, count, width, block: tl.constexpr, columns: tl.constexpr
    ) -> None:
        row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        column = tl.arange(0, columns)
        at = row[:, None] * width + column
        inside = (row[:, None] < count) & (column < width)
        factor = tl.load(scale + row, mask=row < count, other=0.0)
        values = tl.load(mixed + at, mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        direction = tl.load(unit + at, mask=inside, other=0.0).to(tl.float32)
        along = tl.sum(values * direction, axis=1)
        tl.store(gradient + at, values - direction * along[:, None], mask=inside)
