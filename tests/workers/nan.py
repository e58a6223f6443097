"""Worker: train.py, but for a weight of rank 1 that is not a number after step 10.

torchrun --nproc_per_node 2 tests/workers/nan.py <flags of train.py>
"""

import torch

import train
from model.tables.distribute import unwrap
from model.training.trainer import Trainer

AT_STEP = 10


def main() -> None:
    torch.set_num_threads(1)
    step = Trainer._step

    def patched(self: Trainer, *arguments: object) -> None:
        # Before the next step, not after the last: a checkpoint may be due in between.
        if self.position.step == AT_STEP and self.ranks.rank == 1:
            next(unwrap(self.model).encoder.parameters()).data.view(-1)[0] = float("nan")
        step(self, *arguments)

    Trainer._step = patched
    train.main()


if __name__ == "__main__":
    main()
