"""Flags of the evaluation: candidates, negatives and metrics."""

import re
from dataclasses import dataclass

from pipeline.config import Config, flag
from pipeline.errors import UserError

# The metric that selects the best model, by full ranking; its cutoff is always among the cutoffs.
SELECTING_CUTOFF = 10
SELECTING = f"NDCG@{SELECTING_CUTOFF}"
DEFAULT_METRICS_AT = "1,5,10,20"


@dataclass(frozen=True)
class HoldoutConfig(Config):
    """Candidates, negatives and metrics of an evaluation."""

    eval_negatives: int = flag(
        100, "unseen items ranked beside each target", at_least=1, aliases=("num_negatives",)
    )
    eval_negatives_seed: int = flag(0, "seed of --eval_negatives", aliases=("negative_seed",))
    seen: str = flag(
        "auto",
        "a user's earlier items in the ranking; auto: keep them where validation targets repeat",
        choices=("drop", "keep", "auto"),
    )
    targets: str = flag(
        "next",
        "a user's held-out items: the next one, or all of the part (several relevant items)",
        choices=("next", "all"),
    )
    metrics_at: str = flag(
        DEFAULT_METRICS_AT, "lengths k of HR@k and NDCG@k, with commas; 10 is always among them"
    )

    def check(self) -> None:
        if not all(re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*", k) for k in self.metrics_at.split(",")):
            raise UserError(
                "--metrics_at must be whole numbers from 1, with commas between them, not "
                f"{self.metrics_at!r}"
            )

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """The k of metrics, ascending."""
        return tuple(sorted({SELECTING_CUTOFF, *map(int, self.metrics_at.split(","))}))

    def check_catalog(self, num_items: int) -> None:
        """UserError if a given cutoff is beyond the catalog, where every rank is a hit."""
        largest = max(map(int, self.metrics_at.split(",")))
        if largest > num_items and self.metrics_at != DEFAULT_METRICS_AT:
            raise UserError(
                f"--metrics_at {self.metrics_at}: the catalog has {num_items:,} items, fewer than "
                f"{largest:,}"
            )
