"""The training step's fast path on CUDA against its plain one; skipped where there is no CUDA."""

from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from model.execution import ExecutionPlan
from model.kernels import graphed_call
from model.network.config import EncoderConfig, HeadConfig
from model.network.dense_step import DenseStep, StepInput
from model.network.encoder import Encoder
from model.network.head import CatalogSlice, ScoringHead
from model.step.graphed_optimizer import GraphedOptimizer
from model.training.progress import HostThrottle

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need CUDA")

LENGTHS = [40, 7, 0, 23, 40, 1, 12, 0]
ITEMS, NEGATIVES, MASKED = 300, 50, 30


ENCODER = ExecutionPlan(lookup="fbgemm", exchange="torchrec", graphs="encoder")
HOOKED = ExecutionPlan(graphs="encoder")


def step(
    dropout: float = 0.0, loss: str = "softmax", plan: ExecutionPlan | None = None
) -> tuple[DenseStep, Encoder]:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(emb_dim=64, nhead=2, dropout=dropout), max_len=40).train()
    for parameter in encoder.parameters():  # small initial weights would hide attention
        torch.nn.init.normal_(parameter, std=0.15)
    head = ScoringHead(HeadConfig(loss=loss), CatalogSlice(1, ITEMS + 1, shared=False), ITEMS)
    return DenseStep(encoder, head, plan or ExecutionPlan()).train(), encoder


def inputs(seed: int, left_rows: int, loss: str = "softmax") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    positions = int(offsets[-1])
    candidates = ITEMS if loss == "softmax" else MASKED + NEGATIVES
    given = {
        "rows": torch.randn(positions + candidates, 64, generator=generator),
        "offsets": offsets,
        "masked": torch.randperm(positions, generator=generator)[:MASKED].sort().values,
        "targets": torch.randint(ITEMS + 1, (MASKED,), generator=generator),
        "left_only": torch.arange(len(LENGTHS)) < left_rows,
    }
    if loss != "softmax":
        given["negatives"] = torch.randint(1, ITEMS + 1, (NEGATIVES,), generator=generator)
        given["log_counts"] = torch.rand(NEGATIVES, generator=generator)
    return given


def two_streams(seed: int, left_rows: int) -> dict[str, torch.Tensor]:
    """Four windows, the second rows of those with left context only, and a filler row."""
    lengths = [39, 7, 1, 23]
    seconds = [n + 1 if row < left_rows else 0 for row, n in enumerate(lengths)]
    # Constant shapes: filler rows pad the second rows.
    offsets = torch.tensor([0, *lengths, *seconds, 80 - sum(seconds)]).cumsum(0)
    generator = torch.Generator().manual_seed(seed)
    steps_ago = torch.zeros(150, dtype=torch.int64)
    for row, n in enumerate(lengths):
        for start in (int(offsets[row]), int(offsets[4 + row])):
            if start < int(offsets[row]) + n or seconds[row]:
                steps_ago[start : start + n] = torch.arange(n - 1, -1, -1)
    seen = int(offsets[8])  # without fillers
    return {
        "rows": torch.randn(150 + ITEMS, 64, generator=generator),
        "offsets": offsets,
        "masked": torch.randperm(seen, generator=generator)[:MASKED].sort().values,
        "targets": torch.randint(ITEMS + 1, (MASKED,), generator=generator),
        "left_only": torch.arange(4) < left_rows,
        "steps_ago": steps_ago,
    }


