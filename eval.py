"""Evaluate a trained BERT4Rec from its run folder, or from an exported model, on any ranks.

    python eval.py --checkpoint runs/ml-1m
    torchrun --standalone --nproc_per_node 2 eval.py --checkpoint runs/ml-1m --split validation

    python eval.py --checkpoint runs/ml-1m --popularity_discount 0.3

Prints the metrics table and writes eval_<split>.json into the folder; with a discount
eval_<split>-discount-<discount>.json, with another --seen than that of training
eval_<split>-seen-<drop or keep>.json, on other ratings than those of training
eval_<split>-ratings-<fingerprint>.json.
"""

import sys
from pathlib import Path

from model.run.config import EvalFlags
from model.run.flags import FlagParser
from model.run.script import start_script


def read_flags() -> EvalFlags:
    """The flags on the command line."""
    return FlagParser(__doc__, EvalFlags).parse(sys.argv[1:])


def evaluate(flags: EvalFlags) -> None:
    """Load the model, evaluate it, print and write the result."""
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.distributed import start
    from model.evaluation.report import format_report, write_result
    from model.run.build import prepared
    from model.run.measure import measure
    from model.run.protocol import with_seen
    from model.run.trained import TrainedRun

    ranks = start()
    run = TrainedRun(flags)
    store = prepared(run.config, ranks)
    run.check_catalog(store)
    model = run.model(ranks)
    config, _ = with_seen(run.config, store)
    discount = flags.popularity_discount
    result, _ = measure(config, model, store, flags.split, ranks, discount)
    result |= run.trained_to(ranks)
    if discount:
        result["popularity_discount"] = discount
    if not run.has_seen_of(config):
        result["other_seen"] = config.holdout.seen
    if not run.has_ratings_of(store):
        result["other_ratings"] = store.ratings_fingerprint
    ranks.say(format_report(flags.split, result, (store.best_possible or {}).get(flags.split)))
    if ranks.is_first:
        write_result(Path(flags.checkpoint), flags.split, result)


def main() -> None:
    """Evaluate with the flags of the command line."""
    start_script(read_flags, evaluate)


if __name__ == "__main__":
    main()
