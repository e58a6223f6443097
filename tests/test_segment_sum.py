"""Rows added to rows: by hand, and the kernel on CUDA against float64."""

import subprocess
import sys

import pytest
import torch

from model.kernels.segment_sum import add_rows, sort_index, sum_rows
from model.tables.table_update import Step, update_some
from tests.conftest import ROOT, environment


def test_values_of_equal_indices_are_summed_and_others_ignored() -> None:
    rows = torch.tensor([[1.0], [2.0], [3.0]])
    index = sort_index(torch.tensor([2, 0, 2, 3, 5]), 3)  # 3 and 5: nowhere
    add_rows(rows, index, torch.tensor([[10.0], [20.0], [30.0], [40.0], [50.0]]))
    assert rows.tolist() == [[21.0], [2.0], [43.0]]


def test_sums_of_two_tensors_by_hand() -> None:
    index = sort_index(torch.tensor([1, 0, 1, 3, 1]), 3)  # 3: nowhere
    values = torch.tensor([[10.0], [20.0], [30.0], [torch.nan], [50.0]])
    assert sum_rows(index, [values]).tolist()[:2] == [[20.0], [90.0]]  # 2 has no values
    assert sum_rows(index, values.split([2, 3])).tolist()[:2] == [[20.0], [90.0]]


def test_no_values_and_no_rows() -> None:
    rows = torch.ones(2, 3)
    add_rows(rows, sort_index(torch.tensor([], dtype=torch.int64), 2), torch.empty(0, 3))
    assert rows.equal(torch.ones(2, 3))
    add_rows(rows[:0], sort_index(torch.tensor([0, 1]), 0), torch.ones(2, 3))


def test_threads_add_in_a_fixed_order_on_the_cpu() -> None:
    index = sort_index(torch.randint(0, 50, (4000,)), 50)
    added = torch.randn(4000, 32)
    step = Step(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, number=1)
    found = set()
    for threads in (1, *[4] * 20):
        torch.set_num_threads(threads)
        try:
            sums, table, state = torch.zeros(50, 32), torch.zeros(50, 32), torch.zeros(50)
            add_rows(sums, index, added)
            update_some("rowwise_adagrad", table, [state], index, [added], step)
        finally:
            torch.set_num_threads(1)
        found.add(sums.numpy().tobytes() + table.numpy().tobytes())
    assert len(found) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("width", [4, 60, 64, 256, 384])
@pytest.mark.parametrize(
    ("count", "values"),
    [(1, 1), (1, 1000), (7, 9001), (3706, 9000), (32_766, 50), (32_767, 5000), (500_000, 6000)],
)
def test_the_kernel_is_exact_and_deterministic(count: int, values: int, width: int) -> None:
    torch.manual_seed(count)
    rows = torch.randn(count, width, device="cuda")
    # Few are frequent, and some are nowhere.
    index = (torch.rand(values, device="cuda") ** 3 * (count + 2)).long()
    added = torch.randn(values, width, device="cuda")
    found, again = rows.clone(), rows.clone()
    add_rows(found, sort_index(index, count), added)
    add_rows(again, sort_index(index, count), added)
    assert found.equal(again)
    inside = index < count
    expected = rows.double().index_add_(0, index[inside], added[inside].double())
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_the_kernels_are_exact_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.workers.interpreted"],
        cwd=ROOT,
        env=environment(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "checked\n", done.stderr
