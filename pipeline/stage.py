"""Building blocks of the data pipeline, on `torchdata.nodes.BaseNode`.

    class Odd(Stage[int]):                         a stage written as one generator
        def stream(self): yield from (x for x in self.source if x % 2)

    class Halved(MapStage[int, float]):            one output for each input
        def apply(self, x): return x / 2

    for x in Prefetch(Halved(Odd(source)), 4):     a thread runs up to 4 outputs ahead
    Halved(InThread(Odd(source)))                  the stages inside have a thread of their own

Data flow in chunks (Arrow tables, NumPy arrays), never row by row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, Generic, TypeVar

from torchdata.nodes import BaseNode, IterableWrapper

T = TypeVar("T")
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(eq=False)
class Stage(IterableWrapper[T]):
    """A stage written as a generator; its state is the number of chunks it has yielded."""

    source: Any = None

    def __post_init__(self) -> None:
        super().__init__(())

    def stream(self) -> Iterator[T]:
        """All chunks; called again at every reset."""
        raise NotImplementedError(type(self))

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        if self.source is not None:
            self.source.reset()
        self.iterable = self.stream()
        super().reset(initial_state)


@dataclass(eq=False)
class MapStage(BaseNode[Out], Generic[In, Out]):
    """A stage with one output for each of its source's; its state is the source's."""

    source: BaseNode[In]

    def __post_init__(self) -> None:
        super().__init__()

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset(initial_state)

    def get_state(self) -> dict[str, Any]:
        return self.source.state_dict()

    def next(self) -> Out:
        return self.apply(next(self.source))

    def apply(self, chunk: In) -> Out:
        raise NotImplementedError(type(self))


class Prefetch(Iterator[T]):
    """Iterates over ``source`` in a thread that stays at most ``count`` items ahead.

    The thread ends with the source, at the source's first error (which `next` raises), at `close`,
    or when this object is deleted. torchdata's Prefetcher can start in the middle of an epoch only
    by its private state, and a reset may leave its thread running.
    """

    def __init__(self, source: Iterator[T], count: int) -> None:
        self._made: SimpleQueue[T | BaseException] = SimpleQueue()
        self._room, self._closed = Semaphore(count), Event()
        # The thread holds no reference to this object, so that deleting it can end the thread.
        arguments = (source, self._made, self._room, self._closed)
        self._thread = Thread(target=_run_ahead, args=arguments, daemon=True)
        self._thread.start()

    def __next__(self) -> T:
        if self._closed.is_set():
            raise StopIteration
        item = self._made.get()
        self._room.release()
        if isinstance(item, BaseException):
            self._closed.set()
            raise item
        return item

    def close(self) -> None:
        """End the thread and wait for it."""
        self._signal_close()
        self._thread.join()

    def _signal_close(self) -> None:
        self._closed.set()
        self._room.release()

    __del__ = _signal_close


@dataclass(eq=False)
class InThread(BaseNode[T]):
    """Runs ``source`` in a thread of its own, at most two items ahead; its state is not."""

    source: BaseNode[T]

    def __post_init__(self) -> None:
        super().__init__()
        self._running: Prefetch[tuple[T, dict[str, Any]]] | None = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        if self._running is not None:
            self._running.close()
        super().reset(initial_state)
        self.source.reset(initial_state)
        self._state = self.source.state_dict()
        self._running = Prefetch(_with_states(self.source), 2)

    def get_state(self) -> dict[str, Any]:
        return self._state

    def next(self) -> T:
        assert self._running is not None
        item, self._state = next(self._running)
        return item


def _with_states(source: BaseNode[T]) -> Iterator[tuple[T, dict[str, Any]]]:
    for item in source:
        yield item, source.state_dict()


def _run_ahead(source: Iterator, made: SimpleQueue, room: Semaphore, closed: Event) -> None:
    while room.acquire() and not closed.is_set():
        try:
            made.put(next(source))
        except BaseException as error:  # StopIteration and SystemExit too
            made.put(error)
            return
