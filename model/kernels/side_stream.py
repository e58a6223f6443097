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
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_side: torch.cuda.Stream | None = None  # only the training thread uses it
# Tensors that running work reads must not be freed: the main stream could reuse their memory.
_kept: list[Callable[[], object]] = []


@dataclass(frozen=True)
class Pending(Generic[T]):
    """The result of work on the side stream; without a side stream, ``result`` does the work."""

    work: Callable[[], T]
    done: torch.cuda.Event | None = None

    def result(self) -> T:
        """The result, for use on the current stream, which waits for it."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        return self.work()


@contextmanager
def running_on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run work on ``stream`` inside the block; at its end the current stream waits for all."""
    global _side
    assert _side is None
    _side = stream
    try:
        yield
        torch.cuda.current_stream().wait_stream(stream)
    finally:
        _side = None
        _kept.clear()


def start(work: Callable[[], T]) -> Pending[T]:
    """Start work on tensors that exist now and are not changed before its end."""
    if _side is None:
        return Pending(work)
    _kept.append(work)
    _side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_side):
        value, done = work(), _side.record_event()
    return Pending(lambda: value, done)


def run(work: Callable[[], None]) -> None:
    """Run work; before ``running_on`` ends, do not read its results or change its inputs."""
    if _side is None:
        work()
    else:
        start(work)
