"""The cloze task: mask items of a window; the model predicts the items that were there.

A row of five items, V = 50 items (so 51 is the mask token)::

    before   7  3  9  4  2
    masked      *     *            each position with --mask_prob, independently
    after    7 51  9 23  2         3 became the mask token, 4 a random item
    targets     3     4

A masked position becomes the mask token, a uniformly drawn item, or keeps its item (BERT: 0.8 / 0.1
/ 0.1). A row without a masked position gets one, drawn uniformly. In a share of the rows only the
last item is masked, always by the mask token, as in evaluation (BERT4Rec, arXiv 1904.06690, section
3.6).

Draws are keyed by (seed, epoch, window, copy, position): the batch size and the number of ranks do
not change them.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.jagged import jagged_positions
from pipeline.rng import below, child_keys, high32, key64, low32, mix32, position_draws, scaled
from pipeline.stage import MapStage
from pipeline.training.chunks import JaggedWindows, MaskedWindows, SampledWindows
from pipeline.training.config import MAX_COPIES, MaskConfig

# Constants that make the draws of one key independent of each other.
_MASK_LAST, _FORCED, _ACTION, _RANDOM_ITEM = 0x2545F491, 0x68E31DA4, 0x1B56C4E9, 0x5BD1E995
_LEFT_CONTEXT = 0x7ED55D16


@dataclass(frozen=True)
class ClozeMask:
    """Masks rows and chooses those with left context only; it has no state."""

    config: MaskConfig
    num_items: int
    seed: int

    @property
    def mask_token(self) -> int:
        return self.num_items + 1

    def keys(self, epoch: int, windows: np.ndarray, copies: np.ndarray) -> np.ndarray:
        """Keys of the draws of B rows, uint64 [B]: each a copy (int64 [B]) of a window."""
        return child_keys(key64(self.seed, epoch), windows * MAX_COPIES + copies)

    def __call__(
        self, values: np.ndarray, offsets: np.ndarray, keys: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask B rows of T items **in place**.

        Args:
            values: int32 [T], item ids 1..V.
            offsets: int64 [B + 1]; row b is ``values[offsets[b]:offsets[b + 1]]``, never empty.
            keys: uint64 [B], of the rows' draws.

        Returns:
            Masked positions, int64 [M] ascending, and the items there before, int32 [M].
        """
        draws, row_draws = position_draws(low32(keys), offsets), high32(keys)
        starts, ends = offsets[:-1], offsets[1:]
        chosen = below(draws, self.config.mask_prob)
        rows = np.empty(0, dtype=np.int64)
        if self.config.mask_last_share:
            last_draws = mix32(row_draws ^ np.uint32(_MASK_LAST))
            rows = np.flatnonzero(below(last_draws, self.config.mask_last_share))
        chosen[jagged_positions(starts[rows], ends[rows])] = False
        only_last = ends[rows] - 1
        chosen[only_last] = True
        # Bytes: NumPy sums up bools only half as fast.
        empty = np.flatnonzero(np.bitwise_or.reduceat(chosen.view(np.uint8), starts) == 0)
        forced_draws = mix32(row_draws[empty] ^ np.uint32(_FORCED))
        chosen[starts[empty] + scaled(forced_draws, ends[empty] - starts[empty])] = True

        masked = np.flatnonzero(chosen)
        targets = values[masked]
        values[masked] = self._replacements(targets, draws[masked])
        values[only_last] = self.mask_token
        return masked, targets

    def left_only(self, keys: np.ndarray) -> np.ndarray | None:
        """Which rows of these keys have left context only: bool [B]; None: their share is 0."""
        if not self.config.left_context_share:
            return None
        draws = mix32(high32(keys) ^ np.uint32(_LEFT_CONTEXT))
        return below(draws, self.config.left_context_share)

    def _replacements(self, targets: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """New values of the masked positions: int32 [M]."""
        token_share, random_share = self.config.mask_token_share, self.config.random_item_share
        actions = mix32(draws ^ np.uint32(_ACTION))
        replaced = np.full(len(targets), self.mask_token, dtype=np.int32)
        others = np.flatnonzero(~below(actions, token_share))
        replaced[others] = targets[others]
        at = others[np.flatnonzero(below(actions[others], token_share + random_share))]
        replaced[at] = 1 + scaled(mix32(draws[at] ^ np.uint32(_RANDOM_ITEM)), self.num_items)
        return replaced


def in_steps(masked: np.ndarray, value_splits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``masked`` and ``mask_splits`` of `MaskedWindows`, of positions in all values (int64 [M])."""
    mask_splits = np.searchsorted(masked, value_splits)
    return masked - np.repeat(value_splits[:-1], np.diff(mask_splits)), mask_splits


@dataclass(eq=False)
class MaskItems(MapStage[JaggedWindows, MaskedWindows]):
    """Mask rows **in place**."""

    cloze: ClozeMask

    def apply(self, chunk: JaggedWindows) -> MaskedWindows:
        assert chunk.keys is not None
        masked, targets = self.cloze(chunk.values, chunk.offsets, chunk.keys)
        masked, mask_splits = in_steps(masked, chunk.offsets[chunk.window_splits])
        return MaskedWindows(
            **vars(chunk),
            row_splits=chunk.window_splits,
            masked=masked,
            targets=targets,
            mask_splits=mask_splits,
        )


@dataclass(eq=False)
class LeftContextFirst(MapStage[SampledWindows, SampledWindows]):
    """Give the windows the keys of their draws; put left-context rows first in each step."""

    cloze: ClozeMask

    def apply(self, chunk: SampledWindows) -> SampledWindows:
        keys = self.cloze.keys(chunk.epoch, chunk.windows, chunk.copies)
        left_only = self.cloze.left_only(keys)
        if left_only is None:
            return replace(chunk, keys=keys)
        steps = len(chunk.step_windows)
        # NumPy sorts small integers by their bytes, twice as fast.
        step = np.repeat(np.arange(steps, dtype=np.min_scalar_type(2 * steps)), chunk.step_windows)
        order = np.argsort(2 * step + ~left_only, kind="stable")
        return replace(
            chunk,
            windows=chunk.windows[order],
            copies=chunk.copies[order],
            keys=keys[order],
            left_only=left_only[order],
        )
