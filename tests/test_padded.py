"""Attention by groups of similar rows equals attention with all rows padded to one length."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.kernels.varlen_attention import RowLayout
from model.network import padded
from model.network.padded import attend_padded, attend_padded_by_length

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
PLACES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
LENGTHS = st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 16, 17, 40]), min_size=1, max_size=7)


def layout_of(lengths: list[int], two_streams: bool, left: list[bool], fillers: int) -> RowLayout:
    """Rows, second streams of those with left context only, and fillers of three positions."""
    streams = [length + 1 if one else 0 for length, one in zip(lengths, left, strict=False)]
    rows = lengths + streams * two_streams + [3] * fillers
    offsets = torch.tensor([0, *rows]).cumsum(0)
    steps_ago = None
    if two_streams:
        steps_ago = torch.cat([torch.arange(length).flip(0) for length in rows])
    left_only = torch.tensor(left[: len(lengths)])
    return RowLayout(offsets, sum(rows), max(rows), left_only, steps_ago)


def outcome(attend: object, layout: RowLayout) -> list[Tensor]:
    torch.manual_seed(1)
    projected = torch.randn(len(layout.row), 3, 2, 4, dtype=torch.float64, requires_grad=True)
    mixed = attend(layout, projected)  # type: ignore[operator]
    weights = torch.randn(mixed.shape, dtype=torch.float64)
    return [mixed, *torch.autograd.grad((mixed * weights).sum(), projected)]


@settings(max_examples=80)
@given(LENGTHS, st.booleans(), st.lists(st.booleans(), min_size=7, max_size=7), st.integers(0, 2))
def test_groups_of_rows_change_nothing(
    lengths: list[int], two_streams: bool, left: list[bool], fillers: int
) -> None:
    layout = layout_of(lengths, two_streams, left, fillers)
    if not len(layout.row):
        return
    found = outcome(attend_padded_by_length, layout)
    for one, other in zip(found, outcome(attend_padded, layout), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_similar_rows_are_padded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def attend(layout: RowLayout, projected: Tensor) -> Tensor:
        seen.append((layout.rows, layout.longest, layout.windows))
        return attend_padded(layout, projected)

    monkeypatch.setattr(padded, "attend_padded", attend)
    layout = layout_of([3, 40, 7, 30, 60], True, [True] * 4 + [False], 2)
    outcome(attend_padded_by_length, layout)
    # Windows of 3 and 7 with their second streams, of 30, of 40 and 60, and the fillers.
    assert seen == [(4, 8, 2), (2, 31, 1), (4, 60, 2), (2, 3, 0)]


@pytest.mark.parametrize("device", PLACES)
def test_distances_from_the_end_of_the_row(device: str) -> None:
    lengths = [3, 0, 1, 200]
    offsets = torch.tensor([0, 3, 3, 4, 204], device=device)
    expected = [2, 1, 0, 0, *range(199, -1, -1)]
    assert RowLayout(offsets, sum(lengths), 200).from_end.tolist() == expected
