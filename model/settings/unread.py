"""Flags that were given and have no effect, because of the value of another one.

    python train.py --mode ddp --sharding column_wise
    warning: flags without effect: --sharding (only with --mode dmp)

Where training would go against what such a flag says, it is an error of its config class instead
(``--mode ddp --table_precision fp16``).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from model.settings.config import RunConfig


@dataclass(frozen=True)
class _Needs:
    """What must hold for these flags to be read, in the user's words and as a test."""

    names: tuple[str, ...]
    needs: str
    holds: Callable[[RunConfig], bool]


_REPLACED = ("mask_token_share", "random_item_share")
_RANDOM = ("random_user_count", "random_item_count", "random_size", "random_skew")
_SYNTHETIC = ("synthetic_user_count", "synthetic_item_count")
_NEEDS = (
    _Needs(_RANDOM, "--dataset_name random", lambda run: run.data.generated == "random"),
    _Needs(_SYNTHETIC, "--dataset_name synthetic", lambda run: run.data.generated == "synthetic"),
    _Needs(("data_seed",), "generated data", lambda run: run.data.generated != ""),
    _Needs(
        ("mask_prob", *_REPLACED),
        "--mask_last_share below 1",
        lambda run: run.mask.mask_last_share < 1,
    ),
    _Needs(
        ("mask_prob", "mask_last_share", *_REPLACED),
        "--two_stream false or --left_context_share below 1",
        lambda run: not run.mask.two_stream or run.mask.left_context_share < 1,
    ),
    _Needs(
        ("train_negatives",),
        "--loss sampled_softmax or gbce",
        lambda run: run.head.loss in ("sampled_softmax", "gbce"),
    ),
    _Needs(("gbce_calibration",), "--loss gbce", lambda run: run.head.loss == "gbce"),
    _Needs(
        ("attribute_separator", "item_dropout"),
        "--item_attributes",
        lambda run: run.encoder.item_attributes != "",
    ),
    _Needs(("teacher_share",), "--teachers", lambda run: run.teaching.teachers != ""),
    _Needs(
        ("sharding", "embedding_optimizer"),
        "--mode dmp",
        lambda run: run.sharding.mode == "dmp",
    ),
    _Needs(("decay_step",), "--gamma below 1", lambda run: run.training.gamma < 1),
    _Needs(
        ("gamma", "decay_step"),
        "--num_epochs above --decay_step",
        lambda run: run.training.gamma == 1 or run.training.num_epochs > run.training.decay_step,
    ),
    _Needs(
        ("eval_every", "val_batch_size"),
        "--train_on_validation false",
        lambda run: not run.windows.train_on_validation,
    ),
)


def without_effect(given: Collection[str], config: RunConfig) -> str | None:
    """One line about flags of ``given`` that a run of ``config`` does not read; None without any.

    Args:
        given: names of flags on the command line.
        config: with all flags of the run, the given and others.
    """
    told: set[str] = set()
    parts = []
    for each in _NEEDS:
        names = [name for name in each.names if name in given and name not in told]
        if names and not each.holds(config):
            told.update(names)
            parts.append(" ".join(f"--{name}" for name in names) + f" (only with {each.needs})")
    return f"flags without effect: {', '.join(parts)}" if parts else None