def results(
    model: DenseStep, encoder: Encoder, given: dict[str, torch.Tensor], half: bool
) -> list[torch.Tensor]:
    """Loss, report and gradients, in float32 on the CPU."""
    device = next(encoder.parameters()).device
    for parameter in encoder.parameters():
        parameter.grad = None
    moved = {name: tensor.to(device) for name, tensor in given.items()}
    rows = moved.pop("rows").requires_grad_()
    positions = int(given["offsets"][-1])  # T; the rest are candidates
    # Like a lookup's output: parts of one non-leaf tensor.
    items, candidates = (rows * 1).split([positions, len(rows) - positions])
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        given = StepInput(**dict.fromkeys(StepInput._fields) | moved)
        loss, report = model(items, candidates, given, longest=40)
    loss.backward()
    gradients = [rows.grad, *(parameter.grad for parameter in encoder.parameters())]
    return [tensor.detach().float().cpu().clone() for tensor in (loss, report, *gradients)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < limit


@cuda
@pytest.mark.parametrize("left_share", [0, 0.5, 1])
@pytest.mark.parametrize(("make", "rows"), [(inputs, 8), (two_streams, 4)])
def test_jagged_half_precision_equals_padded_full_precision(
    make: Callable[[int, int], dict[str, torch.Tensor]], rows: int, left_share: float
) -> None:
    given = make(1, int(left_share * rows))
    (plain, slow), (fast, encoder) = step(), step()
    encoder.cuda()
    torch.full((1 << 24,), torch.nan, device="cuda")  # unwritten memory must not be zeros
    assert_close(results(fast, encoder, given, True), results(plain, slow, given, False), 0.05)


@cuda
@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
@pytest.mark.parametrize("plan", [ENCODER, HOOKED])
def test_graphs_equal_the_plain_code(plan: ExecutionPlan, loss: str) -> None:
    (plain, slow), (fast, encoder) = step(loss=loss), step(loss=loss, plan=plan)
    encoder.cuda()
    for seed, left_rows in ((1, 4), (2, 4), (3, 6), (1, 4)):  # captured once, replayed with others
        given = inputs(seed, left_rows, loss)
        assert_close(results(fast, encoder, given, True), results(plain, slow, given, False), 0.05)


@cuda
def test_graphs_with_gradient_hooks() -> None:
    (plain, slow), (fast, encoder) = step(), step(plan=HOOKED)
    encoder.cuda()
    # Like DDP: autograd nodes belong to the stream on which they were created.
    held = [p.expand_as(p).grad_fn.next_functions[0][0] for p in encoder.parameters()]
    seen: list[object] = []
    for node in held:
        node.register_hook(lambda *_: seen.append(None))
    for seed, left_rows in ((1, 4), (2, 4)):
        given = inputs(seed, left_rows)
        seen.clear()
        assert_close(results(fast, encoder, given, True), results(plain, slow, given, False), 0.05)
        assert len(seen) == len(held)  # once each: the capture calls no hook


@cuda
def test_second_streams_through_graphs() -> None:
    (plain, slow), (fast, encoder) = step(), step(plan=ENCODER)
    encoder.cuda()
    for seed, left_rows in ((1, 2), (2, 3), (3, 4), (1, 2)):
        given = two_streams(seed, left_rows)
        assert_close(results(fast, encoder, given, True), results(plain, slow, given, False), 0.05)


@cuda
def test_large_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_call, "_COPIED_BYTES", 20_000)  # the items' rows are larger
    (plain, slow), (fast, encoder) = step(), step(plan=ENCODER)
    encoder.cuda()
    for seed, left_rows in ((1, 4), (2, 4), (3, 6), (1, 4)):
        elsewhere = torch.empty(seed << 20, device="cuda")  # so that addresses change
        given = inputs(seed, left_rows)
        assert_close(results(fast, encoder, given, True), results(plain, slow, given, False), 0.05)
        del elsewhere


@cuda
def test_dropout_follows_the_seed_through_graphs() -> None:
    (plain, slow), (fast, encoder) = step(0.3), step(0.3, plan=ENCODER)
    slow.cuda()
    encoder.cuda()
    given = inputs(1, 4)

    def seeded(model: DenseStep, of: Encoder, seed: int) -> torch.Tensor:
        torch.cuda.manual_seed(seed)
        return results(model, of, given, half=True)[0]

    first, second = seeded(fast, encoder, 1), seeded(fast, encoder, 2)  # the first call captures
    assert first.equal(seeded(plain, slow, 1))
    assert second.equal(seeded(plain, slow, 2))
    assert not first.equal(second)


class _Clipped:
    """Just enough of a KeyedOptimizer: AdamW behind a clipped norm."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        rate = torch.tensor(1e-3, device="cuda")
        self.inner = torch.optim.AdamW(parameters, lr=rate, fused=True, capturable=True)
        self.parameters = parameters
        self.params, self.state, self.param_groups = {}, {}, self.inner.param_groups

    def step(self, closure: object = None) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.inner.step()


@cuda
def test_a_graphed_optimizer_equals_the_plain_one() -> None:
    (plain, slow), (fast, encoder) = step(), step(plan=ENCODER)
    slow.cuda()
    encoder.cuda()
    expected, found = (_Clipped(list(each.parameters())) for each in (slow, encoder))
    graphed = GraphedOptimizer(found, found.parameters)
    for number in range(8):
        given = inputs(number % 3, 4)
        results(plain, slow, given, half=True)
        results(fast, encoder, given, half=True)
        for optimizer in (expected, found):
            optimizer.param_groups[0]["lr"].fill_(1e-3 * (number + 1))
        expected.step()
        graphed.step()
        graphed.zero_grad()
    assert graphed._graph is not None
    for one, other in zip(encoder.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-4)


@cuda
def test_released_graphs_are_captured_again() -> None:
    (plain, slow), (fast, encoder) = step(), step(plan=ENCODER)
    encoder.cuda()
    expected = results(plain, slow, inputs(1, 2), False)
    for _ in range(2):
        assert_close(results(fast, encoder, inputs(1, 2), True), expected, 0.05)
        fast.release()
        assert not fast._graphed._captured


@cuda
def test_the_host_stays_a_few_steps_ahead() -> None:
    throttle, done = HostThrottle(torch.device("cuda"), timedelta(seconds=10), ahead=2), []
    for _ in range(6):
        torch.cuda._sleep(20_000_000)  # some 10 ms
        done.append(torch.cuda.Event())
        done[-1].record()
        throttle.after_step()
    assert [event.query() for event in done[:3]] == [True] * 3
    assert not done[-1].query()
    throttle.wait_for_all()
    assert done[-1].query()
