"""Recommend items by a trained BERT4Rec, from its run folder or an exported model, on any ranks.

    python recommend.py --checkpoint runs/ml-1m --user 42
    python recommend.py --checkpoint runs/ml-1m --history "1193,661,914" --k 20
    python recommend.py --checkpoint runs/ml-1m --similar 1193
    python recommend.py --checkpoint runs/ml-1m --histories new.parquet --output recs.jsonl
    torchrun --standalone --nproc_per_node 2 recommend.py --checkpoint runs/ml-1m --all --k 100 \\
        --output recs.parquet

Ids are those of the ratings file. Prints a table, or writes one row a user and rank.
"""

import sys

from model.run.script import start_script
from model.serving.config import RecommendFlags
from model.settings.flags import FlagParser


def read_flags() -> RecommendFlags:
    """The flags on the command line."""
    return FlagParser(__doc__, RecommendFlags).parse(sys.argv[1:])


def recommend(flags: RecommendFlags) -> None:
    """Load the model; print or write what it recommends."""
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.distributed import start
    from model.serving.answer import answer

    answer(flags, start())


def main() -> None:
    """Recommend with the flags of the command line."""
    start_script(read_flags, recommend, lambda flags: "lower --batch_size, or use more ranks")


if __name__ == "__main__":
    main()
