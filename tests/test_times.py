"""Times as input: seconds and gaps of each position, their vectors, and turns by time."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchdata.nodes import IterableWrapper

from model.bert4rec import BERT4Rec, ModelConfig
from model.distributed import Ranks
from model.execution import ExecutionPlan
from model.network.config import EncoderConfig, HeadConfig
from model.network.dense_step import DenseStep, StepInput
from model.network.distillation import Teachers
from model.network.encoder import Encoder
from model.network.head import CatalogSlice
from model.network.times import TimeVectors, turns_a_second, with_times
from model.run.build import train_loader
from model.run.execution import plan_execution
from model.run.teachers import as_teacher
from model.settings.config import RunConfig
from pipeline.batches.times import UNKNOWN, ItemTimes, TimeSpan, with_gaps
from pipeline.batches.train_batch import TrainBatch
from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from pipeline.evaluation.holdout import EvalLoader
from pipeline.preparation.store import SequenceStore
from pipeline.training.chunks import JaggedWindows
from pipeline.training.cloze import ClozeMask
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import TrainLoader
from pipeline.training.shape_buckets import PadToBuckets
from pipeline.training.two_stream import TwoStreams

U = UNKNOWN
# Two users; the second one's first two items have one time.
TIMES = [100, 160, 160, 400, 1000, 50, 50, 7200, 9000]
ITEMS = [1, 2, 3, 4, 5, 6, 7, 1, 2]


def store_of(unit: str = "s", scale: int = 1) -> SequenceStore:
    store = SequenceStore.from_arrays(ITEMS, [0, 5, 9], 7)
    store.times = np.array(TIMES) * scale + scale // 2
    store.counts = {"name": "mine", "times": {"unit": unit}}
    return store


def test_gaps_by_hand() -> None:
    found = with_gaps(np.array([100, 160, 90, U, 300]), np.array([0, 2]), np.array([U, 50]))
    #           the user's first item; an item before 90; neither side of an unknown time has a gap
    assert found.tolist() == [[100, U], [160, 60], [90, 40], [U, U], [300, U]]
    assert with_gaps(np.array([5, 3]), np.array([0]), np.array([9])).tolist() == [[5, 0], [3, 0]]


@pytest.mark.parametrize(("unit", "scale"), [("s", 1), ("ms", 1000)])
def test_rows_have_the_gaps_of_the_whole_history(unit: str, scale: int) -> None:
    times = ItemTimes(store_of(unit, scale))
    found = times.rows(np.array([3, 0, 5]), np.array([5, 2, 8]))
    assert found[:2].tolist() == [[400, 240], [1000, 600]]  # of the item before the window
    assert found[2:4].tolist() == [[100, U], [160, 60]]
    assert found[4:].tolist() == [[50, U], [50, 0], [7200, 7150]]


def test_a_fingerprint_of_times_does_not_depend_on_their_unit() -> None:
    found = [ItemTimes(store_of(*each)).fingerprint() for each in (("s", 1), ("ms", 1000))]
    assert found[0] == found[1]
    moved = store_of()
    moved.times[2] -= 1
    assert ItemTimes(moved).fingerprint() != found[0]


def test_times_long_before_all_others_are_refused() -> None:
    """The periods would be too long to tell the others apart, and config.json damaged."""
    store = store_of()
    store.times[0] = -(1 << 50)
    with pytest.raises(UserError, match="--use_times: mine has the time -1125899906842624"):
        ItemTimes(store).span()


def test_the_span_is_of_the_training_parts() -> None:
    times = ItemTimes(store_of())
    assert times.span() == TimeSpan(first=50, last=160, newest=9000)
    assert times.span(train_on_validation=True) == TimeSpan(first=50, last=7200, newest=9000)


@pytest.mark.parametrize("unit", ["", "1e-6"])
def test_times_of_unknown_unit_are_refused(unit: str) -> None:
    with pytest.raises(UserError, match="the times of mine are numbers of unknown unit: give"):
        ItemTimes(store_of(unit))


def test_data_without_times_are_refused() -> None:
    with pytest.raises(UserError, match="the data has no times: name their column with --columns"):
        ItemTimes(SequenceStore.from_arrays(ITEMS, [0, 5, 9], 7))


def chunk() -> JaggedWindows:
    """A row with left context only, 7 3, and 5 6 with both contexts."""
    return JaggedWindows(
        epoch=0,
        step_samples=[2],
        window_splits=np.array([0, 2]),
        windows=np.arange(2),
        copies=np.zeros(2, dtype=np.int64),
        keys=np.arange(2, dtype=np.uint64),
        left_only=np.array([True, False]),
        values=np.array([7, 3, 5, 6], dtype=np.int32),
        offsets=np.array([0, 2, 4]),
        times=np.array([[10, U], [30, 20], [40, 5], [41, 1]]),
    )


def test_a_second_stream_has_the_times_of_its_targets() -> None:
    cloze = ClozeMask(MaskConfig(two_stream=True, mask_prob=0.999), 7, 0)
    found = next(TwoStreams(IterableWrapper([chunk()]), cloze))
    rows, second = [[10, U], [30, 20], [40, 5], [41, 1]], [[10, U], [30, 20], [U, U]]
    assert found.times.tolist() == [*rows, *second]
    full = next(PadToBuckets(IterableWrapper([found]), 8, 8, position_unit=8, mask_unit=4))
    assert full.times.tolist() == [*rows, *second, [U, U]]


def batches(batch_size: int = 8, users: int = 300, **mask: Any) -> list[TrainBatch]:
    """An epoch of histories 1 ... 6, of which 4 train; item i of user u has the time 10 u + i^2."""
    items = np.tile(np.arange(1, 7), users)
    store = SequenceStore.from_arrays(items, np.arange(users + 1) * 6, 6)
    store.times = (10 * np.arange(users)[:, None] + np.arange(1, 7) ** 2).ravel()
    store.counts = {"times": {"unit": "s"}}
    config = LoaderConfig(train_batch_size=batch_size)
    sizes = WindowConfig(max_len=3), MaskConfig(**mask), config
    loader = TrainLoader(store, *sizes, few_shapes=False, times=ItemTimes(store))
    return [batch.unpack() for batch in loader.epoch(1)]


def test_masked_positions_keep_their_times() -> None:
    found = batches(left_context_share=0.0)
    for batch in found:
        batch.features.values()[batch.masked] = batch.targets  # the items before masking
    times = torch.cat([batch.times for batch in found])
    items = torch.cat([batch.features.values() for batch in found])
    known = times[:, 0] != U
    seconds, gaps = times[known].unbind(1)
    of_items = seconds % 10  # squares 1, 4, 9, 16
    assert set(zip(items[known].tolist(), of_items.tolist(), strict=True)) == {
        *((1, 1), (2, 4), (3, 9), (4, 6))
    }
    found_gaps = set(zip(items[known].tolist(), gaps.tolist(), strict=True))
    assert found_gaps == {(1, U), (2, 3), (3, 5), (4, 7)}


def timeless_users(found: list[TrainBatch]) -> tuple[float, int]:
    rows = [row for b in found for row in b.times.split(b.features.lengths().tolist())]
    timeless = [bool((row == U).all()) for row in rows]
    assert all(
        lost or bool((row[:, 0] != U).all()) for lost, row in zip(timeless, rows, strict=True)
    )
    return np.mean(timeless), len(rows)


def test_a_share_of_the_windows_has_no_times_in_any_batches() -> None:
    share, rows = timeless_users(batches())
    assert rows == 600 and 0.02 < share < 0.09
    assert timeless_users(batches(batch_size=64))[0] == share


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_mask_token_of_an_evaluation_has_the_targets_time(split: str) -> None:
    store = store_of()
    (batch,) = EvalLoader(
        store, split, 3, 8, HoldoutConfig(eval_negatives=1), times=ItemTimes(store)
    )
    # The newest two items, then the mask token in the target's place.
    rows = {
        "validation": [[160, 60], [160, 0], [400, 240], [50, U], [50, 0], [7200, 7150]],
        "test": [[160, 0], [400, 240], [1000, 600], [50, 0], [7200, 7150], [9000, 1800]],
    }
    assert batch.times.tolist() == rows[split]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_knows_of_the_target_its_time_alone(split: str) -> None:
    """Neither its item, nor what follows it, are in the model's input."""
    inputs = []
    for later in (False, True):
        store = store_of()
        items, times = store.items.copy(), store.times.copy()
        for place in store.parts.targets(split, items)[1]:
            end = store.offsets[np.searchsorted(store.offsets, place, "right")]
            if later:
                items[place:end] = 7
                times[place + 1 : end] += 999
        changed = SequenceStore.from_arrays(items, store.offsets, 7)
        changed.times, changed.counts = times, store.counts
        config = HoldoutConfig(eval_negatives=1)
        (batch,) = EvalLoader(changed, split, 3, 8, config, times=ItemTimes(changed))
        inputs.append((batch.features.values(), batch.times, batch.targets))
    (items, times, targets), (same_items, same_times, others) = inputs
    assert torch.equal(items, same_items) and torch.equal(times, same_times)
    assert not torch.equal(targets, others)


