"""Worker: recommend to all users with the models of several run folders.

    torchrun --nproc_per_node 3 tests/workers/recommended.py CACHE_DIR RUN_DIR ...

Rank 0 writes recs-3.parquet into each folder.
"""

import sys
from pathlib import Path

from model.distributed import start
from model.ending import exit_rank
from model.evaluation import catalog_scores
from model.serving.answer import answer
from model.serving.config import Choice, RecommendFlags


def main(cache_dir: str, run_dirs: list[str]) -> None:
    ranks = start()
    # As a catalog that is too large to be kept: parts of 7 items, looked up for every block.
    catalog_scores.PART_ITEMS, catalog_scores.KEPT_BYTES = 7, 0
    for run_dir in run_dirs:
        output = Path(run_dir) / f"recs-{ranks.world_size}.parquet"
        flags = RecommendFlags(
            run_dir,
            all=True,
            choice=Choice(k=100),
            output=str(output),
            cache_dir=cache_dir,
            batch_size=7,
        )
        answer(flags, ranks)
    exit_rank()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
