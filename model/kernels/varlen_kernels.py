"""What FlashAttention leaves to do around its calls, in Triton: one pass over memory each.

    rotate    queries and keys by the angles of their positions
    choose    each position's result from the call it belongs to; of second streams (see
              ``pipeline/training/two_stream.py``) what they see of the items and of themselves put together
    join      gradients likewise, and rotated back

A position's call follows from ``bounds``, int32 [3]: before the first it is one of a row with left
context alone (0), then one of another row (1), then one of a second stream (2), then a filler (3).
Memory that a call did not write is not read.

Shapes: T positions, H heads, W width of a head, and half of it.
"""
# ruff: noqa: ANN001, ANN202 - Triton takes annotations of a kernel for its own

import torch

from model.kernels.compiler import tl, triton

Calls = list[torch.Tensor | None]


def is_available() -> bool:
    """Whether the kernels are there; with CUDA they are."""
    return triton is not None


def rotate(
    projected: torch.Tensor, rotation: torch.Tensor, steps_ago: torch.Tensor
) -> torch.Tensor:
    """Queries and keys rotated by their positions' angles (arXiv 2104.09864), values as they are.

    Args:
        projected: [T, 3, H, W], contiguous.
        rotation: float32 [R, 2, W / 2], cosines and sines.
        steps_ago: int64 [T], each position's line of ``rotation``.
    """
    rotated = torch.empty_like(projected)
    positions, _, heads, width = projected.shape
    if positions:
        values = triton.next_power_of_2(heads * width)
        _rotate[(positions,)](
            projected, rotation, steps_ago, rotated, heads * width, width // 2, values
        )
    return rotated


