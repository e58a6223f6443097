"""Orders: what all ranks do at the same step boundary, whoever noticed that it must be done.

    rank 0  the clock says: save        rank 1  got SIGTERM       rank 2  its loss is not finite
        |                                   |                         |
        +------------- all-reduce of one integer on the host, maximum ------+
                                |
             one step later every rank knows it, and does it

The all-reduce of a step is waited for at the next one, so no step waits for it and no GPU is
synchronised. On GPUs, whose steps take milliseconds, only every fourth step hands its orders in.
When an answer does not come in time, a roll call names the ranks that are silent, or, if all
answer, the line in which each waits for the others.
"""

import re
import signal
import traceback
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from model.distributed import GONE, Ranks
from pipeline.errors import UserError

NOTHING, SAVE, CHECK_LOSS = 0, 1, 2
# An order to stop is this much plus the number of the signal; it outranks the others.
STOP = 100
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Steps on GPUs between two all-reduces: ranks whose hosts lag by turns do not wait each time.
_EVERY = 4
_ROLL_CALL = timedelta(seconds=10)
_SILENT = re.compile(r"timed? ?out|timeout", re.IGNORECASE)


class Orders:
    """Agreement of the ranks during training; while entered, signals become orders.

    Args:
        timeout: how long to wait for a rank.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta) -> None:
        self._timeout = timeout
        self._signal = self._wish = NOTHING
        self._every = _EVERY if ranks.device.type == "cuda" else 1
        self._calls = 0
        self._before: dict[signal.Signals, object] = {}
        self._mine = torch.zeros(1, dtype=torch.int32)
        self._underway: dist.Work | None = None
        self._group = self._roll_call = None
        self._speaks = ranks.is_first and ranks.world_size > 1
        if ranks.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            # Of its own: a group in which an operation failed is unusable.
            self._roll_call = dist.new_group(backend="gloo", timeout=timeout)

    def __enter__(self) -> "Orders":
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # torchrun tells the others to end as soon as it sees that a rank is gone: the one that says
        # what happened is to say it first.
        deaf = signal.SIGTERM if self._speaks and isinstance(error, RuntimeError) else None
        for number, handler in self._before.items():
            if number != deaf:
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = STOP + number

    def exchange(self, wish: int = NOTHING) -> int:
        """Hand in this rank's wish; every rank must call it equally often.

        Returns:
            The strongest wish that any rank handed in before its last exchange (alone: now).
        """
        self._wish = max(wish, self._wish, self._signal)
        self._calls += 1
        if self._calls % self._every and self._group is not None:
            return NOTHING
        wish, self._wish = self._wish, NOTHING
        if self._group is None:
            return wish
        order = NOTHING
        if self._underway is not None:
            self._underway.wait()
            order = int(self._mine)
        self._mine = torch.tensor([wish], dtype=torch.int32)
        self._underway = dist.all_reduce(
            self._mine, dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return order

    def explain(self, error: RuntimeError, step: int) -> UserError | None:
        """What a failed collective means for the user; None if it was not about other ranks."""
        text, advice = str(error), "earlier checkpoints are intact: go on with --resume auto"
        if self._roll_call is None:
            return None
        if not (GONE.search(text) or _SILENT.search(text)):
            return None
        when = f"for {self._timeout.total_seconds():g} s at step {step}"
        if silent := self._silent_ranks():
            if GONE.search(text):
                return UserError(f"another rank is gone at step {step}; {advice}")
            return UserError(f"no answer from {silent} {when}: it is stuck; {advice}")
        # All are there: who gave up waiting has closed its connections to the others.
        places = self._places(error)
        if len(set(places)) > 1:
            where = ", ".join(f"rank {rank} at {place}" for rank, place in enumerate(places))
            return UserError(f"the ranks wait for each other {when}: {where}; {advice}")
        return UserError(f"a rank that answers again by now did not {when}; {advice}")

    def _silent_ranks(self) -> str:
        """Which ranks do not answer to a roll call; only rank 0 hears all answers."""
        try:
            dist.monitored_barrier(self._roll_call, timeout=_ROLL_CALL, wait_all_ranks=True)
        except RuntimeError as error:
            found = re.search(r"Ranks? ([\d, ]+) failed to pass", str(error))
            return f"rank {found.group(1)}" if found else "rank 0, or a rank that it names"
        return ""

    def _places(self, error: RuntimeError) -> list[str]:
        """Which line of the program each rank waited in, once all have answered."""
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename]
        last = ours[-1]
        places = [""] * dist.get_world_size()
        try:
            place = f"{Path(last.filename).name}:{last.lineno} ({last.name})"
            dist.all_gather_object(places, place, group=self._roll_call)
        except RuntimeError:
            return []
        return places