# A knot a second of the periods. 1 January 1970 was a Thursday.
VECTORS = TimeVectors(4, first=0, last=63)


@pytest.mark.parametrize(
    ("time", "known"),
    [
        # Gap 0; the first period; midnight; Thursday.
        ((0, 0), {0: 1, 62: 1, 126: 1, 153: 1}),
        # log2(1 + 3) = 2 octaves; beyond the last period; 01:30; Friday.
        ((86400 + 5400, 3), {4: 1, 125: 1, 127: 0.5, 128: 0.5, 154: 1}),
        # log2(1 + 2^40), beyond the last knot; period 10; ten seconds after midnight.
        ((10, 1 << 40), {61: 1, 72: 1, 126: 1 - 10 / 3600, 127: 10 / 3600, 153: 1}),
        ((-86400, U), {157: 1, 62: 1, 126: 1, 152: 1}),
        ((U, U), {157: 1, 158: 1}),
    ],
)
def test_knots_by_hand(time: tuple[int, int], known: dict[int, float]) -> None:
    columns, weights = VECTORS.knots(torch.tensor([time]))
    assert len(columns[0].unique()) == 7
    found = {c: w for c, w in zip(columns[0].tolist(), weights[0].tolist(), strict=True) if w}
    assert found == pytest.approx(known, abs=1e-6)


