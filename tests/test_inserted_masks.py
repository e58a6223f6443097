"""--left_mask_prob: mask tokens before items that stay visible to what comes later."""

from typing import Any

import numpy as np
import pytest
import torch
from torchdata.nodes import IterableWrapper

from model.encoder import Encoder, EncoderConfig
from model.run import RunConfig
from pipeline.batch import TrainBatch
from pipeline.errors import UserError
from pipeline.loader import LoaderConfig, TrainLoader
from pipeline.masking import ClozeMask, MaskConfig, MaskItems
from pipeline.rounding import RoundUp
from pipeline.samples import Chunk
from pipeline.store import SequenceStore
from pipeline.windows import WindowConfig

NUM_ITEMS = 50
MASK = NUM_ITEMS + 1
ALWAYS = {"mask_token_share": 1.0, "random_item_share": 0.0}


def chunk() -> Chunk:
    """Rows 7 3 9 4 2 (left context alone), 5 6, and 8 (left context alone), in two steps."""
    made = Chunk(0, [2, 3], np.array([0, 2, 3]), np.arange(3), np.zeros(3, dtype=np.int64))
    made.values = np.array([7, 3, 9, 4, 2, 5, 6, 8], dtype=np.int32)
    made.offsets = np.array([0, 5, 7, 8])
    made.left_only = np.array([True, False, True])
    return made


def masked(made: Chunk, **flags: Any) -> Chunk:
    return next(MaskItems(IterableWrapper([made]), ClozeMask(MaskConfig(**flags), NUM_ITEMS, 0)))


def test_every_item_predicted() -> None:
    found = masked(chunk(), left_mask_prob=1.0, mask_prob=0.999, **ALWAYS)
    left = [MASK, 7, MASK, 3, MASK, 9, MASK, 4, MASK, 2]
    assert found.values.tolist() == [*left, MASK, MASK, MASK, 8]
    assert found.offsets.tolist() == [0, 10, 12, 14]
    assert found.masked.tolist() == [0, 2, 4, 6, 8, 10, 11, 12]
    assert found.targets.tolist() == [7, 3, 9, 4, 2, 5, 6, 8]
    assert found.steps_ago.tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 1, 0, 0, 0]


def test_the_example_of_the_module() -> None:
    stage = MaskItems(IterableWrapper([]), ClozeMask(MaskConfig(left_mask_prob=0.5), NUM_ITEMS, 0))
    made = chunk()
    made.masked, made.targets = np.array([1, 3, 6]), np.array([3, 4, 6])
    made.values[6] = MASK
    stage._insert(made, np.array([1, 3]))
    assert made.values.tolist() == [7, MASK, 3, 9, MASK, 4, 2, 5, MASK, 8]
    assert made.steps_ago.tolist() == [4, 3, 3, 2, 1, 1, 0, 1, 0, 0]
    assert made.masked.tolist() == [1, 4, 8]
    assert made.offsets.tolist() == [0, 7, 9, 10]


def test_a_row_masked_at_its_last_item_alone() -> None:
    found = masked(chunk(), left_mask_prob=0.5, mask_last_share=1.0)
    assert found.values.tolist() == [7, 3, 9, 4, MASK, 2, 5, MASK, MASK, 8]
    assert found.targets.tolist() == [2, 6, 8]


def test_rounding_up_keeps_positions() -> None:
    stage = RoundUp(
        IterableWrapper([masked(chunk(), left_mask_prob=1.0)]),
        8,
        MASK,
        position_unit=8,
        mask_unit=4,
    )
    full = next(stage)
    assert len(full.steps_ago) == len(full.values) == 16 + 8
    assert full.steps_ago.tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 1, 0, *[0] * 4, *[0] * 8]


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
        rank,
        world_size,
    )
    return list(loader.epoch(3))


