"""Worker: train.py; rank 1 once calls another collective than rank 0.

torchrun --nproc_per_node 2 tests/workers/mismatch.py [train.py's flags]
"""

import torch
import torch.distributed as dist

import train
from model.training.trainer import Trainer

AT_STEP = 10


def extra_barrier() -> None:
    dist.barrier()


def main() -> None:
    torch.set_num_threads(1)
    step = Trainer._step

    def patched(self: Trainer, *arguments: object) -> None:
        step(self, *arguments)
        if self.position.step == AT_STEP and self.ranks.rank == 1:
            extra_barrier()

    Trainer._step = patched
    train.main()


if __name__ == "__main__":
    main()
