"""Run work off the critical path of a training step on a side stream of CUDA.

A step is a chain of some 250 kernels, most of which leave most of the GPU idle. Work whose result
is needed late can run beside the chain::

    main stream   lookup ---- encoder, head --- backward --- encoder's optimizer --+--> next step
    side stream       \\------ sort of the ids      \\------ update of the table --/

    with side_stream.running_on(stream):
        pending = side_stream.start(lambda: ids.sort())
        ...
        keys, order = pending.result()       the main stream waits for the sort
        side_stream.run(update)              the main stream waits only when the block ends

Outside of ``running_on`` the same calls run on the current stream.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class _SideStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        # Tensors that running work reads must not be freed: the main stream could reuse them.
        self._kept: list[Callable[[], object]] = []

    def start(self, work: Callable[[], T]) -> tuple[T, torch.cuda.Event]:
        self._kept.append(work)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return work(), self._stream.record_event()

    def wait(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._kept.clear()


_side: _SideStream | None = None  # only the training thread uses it


class Pending(Generic[T]):
    """The result of work that runs on the side stream; without one, of work done when needed."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._started = None if _side is None else _side.start(work)

    def result(self) -> T:
        """The result, for use on the current stream, which waits for it."""
        if self._started is None:
            return self._work()
        value, done = self._started
        torch.cuda.current_stream().wait_event(done)
        return value


@contextmanager
def running_on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run work on ``stream`` inside the block; at its end the current stream waits for all."""
    global _side
    assert _side is None
    _side = _SideStream(stream)
    try:
        yield
        _side.wait()
    finally:
        _side = None


def start(work: Callable[[], T]) -> Pending[T]:
    """Start work on tensors that exist now and are not changed before its end."""
    return Pending(work)


def run(work: Callable[[], None]) -> None:
    """Run work whose results are read, and whose inputs are changed, only after ``running_on``."""
    if _side is None:
        work()
    else:
        _side.start(work)
