"""Where a call's wall time goes: what the threads of this process do, sampled every 2 ms."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import FrameType

# The end of a file's path and the name of a function in it.
Place = tuple[str, str]
_INTERVAL = 0.002  # seconds


class Sampled:
    """While the block runs, samples all threads; then :attr:`seconds` has what they did.

    Args:
        stages: name by place; a thread is in the stage of the innermost function that has one, and
            "other" is this thread's rest.
    """

    def __init__(self, stages: Mapping[Place, str]) -> None:
        self.seconds: dict[str, float] = {}
        self._stages, self._counts, self._ended = stages, Counter[str](), threading.Event()
        self._main, self._thread = threading.get_ident(), threading.Thread(target=self._look)

    def __enter__(self) -> "Sampled":
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        # An interval may be longer than demanded: other threads hold the interpreter's lock.
        each = (time.perf_counter() - self._started) / max(1, self._looks)
        self.seconds = {name: round(n * each, 3) for name, n in self._counts.most_common()}

    def _look(self) -> None:
        self._looks = 0
        while not self._ended.wait(_INTERVAL):
            self._looks += 1
            for thread, frame in sys._current_frames().items():
                stage = self._stage(frame) or ("other" if thread == self._main else None)
                if stage is not None:
                    self._counts[stage] += 1

    def _stage(self, frame: FrameType | None) -> str | None:
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            for (path, name), stage in self._stages.items():
                if name == function and file.endswith(path):
                    return stage
            frame = frame.f_back
        return None


def kernels(work: Callable[[], object], most: int = 20) -> list[str]:
    """Seconds of the device, of all its kernels and of those that take longest, and their calls."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        started = time.perf_counter()
        work()
        wall = time.perf_counter() - started
    taken, calls = Counter[str](), Counter[str]()
    for event in recorded.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            taken[event.name] += event.time_range.elapsed_us() / 1e6
            calls[event.name] += 1
    total = f"{sum(taken.values()):.3f} s of {wall:.3f} s, {sum(calls.values())} calls: all"
    return [total] + [
        f"{seconds:.4f} s, {calls[name]} calls: {name[:120]}"
        for name, seconds in taken.most_common(most)
    ]
