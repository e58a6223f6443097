"""Data passed between training stages: one rank's rows of S consecutive steps, in NumPy arrays.

The steps share NumPy's fixed cost per call. Random draws are keyed by window, not by chunk.

Shapes: S steps, W windows, B rows, T items, M masked positions, K negatives. B = W, unless
two_stream.py or shape_buckets.py add rows.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, kw_only=True)
class SampledWindows:
    """The windows of S steps."""

    epoch: int
    step_samples: list[int]  # samples of the epoch consumed by all ranks after each step
    window_splits: np.ndarray  # int64 [S + 1]; step s trains windows[splits[s]:splits[s + 1]]
    windows: np.ndarray  # int64 [W], numbers in the `WindowTable`
    copies: np.ndarray  # int64 [W], which of ``dupe_factor`` copies
    keys: np.ndarray | None = None  # uint64 [W], of the windows' draws (cloze.py)
    left_only: np.ndarray | None = None  # bool [W], rows with left context only

    @property
    def step_windows(self) -> np.ndarray:
        """Windows of each step, int64 [S]."""
        return np.diff(self.window_splits)


@dataclass(frozen=True, eq=False, kw_only=True)
class JaggedWindows(SampledWindows):
    """The windows with their items."""

    values: np.ndarray  # int32 [T]
    offsets: np.ndarray  # int64 [B + 1]; row b is values[offsets[b]:offsets[b + 1]]
    times: np.ndarray | None = None  # int64 [T, 2], as in `TrainBatch`


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedWindows(JaggedWindows):
    """The rows to train on, with masked positions."""

    row_splits: np.ndarray  # int64 [S + 1]; step s has rows row_splits[s]:row_splits[s + 1]
    masked: np.ndarray  # int64 [M], masked positions in their step's values
    targets: np.ndarray  # int32 [M], the items there before masking
    mask_splits: np.ndarray  # int64 [S + 1]; step s has masked[splits[s]:splits[s + 1]]
    steps_ago: np.ndarray | None = None  # int64 [T], as in `TrainBatch`
    negatives: np.ndarray | None = None  # int64 [S, K]
    log_counts: np.ndarray | None = None  # float32 [S, K]
    all_windows: np.ndarray | int = 0  # int64 [S], as in `PackedBatch`
    all_targets: np.ndarray | None = None  # int64 [S], as in `TrainBatch`
    slots: np.ndarray | int = 0  # int64 [S], as in `PackedBatch`; 0: not counted
