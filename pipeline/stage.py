"""Building blocks of the data pipeline, on `torchdata.nodes.BaseNode`.

    class Odd(Stage[int]):                         a stage written as one generator
        def stream(self): yield from (x for x in self.source if x % 2)

    class Halved(MapStage[int, float]):            one output for each input
        def apply(self, x): return x / 2

    for x in Prefetch(Halved(Odd(source)), 4):     a thread runs up to 4 outputs ahead
    InThreads(Halved(numbers), 3)                  three threads map inputs, in order

Data flow in chunks (Arrow tables, NumPy arrays), never row by row.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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
class InThreads(BaseNode[T]):
    """Runs the map stages at the end of ``source`` in threads, each for one input at a time.

    Their source is read by the thread that takes the outputs, which are in order. NumPy works on
    large arrays without Python's lock, so that threads run beside each other.
    """

    source: BaseNode[T]
    threads: int

    def __post_init__(self) -> None:
        super().__init__()
        self._read, self._maps = _split(self.source)
        self._made: deque[tuple[Future[T], dict[str, Any]]] = deque()
        self._state: dict[str, Any] = {}
        self._ended = False
        self._pool: ThreadPoolExecutor | None = None

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        super().reset(initial_state)
        self._read.reset(initial_state)
        self._state, self._ended = self._read.state_dict(), False
        self._made.clear()
        self._pool = ThreadPoolExecutor(self.threads, "stages")

    def get_state(self) -> dict[str, Any]:
        return self._state

    def next(self) -> T:
        assert self._pool is not None
        # One more than threads: each has its next input when it ends.
        while not self._ended and len(self._made) <= self.threads:
            try:
                made = self._pool.submit(_mapped, self._maps, next(self._read))
            except BaseException as error:  # StopIteration and SystemExit too: in its place
                self._ended, made = True, Future[T]()
                made.set_exception(error)
            self._made.append((made, self._read.state_dict()))
        if not self._made:
            raise StopIteration
        made, self._state = self._made.popleft()
        return made.result()


def _split(node: BaseNode[T]) -> tuple[BaseNode[Any], list[Callable[[Any], Any]]]:
    """The source of the map stages that end in ``node``, and their functions."""
    maps: list[Callable[[Any], Any]] = []
    while isinstance(node, MapStage):
        maps.insert(0, node.apply)
        node = node.source
    return node, maps


def _mapped(maps: list[Callable[[Any], Any]], item: Any) -> Any:
    for function in maps:
        item = function(item)
    return item


def _run_ahead(source: Iterator, made: SimpleQueue, room: Semaphore, closed: Event) -> None:
    while room.acquire() and not closed.is_set():
        try:
            made.put(next(source))
        except BaseException as error:  # StopIteration and SystemExit too
            made.put(error)
            return
