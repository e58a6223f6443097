"""Rounding of rows to half precision, by hand and on average; the kernels equal plain torch."""

import math

import pytest
import torch

from model.kernels.random_bits import mixed, random_bits, rounded_at_random
from model.kernels.segment_sum import KINDS, sort_index
from model.tables.table_update import Step, StepOnDevice, update, update_some

CUDA = torch.cuda.is_available()
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
STEP = Step(lr=0.05, beta1=0.9, beta2=0.98, eps=1e-8, number=1, scale=0.5, first_row=7)


def rounded(value: float, bits: int) -> float:
    return rounded_at_random(torch.tensor([value]), torch.tensor([bits])).item()


@pytest.mark.parametrize(
    ("value", "most", "below", "above"),
    [
        # 1 + 2^-12 is a quarter of the way to the next fp16: a quarter of the 8192 draws go up.
        (1 + 2**-12, 6143, 1, 1 + 2**-10),
        (-1 - 2**-12, 6143, -1, -1 - 2**-10),
        # 1310.72 times 2^-16: the draws that go up are .72 x 8192 = 5898.
        (0.02, 2293, 1310 * 2**-16, 1311 * 2**-16),
        # Below 2^-14 all fp16 are 2^-24 apart.
        (1.5 * 2**-24, 4095, 2**-24, 2**-23),
        (2**-26, 6143, 0, 2**-24),
        (2**-14 - 2**-25, 4095, 2**-14 - 2**-24, 2**-14),
        (2 - 2**-12, 2047, 2 - 2**-10, 2),
        (65503.0, 255, 65472, 65504),
    ],
)
def test_the_neighbours_by_hand(value: float, most: int, below: float, above: float) -> None:
    assert rounded(value, 0) == rounded(value, most) == below
    assert rounded(value, most + 1) == rounded(value, 8191) == above
    assert rounded(value, most + 8192 * 5) == below  # other bits do not count


def test_an_fp16_stays_as_it_is() -> None:
    every = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16)
    for bits in (0, 8191):
        found = rounded_at_random(every.float(), torch.full((len(every),), bits))
        torch.testing.assert_close(found, every, rtol=0, atol=0, equal_nan=True)


def test_what_is_no_fp16_shows() -> None:
    found = [rounded(value, 8191) for value in (math.inf, -math.inf, math.nan, 70000.0)]
    assert found[:2] == [math.inf, -math.inf]
    assert math.isnan(found[2])
    assert found[3] == math.inf


def test_the_mean_of_many_roundings_is_the_value() -> None:
    """4096 steps of 6 rows; a mean is at most five of its standard deviations away."""
    values = torch.tensor([0.02, -0.0007, 1.3, 3e-5, -2e-8, 0.9])[:, None].expand(-1, 2)
    rows = torch.arange(6) + (1 << 31) - 3
    drawn = torch.stack(
        [
            rounded_at_random(values, random_bits(mixed(number), rows, 2)).double()
            for number in range(1, 4097)
        ]
    )
    for row, value in enumerate(values[:, 0].double().tolist()):
        for column in range(2):
            low, high = drawn[:, row, column].unique().tolist()
            assert low < value < high
            up = (value - low) / (high - low)
            spread = (high - low) * (up * (1 - up) / len(drawn)) ** 0.5
            assert drawn[:, row, column].mean().item() == pytest.approx(value, abs=5 * spread)


def test_bits_differ_by_step_row_and_column() -> None:
    steps = torch.stack([random_bits(mixed(n), torch.arange(40), 30) for n in range(1, 11)])
    assert len(steps.unique()) >= steps.numel() - 2  # of 2^32, by chance at most a pair is equal
    assert steps.min() >= 0 and steps.max() < 1 << 32
    for bit in range(13):  # each of those compared is set in half of all draws
        share = (steps >> bit & 1).double().mean()
        assert share.item() == pytest.approx(0.5, abs=5 * 0.5 / steps.numel() ** 0.5)
    assert random_bits(mixed(1), torch.tensor([7]), 30).equal(steps[0, 7:8])


def states_of(kind: str, rows: int, width: int) -> list[torch.Tensor]:
    shapes = {"sgd": [], "rowwise_adagrad": [(rows,)], "adam": [(rows, width)] * 2}
    return [torch.zeros(shape) for shape in shapes.get(kind, [(rows, width)])]


def test_steps_smaller_than_the_spacing_add_up() -> None:
    """2,000 steps of 1e-6 from 1, where fp16 are 1e-3 apart; rounded to the nearest: none."""
    table = torch.ones(4, 64).half()
    for number in range(1, 2001):
        step = Step(lr=1e-6, beta1=0, beta2=0, eps=0, number=number)
        update_some("sgd", table, [], sort_index(torch.arange(4), 4), [-torch.ones(4, 64)], step)
    # Each step goes up with probability 1 / 977; 256 values: a standard deviation of 6e-5.
    assert table.float().mean().item() == pytest.approx(1.002, abs=4e-4)


