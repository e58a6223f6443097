"""The training, validation and test part of each history; everything held out is read from here.

    history             a b c d e f g
    leave-one-out       a b c d e|f|g     the last item is the test target, the one before it
                                          the validation target, of users with at least 3 items
    two points          a b c|d e|f g     before the first point, between them, after the second
    one point           a b c d|e|f g     the last item before the point is the validation part

A part of several items has several targets with ``--targets all``, else its first item is the only
one. The history before a target is everything before its part: nothing of the part is known.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.jagged import jagged_positions

SPLITS = ("validation", "test")
LEAVE_ONE_OUT, BY_TIME = "leave_one_out", "time"
PARTS = 3
TRAINING, VALIDATION, TEST = range(PARTS)  # codes of the parts


@dataclass(frozen=True, eq=False)
class Parts:
    """Places in the store's items where the parts of U users end: int64 [U] each."""

    begin: np.ndarray
    training_end: np.ndarray
    validation_end: np.ndarray
    end: np.ndarray  # of the test part and of the history
    by: str = LEAVE_ONE_OUT

    @classmethod
    def leave_one_out(cls, offsets: np.ndarray) -> "Parts":
        """The last two items of users with at least 3; the others only train."""
        begin, end = np.asarray(offsets[:-1]), np.asarray(offsets[1:])
        held_out = end - begin >= 3
        return cls(begin, end - 2 * held_out, end - held_out, end)

    @classmethod
    def of_ends(cls, offsets: np.ndarray, ends: np.ndarray, by: str) -> "Parts":
        """Parts by their ends, int64 [2, U]: of training and of validation."""
        return cls(np.asarray(offsets[:-1]), ends[0], ends[1], np.asarray(offsets[1:]), by)

    def trained_end(self, train_on_validation: bool = False) -> np.ndarray:
        """Where the items end that a model is trained on: int64 [U]."""
        return self.validation_end if train_on_validation else self.training_end

    def history_end(self, split: str) -> np.ndarray:
        """Where the part of ``split`` begins, and the known history ends: int64 [U]."""
        return self.training_end if split == "validation" else self.validation_end

    def targets_end(self, split: str) -> np.ndarray:
        """Where the part of ``split`` ends: int64 [U]."""
        return self.validation_end if split == "validation" else self.end

    def excluded_end(self, split: str) -> np.ndarray:
        """Where items end that are no negatives of ``split``: int64 [U].

        With leave-one-out the whole history, as in the paper. Else nothing after the part.
        """
        return self.end if self.by == LEAVE_ONE_OUT else self.targets_end(split)

    def users(self, split: str) -> np.ndarray:
        """Users with a history and a target in ``split``, ascending: int64 [E]."""
        history_end = self.history_end(split)
        return np.flatnonzero((history_end > self.begin) & (self.targets_end(split) > history_end))

    def targets(
        self, split: str, items: np.ndarray, every: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """User and place in ``items`` of each target, by user and place: int64 [T] each.

        Args:
            every: the first occurrence of each item in the part, not only the first item.
        """
        users = self.users(split)
        begin, end = self.history_end(split)[users], self.targets_end(split)[users]
        if not every:
            return users, begin
        owner, places = np.repeat(users, end - begin), jagged_positions(begin, end)
        order = np.lexsort((places, items[places], owner))  # equal items of a user: earliest first
        by_item, by_user = items[places][order], owner[order]
        again = (by_item[1:] == by_item[:-1]) & (by_user[1:] == by_user[:-1])
        kept = np.sort(order[~np.concatenate([np.zeros(min(1, len(order)), bool), again])])
        return owner[kept], places[kept]


def validation_from_training(ends: np.ndarray, begin: np.ndarray) -> np.ndarray:
    """Ends of the parts, int64 [2, U], if the last training item is the validation part.

    Of users with one training item, it stays one.
    """
    return np.stack([ends[1] - (ends[1] - begin >= 2), ends[1]])
