"""Packed batches equal unpacked ones, on the host and on the device."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.batches.features import jagged_items
from pipeline.batches.packing import as_bools, as_floats, float_pairs, pack
from pipeline.batches.train_batch import PackedBatch, TrainBatch

CPU = torch.device("cpu")
TENSORS = ("masked", "targets", "left_only", "steps_ago", "negatives", "log_counts")
KNOWN = {"num_windows": 2, "num_rows": 2, "longest": 8}


def plain(candidate_range: tuple[int, int] | None = None, sampled: bool = False) -> TrainBatch:
    batch = TrainBatch(
        features=jagged_items(torch.tensor([7, 11, 9, 4, 11]), torch.tensor([3, 2])),
        masked=torch.tensor([1, 4]),
        targets=torch.tensor([3, 2]),
        candidate_range=candidate_range,
        left_only=torch.tensor([True, False]),
        steps_ago=torch.tensor([2, 1, 0, 1, 0]),
        **KNOWN,
    )
    if sampled:
        batch.negatives, batch.log_counts = torch.tensor([5, 5, 8]), torch.tensor([0.5, 2, -1])
    return batch


def packed(batch: TrainBatch, pin_memory: bool = False) -> PackedBatch:
    """The second of two steps; the first is empty."""
    parts = {"values": batch.features.values(), "targets": batch.targets}
    if batch.negatives is not None:
        parts["negatives"] = batch.negatives
    parts |= {
        "lengths": batch.features.lengths(),
        "offsets": torch.tensor([0, 3, 5]),
        "masked": batch.masked,
        "left_only": batch.left_only,
        "steps_ago": batch.steps_ago,
    }
    arrays = {name: part.numpy() for name, part in parts.items()}
    if batch.log_counts is not None:
        arrays["log_counts"] = float_pairs(batch.log_counts.numpy()[None])[0]
    steps = {name: (part, np.array([0, 0, len(part)])) for name, part in arrays.items()}
    _, step = pack(steps, pin_memory)
    return PackedBatch(step, candidate_range=batch.candidate_range, **KNOWN)


def assert_equal(found: TrainBatch, expected: TrainBatch) -> None:
    for name in TENSORS:
        mine, other = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (other is None), name
        assert mine is None or (mine.dtype == other.dtype and torch.equal(mine, other)), name
    for name in KNOWN | {"candidate_range": None}:
        assert getattr(found, name) == getattr(expected, name)
    ours, theirs = found.features, expected.features
    assert ours.keys() == theirs.keys() and ours.stride() == theirs.stride()
    assert ours.length_per_key() == theirs.length_per_key()
    for part in ("values", "lengths", "offsets"):  # theirs: as TorchRec sums them
        assert torch.equal(getattr(ours, part)(), getattr(theirs, part)()), part


@pytest.mark.parametrize("candidates", [None, (1, 11), (1, 201), (4, 4)])
@pytest.mark.parametrize("sampled", [False, True])
def test_unpack_restores_the_batch(candidates: tuple[int, int] | None, sampled: bool) -> None:
    batch = plain(None if sampled else candidates, sampled)
    assert_equal(packed(batch).unpack(), batch)
    assert_equal(packed(batch).unpacked, batch.to(CPU))
    assert_equal(packed(batch).to(CPU).to(CPU).unpacked, batch.to(CPU))


@pytest.mark.parametrize("sampled", [False, True])
def test_a_moved_batch_is_still_packed(sampled: bool) -> None:
    batch = plain(None if sampled else (1, 11), sampled)
    moved = packed(batch).to(CPU)
    assert isinstance(moved, PackedBatch)
    assert_equal(moved.unpacked, batch.to(CPU))
    assert_equal(replace(moved).unpacked, batch.to(CPU))


def test_ids_that_are_looked_up_come_first() -> None:
    for batch, ids, requested in (
        (plain((1, 4)), [7, 11, 9, 4, 11, 1, 2, 3], 5),
        (plain(sampled=True), [7, 11, 9, 4, 11, 3, 2, 5, 5, 8], 10),
    ):
        assert packed(batch).unpacked.ids.tolist() == ids
        assert packed(batch).requested.tolist() == ids[:requested]


def test_one_copy_moves_all_tensors_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    real = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda tensor, *args, **more: moved.append(tensor.numel()) or real(tensor, *args, **more),
    )
    batch = packed(plain(sampled=True))
    batch.to(CPU)
    assert moved == [batch.packed.words.numel()]


def test_record_stream_covers_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: set[int] = set()
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, _: recorded.add(tensor.untyped_storage().data_ptr()),
    )
    step = packed(plain(sampled=True))
    step.record_stream(torch.Stream(CPU))
    assert recorded == {step.packed.words.untyped_storage().data_ptr()}
    for batch in (packed(plain((1, 11))), packed(plain(sampled=True))):
        recorded.clear()
        features = batch.features
        batch.record_stream(torch.Stream(CPU))
        parts = [features.values(), features.lengths(), features.offsets(), batch.packed.words]
        of_batch = (getattr(batch.unpacked, name) for name in TENSORS)
        parts += [part for part in of_batch if part is not None]
        assert recorded == {part.untyped_storage().data_ptr() for part in parts}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_floats_and_bools_round_trip(count: int) -> None:
    rows = np.random.default_rng(0).normal(size=(3, count)).astype(np.float32)
    flags = np.array([True, False, True])
    words = torch.from_numpy(float_pairs(rows))
    assert np.array_equal(torch.stack([as_floats(row, count) for row in words]).numpy(), rows)
    assert as_bools(torch.from_numpy(flags.astype(np.int64))).tolist() == flags.tolist()


def test_without_packed_memory_nothing_changes() -> None:
    batch = plain((1, 11), sampled=False)
    assert replace(batch).to(CPU).words is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sampled", [False, True])
def test_pinned_then_copied(sampled: bool) -> None:
    batch = plain(None if sampled else (1, 11), sampled)
    pinned = packed(batch, pin_memory=True)
    assert pinned.packed.words.is_pinned()
    moved = pinned.to(torch.device("cuda"), non_blocking=True)
    assert moved.unpacked.targets.is_cuda and moved.features.offsets().is_cuda
    assert moved.features.values().tolist() == batch.to(CPU).features.values().tolist()
