"""Flags of the evaluation: candidates, negatives and metrics."""

from dataclasses import dataclass

from pipeline.config import Config, flag


@dataclass(frozen=True)
class HoldoutConfig(Config):
    """Negatives of the sampled evaluation protocol."""

    eval_negatives: int = flag(
        100, "unseen items ranked beside each target", at_least=1, aliases=("num_negatives",)
    )
    eval_negatives_seed: int = flag(0, "seed of --eval_negatives", aliases=("negative_seed",))
    seen: str = flag(
        "auto",
        "a user's earlier items in the ranking; auto: keep them where validation targets repeat",
        choices=("drop", "keep", "auto"),
    )
