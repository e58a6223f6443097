"""FlashAttention over rows as they lie one after the other, some of them with left context alone.

    projected [T, 3, H, W]  q k v of all positions
      rotate q and k                                        one pass (Triton)
      causal attention over the rows with left context alone, which stand first;
      attention both ways over the others                   to either, rows of the other are empty
      each position's result from the call that it belongs to
    attended [T, H, W]

Backward likewise: two calls, and one pass that takes each position's gradient from its own call and
rotates it back. Neither call writes what lies outside its rows: whatever that memory holds is never
selected. After ``torch.nn.attention.varlen``, which calls the same operators for rows of one kind.

Shapes: B rows, L longest row, T positions of all rows, H heads, W width of a head.
"""
# ruff: noqa: ANN001 - Triton takes annotations of a kernel for its own

from typing import Any

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds come without it
    triton = None


def is_available() -> bool:
    """Whether the kernels are there; with CUDA they are."""
    return triton is not None


def attend(
    projected: torch.Tensor,
    starts: torch.Tensor,
    split: torch.Tensor | None,
    longest: int,
    rotation: torch.Tensor | None,
    steps_ago: torch.Tensor,
) -> torch.Tensor:
    """Attention of every position to the positions of its row that it may see.

    Args:
        projected: half precision [T, 3, H, W] on CUDA, contiguous: queries, keys, values.
        starts: int32 [B + 1], where rows begin, and T.
        split: int32 [1], where the rows with left context alone end; None: there are none.
        longest: L.
        rotation: float32 [R, 2, W / 2], cosines and sines that queries and keys are rotated by;
            None: they are not.
        steps_ago: int64 [T], each position's line of ``rotation``.

    Returns:
        [T, H, W].
    """
    return _Attend.apply(projected, starts, split, longest, rotation, steps_ago)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: torch.Tensor,
        starts: torch.Tensor,
        split: torch.Tensor | None,
        longest: int,
        rotation: torch.Tensor | None,
        steps_ago: torch.Tensor,
    ) -> torch.Tensor:
        rotated = projected
        if rotation is not None:
            rotated = torch.empty_like(projected)
            _launch(_rotate, projected, (projected, rotation, steps_ago, rotated))
        query, key, value = rotated.unbind(1)
        outputs, sums, states = [], [], []
        for rows, causal in _calls(starts, split):
            output, log_sums, state, unused, _ = torch.ops.aten._flash_attention_forward(
                query, key, value, rows, rows, longest, longest, 0.0, causal, False
            )
            outputs.append(output)
            sums.append(log_sums)
            states += [state, unused]
        output, log_sums = outputs[0], sums[0]
        if split is not None:
            is_left = torch.arange(len(projected), device=projected.device) < split
            output = torch.where(is_left[:, None, None], *outputs)
            log_sums = torch.where(is_left, *sums)  # [H, T]
        ctx.save_for_backward(rotated, starts, split, rotation, steps_ago, output, log_sums)
        ctx.longest, ctx.states = longest, states
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rotated, starts, split, rotation, steps_ago, output, log_sums = ctx.saved_tensors
        query, key, value = rotated.unbind(1)
        found: list[torch.Tensor] = []
        for number, (rows, causal) in enumerate(_calls(starts, split)):
            found += torch.ops.aten._flash_attention_backward(
                grad.contiguous(),
                query,
                key,
                value,
                output,
                log_sums,
                rows,
                rows,
                ctx.longest,
                ctx.longest,
                0.0,
                causal,
                *ctx.states[2 * number : 2 * number + 2],
            )
        found = [each.contiguous() for each in found]
        left = found[:3] if split is not None else found[-3:]
        # What a kernel does not use must be some tensor all the same.
        table, end = (starts if each is None else each for each in (rotation, split))
        gradient = torch.empty_like(rotated)
        _launch(
            _join,
            rotated,
            (*left, *found[-3:], table, steps_ago, end, gradient),
            rotated_back=rotation is not None,
            has_left=split is not None,
        )
        return gradient, None, None, None, None, None


