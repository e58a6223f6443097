"""Worker: train.py; rank 1 is killed, or fails, at its first checkpoint; rank 0 reports it late.

LOST_BY=kill, LOST_BY=error or, by a UserError, LOST_BY=mistake:

torchrun --nproc_per_node 2 tests/workers/lost.py [train.py's flags]
"""

import os
import signal
import time

import torch

import train
from model.checkpoints.checkpoints import Checkpoints
from model.training.agreement import Agreement
from pipeline.errors import UserError

# Many times what torchrun needs to detect that a rank has ended, and to end the others.
SECONDS = 2


def main() -> None:
    torch.set_num_threads(1)
    save, explain = Checkpoints.save, Agreement.explain

    def lost(self: Checkpoints, *arguments: object) -> bool:
        if self.ranks.rank == 1 and os.environ["LOST_BY"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.ranks.rank == 1 and os.environ["LOST_BY"] == "mistake":
            raise UserError("no such file")
        if self.ranks.rank == 1:
            raise LookupError("a bug\x1b[2J")
        return save(self, *arguments)

    def slow(self: Agreement, *arguments: object) -> UserError | None:
        time.sleep(SECONDS)
        return explain(self, *arguments)

    Checkpoints.save, Agreement.explain = lost, slow
    train.main()


if __name__ == "__main__":
    main()
