"""Worker: collectives whose bytes are known, then training steps, counted; rank 0 writes OUT.

torchrun --nproc_per_node 2 tests/workers/collectives.py OUT CACHE_DIR
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.collectives import CollectiveCounter, count_steps
from model.distributed import start
from model.ending import exit_rank

FLAGS = (
    "--dataset_name=random",
    "--random_user_count=60",
    "--random_item_count=50",
    "--random_size=3000",
    "--max_len=8",
    "--emb_dim=8",
    "--num_layers=1",
    "--train_batch_size=4",
    "--embedding_optimizer=sgd",
)
STEPS = 5


def known() -> list[tuple[str, float]]:
    """The counter's entries for one collective of each kind, and for DDP's."""
    rank = dist.get_rank()
    ten, twenty = torch.ones(10), torch.ones(20)
    ddp = DistributedDataParallel(torch.nn.Linear(3, 2))
    counter = CollectiveCounter()
    with counter:
        dist.all_reduce(ten.double())
        dist.all_gather_into_tensor(twenty, ten)
        dist.reduce_scatter_tensor(ten, twenty)
        dist.all_to_all_single(torch.empty(20), twenty)
        # Rank 0 keeps 1 row and sends 2, rank 1 sends 3 and keeps 4; a row is 5 integers.
        sends = [[1, 2], [3, 4]]
        source = torch.zeros(sum(sends[rank]), 5, dtype=torch.int64)
        receives = [sends[0][rank], sends[1][rank]]
        target = source.new_empty(sum(receives), 5)
        dist.all_to_all_single(target, source, receives, sends[rank])
        ddp(torch.ones(1, 3)).sum().backward()
    return counter.calls


def main(out: Path, cache_dir: str) -> None:
    ranks = start()
    everyone = [None] * ranks.world_size
    dist.all_gather_object(everyone, known())
    found = {"known": everyone}
    for way in ("ddp", "dmp"):
        flags = [*FLAGS, f"--mode={way}", f"--cache_dir={cache_dir}"]
        found[way] = count_steps(flags, STEPS, ranks)
    if ranks.is_first:
        out.write_text(json.dumps(found))
    exit_rank()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
