"""The cloze mask: shares, keys, short rows and small catalogs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.training.cloze import ClozeMask
from pipeline.training.config import MaskConfig

NUM_ITEMS = 50
MASK = NUM_ITEMS + 1


def masked_rows(
    lengths: list[int],
    config: MaskConfig,
    seed: int = 0,
    epoch: int = 0,
    windows: list[int] | None = None,
    copies: list[int] | None = None,
    item: int = 7,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values after masking, masked positions and targets of rows that hold one item throughout."""
    values = np.full(sum(lengths), item, dtype=np.int32)
    cloze = ClozeMask(config, NUM_ITEMS, seed)
    keys = cloze.keys(
        epoch,
        np.arange(len(lengths)) if windows is None else np.array(windows),
        np.zeros(len(lengths), dtype=np.int64) if copies is None else np.array(copies),
    )
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    masked, targets = cloze(values, offsets, keys)
    return values, masked, targets


def within(count: int, trials: int, share: float) -> bool:
    """Whether a binomial count is within five standard deviations of what is expected."""
    return abs(count - trials * share) <= 5 * np.sqrt(trials * share * (1 - share)) + 1e-9


def test_share_of_masked_positions() -> None:
    _, masked, _ = masked_rows([100] * 1000, MaskConfig(mask_prob=0.2))
    assert within(len(masked), 100_000, 0.2)


def test_every_position_of_a_row_is_masked_equally_often() -> None:
    _, masked, _ = masked_rows([10] * 10_000, MaskConfig(mask_prob=0.5))
    counts = np.bincount(masked % 10, minlength=10)
    assert all(within(count, 10_000, 0.5) for count in counts)


def test_positions_are_masked_independently() -> None:
    _, masked, _ = masked_rows([2] * 40_000, MaskConfig(mask_prob=0.5))
    first, second = np.isin(np.arange(80_000), masked).reshape(-1, 2).T
    # The forced position of rows in which nothing was drawn moves 1/4 of the rows, half each way.
    assert within(int((first & second).sum()), 40_000, 0.25)
    assert within(int((first & ~second).sum()), 40_000, 0.375)
    assert not (~first & ~second).any()


@pytest.mark.parametrize(
    ("token", "random"), [(0.8, 0.1), (0.8, 0.2), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]
)
def test_shares_of_replacements(token: float, random: float) -> None:
    config = MaskConfig(mask_prob=0.3, mask_token_share=token, random_item_share=random)
    values, masked, targets = masked_rows([50] * 1000, config)
    assert (targets == 7).all()
    after = values[masked]
    # A random item is the item itself once in 50 times.
    assert within(int((after == MASK).sum()), len(after), token)
    assert within(int(((after != MASK) & (after != 7)).sum()), len(after), random * 49 / 50)
    untouched = np.delete(values, masked)
    assert (untouched == 7).all()


def test_random_items_are_uniform() -> None:
    config = MaskConfig(mask_prob=0.5, mask_token_share=0.0, random_item_share=1.0)
    values, masked, _ = masked_rows([100] * 2000, config)
    counts = np.bincount(values[masked], minlength=MASK + 1)
    assert counts[0] == counts[MASK] == 0
    assert all(within(count, len(masked), 1 / 50) for count in counts[1:MASK])


def test_rows_with_only_the_last_item_masked() -> None:
    config = MaskConfig(mask_prob=0.5, mask_last_share=0.25, mask_token_share=0.0)
    values, masked, _ = masked_rows([20] * 4000, config)
    rows = np.split(masked, np.searchsorted(masked, np.arange(20, 80_000, 20)))
    only_last = [row for row, at in enumerate(rows) if at.tolist() == [row * 20 + 19]]
    assert within(len(only_last), 4000, 0.25)
    assert all(values[row * 20 + 19] == MASK for row in only_last)
    assert (values == MASK).sum() == len(only_last)


def test_all_rows_with_only_the_last_item_masked() -> None:
    values, masked, targets = masked_rows([3, 1, 2], MaskConfig(mask_last_share=1.0))
    assert masked.tolist() == [2, 3, 5]
    assert targets.tolist() == [7, 7, 7]
    assert values.tolist() == [7, 7, MASK, MASK, 7, MASK]


