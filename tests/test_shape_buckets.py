"""Padded steps have the same windows and targets, plus fillers that the loss ignores."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
from torchdata.nodes import IterableWrapper

from model.step.train_step import graph_key
from pipeline.preparation.store import SequenceStore
from pipeline.training.chunks import MaskedWindows
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import RankShare, TrainLoader
from pipeline.training.shape_buckets import PadToBuckets, bucket_size


def test_buckets_are_a_sixteenth_of_the_next_power_of_two() -> None:
    assert bucket_size(1) == bucket_size(128) == 8
    assert bucket_size(129) == 16
    assert bucket_size(51_200) == 4096


def test_the_example_of_the_module() -> None:
    chunk = MaskedWindows(
        epoch=0,
        step_samples=[3],
        window_splits=np.array([0, 3]),
        windows=np.arange(3),
        copies=np.zeros(3, dtype=np.int64),
        row_splits=np.array([0, 3]),
        values=np.array([7, 11, 9, 4, 11, 5, 6, 11, 2], dtype=np.int32),
        offsets=np.array([0, 3, 5, 9]),
        masked=np.array([1, 4, 7]),
        targets=np.array([3, 2, 8], dtype=np.int32),
        mask_splits=np.array([0, 3]),
    )
    stage = PadToBuckets(IterableWrapper([chunk]), 4, 11, position_unit=8, mask_unit=4)
    full = next(stage)
    assert full.values.tolist() == [7, 11, 9, 4, 11, 5, 6, 11, 2] + [11] * 7
    assert np.diff(full.offsets).tolist() == [3, 2, 4, 4, 3]
    assert full.masked.tolist() == [1, 4, 7, 0]
    assert full.targets.tolist() == [3, 2, 8, 0]
    assert full.row_splits.tolist() == [0, 5]
    assert full.mask_splits.tolist() == [0, 4]
    assert full.step_windows.tolist() == [3]


def test_padding_adds_only_what_the_loss_ignores() -> None:
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
            RankShare(rank, 2),
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


def test_ranks_that_exchange_sizes_have_the_same_shapes() -> None:
    generator = np.random.default_rng(1)
    lengths = generator.integers(3, 40, 40)
    store = SequenceStore.from_arrays(
        generator.integers(1, 21, lengths.sum()), np.concatenate([[0], lengths.cumsum()]), 20
    )
    mask = MaskConfig(left_context_share=0.5)
    ranks, barrier = 3, threading.Barrier(3)
    sizes_of: list[dict[int, np.ndarray]] = [{}]

    def all_sizes(rank: int, sizes: np.ndarray) -> np.ndarray:
        here = sizes_of[-1]
        here[rank] = sizes
        if barrier.wait() == 0:
            sizes_of.append({})
        barrier.wait()
        return np.stack([here[each] for each in range(ranks)])

    def batches(rank: int, few_shapes: bool, alone: bool = False) -> list:
        loader = TrainLoader(
            store,
            WindowConfig(max_len=10),
            mask,
            LoaderConfig(train_batch_size=7),
            RankShare(rank, ranks, None if alone else partial(all_sizes, rank)),
            few_shapes=few_shapes,
        )
        # The last steps of the second call have a window less.
        return [*loader.epoch(1, stop=3), *loader.epoch(1, sample=1)]

    for few_shapes in (False, True):
        with ThreadPoolExecutor(ranks) as pool:
            found = [*pool.map(partial(batches, few_shapes=few_shapes), range(ranks))]
        plain = [batches(rank, few_shapes, alone=True) for rank in range(ranks)]
        uneven = 0
        # Ranks meet a pair of equal or different shapes in the same steps.
        shapes = [[*map(graph_key, of_rank)] for of_rank in found]
        first_steps = [[*map(of_rank.index, of_rank)] for of_rank in shapes]
        assert first_steps == first_steps[:1] * ranks and shapes != shapes[:1] * ranks
        for step, packed in enumerate(zip(*found, strict=True)):
            of_step = [batch.unpack() for batch in packed]
            windows = [batch.num_windows for batch in of_step]
            targets = sum(int((batch.targets > 0).sum()) for batch in of_step)
            assert [batch.all_targets.tolist() for batch in of_step] == [[targets]] * ranks
            uneven += len({*windows}) > 1
            assert {batch.all_windows for batch in packed} == {sum(windows)}
            for sizes in (
                [len(batch.ids) for batch in of_step],
                [len(batch.masked) for batch in of_step],
                [len(batch.row_offsets) for batch in of_step],
            ):
                assert len({*sizes}) == 1
            for rank, batch in enumerate(of_step):
                before = plain[rank][step].unpack()
                items, masked = before.features.values(), before.masked
                if windows[rank] == 0:  # without padding, one mask token
                    assert (batch.ids == 21).all()
                    assert (batch.targets == 0).all()
                    continue
                assert batch.ids[: len(items)].equal(items)
                assert (batch.ids[len(items) :] == 21).all()
                assert batch.masked[: len(masked)].equal(masked)
                assert (batch.targets[len(masked) :] == 0).all()
                assert int(batch.row_offsets[-1]) == len(batch.ids)
                assert int(batch.row_offsets.diff().max()) <= 10
        assert uneven == 2  # the last steps of two epochs
        assert graph_key(replace(found[0][0], all_windows=1)) != graph_key(found[0][0])
