"""The final evaluation of a trained model: all metrics, and every user's ranks."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torchrec.distributed import DistributedModelParallel

from model.distributed import Ranks, from_first_rank
from model.evaluation.comparison import compare, format_comparison
from model.evaluation.details import details
from model.evaluation.evaluate import Result, rank_users, summed
from model.evaluation.listed import LONGEST
from model.evaluation.metrics import names_of_several, one_list, sums_of_several
from model.evaluation.ranked_users import RankedUsers, gathered
from model.evaluation.report import notes
from model.run.build import eval_loader, prepared
from model.run.trained import TrainedRun
from model.settings.config import EvalFlags, RunConfig
from model.settings.protocol import protocol_of, with_seen
from pipeline.errors import UserError
from pipeline.evaluation.config import SELECTING, SELECTING_CUTOFF
from pipeline.evaluation.recent import DAYS, ranks_by, recent_scores
from pipeline.preparation.store import SequenceStore


def measure(
    config: RunConfig,
    model: DistributedModelParallel,
    store: SequenceStore,
    split: str,
    ranks: Ranks,
    discount: float = 0.0,
) -> tuple[Result, RankedUsers]:
    """The result of ``split`` and the users that it is made of; the same on every rank.

    Args:
        discount: of popularity.
    """
    holdout, loader = config.holdout, eval_loader(config, store, split, ranks)
    ranking = rank_users(
        model,
        loader,
        torch.from_numpy(store.train_item_counts),
        discount=discount,
        negatives=holdout.eval_negatives,
        list_lengths=[length for length in holdout.cutoffs if length <= LONGEST],
    )
    result, recent = summed(ranking, holdout.cutoffs), None
    days = recent_days(config, store, ranks)
    if days is not None:
        result["recent_days"] = days
        recent = ranks_by(loader, _recent(store, split, days))
    users = gathered(ranking, loader, recent)
    result |= details(users, store, split, holdout.cutoffs, holdout.eval_negatives_seed)
    assert ranking.listed is not None
    result["lists"] = ranking.listed.metrics(store.train_item_counts)
    if left_out := store.num_users - result["users"]:
        result["users_left_out"] = left_out
    if dropped := store.counts.get(split, {}).get("dropped"):
        result["ratings_dropped"] = dropped
    result["protocol"] = protocol_of(config, store)
    result |= {"ratings": store.ratings_fingerprint, "catalog": store.catalog_fingerprint}
    return result, users


def recent_days(config: RunConfig, store: SequenceStore, ranks: Ranks) -> int | None:
    """In how many days popularity ranks validation best, by full `SELECTING`; on all ranks.

    None if the split is not by time, or the unit of the times is unknown.
    """
    if recent_scores(store, "validation", DAYS[0]) is None:
        return None
    loader, found = eval_loader(config, store, "validation", ranks), []
    owners = loader.users[loader.users >= 0]
    for days in DAYS:
        of_days = ranks_by(loader, _recent(store, "validation", days))
        full = torch.from_numpy(one_list(of_days, owners)[1])
        found.append(sums_of_several(full, torch.from_numpy(owners), (SELECTING_CUTOFF,)))
    sums = torch.stack(found).to(ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(sums)
    place = names_of_several((SELECTING_CUTOFF,)).index(SELECTING)
    return DAYS[int(sums[:, place].argmax())]


def _recent(store: SequenceStore, split: str, days: int) -> np.ndarray:
    scores = recent_scores(store, split, days)
    assert scores is not None
    return scores


@dataclass(frozen=True)
class Measured:
    """A model of a run folder or an export, evaluated; the same on every rank."""

    run: TrainedRun
    config: RunConfig
    store: SequenceStore
    result: Result
    users: RankedUsers


def measure_trained(flags: EvalFlags, ranks: Ranks) -> Measured:
    """Evaluate ``--checkpoint``; the result says where it was not evaluated as in training."""
    run = TrainedRun(flags)
    store = _ratings(run, ranks)
    config, _ = with_seen(run.config, store)
    discount = flags.popularity_discount
    result, users = measure(config, run.model(ranks), store, flags.split, ranks, discount)
    result |= run.trained_to(ranks) | _otherwise(run, config, store, discount)
    return Measured(run, config, store, result, users)


def _otherwise(
    run: TrainedRun, config: RunConfig, store: SequenceStore, discount: float
) -> dict[str, Any]:
    """Keys of a result that is not evaluated as in training."""
    found: dict[str, Any] = {"popularity_discount": discount} if discount else {}
    found |= run.other_protocol(config)
    if ratings := run.other_ratings(store):
        found["other_ratings"] = ratings
    return found


def compared(flags: EvalFlags, ranks: Ranks) -> str:
    """A table of both models of ``--compare``, evaluated on the same users by the first's flags.

    Raises:
        UserError: their users or items differ.
    """
    runs = [TrainedRun(replace(flags, checkpoint=name, compare=())) for name in flags.compare]
    stores = [_ratings(run, ranks) for run in runs]
    prints = [(each.catalog_fingerprint, each.ratings_fingerprint) for each in stores]
    if prints[0] != prints[1]:
        raise UserError(
            f"--compare {' '.join(flags.compare)}: they were trained on different ratings or "
            "splits, so that their users are no pairs: give both the same by --dataset_path, or "
            "train one again"
        )
    config, _ = with_seen(runs[0].config, stores[0])
    users, noted, discount = [], [], flags.popularity_discount
    timed = [name for name, run in zip(flags.compare, runs, strict=True) if run.span is not None]
    if len(timed) == 1:
        ranks.warn(
            f"{timed[0]} knows the targets' times (--use_times), the other does not: a part of the "
            "difference may be theirs"
        )
    for run, store in zip(runs, stores, strict=True):  # equal ratings; times may differ
        of_run, model = replace(run.config, holdout=config.holdout), run.model(ranks)
        noted.append(notes(_otherwise(run, config, store, discount)))
        users.append(measure(of_run, model, store, flags.split, ranks, discount)[1])
    holdout = config.holdout
    found = compare(users[0], users[1], holdout.cutoffs, holdout.eval_negatives_seed)
    number = len(np.unique(users[0].users))  # of which each may have several targets
    return format_comparison(flags.compare, found, flags.split, number, noted)


def _ratings(run: TrainedRun, ranks: Ranks) -> SequenceStore:
    from_first_rank(ranks, run.check_places)
    store = prepared(run.config, ranks)
    run.check_catalog(store)
    return store
