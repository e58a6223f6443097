"""Rows that a rank receives in a step by each exchange, for uniform and for skewed items.

    python benchmarks/slots.py
    python benchmarks/slots.py --skew 1.2 --ranks 4 --batch 1024

Data as in TorchRec's example with the sampled softmax of 4096 negatives. An all-to-all receives W
times the slots of a step (``pipeline/training/slots.py``), a gather W times the requested ids. No
model and no process group: the loader of rank 0 stands for all.
"""

import argparse
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.network.head import shard_rows
from pipeline.preparation.prepare import prepare
from pipeline.preparation.store import SequenceStore
from pipeline.sources.config import DataConfig
from pipeline.training.config import LoaderConfig, MaskConfig, WindowConfig
from pipeline.training.loader import RankShare, TrainLoader
from pipeline.training.negatives import SharedNegatives

STEPS = 12


def received(store: SequenceStore, ranks: int, batch: int) -> tuple[int, int, int]:
    """Requested ids, different ones among them, and slots of the last of some steps."""
    loader = TrainLoader(
        store,
        WindowConfig(max_len=16),
        MaskConfig(mask_prob=0.2),
        LoaderConfig(train_batch_size=batch),
        RankShare(
            world_size=ranks,
            all_sizes=lambda sizes: sizes[None],
            shard_rows=shard_rows(store.num_items, ranks),
        ),
        candidate_range=(1, 1),
        few_shapes=True,
        negatives=SharedNegatives(4096, store.num_items, 0, store.train_item_counts[1:-1]),
    )
    *_, last = islice(loader.epoch(0), STEPS)
    ids = last.requested.numpy()
    return len(ids), len(np.unique(ids)), last.slots


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skew", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--batch", nargs="+", type=int, default=[1024, 4096])
    options = parser.parse_args()
    print("| skew | ranks | batch | requested | different | gather | all-to-all | of gather |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for skew in options.skew:
            store = prepare(
                DataConfig(
                    dataset_name="random",
                    random_user_count=3000,
                    random_item_count=500_000,
                    random_size=8_000_000,
                    random_skew=skew,
                    cache_dir=cache,
                )
            )
            for ranks in options.ranks:
                for batch in options.batch:
                    ids, different, slots = received(store, ranks, batch)
                    sizes = f"{ids:,} | {different:,} | {ranks * ids:,} | {ranks * slots:,}"
                    print(f"| {skew:g} | {ranks} | {batch} | {sizes} | {slots / ids:.2f} |")


if __name__ == "__main__":
    main()
