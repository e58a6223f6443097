"""Negatives: drawn with the given probabilities, keyed by the position in the data order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.batches.train_batch import TrainBatch
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore
from pipeline.training import alias_table
from pipeline.training.alias_table import AliasTable
from pipeline.training.config import LoaderConfig, MaskConfig, NegativesConfig, WindowConfig
from pipeline.training.loader import RankShare, TrainLoader
from pipeline.training.negatives import SharedNegatives

NUM_ITEMS, DRAWS = 9, 5
COUNTS = np.array([0, 4, 0, 0, 19, 1, 0, 0, 2])


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40))
def test_the_alias_table_holds_the_probabilities(weights: list[int]) -> None:
    probabilities = np.array(weights) / sum(weights)
    for block in (1, 3, alias_table._BLOCK):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(alias_table, "_BLOCK", block)
            table = AliasTable(len(weights), probabilities.__getitem__)
        kept = table.keep / 2.0**32
        found = kept.copy()
        np.add.at(found, table.other, 1 - kept)
        # A cell's share is rounded to a multiple of 2^-32.
        np.testing.assert_allclose(found / len(weights), probabilities, atol=1e-9)
        if block == 1:
            alone = table
        assert table.keep.tolist() == alone.keep.tolist()
        assert table.other.tolist() == alone.other.tolist()


def test_equal_probabilities_that_rounding_puts_below_a_cell() -> None:
    assert 1 / 49 * 49 < 1
    table = AliasTable(49, np.full(49, 1 / 49).__getitem__)
    cells = np.arange(49)
    assert table(cells, np.full(49, 2**32 - 1, dtype=np.uint32)).tolist() == cells.tolist()


def test_a_cell_below_its_share_is_itself_else_its_alias() -> None:
    # Shares of the two cells: 0.5, and 1.5 of which a half fills the first.
    table = AliasTable(2, np.array([0.25, 0.75]).__getitem__)
    draws = np.array([2**31 - 1, 2**31, 0, 2**32 - 2], dtype=np.uint32)
    assert table(np.array([0, 0, 1, 1]), draws).tolist() == [0, 1, 1, 1]


def test_counts_and_their_expected_logarithms() -> None:
    sampler = SharedNegatives(20_000, NUM_ITEMS, seed=3, train_counts=COUNTS)
    items, log_counts = sampler(0, [7])
    counts = np.bincount(items[0], minlength=NUM_ITEMS + 1)
    expected = 20_000 * (COUNTS + 1) / (COUNTS + 1).sum()
    assert counts[0] == 0 and counts.sum() == 20_000
    # Five standard deviations of a binomial.
    assert (np.abs(counts[1:] - expected) < 5 * np.sqrt(expected)).all()
    np.testing.assert_allclose(np.exp(log_counts), expected[items - 1], rtol=1e-5)


def test_uniform_draws_are_as_frequent_as_expected() -> None:
    items, log_counts = SharedNegatives(18_000, NUM_ITEMS, seed=3)(0, [7])
    counts = np.bincount(items[0], minlength=NUM_ITEMS + 1)[1:]
    assert (np.abs(counts - 2000) < 5 * np.sqrt(2000)).all()
    np.testing.assert_allclose(log_counts, np.log(2000), rtol=1e-6)


def test_draws_are_a_function_of_seed_epoch_and_sample() -> None:
    def drawn(seed: int, epoch: int, sample: int) -> tuple[int, ...]:
        return tuple(SharedNegatives(DRAWS, 1000, seed, np.zeros(1000, int))(epoch, [sample])[0][0])

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    several, _ = SharedNegatives(DRAWS, 1000, 1, np.zeros(1000, int))(2, [3, 4])
    assert list(map(tuple, several)) == [drawn(1, 2, 3), drawn(1, 2, 4)]
    assert len({drawn(1, 2, 3), drawn(2, 2, 3), drawn(1, 3, 3), drawn(1, 2, 4)}) == 4


def loader(rank: int = 0, world_size: int = 1) -> TrainLoader:
    store = SequenceStore.from_arrays(
        np.arange(7 * 4) % NUM_ITEMS + 1, np.arange(8) * 4, num_items=NUM_ITEMS
    )
    return TrainLoader(
        store,
        WindowConfig(max_len=4),
        MaskConfig(),
        LoaderConfig(train_batch_size=4 // world_size, seed=1),
        RankShare(rank, world_size),
        negatives=SharedNegatives(DRAWS, NUM_ITEMS, 1, COUNTS),
    )


def negatives(batches: list[TrainBatch]) -> list[list[int]]:
    return [batch.unpack().negatives.tolist() for batch in batches]


def test_all_ranks_have_the_negatives_of_one() -> None:
    # 7 windows: the second step's last window leaves one of four ranks with a filler row.
    alone = list(loader().epoch(2))
    assert len(alone) == 2 and len({tuple(row) for row in negatives(alone)}) == 2
    for rank in range(4):
        shared = list(loader(rank, 4).epoch(2))
        assert negatives(shared) == negatives(alone)
        one, other = shared[0].unpack(), alone[0].unpack()
        assert one.log_counts.tolist() == other.log_counts.tolist()


def test_a_resumed_epoch_draws_the_same() -> None:
    whole = loader().epoch(1)
    next(whole)
    assert negatives(list(loader().epoch(1, sample=4))) == negatives(list(whole))


def test_batches_carry_them_as_tensors_and_candidates() -> None:
    packed = next(loader().epoch(0))
    batch = packed.unpack()
    assert batch.negatives.dtype == torch.int64 and batch.log_counts.dtype == torch.float32
    features = packed.to(torch.device("cpu")).features
    assert features["candidate"].values().tolist() == [
        *batch.targets.tolist(),
        *batch.negatives.tolist(),
    ]
    assert features["item"].values().tolist() == batch.features.values().tolist()


def test_flags_out_of_range() -> None:
    with pytest.raises(UserError, match="--train_negatives must be at least 1, not 0"):
        NegativesConfig(train_negatives=0)