def rows(batch: TrainBatch) -> list[tuple[list[int], list[int], bool]]:
    """Values, positions' numbers (by place, where there are none) and left_only of each row."""
    lengths = batch.features.lengths().tolist()
    values = batch.features.values().split(lengths)
    places = [torch.arange(length - 1, -1, -1) for length in lengths]
    steps = places if batch.steps_ago is None else batch.steps_ago.split(lengths)
    return [
        (value.tolist(), step.tolist(), bool(left))
        for value, step, left in zip(values, steps, batch.left_only, strict=True)
    ]


def test_rows_that_see_both_ways_stay_as_they_are() -> None:
    plain, inserted = batches(), batches(left_mask_prob=0.7)
    some = 0
    for before, after in zip(plain, inserted, strict=True):
        for one, other in zip(rows(before), rows(after), strict=True):
            assert one[2] == other[2]
            if one[2]:
                kept = [item for item in other[0] if item != MASK]
                # All its items are there, in order; those at random positions of the plain row too.
                assert [len(kept)] == [len(one[0])]
                assert other[1] == sorted(other[1], reverse=True) and max(other[1]) < 10
                some += len(other[0]) - len(kept)
            else:
                assert one == other
    assert some > 40


def test_two_ranks_draw_what_one_does() -> None:
    def step(parts: list[TrainBatch]) -> list[tuple[list[int], list[int], bool]]:
        return sorted(row for part in parts for row in rows(part) if row[0] != [MASK])

    ranks = [batches(rank, 2, left_mask_prob=0.7) for rank in range(2)]
    for whole, *parts in zip(batches(left_mask_prob=0.7), *ranks, strict=True):
        assert step([whole]) == step(parts)


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_a_mask_token_sees_what_came_before_its_item(positions: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(emb_dim=16, nhead=2, positions=positions), max_len=5).eval()
    # The rows of the module's example and one that sees both ways; a mask token is a row like any.
    steps_ago = torch.tensor([4, 3, 3, 2, 1, 1, 0, 2, 1, 0])
    offsets, left_only = torch.tensor([0, 7, 10]), torch.tensor([True, False])
    items, masks = torch.randn(10, 16), torch.tensor([1, 4])

    def encoded(changed: int | None = None) -> torch.Tensor:
        given = items.clone()
        if changed is not None:
            given[changed] = torch.ones(16)
        return encoder(given, offsets, masks, 16, left_only, steps_ago)

    before = encoded()
    for changed, moved in ((0, [1, 1]), (2, [0, 1]), (3, [0, 1]), (5, [0, 0]), (6, [0, 0])):
        difference = (encoded(changed) - before).abs().amax(dim=1)
        assert (difference > 1e-5).tolist() == [bool(each) for each in moved], changed


@pytest.mark.parametrize("learned", [True, False])
def test_an_item_and_its_mask_token_are_equally_far(learned: bool) -> None:
    """The second mask token of a row without the first one's item is where it would be alone."""
    torch.manual_seed(0)
    config = EncoderConfig(emb_dim=16, nhead=2, num_layers=1, learned_positions=learned)
    encoder = Encoder(config, max_len=5).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    a, b, mask = torch.randn(3, 16)
    left_only = torch.tensor([True])
    # a M b: M, between them, encodes as in the row "a M" of an evaluation one step further back.
    shown = encoder(
        torch.stack([a, mask, b]),
        torch.tensor([0, 3]),
        torch.tensor([1]),
        8,
        left_only,
        torch.tensor([1, 0, 0]),
    )
    asked = encoder(torch.stack([a, mask]), torch.tensor([0, 2]), torch.tensor([1]), 8)
    torch.testing.assert_close(shown, asked)


def test_flags() -> None:
    for wrong in (0.0, 1.5):
        with pytest.raises(UserError, match=r"--left_mask_prob must be in \(0, 1\], not"):
            MaskConfig(left_mask_prob=wrong)
    with pytest.raises(UserError, match="raise --left_context_share or leave it out"):
        MaskConfig(left_mask_prob=0.3, left_context_share=0.0)
    with pytest.raises(UserError, match="--left_mask_prob gives two positions the same distance"):
        RunConfig(mask=MaskConfig(left_mask_prob=0.3), encoder=EncoderConfig(positions="bias"))
