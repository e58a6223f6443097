"""Flags of the evaluation's sampled protocol."""

from dataclasses import dataclass

from pipeline.config import Config, flag


@dataclass(frozen=True)
class HoldoutConfig(Config):
    """Negatives of the sampled evaluation protocol."""

    eval_negatives: int = flag(
        100,
        "negatives of an evaluated user: unseen items that the sampled protocol ranks the target "
        "against (those of the training loss: --train_negatives)",
        at_least=1,
        aliases=("num_negatives",),
    )
    eval_negatives_seed: int = flag(
        0, "seed of the evaluation's negatives", aliases=("negative_seed",)
    )
