"""What the training stages hand on: one rank's rows of S consecutive steps, in NumPy arrays.

    SampledWindows    which windows                 (sampler.py, cloze.py: LeftContextFirst)
      JaggedWindows     + their items               (windows.py)
        MaskedWindows     + masked positions        (cloze.py, two_stream.py, shape_buckets.py,
                                                     negatives.py)

NumPy's fixed cost per call is paid once for S steps, which makes small batches cheap. Random draws
are keyed by window, so the chunk size does not change them.

Shapes: S steps, W windows, B rows, T items, M masked positions, K negatives. B = W, unless
two_stream.py or shape_buckets.py add rows.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledWindows:
    """The windows of S steps.

    Attributes:
        epoch: the epoch.
        step_samples: samples consumed by all ranks after each step.
        window_splits: int64 [S + 1]; step s trains windows window_splits[s]:window_splits[s + 1],
            perhaps none.
        windows: int64 [W], numbers in the `WindowTable`.
        copies: int64 [W], which of ``dupe_factor`` copies.
        left_only: bool [W], rows whose positions attend only to what precedes them; None: no row
            ever does.
    """

    epoch: int
    step_samples: list[int]
    window_splits: np.ndarray
    windows: np.ndarray
    copies: np.ndarray
    left_only: np.ndarray | None = None

    @property
    def step_windows(self) -> np.ndarray:
        """int64 [S], windows of each step."""
        return np.diff(self.window_splits)


@dataclass(frozen=True, eq=False, kw_only=True)
class JaggedWindows(SampledWindows):
    """The windows with their items.

    Attributes:
        values: int32 [T], the items of all rows.
        offsets: int64 [B + 1]; row b is values[offsets[b]:offsets[b + 1]].
    """

    values: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedWindows(JaggedWindows):
    """The rows to train on.

    Attributes:
        row_splits: int64 [S + 1]; step s has rows row_splits[s]:row_splits[s + 1].
        masked: int64 [M], masked positions in the values, step by step.
        targets: int32 [M], the items there before masking.
        mask_splits: int64 [S + 1]; step s has masked[mask_splits[s]:mask_splits[s + 1]].
        steps_ago: int64 [T], how many items of its history follow a position; None: as many as
            positions of its row follow it.
        negatives: int64 [S, K], items drawn for each step; None: no negatives.
        log_counts: float32 [S, K], logarithms of the negatives' expected counts.
        equal_shapes: bool [S], steps with the same shapes on every rank; None: ranks do not
            exchange sizes.
    """

    row_splits: np.ndarray
    masked: np.ndarray
    targets: np.ndarray
    mask_splits: np.ndarray
    steps_ago: np.ndarray | None = None
    negatives: np.ndarray | None = None
    log_counts: np.ndarray | None = None
    equal_shapes: np.ndarray | None = None