def test_a_tiny_probability_masks_one_position_a_row_uniformly() -> None:
    _, masked, _ = masked_rows([4] * 8000, MaskConfig(mask_prob=1e-12))
    assert (masked // 4).tolist() == list(range(8000))
    assert all(within(count, 8000, 0.25) for count in np.bincount(masked % 4, minlength=4))


def test_rows_of_one_item_are_masked() -> None:
    _, masked, _ = masked_rows([1] * 100, MaskConfig(mask_prob=0.01))
    assert masked.tolist() == list(range(100))


def test_a_catalog_of_one_item() -> None:
    values = np.ones(1000, dtype=np.int32)
    config = MaskConfig(mask_prob=0.5, mask_token_share=0.5, random_item_share=0.5)
    cloze, zeros = ClozeMask(config, 1, 0), np.zeros(10, dtype=np.int64)
    _, targets = cloze(values, np.arange(11) * 100, cloze.keys(0, np.arange(10), zeros))
    assert set(values.tolist()) == {1, 2}
    assert set(targets.tolist()) == {1}


def test_a_chunk_without_rows_has_no_targets() -> None:
    _, masked, targets = masked_rows([], MaskConfig())
    assert masked.tolist() == targets.tolist() == []


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    cut=st.integers(0, 8),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_a_row_is_masked_the_same_in_any_chunk(
    lengths: list[int], cut: int, seed: int, epoch: int
) -> None:
    config = MaskConfig(mask_prob=0.4, mask_last_share=0.3, random_item_share=0.2)
    windows = [1000 + 3 * row for row in range(len(lengths))]
    copies = [row % 2 for row in range(len(lengths))]
    whole, masked, _ = masked_rows(lengths, config, seed, epoch, windows, copies)
    parts = [
        masked_rows(lengths[part], config, seed, epoch, windows[part], copies[part])
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert np.concatenate([values for values, _, _ in parts]).tolist() == whole.tolist()
    moved = [parts[0][1], parts[1][1] + sum(lengths[:cut])]
    assert np.concatenate(moved).tolist() == masked.tolist()


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    mask_prob=st.floats(1e-9, 0.999999),
    mask_last_share=st.floats(0, 1),
    seed=st.integers(-5, 5),
)
def test_every_row_has_a_masked_position_and_targets_restore_it(
    lengths: list[int], mask_prob: float, mask_last_share: float, seed: int
) -> None:
    config = MaskConfig(mask_prob, mask_last_share=mask_last_share)
    values, masked, targets = masked_rows(lengths, config, seed=seed)
    rows = np.searchsorted(np.cumsum(lengths), masked, side="right")
    assert set(rows.tolist()) == set(range(len(lengths)))
    assert (np.diff(masked) > 0).all()
    values[masked] = targets
    assert (values == 7).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"windows": [9]}, {"copies": [1]}])
def test_each_part_of_the_key_changes_the_mask(other: dict[str, object]) -> None:
    config = MaskConfig(mask_prob=0.5)
    same = {"seed": 0, "epoch": 0, "windows": [0], "copies": [0]}
    first = masked_rows([64], config, **same)[1]
    assert masked_rows([64], config, **same)[1].tolist() == first.tolist()
    assert masked_rows([64], config, **(same | other))[1].tolist() != first.tolist()


def test_copies_do_not_depend_on_their_number() -> None:
    few = masked_rows([64], MaskConfig(dupe_factor=2), copies=[1])[1]
    many = masked_rows([64], MaskConfig(dupe_factor=9), copies=[1])[1]
    assert few.tolist() == many.tolist()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"mask_prob": 0.0}, "--mask_prob must be above 0 and below 1, not 0.0"),
        ({"mask_prob": 1.0}, "--mask_prob must be above 0 and below 1, not 1.0"),
        ({"mask_prob": float("nan")}, "--mask_prob must be a finite number, not nan"),
        ({"dupe_factor": 0}, "--dupe_factor must be at least 1 and at most 65,536, not 0"),
        ({"mask_last_share": 1.5}, "--mask_last_share must be at least 0 and at most 1, not 1.5"),
        (
            {"mask_token_share": -0.1},
            "--mask_token_share must be at least 0 and at most 1, not -0.1",
        ),
        (
            {"random_item_share": 1.1},
            "--random_item_share must be at least 0 and at most 1, not 1.1",
        ),
        ({"mask_token_share": 0.8, "random_item_share": 0.3}, "--random_item_share must not"),
    ],
)
def test_flags_out_of_range_are_named(flags: dict[str, float], named: str) -> None:
    with pytest.raises(UserError, match=named):
        MaskConfig(**flags)
