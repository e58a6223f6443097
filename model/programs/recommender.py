"""Recommendations from an exported model, with numpy and onnxruntime alone.

    from recommender import Recommender
    Recommender("exported").recommend([["1193", "661"], ["2571"]], k=10)

    python exported/recommender.py --history 1193,661,914 --k 10

Reads model.onnx (with model.safetensors), item_vectors.npy, items.json and config.json.
Several threads may call it. Item ids are spelled as in items.json, whole numbers as text or int.

Shapes: B users, L items of the longest history, V items, C items of a part, D width.
"""

import argparse
import json
import sys
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

    Raises:
        OSError: a file is missing, as while a new export replaces an older one.
        RuntimeError: the export was replaced while it was read; read it again.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 1) -> None:
        self._folder = Path(folder)
        folder = self._folder.resolve()  # a link may lead to another export a moment later
        self._written = _written(folder)
        try:
            self._read(folder, threads)
        finally:  # also instead of an error that the replacement caused
            if _written(folder) != self._written:
                raise RuntimeError(f"{folder} was replaced while it was read: read it again")

    def _read(self, folder: Path, threads: int) -> None:
        known = json.loads((folder / "items.json").read_text("utf-8"))
        self.items: list[str | int] = known["items"]
        self.titles: list[str] = known["titles"]  # "" if there is none
        self.train_counts = np.array(known["train_counts"])
        self._rows = {str(item): row for row, item in enumerate(self.items)}
        self.vectors = np.load(folder / "item_vectors.npy", mmap_mode="r")  # float32 [V, D]
        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        self._longest = self.config["flags"]["max_len"] - 1  # one position is the mask token's
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)

    def outdated(self) -> bool:
        """Whether the folder holds another export by now; False while one is being written."""
        try:
            return _written(self._folder) != self._written
        except FileNotFoundError:
            return False

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
            usable &= np.isin(np.arange(len(usable)), self.rows(allow))
        usable[self.rows(deny)] = False
        known = [self.rows(history) for history in histories]
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
        mine = self.vectors[row := self._rows[str(item).strip()]]
        scores = self.vectors @ mine / np.maximum(np.linalg.norm(self.vectors, axis=1), 1e-12)
        scores /= max(np.linalg.norm(mine), 1e-12)
        scores[row] = -np.inf
        scores[self.train_counts == 0] = -np.inf
        return self._named(_top(scores, k))

    def user_vectors(self, histories: Sequence[Iterable[object]]) -> np.ndarray:
        """float32 [B, D]; the product with an item's vector is its score."""
        known = [self.rows(history) for history in histories]
        blocks = [known[at : at + _USERS] for at in range(0, len(known), _USERS)]
        none = np.empty((0, self.vectors.shape[1]), np.float32)
        return np.concatenate([none, *map(self._encoded, blocks)])

    def rows(self, items: Iterable[object]) -> np.ndarray:
        """int64 places in ``self.items`` of the known ones of these items, in their order."""
        if isinstance(items, (str, bytes)):
            raise TypeError(f"item ids must be a list, not the text {items!r}")
        found = (self._rows.get(str(item).strip()) for item in items)
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


def _written(folder: Path) -> tuple[int, int]:
    """Identifies an export: its weights are removed before another is written, and written last."""
    weights = (folder / "model.safetensors").stat()
    return weights.st_ino, weights.st_mtime_ns


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
    given, serving = parser.parse_args(), Recommender()
    history = [item for item in given.history.split(",") if item.strip()]
    if unknown := len(history) - len(serving.rows(history)):
        print(f"warning: {unknown} of {len(history)} items are unknown: left out", file=sys.stderr)
    if given.k < 1:
        parser.error("--k must be at least 1")
    for name, value in serving.recommend([history], given.k)[0]:
        print(f"{value:8.4f}  {name}  {serving.titles[serving.rows([name])[0]]}".rstrip())
