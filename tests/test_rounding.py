"""Rounded-up steps hold the same windows and targets, and fillers that count for nothing."""

import numpy as np
from torchdata.nodes import IterableWrapper

from pipeline.loader import LoaderConfig, TrainLoader
from pipeline.masking import MaskConfig
from pipeline.rounding import RoundUp, rounding_unit
from pipeline.samples import Chunk
from pipeline.store import SequenceStore
from pipeline.windows import WindowConfig


def test_units_are_a_sixteenth_of_the_next_power_of_two() -> None:
    assert rounding_unit(1) == rounding_unit(128) == 8
    assert rounding_unit(129) == 16
    assert rounding_unit(51_200) == 4096


def test_the_example_of_the_module() -> None:
    chunk = Chunk(0, [3], np.array([0, 3]), np.arange(3), np.zeros(3, np.int64))
    chunk.values = np.array([7, 11, 9, 4, 11, 5, 6, 11, 2], dtype=np.int32)
    chunk.offsets = np.array([0, 3, 5, 9])
    chunk.masked, chunk.targets = np.array([1, 4, 7]), np.array([3, 2, 8], dtype=np.int32)
    stage = RoundUp(IterableWrapper([chunk]), 4, 11, position_unit=8, mask_unit=4)
    full = next(stage)
    assert full.values.tolist() == [7, 11, 9, 4, 11, 5, 6, 11, 2] + [11] * 7
    assert np.diff(full.offsets).tolist() == [3, 2, 4, 4, 3]
    assert full.masked.tolist() == [1, 4, 7, 0]
    assert full.targets.tolist() == [3, 2, 8, 0]
    assert full.row_splits.tolist() == [0, 5]
    assert full.step_windows.tolist() == [3]


def test_rounding_adds_only_what_counts_for_nothing() -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 40, 50)
    store = SequenceStore.from_arrays(
        generator.integers(1, 21, lengths.sum()), np.concatenate([[0], lengths.cumsum()]), 20
    )

    def batches(few_shapes: bool, rank: int) -> list:
        loader = TrainLoader(
            store,
            WindowConfig(max_len=10),
            MaskConfig(),
            LoaderConfig(train_batch_size=7),
            rank=rank,
            world_size=2,
            few_shapes=few_shapes,
        )
        return [batch.unpack() for batch in loader.epoch(1)]

    for rank in (0, 1):
        plain, rounded = batches(False, rank), batches(True, rank)
        assert len(plain) == len(rounded) > 1
        for before, after in zip(plain, rounded, strict=True):
            items, masked = before.features.values(), before.masked
            new_items, new_lengths = after.features.values(), after.features.lengths()
            assert len(new_items) % 8 == 0
            assert len(after.masked) % 8 == 0
            assert new_items[: len(items)].equal(items)
            assert (new_items[len(items) :] == 21).all()
            assert new_lengths[: before.num_rows].equal(before.features.lengths())
            assert int(new_lengths.sum()) == len(new_items)
            assert int(new_lengths.max()) <= 10
            assert after.num_rows == len(new_lengths)
            assert after.masked[: len(masked)].equal(masked)
            assert after.targets[: len(masked)].equal(before.targets)
            assert (after.targets[len(masked) :] == 0).all()
            assert after.num_windows == before.num_windows
