"""The prefetching thread: order, how far it runs ahead, errors, and its end."""

import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.errors import UserError
from pipeline.stage import InThreads, MapStage, Prefetch, Stage


class Numbers(Stage[int]):
    """0, 1, 2, ..., as many as given; remembers how many were made."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.made = size, 0

    def stream(self) -> Iterator[int]:
        for number in range(self.size):
            self.made += 1
            yield number


class Doubled(MapStage[int, int]):
    def apply(self, chunk: int) -> int:
        if chunk == 5:
            raise UserError("five: no doubling")
        return 2 * chunk


class Negated(MapStage[int, int]):
    def apply(self, chunk: int) -> int:
        return -chunk


def started(before: list[threading.Thread]) -> list[threading.Thread]:
    """Threads that run now and did not before."""
    return [thread for thread in threading.enumerate() if thread not in before]


def wait_for(reached: Callable[[], bool]) -> None:
    for _ in range(500):
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError("waited for 5 seconds")


def test_stages_resume_from_their_state() -> None:
    stage = Doubled(Numbers(5))
    assert [next(stage), next(stage)] == [0, 2]
    state = stage.state_dict()
    assert list(stage) == [4, 6, 8]
    stage.reset(state)
    assert list(stage) == [4, 6, 8]


@pytest.mark.parametrize("count", [1, 3])
def test_the_thread_prefetches_at_most_count_items(count: int) -> None:
    source = Numbers(100)
    ahead = Prefetch(source, count)
    wait_for(lambda: source.made == count)
    assert next(ahead) == 0
    wait_for(lambda: source.made == count + 1)
    time.sleep(0.05)
    assert source.made == count + 1
    assert list(ahead) == list(range(1, 100))
    with pytest.raises(StopIteration):
        next(ahead)


def test_errors_are_raised_in_order_and_end_the_thread() -> None:
    ahead = Prefetch(Doubled(Numbers(9)), 2)
    assert [next(ahead) for _ in range(5)] == [0, 2, 4, 6, 8]
    with pytest.raises(UserError, match=r"^five: no doubling$"):
        next(ahead)
    assert next(ahead, "end") == "end"


def test_no_error_ends_a_thread_in_silence() -> None:
    class Exits(MapStage[int, int]):
        def apply(self, chunk: int) -> int:
            raise SystemExit(3)

    ahead = Prefetch(Doubled(InThreads(Exits(Numbers(9)), 2)), 2)
    with pytest.raises(SystemExit):
        next(ahead)


def test_close_ends_the_thread_and_the_source_can_be_reset() -> None:
    source, before = Numbers(100), threading.enumerate()
    first = Prefetch(source, 4)
    assert next(first) == 0
    assert len(started(before)) == 1
    first.close()
    assert not started(before)
    assert next(first, "end") == "end"
    source.reset()
    assert list(Prefetch(source, 4)) == list(range(100))


def test_deletion_ends_the_thread() -> None:
    before = threading.enumerate()
    ahead = Prefetch(Numbers(100), 4)
    assert next(ahead) == 0
    del ahead
    gc.collect()
    wait_for(lambda: not started(before))


@pytest.mark.parametrize("threads", [1, 3])
def test_stages_in_threads_resume_from_what_was_taken(threads: int) -> None:
    before = threading.enumerate()
    source = Numbers(9)
    stage = Doubled(InThreads(Negated(Negated(source)), threads))
    assert [next(stage), next(stage)] == [0, 2]
    assert source.made == threads + 2  # each thread has its next item
    state = stage.state_dict()
    assert [next(stage), next(stage)] == [4, 6]
    for _ in range(2):
        stage.reset(state)
        assert [next(stage), next(stage), next(stage)] == [4, 6, 8]
    with pytest.raises(UserError, match=r"^five: no doubling$"):
        next(stage)
    stage.reset()
    assert len(started(before)) <= threads
    assert next(stage) == 0
    del stage
    gc.collect()
    wait_for(lambda: not started(before))


def test_stages_in_threads_are_in_order_and_beside_each_other() -> None:
    """An item is done once the next two have begun: with fewer than three threads it never is."""
    begun = [threading.Event() for _ in range(12)]

    class Waiting(MapStage[int, int]):
        def apply(self, chunk: int) -> int:
            begun[chunk].set()
            assert all(event.wait(5) for event in begun[chunk : chunk + 3])
            return chunk

    assert list(InThreads(Waiting(Numbers(12)), 3)) == list(range(12))


def test_an_error_in_a_thread_comes_in_its_place() -> None:
    stage = InThreads(Doubled(Numbers(9)), 3)
    assert [next(stage) for _ in range(5)] == [0, 2, 4, 6, 8]
    with pytest.raises(UserError, match=r"^five: no doubling$"):
        next(stage)