def encoder_of(**flags: Any) -> Encoder:
    torch.manual_seed(3)
    config = EncoderConfig(16, 2, use_times=True, **flags)
    encoder = Encoder(config, 8, TimeSpan(0, 1000, 1000)).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return encoder


ROWS = torch.randn(5, 16), torch.tensor([0, 3, 5]), torch.tensor([2, 4])
GIVEN = torch.tensor([[100, U], [160, 60], [400, 240], [50, U], [7200, 7150]])


def test_vectors_are_added_to_the_items() -> None:
    encoder, (items, *layout) = encoder_of(positions="none"), ROWS
    found = encoder(items, *layout, times=GIVEN)
    added = encoder.times(GIVEN, torch.float32)
    encoder.times = None
    torch.testing.assert_close(found, encoder(items + added, *layout))


def test_no_times_are_unknown_times() -> None:
    encoder, unknown = encoder_of(), torch.full((5, 2), U)
    assert torch.equal(encoder(*ROWS), encoder(*ROWS, times=unknown))
    assert not torch.allclose(encoder(*ROWS), encoder(*ROWS, times=GIVEN))


@pytest.mark.parametrize("two_stream", [False, True])
def test_left_context_knows_no_later_time(two_stream: bool) -> None:
    """The time of item j changes what is predicted of j and later items, and nothing before."""
    encoder, size = encoder_of(), 5
    seconds, offsets, at = torch.tensor([100, 160, 400, 4000, 9000]), [0, size], range(size)
    rows, steps_ago = torch.randn(size, 16), None
    if two_stream:  # and the extra mask token
        rows = torch.cat([rows, torch.randn(1, 16).expand(size + 1, 16)])
        offsets, at = [0, size, 2 * size + 1], range(size, 2 * size)
        steps_ago = torch.tensor([*range(size)[::-1], *range(size)[::-1], 0])

    def predicted(seconds: torch.Tensor) -> torch.Tensor:
        times = torch.from_numpy(with_gaps(seconds.numpy(), np.array([0]), np.array([50])))
        if two_stream:
            times = torch.cat([times, times, torch.tensor([[U, U]])])
        left = torch.tensor([True])
        return encoder(rows, torch.tensor(offsets), torch.tensor(at), left, steps_ago, times)

    before = predicted(seconds)
    for j in range(size):
        moved = seconds.clone()
        moved[j] += 37
        changed = (predicted(moved) - before).abs().amax(dim=1) > 1e-5
        assert changed.tolist() == [place >= j for place in range(size)]


