"""The final evaluation of a trained model: all metrics, and every user's ranks."""

import torch
from torchrec.distributed import DistributedModelParallel

from model.distributed import Ranks
from model.evaluation.details import details
from model.evaluation.evaluate import Result, rank_users, summed
from model.evaluation.listed import LONGEST
from model.evaluation.ranked_users import RankedUsers, gathered
from model.run.build import eval_loader
from model.run.config import RunConfig
from model.run.protocol import protocol_of
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
    result, users = summed(ranking, holdout.cutoffs), gathered(ranking, loader)
    result |= details(users, store, split, holdout.cutoffs, holdout.eval_negatives_seed)
    assert ranking.listed is not None
    result["lists"] = ranking.listed.metrics(store.train_item_counts)
    result["protocol"] = protocol_of(config, store)
    result |= {"ratings": store.ratings_fingerprint, "catalog": store.catalog_fingerprint}
    return result, users
