"""--two_stream: left-context rows keep their items, and second rows predict them."""

from typing import Any

import numpy as np
import pytest
import torch
from torchdata.nodes import IterableWrapper

from model.network.config import EncoderConfig
from model.network.encoder import Encoder
from pipeline.batches.train_batch import TrainBatch
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.training.chunks import JaggedWindows, MaskedWindows
from pipeline.training.cloze import ClozeMask
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import RankShare, TrainLoader
from pipeline.training.shape_buckets import PadToBuckets
from pipeline.training.two_stream import TwoStreams

NUM_ITEMS = 50
M = NUM_ITEMS + 1


def chunk() -> JaggedWindows:
    """Step 0: rows 7 3 9 (left context only) and 5 6; step 1: row 8 (left context only)."""
    return JaggedWindows(
        epoch=0,
        step_samples=[2, 3],
        window_splits=np.array([0, 2, 3]),
        windows=np.arange(3),
        copies=np.zeros(3, dtype=np.int64),
        keys=np.arange(3, dtype=np.uint64),
        left_only=np.array([True, False, True]),
        values=np.array([7, 3, 9, 5, 6, 8], dtype=np.int32),
        offsets=np.array([0, 3, 5, 6]),
    )


def streams() -> MaskedWindows:
    config = MaskConfig(two_stream=True, mask_prob=0.999, mask_token_share=1, random_item_share=0)
    return next(TwoStreams(IterableWrapper([chunk()]), ClozeMask(config, NUM_ITEMS, 0)))


def test_second_streams_follow_the_windows_and_predict_all_their_items() -> None:
    found = streams()
    #                              7 3 9, 5 6 masked, second row of 7 3 9, none | 8, its second row
    assert found.values.tolist() == [7, 3, 9, M, M, M, M, M, M, 8, M, M]
    assert np.diff(found.offsets).tolist() == [3, 2, 4, 0, 1, 2]
    assert found.row_splits.tolist() == [0, 4, 6]
    assert found.masked.tolist() == [3, 4, 5, 6, 7, 1]  # in their steps
    assert found.targets.tolist() == [5, 6, 7, 3, 9, 8]
    assert found.mask_splits.tolist() == [0, 5, 6]
    assert found.steps_ago.tolist() == [2, 1, 0, 1, 0, 2, 1, 0, 0, 0, 0, 0]
    assert found.left_only.tolist() == [True, False, True]
    assert found.step_windows.tolist() == [2, 1]


def test_padding_keeps_positions() -> None:
    full = next(PadToBuckets(IterableWrapper([streams()]), 8, M, position_unit=8, mask_unit=4))
    assert full.steps_ago.tolist() == [2, 1, 0, 1, 0, 2, 1, 0, *[0] * 8, *[0] * 8]
    assert full.targets.tolist() == [5, 6, 7, 3, 9, 0, 0, 0, 8, 0, 0, 0]
    assert full.left_only.tolist() == [True, False, True]


def batches(rank: int = 0, world_size: int = 1, **flags: Any) -> list[TrainBatch]:
    lengths = np.random.default_rng(0).integers(3, 30, 40)
    store = SequenceStore.from_arrays(
        np.random.default_rng(1).integers(1, NUM_ITEMS + 1, lengths.sum()),
        np.concatenate([[0], lengths.cumsum()]),
        NUM_ITEMS,
    )
    loader = TrainLoader(
        store,
        WindowConfig(max_len=10),
        MaskConfig(**flags),
        LoaderConfig(train_batch_size=8 // world_size),
        RankShare(rank, world_size),
        few_shapes=False,
    )
    return [batch.unpack() for batch in loader.epoch(3)]


def rows(batch: TrainBatch) -> list[tuple[list[int], bool]]:
    """Values and left_only of each window."""
    values = batch.features.values().split(batch.features.lengths().tolist())
    found = zip(values, batch.left_only.tolist(), strict=False)
    return [(value.tolist(), left) for value, left in found]


def test_rows_with_both_contexts_are_unchanged() -> None:
    kinds = set()
    for before, after in zip(batches(), batches(two_stream=True), strict=True):
        assert after.num_rows == 2 * before.num_rows
        for (values, left), (found, still_left) in zip(rows(before), rows(after), strict=True):
            assert left == still_left and len(values) == len(found)
            assert M not in found if left else values == found
            kinds.add(left)
    assert kinds == {True, False}


def test_two_ranks_have_the_draws_of_one() -> None:
    ranks = [batches(rank, 2, two_stream=True) for rank in range(2)]
    for whole, *parts in zip(batches(two_stream=True), *ranks, strict=True):
        shared = [row for part in parts for row in rows(part) if part.num_windows]
        assert sorted(rows(whole)) == sorted(shared)


def two_streams(encoder: Encoder, items: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Vectors of the mask tokens of rows items[0:4] and items[4:5], and of items[5:8], which see
    both ways: [5 + 3, D]."""
    lengths = [4, 1, 3, 5, 2, 0]  # the windows, then their second rows
    embedded = torch.cat([items, mask.expand(7, -1)])
    steps_ago = torch.tensor([3, 2, 1, 0, 0, 2, 1, 0, 3, 2, 1, 0, 0, 0, 0])
    return encoder(
        embedded,
        torch.tensor([0, *lengths]).cumsum(0),
        torch.tensor([8, 9, 10, 11, 13, 5, 6, 7]),
        torch.tensor([True, True, False]),
        steps_ago,
        longest=8,
    )


def test_each_mask_token_equals_one_after_a_shorter_history() -> None:
    """A mask token's vector equals evaluation's for the history that ends before its item."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(emb_dim=16, nhead=2, learned_positions=False), max_len=8).eval()
    for parameter in encoder.parameters():  # with small initial weights context has little effect
        torch.nn.init.normal_(parameter, std=0.3)
    items, mask = torch.randn(8, 16), torch.randn(16)
    found = two_streams(encoder, items, mask)
    for number, (first, last) in enumerate([(0, 0), (0, 1), (0, 2), (0, 3), (4, 4)]):
        row = torch.cat([items[first:last], mask[None]])
        offsets, end = torch.tensor([0, len(row)]), torch.tensor([len(row) - 1])
        alone = encoder(row, offsets, end, torch.tensor([True]), longest=8)
        torch.testing.assert_close(found[number], alone[0])
    row, right = (torch.tensor([0, 3]), torch.arange(3)), torch.tensor([False])
    both_ways = encoder(items[5:8], *row, right, longest=8)
    torch.testing.assert_close(found[5:], both_ways)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_a_mask_token_ignores_its_item_and_later_ones(positions: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(emb_dim=16, nhead=2, positions=positions), max_len=8).eval()
    items, mask = torch.randn(8, 16), torch.randn(16)
    before = two_streams(encoder, items, mask)
    for changed in range(8):
        other = items.clone()
        other[changed] = 1.0
        moved = (two_streams(encoder, other, mask) - before).abs().amax(dim=1) > 1e-5
        # Mask tokens 0-3 predict items 0-3, 4 predicts item 4; the last three have both contexts.
        expected = [changed < asked for asked in range(4)] + [False] + [changed >= 5] * 3
        assert moved.tolist() == expected, changed


def test_two_streams_need_windows_with_left_context() -> None:
    with pytest.raises(UserError, match="raise --left_context_share or leave it out"):
        MaskConfig(two_stream=True, left_context_share=0.0)