def test_untrained_vectors_change_nothing() -> None:
    plain = EncoderConfig(16, 2, positions="none")
    before, span = Encoder(plain, 8).eval(), TimeSpan(0, 9, 9)
    with_them = Encoder(replace(plain, use_times=True), 8, span).eval()
    with_them.load_state_dict(before.state_dict(), strict=False)
    assert torch.equal(before(*ROWS), with_them(*ROWS, times=GIVEN))


def test_turns_depend_on_differences_of_times() -> None:
    """Times moved alike change no product of a query and a key."""
    encoder = encoder_of()
    rotation = encoder.layers[0].attention.rotation[torch.tensor([1, 0])]  # [2, 2, 4]
    near, far = (
        with_times(rotation, torch.tensor([[t, U], [t + 90, U]]), 0, turns_a_second(rotation))
        for t in (0, 10**9)
    )
    turn = [torch.complex(*each.unbind(1)) for each in (near, far)]
    products = [one[0] * one[1].conj() for one in turn]
    torch.testing.assert_close(*products, atol=1e-4, rtol=0)
    # Pairs 0 and 2 turn by position, pair 1 by a radian a minute, pair 3 by one in four years.
    assert torch.equal(near[:, :, ::2], rotation[:, :, ::2])
    assert products[0][1].angle().item() == pytest.approx(-1.5, abs=1e-5)
    assert products[0][3].angle().item() == pytest.approx(-90 / (4 * 365.25 * 86400), abs=1e-6)


@pytest.mark.parametrize("student_reads", [False, True])
def test_a_teacher_reads_the_times_of_the_batch(student_reads: bool) -> None:
    """Teacher and student each have their own flag."""
    sizes, head = (30, 8), HeadConfig()
    plain = EncoderConfig(16, 2, dropout=0, positions="none")
    timed = replace(plain, use_times=True)
    teacher, student = (
        BERT4Rec(
            ModelConfig(*sizes, encoder, head, span=TimeSpan(0, 9999, 9999)),
            CatalogSlice(1, 31, shared=False),
        )
        for encoder in (timed, timed if student_reads else plain)
    )
    nn.init.normal_(teacher.encoder.times.rows.weight)
    teachers = Teachers([as_teacher(teacher, teacher.head.catalog, ROWS[0].device, "fp32")], 0.5)
    assert teachers.use_times
    step = DenseStep(student.encoder, student.head, ExecutionPlan(), teachers)
    table = student.embeddings.embeddings["item"].weight
    ids, targets = torch.tensor([3, 9, 31, 5, 31]), torch.tensor([7, 30])
    none = dict.fromkeys(("left_only", "steps_ago", "negatives", "log_counts", "all_targets"))
    given = StepInput(offsets=ROWS[1], masked=ROWS[2], targets=targets, ids=ids, **none)
    losses = {
        step(table[ids], table[1:31], given._replace(times=times), longest=8)[0].item()
        for times in (None, torch.full((5, 2), U), GIVEN)
    }
    assert len(losses) == 2  # a student's untrained vectors change nothing


@pytest.mark.parametrize("student_reads", [False, True])
def test_batches_have_times_if_a_teacher_reads_them(one_rank: Ranks, student_reads: bool) -> None:
    encoder = EncoderConfig(16, 2, use_times=student_reads)
    config = RunConfig(encoder=encoder, windows=WindowConfig(max_len=8))
    plan, store = plan_execution(config, 7, one_rank), store_of()
    teachers = Teachers([SimpleNamespace(uses_times=True)], 0.5)
    for taught, has_times in ((None, student_reads), (teachers, True)):
        (batch,) = train_loader(config, store, one_rank, plan, taught).epoch(0)
        assert (batch.unpacked.times is not None) == has_times
