"""Attention with rows padded to one length, or on CPU to a length for each group of similar rows.

    a b c               a b c    d
    . . d   one group   e f g    h   two groups of rows of similar length
    e f g
    . . h

Both give the same values, but for the order of sums. Shapes: B rows, L longest row, T positions of
all rows, H heads, K width of a head, W windows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.varlen_attention import RowLayout

_SHORTEST = 8  # rows up to this length are one group


def attend_padded_by_length(layout: RowLayout, projected: Tensor) -> Tensor:
    """As :func:`attend_padded`, with less padding: rows of similar length go together. On CPU."""
    lengths = layout.offsets.diff()
    sizes = lengths.clone()
    if layout.windows:  # which stay with their second streams, one longer or empty
        first, second = sizes[: 2 * layout.windows].view(2, -1)
        sizes[: 2 * layout.windows] = torch.maximum(first, second).repeat(2)
    groups = torch.log2(sizes.clamp(min=_SHORTEST).double()).ceil()
    if layout.windows:  # the other rows have no second streams: groups of their own
        groups[2 * layout.windows :] += 64
    found = groups.unique()
    if len(found) == 1:
        return attend_padded(layout, projected)
    mixed = projected.new_empty(projected.shape[0], *projected.shape[2:])
    pieces, places = [], []
    for group in found:
        rows = (groups == group).nonzero()[:, 0]
        place = (groups == group)[layout.row].nonzero()[:, 0]
        if not len(place):
            continue
        pieces.append(attend_padded(_of_rows(layout, rows, lengths, place), projected[place]))
        places.append(place)
    return mixed.index_copy(0, torch.cat(places), torch.cat(pieces))


def _of_rows(layout: RowLayout, rows: Tensor, lengths: Tensor, place: Tensor) -> RowLayout:
    """The layout of some rows, int64 [G], at the positions ``place`` of all."""
    offsets = F.pad(lengths[rows].cumsum(0), (1, 0))
    left_only = layout.left_only
    if left_only is not None:
        left_only = left_only[rows[rows < left_only.numel()]]
    steps_ago = layout.steps_ago[place] if layout.windows and rows[0] < layout.windows else None
    longest = int(lengths[rows].max())
    return RowLayout(offsets, len(place), longest, left_only, steps_ago)


def attend_padded(layout: RowLayout, projected: Tensor) -> Tensor:
    """Rotated queries, keys and values [T, 3, H, K] -> [T, H, K], with rows padded to L."""
    longest, windows = layout.longest, layout.windows
    cell = (layout.row + 1) * longest - 1 - layout.from_end  # [T] in the flattened grid
    grid = projected.new_zeros(layout.rows * longest, *projected.shape[1:])
    grid = grid.index_copy(0, cell, projected).view(layout.rows, longest, 3, *grid.shape[2:])
    query, key, value = grid.permute(2, 0, 3, 1, 4)  # each [B, H, L, K]
    columns = torch.arange(longest, device=cell.device)
    earlier, itself = columns <= columns[:, None], columns == columns[:, None]  # [L, L]
    lengths = layout.offsets.diff()[:, None]
    filled = (columns >= longest - lengths)[:, None]  # [B, 1, L]
    # Keys (columns) that a query attends to in its row. Padding and empty rows get visible keys,
    # too: a softmax over no key would be NaN.
    visible = filled | (lengths == 0)[:, None]
    if layout.left_only is not None:
        left_only = F.pad(layout.left_only, (0, layout.rows - layout.left_only.numel()))
        visible = (visible & (earlier | ~left_only[:, None, None])) | itself  # [B, L, L]
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None])
    if windows:
        first, second = slice(0, windows), slice(windows, 2 * windows)
        # Keys of the window, then of its second stream, that its queries attend to: [W, L, 2 L].
        # Rows are padded on the left and a second stream is one longer: its position t is in the
        # column of the window's position t - 1.
        before = earlier & filled[first]
        visible = torch.cat([before, itself.expand_as(before)], dim=2)
        second_mixed = F.scaled_dot_product_attention(
            query[second],
            torch.cat([key[first], key[second]], dim=2),
            torch.cat([value[first], value[second]], dim=2),
            attn_mask=visible[:, None],
        )
        mixed = torch.cat([mixed[first], second_mixed, mixed[2 * windows :]])
    return mixed.transpose(1, 2).flatten(0, 1).index_select(0, cell)
