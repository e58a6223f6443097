"""Work off the chain: what waits for what, on streams that write down what they are told."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from model.kernels import side_stream


class _Stream:
    """Stands for a CUDA stream; all of them write into one list."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def wait_stream(self, other: "_Stream") -> None:
        self.told.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        self.told.append(f"{self.name} is marked")
        return f"mark of {self.name}"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was told to the streams, of which the current one is the chain."""
    told: list[str] = []
    current = [_Stream("chain", told)]

    @contextmanager
    def on(stream: _Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    return told


def test_work_is_done_when_it_is_needed_where_nothing_is_open(told: list[str]) -> None:
    done = []
    pending = side_stream.start(lambda: done.append("sorted") or 3)
    assert not done
    assert pending.result() == 3
    side_stream.run(lambda: done.append("updated"))
    assert done == ["sorted", "updated"]
    assert not told


def test_what_waits_for_what(told: list[str]) -> None:
    with side_stream.running_on(_Stream("side", told)):
        pending = side_stream.start(lambda: told.append("sort") or 3)
        told.append("forward")
        assert pending.result() == 3
        told.append("backward")
        side_stream.run(lambda: told.append("update"))
        told.append("optimizer")
    assert told == [
        *("side waits for chain", "sort", "side is marked"),
        "forward",
        "chain waits for mark of side",
        "backward",
        *("side waits for chain", "update", "side is marked"),
        "optimizer",
        "chain waits for side",
    ]


def test_what_is_read_is_kept_until_the_end(told: list[str]) -> None:
    def begun() -> weakref.ref[torch.Tensor]:
        gradient = torch.ones(2)
        side_stream.run(lambda: gradient.sum())
        return weakref.ref(gradient)

    with side_stream.running_on(_Stream("side", told)):
        gradient = begun()
        gc.collect()
        assert gradient() is not None
    gc.collect()
    assert gradient() is None


def test_a_failure_closes_it(told: list[str]) -> None:
    with pytest.raises(RuntimeError, match="failed"), side_stream.running_on(_Stream("side", told)):
        raise RuntimeError("failed")
    side_stream.run(lambda: told.append("done at once"))
    assert told == ["done at once"]
