"""Batches keep their shapes when they move, and candidates appear once, on the device."""

import pytest
import torch

from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import jagged_items
from pipeline.batches.train_batch import TrainBatch

CPU = torch.device("cpu")


def train_batch(candidate_range: tuple[int, int] | None) -> TrainBatch:
    """The two rows of the module's example."""
    return TrainBatch(
        features=jagged_items(torch.tensor([7, 11, 9, 4, 11]), torch.tensor([3, 2])),
        masked=torch.tensor([1, 4]),
        targets=torch.tensor([3, 2]),
        num_windows=2,
        num_rows=2,
        longest=8,
        candidate_range=candidate_range,
    )


def eval_batch() -> EvalBatch:
    return EvalBatch(
        features=jagged_items(torch.tensor([7, 11, 11]), torch.tensor([2, 1])),
        masked=torch.tensor([1, 2]),
        targets=torch.tensor([3, 1]),
        users=torch.tensor([5, -1]),
        is_first=torch.tensor([True, False]),
        negatives=torch.tensor([[4, 2], [0, 0]]),
        seen=torch.tensor([7]),
        seen_offsets=torch.tensor([0, 1, 1]),
        num_rows=2,
        longest=8,
    )


def test_to_appends_the_candidates_spread_over_the_rows() -> None:
    features = train_batch((1, 11)).to(CPU).features
    assert features.keys() == ["item", "candidate"]
    assert features["item"].values().tolist() == [7, 11, 9, 4, 11]
    assert features["item"].lengths().tolist() == [3, 2]
    assert features["candidate"].values().tolist() == list(range(1, 11))
    assert features["candidate"].lengths().tolist() == [5, 5]
    assert features.stride() == 2


def test_a_second_to_appends_nothing() -> None:
    once = train_batch((1, 11)).to(CPU)
    assert once.to(CPU).features.values().tolist() == once.features.values().tolist()


def test_without_a_candidate_range_there_are_no_candidates() -> None:
    assert train_batch(None).to(CPU).features.keys() == ["item"]


def test_an_empty_candidate_range_is_a_key_without_values() -> None:
    features = train_batch((4, 4)).to(CPU).features
    assert features["candidate"].lengths().tolist() == [0, 0]
    assert features["candidate"].values().tolist() == []


def test_ranges_and_row_counts_are_not_mixed_up_by_the_cache() -> None:
    train_batch((1, 11)).to(CPU)
    assert train_batch((2, 4)).to(CPU).features["candidate"].values().tolist() == [2, 3]
    one_row = train_batch((1, 11))
    one_row.features = jagged_items(torch.tensor([7]), torch.tensor([1]))
    assert one_row.to(CPU).features["candidate"].lengths().tolist() == [10]


def test_lengths_per_key_need_no_device_synchronisation() -> None:
    features = train_batch((1, 11)).to(CPU).features
    assert features._length_per_key == [5, 10]
    # TorchRec's own sums must equal the given ones.
    features._length_per_key = None
    assert features.length_per_key() == [5, 10]


def test_an_eval_batch_keeps_every_field() -> None:
    moved = eval_batch().to(CPU)
    assert moved.features["item"].lengths().tolist() == [2, 1]
    assert moved.features["candidate"].lengths().tolist() == [0, 0]
    for name in ("masked", "targets", "users", "negatives", "seen", "seen_offsets"):
        assert torch.equal(getattr(moved, name), getattr(eval_batch(), name)), name


def sampled_batch() -> TrainBatch:
    """The same rows with three negatives; the first row has left context only."""
    batch = train_batch(None)
    batch.left_only = torch.tensor([True, False])
    batch.negatives, batch.log_counts = torch.tensor([5, 5, 8]), torch.tensor([0.5, 0.5, -1.0])
    return batch


def test_targets_and_negatives_are_the_candidates_of_a_sampled_loss() -> None:
    moved = sampled_batch().to(CPU)
    assert moved.features["item"].values().tolist() == [7, 11, 9, 4, 11]
    assert moved.features["candidate"].values().tolist() == [3, 2, 5, 5, 8]
    assert moved.features["candidate"].lengths().tolist() == [3, 2]
    assert moved.negatives.tolist() == [5, 5, 8] and moved.log_counts.tolist() == [0.5, 0.5, -1.0]
    assert moved.left_only.tolist() == [True, False]
    assert moved.to(CPU).features.values().tolist() == moved.features.values().tolist()


@pytest.mark.parametrize("batch", [train_batch((1, 11)), sampled_batch()])
def test_record_stream_covers_every_tensor(
    batch: TrainBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = batch.to(CPU)
    recorded: list[int] = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, _: recorded.append(tensor.data_ptr())
    )
    moved.record_stream(torch.Stream(CPU))
    own = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    expected = [*own, moved.features.values(), moved.features.lengths()]
    assert sorted(recorded) == sorted(tensor.data_ptr() for tensor in expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="pins where there is CUDA")
def test_pin_memory_without_cuda_is_the_batch_itself() -> None:
    evaluated = eval_batch()
    assert evaluated.pin_memory() is evaluated


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("batch", [train_batch((1, 11)), sampled_batch(), eval_batch()])
def test_copied_on_a_side_stream(batch: TrainBatch | EvalBatch) -> None:
    if isinstance(batch, EvalBatch):
        batch = batch.pin_memory()
        assert batch.masked.is_pinned() and batch.features.values().is_pinned()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moved = batch.to(torch.device("cuda"), non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    if isinstance(moved, TrainBatch):
        moved.record_stream(torch.cuda.current_stream())
    assert moved.features.values().tolist() == batch.to(CPU).features.values().tolist()
    assert moved.targets.tolist() == batch.targets.tolist()


def test_many_candidates_get_extra_rows_after_the_item_rows() -> None:
    features = train_batch((1, 201)).to(CPU).features
    assert features["item"].lengths().tolist() == [3, 2, 0, 0]
    assert features["candidate"].lengths().tolist() == [50, 50, 50, 50]
    assert features["candidate"].values().tolist() == list(range(1, 201))