def choose(
    rotated: torch.Tensor, outputs: Calls, sums: Calls, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives at each position.

    Args:
        rotated: [T, 3, H, W].
        outputs: [T, H, W] of the calls 0, 1 and 2, or None.
        sums: float32 [H, T] of the calls, log-sum-exp of the scores.
        bounds: see the module docstring.

    Returns:
        [T, H, W] and float32 [H, T]; of second streams with themselves among what they see.
    """
    positions, _, heads, width = rotated.shape
    output = torch.empty_like(rotated[:, 0], memory_format=torch.contiguous_format)
    log_sums = torch.empty(heads, positions, device=rotated.device)
    if positions:
        _choose[(positions,)](
            rotated,
            *_given(outputs, rotated),
            *_given(sums, log_sums),
            bounds,
            output,
            log_sums,
            positions,
            width**-0.5,
            heads,
            width,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(width),
            outputs[2] is not None,
        )
    return output, log_sums


def join(
    rotated: torch.Tensor,
    gradients: Calls,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    grad: torch.Tensor,
    bounds: torch.Tensor,
    rotation: torch.Tensor | None,
    steps_ago: torch.Tensor,
) -> torch.Tensor:
    """The gradient for what was to be rotated: [T, 3, H, W].

    Args:
        gradients: [T, H, W] for queries, keys and values of the calls 0, 1 and 2, nine in all; None
            where there was no such call.
        output, log_sums: what :func:`choose` returned.
        grad: [T, H, W], the gradient for the output.
        rotation: as for :func:`rotate`; None: nothing was rotated.
    """
    positions, _, heads, width = rotated.shape
    gradient = torch.empty_like(rotated)
    if positions:
        _join[(positions,)](
            rotated,
            *_given(gradients, rotated),
            output,
            log_sums,
            grad,
            bounds,
            bounds if rotation is None else rotation,
            steps_ago,
            gradient,
            positions,
            width**-0.5,
            heads,
            width // 2,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(width // 2),
            gradients[6] is not None,
            rotation is not None,
        )
    return gradient


def _given(tensors: Calls, other: torch.Tensor) -> list[torch.Tensor]:
    """A kernel wants some tensor even where it reads none."""
    return [other if tensor is None else tensor for tensor in tensors]


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
    def _call_of(position, bounds):
        """0, 1, 2 or 3."""
        call = (position >= tl.load(bounds)).to(tl.int32)
        call += (position >= tl.load(bounds + 1)).to(tl.int32)
        return call + (position >= tl.load(bounds + 2)).to(tl.int32)

    @triton.jit
    def _pick(first, second, third, at, inside, call, has_third: tl.constexpr):
        """The value of the position's own call; 0 of a filler."""
        found = tl.load(first + at, mask=inside & (call == 0), other=0.0).to(tl.float32)
        found += tl.load(second + at, mask=inside & (call == 1), other=0.0).to(tl.float32)
        if has_third:
            found += tl.load(third + at, mask=inside & (call == 2), other=0.0).to(tl.float32)
        return found

    @triton.jit
    def _choose(
        rotated,
        output_0,
        output_1,
        output_2,
        sums_0,
        sums_1,
        sums_2,
        bounds,
        output,
        log_sums,
        positions,
        scale,
        heads: tl.constexpr,
        width: tl.constexpr,
        padded_heads: tl.constexpr,
        padded_width: tl.constexpr,
        has_second: tl.constexpr,
    ) -> None:
        position = tl.program_id(0).to(tl.int64)
        call = _call_of(position, bounds)
        head, value = tl.arange(0, padded_heads), tl.arange(0, padded_width)
        is_head = head < heads
        inside = is_head[:, None] & (value < width)[None, :]
        within = head[:, None] * width + value[None, :]
        size = heads * width
        at, of_head = position * size + within, head * positions + position
        found = _pick(output_0, output_1, output_2, at, inside, call, has_second)
        sums = _pick(sums_0, sums_1, sums_2, of_head, is_head, call, has_second)
        if has_second:
            asks = inside & (call == 2)
            line = rotated + position * 3 * size + within
            query = tl.load(line, mask=asks, other=0.0).to(tl.float32)
            key = tl.load(line + size, mask=asks, other=0.0).to(tl.float32)
            own = tl.load(line + 2 * size, mask=asks, other=0.0).to(tl.float32)
            score = tl.sum(query * key, axis=1) * scale
            # A kernel that saw no item at all says infinity, and 0 for their mean.
            sums_of_items = tl.where(tl.abs(sums) < 1e30, sums, -1e30)
            top = tl.maximum(sums_of_items, score)
            total = top + tl.log(tl.exp(sums_of_items - top) + tl.exp(score - top))
            share = tl.exp(sums_of_items - total)
            mixed = found * share[:, None] + own * tl.exp(score - total)[:, None]
            found = tl.where(call == 2, mixed, found)
            sums = tl.where(call == 2, total, sums)
        tl.store(output + at, found, mask=inside)
        tl.store(log_sums + of_head, sums, mask=is_head)

    @triton.jit
    def _join(
        rotated,
        query_0,
        key_0,
        value_0,
        query_1,
        key_1,
        value_1,
        query_2,
        key_2,
        value_2,
        output,
        log_sums,
        grad,
        bounds,
        rotation,
        steps_ago,
        gradient,
        positions,
        scale,
        heads: tl.constexpr,
        half: tl.constexpr,
        padded_heads: tl.constexpr,
        padded_half: tl.constexpr,
        has_second: tl.constexpr,
        is_rotated: tl.constexpr,
    ) -> None:
        position = tl.program_id(0).to(tl.int64)
        call = _call_of(position, bounds)
        head, pair = tl.arange(0, padded_heads), tl.arange(0, padded_half)
        is_head = head < heads
        inside = is_head[:, None] & (pair < half)[None, :]
        within = head[:, None] * (2 * half) + pair[None, :]
        size = 2 * heads * half
        at = position * size + within  # of the first half of a head; the second follows
        query_low = _pick(query_0, query_1, query_2, at, inside, call, has_second)
        query_high = _pick(query_0, query_1, query_2, at + half, inside, call, has_second)
        key_low = _pick(key_0, key_1, key_1, at, inside, call, False)
        key_high = _pick(key_0, key_1, key_1, at + half, inside, call, False)
        value_low = _pick(value_0, value_1, value_1, at, inside, call, False)
        value_high = _pick(value_0, value_1, value_1, at + half, inside, call, False)
        line = position * 3 * size + within
        if has_second:
            # Rows with left context alone are also seen by their second streams.
            seen = inside & (call == 0)
            key_low += tl.load(key_2 + at, mask=seen, other=0.0).to(tl.float32)
            key_high += tl.load(key_2 + at + half, mask=seen, other=0.0).to(tl.float32)
            value_low += tl.load(value_2 + at, mask=seen, other=0.0).to(tl.float32)
            value_high += tl.load(value_2 + at + half, mask=seen, other=0.0).to(tl.float32)
            # And these see themselves: P = exp(score - log-sum-exp), dS = P (dO v - dO O).
            asks = inside & (call == 2)
            q_low = tl.load(rotated + line, mask=asks, other=0.0).to(tl.float32)
            q_high = tl.load(rotated + line + half, mask=asks, other=0.0).to(tl.float32)
            k_low = tl.load(rotated + line + size, mask=asks, other=0.0).to(tl.float32)
            k_high = tl.load(rotated + line + size + half, mask=asks, other=0.0).to(tl.float32)
            v_low = tl.load(rotated + line + 2 * size, mask=asks, other=0.0).to(tl.float32)
            v_high = tl.load(rotated + line + 2 * size + half, mask=asks, other=0.0).to(tl.float32)
            o_low = tl.load(output + at, mask=asks, other=0.0).to(tl.float32)
            o_high = tl.load(output + at + half, mask=asks, other=0.0).to(tl.float32)
            g_low = tl.load(grad + at, mask=asks, other=0.0).to(tl.float32)
            g_high = tl.load(grad + at + half, mask=asks, other=0.0).to(tl.float32)
            asking = is_head & (call == 2)
            sums = tl.load(log_sums + head * positions + position, mask=asking, other=0.0)
            score = tl.sum(q_low * k_low + q_high * k_high, axis=1) * scale
            share = tl.where(asking, tl.exp(score - sums), 0.0)
            along = tl.sum(g_low * (v_low - o_low) + g_high * (v_high - o_high), axis=1)
            slope = (share * along * scale)[:, None]
            query_low += slope * k_low
            query_high += slope * k_high
            key_low += slope * q_low
            key_high += slope * q_high
            value_low += share[:, None] * g_low
            value_high += share[:, None] * g_high
        if is_rotated:
            angle = rotation + tl.load(steps_ago + position) * 2 * half + pair
            cosine = tl.load(angle, mask=pair < half, other=0.0)[None, :]
            sine = tl.load(angle + half, mask=pair < half, other=0.0)[None, :]
            turned = query_low * cosine + query_high * sine
            query_high = query_high * cosine - query_low * sine
            query_low = turned
            turned = key_low * cosine + key_high * sine
            key_high = key_high * cosine - key_low * sine
            key_low = turned
        tl.store(gradient + line, query_low, mask=inside)
        tl.store(gradient + line + half, query_high, mask=inside)
        tl.store(gradient + line + size, key_low, mask=inside)
        tl.store(gradient + line + size + half, key_high, mask=inside)
        tl.store(gradient + line + 2 * size, value_low, mask=inside)
        tl.store(gradient + line + 2 * size + half, value_high, mask=inside)
