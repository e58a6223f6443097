"""The Triton kernels around the calls of FlashAttention in :mod:`model.kernels.varlen_attention`.

``bounds``, int32 [3], gives the call of each position: those before bounds[0] belong to call 0
(rows with left context only), then come call 1 (other rows), call 2 (second streams, see
``pipeline/training/two_stream.py``), fillers (3). Memory that a call did not write is not read.

Shapes: T positions, H heads, W width of a head (``half`` is W / 2).
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from model.kernels.compiler import tl, triton

if triton is not None:
    _BLOCK = tl.constexpr(64)

    @triton.jit
    def from_end(offsets, found) -> None:
        """The distance of each position from its row's end."""
        row = offsets + tl.program_id(0)
        first, end = tl.load(row), tl.load(row + 1)
        while first < end:
            at = first + tl.arange(0, _BLOCK)
            tl.store(found + at, end - 1 - at, mask=at < end)
            first += _BLOCK

    @triton.jit
    def rotate(
        projected, rotation, steps_ago, rotated, size: tl.constexpr, half: tl.constexpr
    ) -> None:
        """Queries and keys rotated by their positions' angles (arXiv 2104.09864), values copied."""
        position = tl.program_id(0).to(tl.int64)
        step = tl.load(steps_ago + position)
        # Pairs of q and k: value i of the first half of a head and value i of the second.
        pair = tl.arange(0, triton.next_power_of_2(size))
        inside = pair < size
        at = position * 3 * size + (pair // half) * 2 * half + pair % half
        angle = rotation + step * 2 * half + pair % half
        cosine = tl.load(angle, mask=inside, other=0.0)
        sine = tl.load(angle + half, mask=inside, other=0.0)
        low = _load(projected + at, inside)
        high = _load(projected + at + half, inside)
        tl.store(rotated + at, low * cosine - high * sine, mask=inside)
        tl.store(rotated + at + half, low * sine + high * cosine, mask=inside)
        value = position * 3 * size + 2 * size + pair
        tl.store(rotated + value, tl.load(projected + value, mask=inside), mask=inside)

    @triton.jit
    def _load(pointers, mask):
        """Values as float32, 0 outside the mask."""
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)

    @triton.jit
    def _call_of(position, bounds):
        """0, 1, 2 or 3."""
        call = (position >= tl.load(bounds)).to(tl.int32)
        call += (position >= tl.load(bounds + 1)).to(tl.int32)
        return call + (position >= tl.load(bounds + 2)).to(tl.int32)

    @triton.jit
    def _pick(parts, calls: tl.constexpr, at, inside, call):
        """The values ``at`` from the position's call if it is below ``calls``, else zeros."""
        found = _load(parts[1] + at, inside & (call == 1))
        if parts[0] is not None:
            found += _load(parts[0] + at, inside & (call == 0))
        if calls == 3 and parts[2] is not None:
            found += _load(parts[2] + at, inside & (call == 2))
        return found

    @triton.jit
    def choose(
        rotated, calls, bounds, results, positions, scale, heads: tl.constexpr, width: tl.constexpr
    ) -> None:
        """Output [T, H, W] and log-sum-exp [H, T] of each position's own call, from ``calls``.

        A second stream's position also attends to itself.
        """
        outputs, call_sums = calls
        output, log_sums = results
        position = tl.program_id(0).to(tl.int64)
        call = _call_of(position, bounds)
        head = tl.arange(0, triton.next_power_of_2(heads))
        value = tl.arange(0, triton.next_power_of_2(width))
        is_head = head < heads
        inside = is_head[:, None] & (value < width)[None, :]
        within = head[:, None] * width + value[None, :]
        size = heads * width
        at, of_head = position * size + within, head * positions + position
        found = _pick(outputs, 3, at, inside, call)
        sums = _pick(call_sums, 3, of_head, is_head, call)
        if outputs[2] is not None:
            second = inside & (call == 2)
            line = rotated + position * 3 * size + within
            query = _load(line, second)
            key = _load(line + size, second)
            own = _load(line + 2 * size, second)
            score = tl.sum(query * key, axis=1) * scale
            # FlashAttention without a key returns log-sum-exp infinity and output 0.
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
    def join(
        rotated, found, given, gradient, positions, scale, heads: tl.constexpr, half: tl.constexpr
    ) -> None:
        """The gradient, [T, 3, H, W], for queries, keys and values before the rotation, if any.

        ``found``: gradients of queries, of keys, of values; each by call, None without one.
        ``given``: the results of ``choose``, the gradient of its output, ``bounds``, the rotation.
        """
        queries, keys, values = found
        output, log_sums, grad, bounds, rotation, steps_ago = given
        position = tl.program_id(0).to(tl.int64)
        call = _call_of(position, bounds)
        head = tl.arange(0, triton.next_power_of_2(heads))
        pair = tl.arange(0, triton.next_power_of_2(half))
        is_head = head < heads
        inside = is_head[:, None] & (pair < half)[None, :]
        within = head[:, None] * (2 * half) + pair[None, :]
        size = 2 * heads * half
        at = position * size + within  # of the first half of a head; the second follows
        query_low = _pick(queries, 3, at, inside, call)
        query_high = _pick(queries, 3, at + half, inside, call)
        key_low = _pick(keys, 2, at, inside, call)
        key_high = _pick(keys, 2, at + half, inside, call)
        value_low = _pick(values, 2, at, inside, call)
        value_high = _pick(values, 2, at + half, inside, call)
        line = position * 3 * size + within
        if queries[2] is not None:
            # Second streams also attend to the rows with left context only.
            seen = inside & (call == 0)
            key_low += _load(keys[2] + at, seen)
            key_high += _load(keys[2] + at + half, seen)
            value_low += _load(values[2] + at, seen)
            value_high += _load(values[2] + at + half, seen)
            # And to themselves: P = exp(score - log-sum-exp), dS = P (dO v - dO O).
            second = inside & (call == 2)
            q_low = _load(rotated + line, second)
            q_high = _load(rotated + line + half, second)
            k_low = _load(rotated + line + size, second)
            k_high = _load(rotated + line + size + half, second)
            v_low = _load(rotated + line + 2 * size, second)
            v_high = _load(rotated + line + 2 * size + half, second)
            o_low = _load(output + at, second)
            o_high = _load(output + at + half, second)
            g_low = _load(grad + at, second)
            g_high = _load(grad + at + half, second)
            is_second = is_head & (call == 2)
            sums = tl.load(log_sums + head * positions + position, mask=is_second, other=0.0)
            score = tl.sum(q_low * k_low + q_high * k_high, axis=1) * scale
            share = tl.where(is_second, tl.exp(score - sums), 0.0)
            along = tl.sum(g_low * (v_low - o_low) + g_high * (v_high - o_high), axis=1)
            slope = (share * along * scale)[:, None]
            query_low += slope * k_low
            query_high += slope * k_high
            key_low += slope * q_low
            key_high += slope * q_high
            value_low += share[:, None] * g_low
            value_high += share[:, None] * g_high
        if rotation is not None:
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
