"""Run work off the critical path of a training step on a side stream of CUDA.

A step is a chain of kernels, most of which leave most of the GPU idle. Work whose result
is needed late can run beside the chain::

    main stream   lookup -- encoder, head -- backward -- averaging, AdamW ---------+--> next step
    side stream      \\-- sort of ids, norms       \\-- candidates, exchange, update --/

    with side_stream.running_on(stream):
        pending = side_stream.start(lambda: ids.sort())
        ...
        keys, order = pending.result()       the main stream waits for the sort
        side_stream.mark(gradient)           complete from here on
        ...                                  kernels for which the update does not wait
        side_stream.run(update, gradient)    the main stream waits only when the block ends

Outside of ``running_on`` the same calls run on the current stream, in the order of the calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

_side: torch.cuda.Stream | None = None  # only the training thread uses it
# Tensors that running work reads must not be freed: the main stream could reuse their memory. Nor
# must results, which the main stream may still read: the side stream could reuse theirs.
_kept: list[object] = []
_marked: tuple[torch.Tensor, torch.cuda.Event] | None = None


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

    def unfinished(self) -> T:
        """The result, of which only work that :func:`run` starts later reads values."""
        return self.work()


@contextmanager
def running_on(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run work on ``stream`` inside the block; at its end the current stream waits for all."""
    global _side, _marked
    assert _side is None
    _side = stream
    try:
        yield
        torch.cuda.current_stream().wait_stream(stream)
    finally:
        _side = _marked = None
        _kept.clear()


def start(work: Callable[[], T]) -> Pending[T]:
    """Start work on tensors that exist now and are not changed before its end."""
    if _side is None:
        return Pending(work)
    return _started(work, _side, torch.cuda.current_stream().record_event())


def mark(tensor: torch.Tensor) -> None:
    """Work on ``tensor`` that :func:`run` will run can start from here on."""
    global _marked
    if _side is not None:
        _marked = tensor, torch.cuda.current_stream().record_event()


def run(work: Callable[[], None], last: torch.Tensor) -> None:
    """Run work; before ``running_on`` ends, do not read its results or change its inputs.

    Args:
        last: the input that is complete last: if it is marked, from there on, else now.
    """
    if _side is None:
        work()
        return
    ready = None
    if _marked is not None and _marked[0].data_ptr() == last.data_ptr():
        ready = _marked[1]
    _started(work, _side, ready or torch.cuda.current_stream().record_event())


def _started(work: Callable[[], T], side: torch.cuda.Stream, ready: torch.cuda.Event) -> Pending[T]:
    _kept.append(work)
    side.wait_event(ready)
    with torch.cuda.stream(side):
        value, done = work(), side.record_event()
    _kept.append(value)
    return Pending(lambda: value, done)
