"""All ranks take the same decision at the same step boundary.

    rank 0  a checkpoint is due      rank 1  received SIGTERM      rank 2  its loss is not finite
        |                                |                             |
        +---------- all-reduce of one integer per rank, maximum, on the host ----------+
                                         |
                        one step later all ranks act on the result

A step starts an all-reduce and the next one reads the result, so that no step waits. When a
collective fails, a barrier finds the ranks that do not answer; if all answer, the error message
shows at which line of code each rank was waiting.
"""

import re
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from model.checkpoints.checkpoints import Checkpoints
from model.distributed import Ranks
from model.ending import GONE, LostRankError, failure_of_another_rank

# Requests and decisions, in ascending priority. STOP is added to the number of the signal.
NOTHING, SAVE, CHECK_LOSS, STOP = 0, 1, 2, 100
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# On GPUs, all-reduce every fourth step: hosts that lag in turn do not wait at every step.
_STEPS_BETWEEN = 4
_BARRIER_TIMEOUT = timedelta(seconds=10)
TIMED_OUT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)


class Agreement:
    """Agreement of the ranks; as a context manager, it turns signals into requests."""

    def __init__(self, ranks: Ranks) -> None:
        self._timeout = ranks.timeout
        self._signal = self._request = NOTHING
        self._steps_between = _STEPS_BETWEEN if ranks.device.type == "cuda" else 1
        self._calls = 0
        self._handlers: dict[signal.Signals, Any] = {}  # from before, of the signals heard
        self._reduced = torch.zeros(1, dtype=torch.int32)
        self._underway: dist.Work | None = None
        self._group = self._barrier_group = None
        self._explains_first = ranks.is_first and ranks.world_size > 1
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=ranks.timeout)
            # A second group: after a failed operation, a group is unusable.
            self._barrier_group = dist.new_group(backend="gloo", timeout=ranks.timeout)

    def __enter__(self) -> "Agreement":
        # A signal that is ignored, as nohup ignores SIGHUP, stays so.
        heard = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # torchrun sends SIGTERM to the other ranks as soon as one exits. Rank 0 still ignores it,
        # so that it can explain the error first.
        ignored = signal.SIGTERM if self._explains_first and isinstance(error, RuntimeError) else 0
        for number, handler in self._handlers.items():
            if number != ignored:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = STOP + number

    def exchange(self, request: int = NOTHING) -> int:
        """Submit a request; the highest one that any rank submitted before its last exchange.

        Every rank must call it equally often. On a single rank it returns the request itself.
        """
        if self._group is None:
            return max(request, self._signal)
        self._request = max(request, self._request, self._signal)
        self._calls += 1
        if self._calls % self._steps_between:
            return NOTHING
        if self._underway is not None:
            self._underway.wait()
        decision = int(self._reduced)
        self._reduced, self._request = torch.tensor([self._request], dtype=torch.int32), NOTHING
        self._underway = dist.all_reduce(
            self._reduced, dist.ReduceOp.MAX, self._group, async_op=True
        )
        return decision

    def explain(
        self, error: RuntimeError, step: int, checkpoints: Checkpoints
    ) -> LostRankError | None:
        """The error to report for a failed collective; None if other ranks are not the cause."""
        text, advice = str(error), f"{checkpoints.kept}: {checkpoints.advice}"
        if self._barrier_group is None or not (GONE.search(text) or TIMED_OUT.search(text)):
            return None
        if failed := failure_of_another_rank():
            return LostRankError(f"{failed}; {checkpoints.kept}")
        when = f"for {self._timeout.total_seconds():g} s at step {step}"
        started = time.monotonic()
        if silent := self._silent_ranks():
            # The first rank to time out closes its connections: to the others it seems to have
            # ended. A rank that has ended fails the barrier at once, a stuck one when time is up.
            waited = time.monotonic() - started >= _BARRIER_TIMEOUT.total_seconds()
            if GONE.search(text) and not waited:
                return LostRankError(f"another rank ended at step {step}; {advice}")
            message = f"no answer from {silent} {when}: it is stuck; {advice}"
            return LostRankError(message, is_known=dist.get_rank() == 0)
        # All ranks are alive: the first to time out closed its connections to the others.
        places = self._waiting_places(error)
        if len(set(places)) > 1:
            where = ", ".join(f"rank {rank} at {place}" for rank, place in enumerate(places))
            return LostRankError(f"the ranks wait for each other {when}: {where}; {advice}")
        return LostRankError(f"a rank did not answer {when}, though it answers now; {advice}")

    def _silent_ranks(self) -> str:
        """The ranks that do not reach a barrier; only rank 0 gets all answers."""
        try:
            dist.monitored_barrier(self._barrier_group, _BARRIER_TIMEOUT, wait_all_ranks=True)
        except RuntimeError as error:
            found = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            return f"rank {found.group(1)}" if found else "rank 0, or a rank that it names"
        return ""

    def _waiting_places(self, error: RuntimeError) -> list[str]:
        """The line of our code at which each rank was waiting."""
        frames = traceback.extract_tb(error.__traceback__)
        last = [frame for frame in frames if "site-packages" not in frame.filename][-1]
        places = [""] * dist.get_world_size()
        try:
            place = f"{Path(last.filename).name}:{last.lineno} ({last.name})"
            dist.all_gather_object(places, place, group=self._barrier_group)
        except RuntimeError:
            return []
        return places
