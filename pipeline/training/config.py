"""Flags of the training batches: windows, cloze masks, batches and negatives."""

from dataclasses import dataclass

from pipeline.config import Config, flag
from pipeline.errors import UserError

MAX_COPIES = 1 << 16


@dataclass(frozen=True)
class WindowConfig(Config):
    """How histories are cut into windows."""

    max_len: int = flag(
        100, "maximum number of items in a window of a history", at_least=1, limit=1 << 20
    )
    window_stride: float = flag(
        1.0, "distance between windows, as a share of --max_len; 1: no overlap", above=0, at_most=1
    )
    train_on_validation: bool = flag(False, "train on validation items too; test the last model")

    @property
    def stride(self) -> int:
        """Items between the starts of two windows, at least 1."""
        return max(1, round(self.max_len * self.window_stride))


def _share(default: float, help: str) -> float:
    return flag(default, help, at_least=0, at_most=1)


@dataclass(frozen=True)
class MaskConfig(Config):
    """Which positions are masked and what replaces them."""

    mask_prob: float = flag(
        0.3,
        "probability that a position of a window is masked",
        above=0,
        below=1,
        reason="some positions must be masked and some visible",
    )
    dupe_factor: int = flag(
        1, "differently masked copies of each window in an epoch", at_least=1, at_most=MAX_COPIES
    )
    mask_last_share: float = _share(0.0, "share of windows in which only the last item is masked")
    left_context_share: float = _share(
        0.5, "share of windows in which a position attends to itself and earlier ones only"
    )
    two_stream: bool = flag(
        False, "with left context, predict every item from a second row of mask tokens"
    )
    mask_token_share: float = _share(0.8, "share of masked positions that become the mask token")
    random_item_share: float = _share(
        0.1, "share of masked positions that become a random item; the rest is kept"
    )

    def check(self) -> None:
        if self.two_stream and not self.left_context_share:
            raise UserError(
                "--two_stream needs windows with left context only, and there are none: "
                "raise --left_context_share or leave it out"
            )
        if self.mask_token_share + self.random_item_share > 1.0 + 1e-9:
            raise UserError(
                "--mask_token_share and --random_item_share must not exceed 1 in sum, "
                f"but {self.mask_token_share} + {self.random_item_share} do: lower one of them"
            )


@dataclass(frozen=True)
class LoaderConfig(Config):
    """How windows become batches."""

    train_batch_size: int = flag(
        128, "windows per training step and rank", at_least=1, limit=1 << 24
    )
    prefetch_batches: int = flag(8, "minimum number of batches prepared ahead", at_least=1)
    seed: int = flag(
        0, "seed of weights, order, masks, dropout, negatives", at_least=0, at_most=(1 << 63) - 1
    )


@dataclass(frozen=True)
class NegativesConfig(Config):
    """Negatives of the sampled losses."""

    train_negatives: int = flag(
        4096,
        "negatives that all positions of a step share, for a sampled loss",
        at_least=1,
        limit=1 << 26,
    )
