"""The Triton kernels of :mod:`model.kernels.varlen_attention`: packed positions in tiles.

A program takes a tile of positions and one head. What a position sees, and what sees it, are ranges
of the packed positions (``spans``): the program loops, in blocks, from the first to the last one of
its tile and masks what a position does not see. Short rows share a tile, long rows take several.

A position in a second stream, and a filler, whose span is empty, is apart from its own span of keys
(``is_apart``) and sees itself, too: the kernels take this one key before the blocks.

Queries and keys are two halves: a rotation pairs value i of the first with value i of the second.

Shapes: T positions, H heads, W width of a head, R positions of a tile or block.
"""
# ruff: noqa: ANN001, ANN202 - Triton would interpret a kernel's annotations

from typing import NamedTuple

from model.kernels.compiler import tl, triton


class Sizes(NamedTuple):
    """Constants for which :func:`attend` and the kernels of its gradients are compiled.

    Attributes:
        size: H W.
        line: values from a position's queries, and keys, to those of the next one.
        half: W / 2.
        columns: ``half`` rounded up to a power of two, 16 or more.
        tile: R, positions of a program, and of a block.
        parts: 2 if there are second streams, else 1.
    """

    size: int
    line: int
    half: int
    columns: int
    tile: int
    parts: int


if triton is not None:
    _BLOCK = tl.constexpr(64)

    @triton.jit
    def from_end(offsets, found) -> None:
        """Into ``found`` [T]: the distance of each position from its row's end. A program a row."""
        row = offsets + tl.program_id(0)
        first, end = tl.load(row), tl.load(row + 1)
        while first < end:
            at = first + tl.arange(0, _BLOCK)
            tl.store(found + at, end - 1 - at, mask=at < end)
            first += _BLOCK

    @triton.jit
    def spans(offsets, left_only, found, positions, seconds: tl.constexpr) -> None:
        """Into ``found``, int32 [6, T] of zeros: begins and ends of three spans of each position.

        They are: the keys that it sees, the queries in its row that see it, and the queries in the
        row's second stream that see it. A program takes a window and, with ``seconds``, its second
        stream.

        Args:
            left_only: bool [windows], contiguous; None: all False.
        """
        window, windows = tl.program_id(0), tl.num_programs(0)
        first, end = tl.load(offsets + window), tl.load(offsets + window + 1)
        start, stop, is_left = first * 0, first * 0, first < 0
        if left_only is not None:
            is_left = tl.load(left_only + window)
        if seconds:
            start = tl.load(offsets + windows + window)
            stop = tl.load(offsets + windows + window + 1)
        for base in range(first, end, _BLOCK):
            at = base + tl.arange(0, _BLOCK)
            inside = at < end
            tl.store(found + at, first, mask=inside)
            tl.store(found + positions + at, tl.where(is_left, at + 1, end), mask=inside)
            tl.store(found + 2 * positions + at, tl.where(is_left, at, first), mask=inside)
            tl.store(found + 3 * positions + at, end, mask=inside)
            if seconds:  # those after its place in the row, of which the second stream has one more
                inside = inside & is_left
                tl.store(found + 4 * positions + at, start + at - first + 1, mask=inside)
                tl.store(found + 5 * positions + at, stop, mask=inside)
        for base in range(start, stop, _BLOCK):
            at = base + tl.arange(0, _BLOCK)
            inside = at < stop
            tl.store(found + at, first, mask=inside)
            tl.store(found + positions + at, first + at - start, mask=inside)

    @triton.jit
    def rotate(projected, rotation, line, rotated, size: tl.constexpr, half: tl.constexpr) -> None:
        """Queries and keys, [T, 2, H, W], rotated by their positions' angles (arXiv 2104.09864).

        A program takes a position, of which ``line`` [T] is the row of ``rotation`` [., 2, W / 2].
        """
        position = tl.program_id(0).to(tl.int64)
        # Pairs: value i of the first half of a head and value i of the second.
        pair = tl.arange(0, triton.next_power_of_2(size))
        inside = pair < size
        within = (pair // half) * 2 * half + pair % half
        angle = rotation + tl.load(line + position) * 2 * half + pair % half
        cosine = tl.load(angle, mask=inside, other=0.0)
        sine = tl.load(angle + half, mask=inside, other=0.0)
        source, target = projected + position * 3 * size + within, rotated + position * 2 * size
        low = tl.load(source, mask=inside, other=0.0)
        high = tl.load(source + half, mask=inside, other=0.0)
        tl.store(target + within, low * cosine - high * sine, mask=inside)
        tl.store(target + within + half, low * sine + high * cosine, mask=inside)

    @triton.jit
    def _vectors(pointer, at, line, positions, sizes: tl.constexpr, halves: tl.constexpr = 2):
        """Vectors [R, W] of positions ``at``, ``line`` values apart; zeros outside.

        ``halves``: 1 for the first halves, [R, W / 2].
        """
        column = tl.arange(0, halves * sizes.columns)
        inside = (at < positions)[:, None] & (column < halves * sizes.half)[None, :]
        return tl.load(pointer + at.to(tl.int64)[:, None] * line + column, mask=inside, other=0.0)

    @triton.jit
    def _halves(pointer, at, positions, sizes: tl.constexpr):
        """The first and second halves [R, W / 2] of queries or keys of positions ``at``."""
        low = _vectors(pointer, at, sizes.line, positions, sizes, 1)
        return low, _vectors(pointer + sizes.half, at, sizes.line, positions, sizes, 1)

    @triton.jit
    def _store(
        pointer, at, vectors, line, positions, sizes: tl.constexpr, halves: tl.constexpr = 2
    ):
        """As :func:`_vectors`, but stored."""
        column = tl.arange(0, halves * sizes.columns)
        inside = (at < positions)[:, None] & (column < halves * sizes.half)[None, :]
        tl.store(pointer + at.to(tl.int64)[:, None] * line + column, vectors, mask=inside)

    @triton.jit
    def _store_turned(pointer, at, low, high, positions, turns, sizes: tl.constexpr) -> None:
        """Store gradients of rotated vectors as those of the vectors before their rotation.

        ``turns``: rotation, or None, and its row for each position.
        """
        rotation, lines = turns
        if rotation is not None:
            column = tl.arange(0, sizes.columns)
            line = tl.load(lines + at, mask=at < positions, other=0)[:, None]
            angle = line * 2 * sizes.half + column
            inside = (at < positions)[:, None] & (column < sizes.half)[None, :]
            cosine = tl.load(rotation + angle, mask=inside, other=0.0)
            sine = tl.load(rotation + angle + sizes.half, mask=inside, other=0.0)
            turned = low * cosine + high * sine
            high = high * cosine - low * sine
            low = turned
        _store(pointer, at, low, 3 * sizes.size, positions, sizes, 1)
        _store(pointer + sizes.half, at, high, 3 * sizes.size, positions, sizes, 1)

    @triton.jit
    def _span(spans, number, at, positions):
        """Begins and ends [R] of a span of positions ``at``."""
        inside = at < positions
        begin = tl.load(spans + number * positions + at, mask=inside, other=0)
        return begin, tl.load(spans + (number + 1) * positions + at, mask=inside, other=0)

    @triton.jit
    def _reach(begin, end, positions):
        """The first position of all spans that are not empty, and the end of the last one."""
        return tl.min(tl.where(begin < end, begin, positions), axis=0), tl.max(end, axis=0)

    @triton.jit
    def _masses(low, high, key_low, key_high, sums, span, key, scale):
        """Probabilities [queries, keys], 0 for keys that a query does not see."""
        begin, end = span
        scores = tl.dot(high, tl.trans(key_high), tl.dot(low, tl.trans(key_low)))
        seen = (key[None, :] >= begin[:, None]) & (key[None, :] < end[:, None])
        return tl.where(seen, tl.exp(scores * scale - sums[:, None]), 0.0)

    @triton.jit
    def _own_score(low, high, key_low, key_high, scale):
        """Scores [R] of the key at each query's own place."""
        both = low.to(tl.float32) * key_low + high.to(tl.float32) * key_high
        return tl.sum(both, axis=1) * scale

    @triton.jit
    def attend(given, spans, output, log_sums, positions, scale, sizes: tl.constexpr) -> None:
        """Output [T, H, W] and log-sum-exp [H, T] of a tile of queries.

        ``given``: queries, then keys; and values, in [T, 3, H, W].
        """
        head, width = tl.program_id(1), 2 * sizes.half
        parts: tl.constexpr = sizes.parts
        queries, values = given[0] + head * width, given[1] + 2 * sizes.size + head * width
        keys = queries + sizes.size
        at = tl.program_id(0) * sizes.tile + tl.arange(0, sizes.tile)
        begin, end = _span(spans, 0, at, positions)
        low, high = _halves(queries, at, positions, sizes)
        # A second stream's position sees itself, too, and a filler only itself.
        is_apart = (at < begin) | (at >= end)
        itself = tl.where(is_apart, at, positions)
        key_low, key_high = _halves(keys, itself, positions, sizes)
        top = tl.where(is_apart, _own_score(low, high, key_low, key_high, scale), -1e30)
        total = tl.where(is_apart, 1.0, 0.0)
        mixed = _vectors(values, itself, 3 * sizes.size, positions, sizes).to(tl.float32)
        for part in tl.static_range(parts):  # windows, then second streams
            ends = tl.where(is_apart == (part == 1), end, 0)
            first, last = _reach(begin, ends, positions)
            for start in range(first, last, sizes.tile):
                key = start + tl.arange(0, sizes.tile)
                key_low, key_high = _halves(keys, key, positions, sizes)
                value = _vectors(values, key, 3 * sizes.size, positions, sizes)
                scores = tl.dot(high, tl.trans(key_high), tl.dot(low, tl.trans(key_low)))
                seen = (key[None, :] >= begin[:, None]) & (key[None, :] < ends[:, None])
                scores = tl.where(seen, scores * scale, -1e30)
                new_top = tl.maximum(top, tl.max(scores, axis=1))
                mass = tl.where(seen, tl.exp(scores - new_top[:, None]), 0.0)
                fading = tl.exp(top - new_top)
                total = total * fading + tl.sum(mass, axis=1)
                mixed = tl.dot(mass.to(value.dtype), value, mixed * fading[:, None])
                top = new_top
        mixed = mixed / total[:, None]
        _store(output + head * width, at, mixed, sizes.size, positions, sizes)
        sums = log_sums + head * positions + at
        tl.store(sums, top + tl.log(total), mask=at < positions)

    @triton.jit
    def query_gradient(
        given, spans, results, turns, gradient, positions, scale, sizes: tl.constexpr
    ) -> None:
        """The gradient of a tile of queries, into [T, 3, H, W]; others as of :func:`attend`.

        ``results``: output and log-sum-exp of :func:`attend`, the output's gradient, and [H, T],
        which gets the dot products of output and gradient.
        """
        output, log_sums, grads, products = results
        head, width = tl.program_id(1), 2 * sizes.half
        parts: tl.constexpr = sizes.parts
        queries, values = given[0] + head * width, given[1] + 2 * sizes.size + head * width
        keys = queries + sizes.size
        at = tl.program_id(0) * sizes.tile + tl.arange(0, sizes.tile)
        begin, end = _span(spans, 0, at, positions)
        low, high = _halves(queries, at, positions, sizes)
        grad = _vectors(grads + head * width, at, sizes.size, positions, sizes)
        found = _vectors(output + head * width, at, sizes.size, positions, sizes)
        product = tl.sum(grad.to(tl.float32) * found, axis=1)
        of_head = head * positions + at
        tl.store(products + of_head, product, mask=at < positions)
        sums = tl.load(log_sums + of_head, mask=at < positions, other=0.0)
        is_apart = (at < begin) | (at >= end)
        itself = tl.where(is_apart, at, positions)
        key_low, key_high = _halves(keys, itself, positions, sizes)
        value = _vectors(values, itself, 3 * sizes.size, positions, sizes)
        mass = tl.exp(_own_score(low, high, key_low, key_high, scale) - sums)
        slope = mass * (tl.sum(grad.to(tl.float32) * value, axis=1) - product) * scale
        slope = tl.where(is_apart, slope, 0.0)[:, None]
        query_low, query_high = slope * key_low, slope * key_high
        for part in tl.static_range(parts):
            ends = tl.where(is_apart == (part == 1), end, 0)
            first, last = _reach(begin, ends, positions)
            for start in range(first, last, sizes.tile):
                key = start + tl.arange(0, sizes.tile)
                key_low, key_high = _halves(keys, key, positions, sizes)
                value = _vectors(values, key, 3 * sizes.size, positions, sizes)
                span = begin, ends
                masses = _masses(low, high, key_low, key_high, sums, span, key, scale)
                slopes = tl.dot(grad, tl.trans(value)) - product[:, None]
                slopes = (masses * slopes * scale).to(low.dtype)
                query_low = tl.dot(slopes, key_low, query_low)
                query_high = tl.dot(slopes, key_high, query_high)
        target, low, high = gradient + head * width, query_low, query_high
        _store_turned(target, at, low, high, positions, turns, sizes)

    @triton.jit
    def key_gradient(
        given, spans, results, turns, gradient, positions, scale, sizes: tl.constexpr
    ) -> None:
        """The gradients of a tile of keys and of its values; after :func:`query_gradient`."""
        _, log_sums, grads, products = results
        head, width = tl.program_id(1), 2 * sizes.half
        parts: tl.constexpr = sizes.parts
        queries, values = given[0] + head * width, given[1] + 2 * sizes.size + head * width
        keys, grads = queries + sizes.size, grads + head * width
        log_sums, products = log_sums + head * positions, products + head * positions
        at = tl.program_id(0) * sizes.tile + tl.arange(0, sizes.tile)
        begin, end = _span(spans, 0, at, positions)
        low, high = _halves(keys, at, positions, sizes)
        value = _vectors(values, at, 3 * sizes.size, positions, sizes)
        is_apart = (at < begin) | (at >= end)
        itself = tl.where(is_apart, at, positions)
        query_low, query_high = _halves(queries, itself, positions, sizes)
        grad = _vectors(grads, itself, sizes.size, positions, sizes)
        sums = tl.load(log_sums + at, mask=at < positions, other=0.0)
        product = tl.load(products + at, mask=at < positions, other=0.0)
        mass = tl.exp(_own_score(query_low, query_high, low, high, scale) - sums)
        mass = tl.where(is_apart, mass, 0.0)[:, None]
        slope = tl.sum(grad.to(tl.float32) * value, axis=1) - product
        slope = mass * slope[:, None] * scale
        key_low, key_high, value_sum = slope * query_low, slope * query_high, mass * grad
        for part in tl.static_range(parts):  # queries in the row, then in its second stream
            begin, end = _span(spans, 2 + 2 * part, at, positions)
            first, last = _reach(begin, end, positions)
            for start in range(first, last, sizes.tile):
                query = start + tl.arange(0, sizes.tile)
                seen_from, seen_to = _span(spans, 0, query, positions)
                span = seen_from, tl.where(query < last, seen_to, 0)  # a block may go further
                query_low, query_high = _halves(queries, query, positions, sizes)
                grad = _vectors(grads, query, sizes.size, positions, sizes)
                sums = tl.load(log_sums + query, mask=query < positions, other=0.0)
                product = tl.load(products + query, mask=query < positions, other=0.0)
                masses = _masses(query_low, query_high, low, high, sums, span, at, scale)
                value_sum = tl.dot(tl.trans(masses.to(grad.dtype)), grad, value_sum)
                slopes = tl.dot(grad, tl.trans(value)) - product[:, None]
                slopes = tl.trans((masses * slopes * scale).to(low.dtype))
                key_low = tl.dot(slopes, query_low, key_low)
                key_high = tl.dot(slopes, query_high, key_high)
        target, low, high = gradient + sizes.size + head * width, key_low, key_high
        _store_turned(target, at, low, high, positions, turns, sizes)
        _store(target + sizes.size, at, value_sum, 3 * sizes.size, positions, sizes)
