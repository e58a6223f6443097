"""Work off the critical path gives the same results with and without a side stream."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch

from model.kernels import side_stream
from model.losses.sharded_softmax import Beside, linear_cross_entropy

GRADIENT = torch.ones(2)


class _Stream:
    """A fake CUDA stream that finishes all work at once; its events are numbered."""

    def __init__(self) -> None:
        self.events = 0
        self.waited: list[int] = []  # for events of the other stream

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def wait_event(self, event: int) -> None:
        self.waited.append(event)

    def record_event(self) -> int:
        self.events += 1
        return self.events


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> _Stream:
    current = _Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    return current


@pytest.fixture
def stream(main: _Stream) -> _Stream:
    return _Stream()


def test_without_a_side_stream_work_is_done_when_its_result_is_needed() -> None:
    done = []
    pending = side_stream.start(lambda: done.append("sorted") or 3)
    assert not done
    assert pending.result() == 3
    side_stream.mark(GRADIENT)
    side_stream.run(lambda: done.append("updated"), GRADIENT)
    assert done == ["sorted", "updated"]


def test_on_a_side_stream_work_starts_at_once_and_is_done_once(stream: _Stream) -> None:
    done = []
    with side_stream.running_on(stream):
        pending = side_stream.start(lambda: done.append("sorted") or 3)
        assert done == ["sorted"]
        side_stream.run(lambda: done.append("updated"), GRADIENT)
        assert pending.result() == pending.result() == 3
    assert done == ["sorted", "updated"]


def test_tensors_that_work_reads_are_kept_until_the_end(stream: _Stream) -> None:
    def started() -> weakref.ref[torch.Tensor]:
        gradient = torch.ones(2)
        side_stream.mark(gradient)
        side_stream.run(lambda: gradient.sum(), gradient)
        return weakref.ref(gradient)

    with side_stream.running_on(stream):
        gradient = started()
        gc.collect()
        assert gradient() is not None
    gc.collect()
    assert gradient() is None


def test_results_are_kept_until_the_end(stream: _Stream) -> None:
    with side_stream.running_on(stream):
        result = weakref.ref(side_stream.start(lambda: torch.ones(2)).result())
        gc.collect()
        assert result() is not None
    gc.collect()
    assert result() is None


def test_work_on_a_marked_tensor_does_not_wait_for_later_kernels(
    main: _Stream, stream: _Stream
) -> None:
    with side_stream.running_on(stream):
        side_stream.mark(GRADIENT)
        main.record_event()
        side_stream.run(lambda: None, GRADIENT)
        assert stream.waited == [1]
        side_stream.run(lambda: None, torch.ones(2))  # another tensor: complete only now
        assert stream.waited == [1, 3]
    with side_stream.running_on(stream):
        side_stream.run(lambda: None, GRADIENT)  # of an earlier step
    assert stream.waited == [1, 3, 4]


def test_a_failure_ends_the_side_stream(stream: _Stream) -> None:
    with pytest.raises(RuntimeError, match="failed"), side_stream.running_on(stream):
        raise RuntimeError("failed")
    done = []
    side_stream.start(lambda: done.append("never needed"))
    assert not done


@pytest.mark.parametrize(("in_backward", "works"), [(False, 2), (True, 3)])
def test_a_softmax_whose_norms_and_gradient_run_beside_is_the_same(
    stream: _Stream, in_backward: bool, works: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, rows = torch.randn(12, 4, generator=generator).requires_grad_().split([5, 7])
    found = []
    for opened in (nullcontext(), side_stream.running_on(stream)):
        with opened:
            beside = Beside.start(rows, True, in_backward)
            targets = torch.tensor([1, 7, 7, 3, 2])
            losses = linear_cross_entropy(hidden, beside, targets, 1, 9.0)
            gradients = torch.autograd.grad(losses.sum(), (hidden, rows), retain_graph=True)
        found.append((losses, *gradients))
    assert all(map(torch.equal, *found))
    assert len(stream.waited) == works  # the norms, the sort of the targets, the rows' gradient


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_streams_wait_for_each_other() -> None:
    values = torch.rand(1 << 24, device="cuda")
    expected = values.sort().values
    with side_stream.running_on(torch.cuda.Stream()):
        for _ in range(5):
            values = values.roll(1)  # on the main stream, before the work that reads it
        pending = side_stream.start(lambda: values.sort().values)
        total = torch.zeros_like(values)
        assert pending.result().equal(expected)
        side_stream.run(lambda: total.add_(expected.flip(0)), total)
    assert total.equal(expected.flip(0))
