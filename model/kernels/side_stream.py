"""Work off the chain of a step's kernels, on a stream of its own, while a step is captured.

A training step is a chain of some 250 kernels, most of which leave most of a GPU idle. What nothing
waits for until later need not be a link of it::

    chain    lookup --- encoder, head --- backward --- optimizer of the encoder --+--> next step
    aside       \\------ sort of the ids                \\------ update of the table --/

    with aside.opened(stream):               has ended, for the chain, when this is left
        ahead = aside.begin(lambda: ids.sort())
        ...
        keys, order = ahead.result()         the chain waits for it
        aside.leave(update)                  nobody waits but the end

Memory is safe because whatever the work reads is kept until the end, and what it makes is of its
own stream, on which nothing is made before it has waited for the chain.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Ahead(Generic[T]):
    """Work that was begun before its result is needed; where nothing is open, done only then."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._made = None if _open is None else _open.begin(work)

    def result(self) -> T:
        """What the work makes, for the current stream, which waits for it."""
        if self._made is None:
            return self._work()
        value, done = self._made
        torch.cuda.current_stream().wait_event(done)
        return value


class _Aside:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._kept: list[Callable[[], object]] = []

    def begin(self, work: Callable[[], T]) -> tuple[T, torch.cuda.Event]:
        self._kept.append(work)  # and with it what it reads
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            value = work()
            return value, self._stream.record_event()

    def end(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)
        self._kept.clear()


# Of the one thread that trains.
_open: _Aside | None = None


@contextmanager
def opened(stream: torch.cuda.Stream) -> Iterator[None]:
    """Let work be begun on ``stream``; at the end the current stream waits for all of it."""
    global _open
    assert _open is None
    _open = _Aside(stream)
    try:
        yield
        _open.end()
    finally:
        _open = None


def begin(work: Callable[[], T]) -> Ahead[T]:
    """Start work on what the current stream has made so far, which must not be changed since."""
    return Ahead(work)


def leave(work: Callable[[], None]) -> None:
    """Do work of which nothing is read, and for which nothing is changed, before the end."""
    if _open is None:
        work()
    else:
        _open.begin(work)
