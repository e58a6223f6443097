"""Evaluate a trained BERT4Rec from its run folder, or from an exported model, on any ranks.

    python eval.py --checkpoint runs/ml-1m
    torchrun --standalone --nproc_per_node 2 eval.py --checkpoint runs/ml-1m --split validation

    python eval.py --checkpoint runs/ml-1m --popularity_discount 0.3
    python eval.py --checkpoint runs/ml-1m --per_user ranks.parquet
    python eval.py --compare runs/ml-1m runs/taught

Prints the metrics table and writes eval_<split>.json into the folder; with a discount
eval_<split>-discount-<discount>.json, with another --seen or --targets than in training
eval_<split>-seen-<drop or keep>.json or eval_<split>-targets-<next or all>.json, on other ratings
than those of training eval_<split>-ratings-<fingerprint>.json. The folder of a model may be
read-only: then the table is all, which a warning says.
"""

import sys
from pathlib import Path

from model.run.script import start_script
from model.settings.config import EvalFlags
from model.settings.flags import FlagParser


def read_flags() -> EvalFlags:
    """The flags on the command line."""
    return FlagParser(__doc__, EvalFlags).parse(sys.argv[1:])


def evaluate(flags: EvalFlags) -> None:
    """Evaluate the model, print and write the result; or compare two models."""
    # Imported here because torch and TorchRec take seconds: read_flags does without them.
    from model.distributed import from_first_rank, start
    from model.evaluation.ranked_users import check_ranks_file, write_ranks
    from model.evaluation.report import format_report, write_result
    from model.run.board import write_evaluated
    from model.run.measure import compared, measure_trained
    from pipeline.errors import UserError, is_read_only

    ranks, split, per_user = start(), flags.split, Path(flags.per_user)
    if flags.compare:
        ranks.say(compared(flags, ranks))
        return
    if flags.per_user:  # before the model is evaluated, which may take long
        from_first_rank(ranks, lambda: check_ranks_file(per_user))
    found = measure_trained(flags, ranks)
    best_possible = (found.store.best_possible or {}).get(split)
    ranks.say(format_report(split, found.result, best_possible))
    if not ranks.is_first:
        return
    if flags.per_user:
        write_ranks(per_user, found.users, found.store)
    try:
        name = write_result(Path(flags.checkpoint), split, found.result).stem
        write_evaluated(found.run, name, found.result, best_possible)
    except UserError as error:
        if not is_read_only(error):
            raise
        ranks.warn(f"the result is printed, but not in the folder: {error}")


def main() -> None:
    """Evaluate with the flags of the command line."""
    start_script(read_flags, evaluate, lambda flags: "lower --batch_size, or use more ranks")


if __name__ == "__main__":
    main()
