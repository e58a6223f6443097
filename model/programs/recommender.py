"""Recommendations from an exported model, with numpy and onnxruntime alone.

    from recommender import Recommender
    Recommender("exported").recommend([["1193", "661"], ["2571"]], k=10)

    python exported/recommender.py --history 1193,661,914 --k 10

Reads model.onnx (with model.safetensors), item_vectors.npy, items.json and config.json.

Shapes: B users, L items of the longest history, V items, C items of a part, D width.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

_PART, _USERS = 1 << 18, 64  # items and users that are scored at once
Found = tuple[np.ndarray, np.ndarray]  # rows of the catalog and their scores, best first


class Recommender:
    """Top-K items for histories of original item ids.

    Args:
        folder: the exported model.
        threads: processor threads of the encoder.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 1) -> None:
        folder = Path(folder)
        known = json.loads((folder / "items.json").read_text("utf-8"))
        self.items: list[str | int] = known["items"]
        self.train_counts = np.array(known["train_counts"])
        self._rows = {str(item): row for row, item in enumerate(self.items)}
        self.vectors = np.load(folder / "item_vectors.npy", mmap_mode="r")  # float32 [V, D]
        flags = json.loads((folder / "config.json").read_text("utf-8"))["flags"]
        self._longest = flags["max_len"] - 1  # one position is the mask token's
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)

    def recommend(
        self,
        histories: Sequence[Iterable[object]],
        k: int = 10,
        seen: str = "drop",
        allow: Iterable[object] | None = None,
        deny: Iterable[object] = (),
    ) -> list[list[tuple[str | int, float]]]:
        """The best items of each history with their scores, best first.

        Unknown items of a history do not count. A history without known items gets the most popular
        ones, with their training counts as scores. Items that were never trained are left out.

        Args:
            histories: item ids, oldest first.
            seen: "drop": no item of the history; "keep".
            allow: the only items to choose from; None: all.
            deny: items to leave out.
        """
        if seen not in ("drop", "keep") or k < 1:
            raise ValueError("seen is drop or keep, and k at least 1")
        usable = self.train_counts > 0
        if allow is not None:
            usable &= np.isin(np.arange(len(usable)), self._known(allow))
        usable[self._known(deny)] = False
        known = [self._known(history) for history in histories]
        found: list[Found] = []
        for start in range(0, len(known), _USERS):
            block = known[start : start + _USERS]
            found += self._best(self._encoded(block), block, usable, k, seen == "drop")
        for user, rows in enumerate(known):
            if not len(rows):
                found[user] = _top(np.where(usable, self.train_counts, -np.inf), k)
        return [self._named(each) for each in found]

    def similar(self, item: object, k: int = 10) -> list[tuple[str | int, float]]:
        """The items with the highest cosine to an item; KeyError if it is unknown."""
        mine = self.vectors[row := self._rows[str(item)]]
        scores = self.vectors @ mine / np.maximum(np.linalg.norm(self.vectors, axis=1), 1e-12)
        scores /= max(np.linalg.norm(mine), 1e-12)
        scores[row] = -np.inf
        scores[self.train_counts == 0] = -np.inf
        return self._named(_top(scores, k))

    def user_vectors(self, histories: Sequence[Iterable[object]]) -> np.ndarray:
        """float32 [B, D]; the product with an item's vector is its score."""
        known = [self._known(history) for history in histories]
        starts = range(0, len(known), _USERS)
        return np.concatenate([self._encoded(known[at : at + _USERS]) for at in starts])

    def _known(self, items: Iterable[object]) -> np.ndarray:
        """Rows of the catalog's items; the others are left out."""
        found = (self._rows.get(str(item)) for item in items)
        return np.array([row for row in found if row is not None], np.int64)

    def _encoded(self, block: list[np.ndarray]) -> np.ndarray:
        recent = [rows[-self._longest :] if self._longest else rows[:0] for rows in block]
        longest = max(1, *map(len, recent))
        histories = np.zeros((len(block), longest), np.int64)
        for user, rows in enumerate(recent):
            histories[user, longest - len(rows) :] = rows + 1  # 0 is padding
        return self._session.run(None, {"histories": histories})[0]

    def _best(
        self, users: np.ndarray, block: list[np.ndarray], usable: np.ndarray, k: int, drop: bool
    ) -> list[Found]:
        """The best items of each user, from the best of each part of the catalog."""
        parts: list[list[Found]] = [[] for _ in block]
        for low in range(0, len(self.vectors), _PART):
            part = self.vectors[low : low + _PART]
            scores = users @ part.T  # [B, C]
            scores[:, ~usable[low : low + _PART]] = -np.inf
            for row, mine, best in zip(scores, block, parts, strict=True):
                if drop:
                    row[mine[(mine >= low) & (mine < low + len(part))] - low] = -np.inf
                columns, values = _top(row, k)
                best.append((columns + low, values))
        return [_best_of(best, k) for best in parts]

    def _named(self, found: Found) -> list[tuple[str | int, float]]:
        return [(self.items[row], float(score)) for row, score in zip(*found, strict=True)]


def _top(scores: np.ndarray, k: int) -> Found:
    """The K highest finite scores, best first; equal ones in the catalog's order."""
    kth = np.partition(scores, len(scores) - k)[len(scores) - k] if k < len(scores) else -np.inf
    rows = np.flatnonzero(scores >= kth)
    rows = rows[scores[rows] > -np.inf]
    return _best_of([(rows, scores[rows])], k)


def _best_of(found: list[Found], k: int) -> Found:
    rows, scores = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(-scores, kind="stable")[:k]
    return rows[order], scores[order]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print recommendations for a history.")
    parser.add_argument("--history", required=True, help="item ids, oldest first: 1193,661,914")
    parser.add_argument("--k", type=int, default=10)
    given = parser.parse_args()
    for name, value in Recommender().recommend([given.history.split(",")], given.k)[0]:
        print(f"{value:8.4f}  {name}")