def test_an_fp16_row_by_hand() -> None:
    table, sums = torch.tensor([[4.0, 2.0], [1.0, 1.0]]).half(), torch.zeros(2)
    step = Step(lr=0.5, beta1=0, beta2=0, eps=0, number=1, scale=0.5)
    # Gradients 3 + 3 and 4 + 4, halved: the mean of squares is 12.5. Row 0: 4 - 1.5 / root, ...
    index = sort_index(torch.tensor([0, 2, 0]), 2)
    update_some("rowwise_adagrad", table, [sums], index, [torch.tensor([[3.0, 4]] * 3)], step)
    assert sums.tolist() == [12.5, 0]
    assert table[1].tolist() == [1, 1]
    root = 12.5**0.5
    for value, exact, spacing in zip(
        table[0].tolist(), (4 - 1.5 / root, 2 - 2 / root), (2**-9, 2**-10), strict=True
    ):
        assert value != exact and abs(value - exact) < spacing
        assert value % spacing == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_table_is_rounded_as_some_of_its_rows(kind: str) -> None:
    """In one pass over rows 1 to 4 and the outer rows 5 and 0, as if all were looked up."""
    start = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).half()
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    one, other = start.clone(), start.clone()
    states = [states_of(kind, 6, 8) for _ in range(2)]
    for number in (1, 2):
        step = Step(**{**vars(STEP), "number": number})
        index = sort_index(torch.arange(6), 6)
        update_some(kind, one, states[0], index, [gradient.clone()], step)
        outer = gradient[[5, 0]].clone()
        update(kind, other, states[1], gradient[1:5].clone(), outer, 1, step)
    assert one.equal(other) and not one.equal(start)
    torch.testing.assert_close(states[0], states[1])


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [8, 60, 128, 384])
def test_kernels_equal_plain_torch(kind: str, dtype: torch.dtype, width: int) -> None:
    rows, generator = 50, torch.Generator().manual_seed(width)
    start = (0.02 * torch.randn(rows, width, generator=generator)).to(dtype)
    found = {}
    for device in ("cpu", "cuda"):
        draws = torch.Generator().manual_seed(3)
        table = start.to(device, copy=True)
        states = [state.to(device) for state in states_of(kind, rows, width)]
        for number in range(1, 6):
            step = Step(**{**vars(STEP), "number": number})
            index = torch.randint(0, rows + 1, (40 + 700 * (number == 3),), generator=draws)
            gradients = torch.randn(len(index), width, generator=draws).to(device)
            update_some(kind, table, states, sort_index(index.to(device), rows), [gradients], step)
            scored = torch.randn(rows - 2, width, generator=draws).to(device)
            outer = torch.randn(2, width, generator=draws).to(device)
            outer[number % 2] = 0
            update(kind, table, states, scored, outer, 1, step)
        found[device] = [part.cpu() for part in (table.float(), *states)]
    torch.testing.assert_close(found["cpu"][1:], found["cuda"][1:], rtol=1e-4, atol=1e-4)
    if dtype == torch.float32:
        torch.testing.assert_close(found["cpu"][0], found["cuda"][0], rtol=1e-5, atol=2e-6)
        return
    # The same random bits: only where the last bit of a float32 decides, another neighbour.
    different = found["cpu"][0] != found["cuda"][0]
    assert different.double().mean() < 0.01
    torch.testing.assert_close(found["cpu"][0], found["cuda"][0], rtol=2e-3, atol=1e-4)


@needs_cuda
def test_kernels_round_to_the_same_neighbours() -> None:
    """Steps of no length: what is rounded is an exact fp16, or half way between two."""
    rows, width = 300, 256
    table = (torch.arange(rows * width).view(rows, width) % 1024 / 1024 + 1).half()
    found = []
    for device in ("cpu", "cuda"):
        given = table.to(device, copy=True)
        index = sort_index(torch.arange(rows, device=device), rows)
        step = Step(lr=1.0, beta1=0, beta2=0, eps=0, number=9, first_row=1000)
        gradients = torch.full((rows, width), -(2.0**-11), device=device)
        update_some("sgd", given, [], index, [gradients], step)
        found.append(given.cpu())
    assert found[0].equal(found[1])
    moved = (found[0].float() - table.float()) * 1024
    assert sorted(moved.unique().tolist()) == [0, 1]
    assert moved.mean().item() == pytest.approx(0.5, abs=0.01)


@needs_cuda
@pytest.mark.parametrize("kind", ["sgd", "rowwise_adagrad"])
def test_a_replayed_graph_draws_new_bits(kind: str) -> None:
    rows, width = 40, 64
    start = torch.ones(rows, width, device="cuda").half()
    gradients = torch.full((rows, width), -(2.0**-11), device="cuda")
    index = sort_index(torch.arange(rows, device="cuda"), rows)
    steps = [Step(lr=0.5, beta1=0, beta2=0, eps=1e-8, number=n) for n in range(1, 6)]

    def launched() -> list[torch.Tensor]:
        table, states = start.clone(), [s.cuda() for s in states_of(kind, rows, width)]
        tables = []
        for step in steps:
            update_some(kind, table, states, index, [gradients], step)
            tables.append(table.clone())
        return tables

    expected = launched()
    table, states = start.clone(), [s.cuda() for s in states_of(kind, rows, width)]
    on_device = StepOnDevice(table.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_some(kind, table, states, index, [gradients], steps[0], on_device)
    for step, wanted in zip(steps, expected, strict=True):
        on_device.write(kind, step)
        graph.replay()
        assert table.equal(wanted)
    assert len({t.cpu().numpy().tobytes() for t in expected}) == len(steps)