def _calls(starts: torch.Tensor, split: torch.Tensor | None) -> list[tuple[torch.Tensor, bool]]:
    """The rows of each call to FlashAttention, and whether it is causal."""
    if split is None:
        return [(starts, False)]
    return [(torch.minimum(starts, split), True), (torch.maximum(starts, split), False)]


def _launch(
    kernel: Any, projected: torch.Tensor, tensors: tuple[torch.Tensor, ...], **more: bool
) -> None:
    """One program for each position."""
    positions, _, heads, width = projected.shape
    if positions:
        values = triton.next_power_of_2(heads * width)
        kernel[(positions,)](*tensors, heads * width, width // 2, values, **more)


if triton is not None:

    @triton.jit
    def _rotate(
        projected,
        rotation,
        steps_ago,
        rotated,
        size: tl.constexpr,
        half: tl.constexpr,
        values: tl.constexpr,
    ) -> None:
        position = tl.program_id(0).to(tl.int64)
        step = tl.load(steps_ago + position)
        # Pairs of q and k: value i of the first half of a head and value i of the second.
        pair = tl.arange(0, values)
        inside = pair < size
        at = position * 3 * size + (pair // half) * 2 * half + pair % half
        angle = rotation + step * 2 * half + pair % half
        cosine = tl.load(angle, mask=inside, other=0.0)
        sine = tl.load(angle + half, mask=inside, other=0.0)
        low = tl.load(projected + at, mask=inside, other=0.0).to(tl.float32)
        high = tl.load(projected + at + half, mask=inside, other=0.0).to(tl.float32)
        tl.store(rotated + at, low * cosine - high * sine, mask=inside)
        tl.store(rotated + at + half, low * sine + high * cosine, mask=inside)
        value = position * 3 * size + 2 * size + pair
        tl.store(rotated + value, tl.load(projected + value, mask=inside), mask=inside)

    @triton.jit
    def _join(
        left_query,
        left_key,
        left_value,
        query,
        key,
        value,
        rotation,
        steps_ago,
        split,
        gradient,
        size: tl.constexpr,
        half: tl.constexpr,
        values: tl.constexpr,
        rotated_back: tl.constexpr,
        has_left: tl.constexpr,
    ) -> None:
        position = tl.program_id(0).to(tl.int64)
        index = tl.arange(0, values)
        inside = index < size
        is_left = False
        if has_left:
            is_left = position < tl.load(split)
        use_left, use_other = inside & is_left, inside & (not is_left)
        base = position * size
        if rotated_back:
            step = tl.load(steps_ago + position)
            pair = tl.arange(0, values // 2)
            paired = pair < size // 2
            pair_left, pair_other = paired & is_left, paired & (not is_left)
            within = base + (pair // half) * 2 * half + pair % half
            angle = rotation + step * 2 * half + pair % half
            cosine = tl.load(angle, mask=paired, other=0.0)
            sine = tl.load(angle + half, mask=paired, other=0.0)
            target = gradient + 2 * base + within
            for part in tl.static_range(2):
                one = left_query if part == 0 else left_key
                other = query if part == 0 else key
                low = tl.load(one + within, mask=pair_left, other=0.0).to(tl.float32)
                low += tl.load(other + within, mask=pair_other, other=0.0).to(tl.float32)
                high = tl.load(one + within + half, mask=pair_left, other=0.0).to(tl.float32)
                high += tl.load(other + within + half, mask=pair_other, other=0.0).to(tl.float32)
                tl.store(target + part * size, low * cosine + high * sine, mask=paired)
                tl.store(target + part * size + half, high * cosine - low * sine, mask=paired)
        else:
            for part in tl.static_range(2):
                one = left_query if part == 0 else left_key
                other = query if part == 0 else key
                found = tl.load(one + base + index, mask=use_left, other=0.0)
                found += tl.load(other + base + index, mask=use_other, other=0.0)
                tl.store(gradient + 3 * base + part * size + index, found, mask=inside)
        found = tl.load(left_value + base + index, mask=use_left, other=0.0)
        found += tl.load(value + base + index, mask=use_other, other=0.0)
        tl.store(gradient + 3 * base + 2 * size + index, found, mask=inside)
