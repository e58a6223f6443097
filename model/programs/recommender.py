"""Recommendations from an exported model, with numpy and onnxruntime alone.

    from recommender import Recommender
    Recommender("exported").recommend([["1193", "661"], ["2571"]], k=10)

Several threads may call it. Ids are spelled as in items.json, whole numbers as text or int.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

_USERS, _SCORES = 64, 1 << 24  # most users and scores of a block
Ids = Iterable[object]
Times = Sequence[Sequence[int]]  # of each item; empty: none
Found = list[tuple[str | int, float]]  # ids and their scores, best first
_UNKNOWN = -(1 << 62)  # a time


class Recommender:
    """Best items for histories of item ids; ``threads`` are the encoder's.

    Raises:
        OSError, RuntimeError, ValueError: a new export is replacing this one, or it is damaged.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 1) -> None:
        self._folder = Path(folder)
        folder = self._folder.resolve()  # a link may lead to another export a moment later
        self._written = _written(folder)
        try:
            sums = json.loads((folder / "checksums.json").read_text("utf-8"))
            for path in (folder / name for name in sums if (folder / name).exists()):
                if zlib.crc32(np.memmap(path, mode="r").data) != sums[path.name]["crc32"]:
                    raise ValueError(f"{path} was altered: export the model again")
            self.config = json.loads((folder / "config.json").read_text("utf-8"))
            known = json.loads((folder / "items.json").read_text("utf-8"))
            self.vectors = np.load(folder / "item_vectors.npy", mmap_mode="r")  # [items, width]
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self._session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options)
        finally:  # also instead of an error that the replacement caused
            if _written(folder) != self._written:
                raise RuntimeError(f"{folder} was replaced while it was read: read it again")
        self.items, self.titles = known["items"], known["titles"]  # title "": there is none
        self.train_counts = np.array(known["train_counts"])
        self._rows = {str(item): row for row, item in enumerate(self.items)}

    def outdated(self) -> bool:
        """Whether the folder holds another export by now; False while one is being written."""
        try:
            return _written(self._folder) != self._written
        except FileNotFoundError:
            return False

    def recommend(
        self,
        histories: Sequence[Ids],
        k: int = 10,
        seen: str = "drop",
        allow: Ids | None = None,
        deny: Ids = (),
        times: Times = (),
        at: int | None = None,
    ) -> list[Found]:
        """The best items of each history (oldest first), without those that were never trained.

        Unknown items of a history do not count. A history without known items gets the most popular
        ones, with their training counts as scores.

        Args:
            seen: "drop": no item of the history; "keep".
            allow, deny: the only items to choose from (None: all), and items to leave out.
            times: of the histories' items, in seconds since 1970, for a model that reads times.
            at: time of the request; None: the newest one known. Only with ``times``.
        """
        if seen not in ("drop", "keep") or k < 1:
            raise ValueError("seen is drop or keep, and k at least 1")
        usable = self.train_counts > 0
        if allow is not None:
            usable &= np.isin(np.arange(len(usable)), self.rows(allow))
        usable[self.rows(deny)] = False
        best = []
        for block, vectors in self._encoded(histories, times, at):
            for rows, scores in zip(block, vectors @ self.vectors.T, strict=True):
                if seen == "drop":
                    scores[rows] = -np.inf
                ranked = scores if len(rows) else self.train_counts.astype(float)
                best.append(self._best(ranked, usable, k))
        return best

    def similar(self, item: object, k: int = 10) -> Found:
        """The items with the highest cosine to an item; KeyError if it is unknown."""
        row, usable = self._rows[str(item).strip()], self.train_counts > 0
        lengths = np.maximum(np.linalg.norm(self.vectors, axis=1), 1e-12)
        usable[row] = False
        return self._best(self.vectors @ (self.vectors[row] / lengths[row]) / lengths, usable, k)

    def user_vectors(
        self, histories: Sequence[Ids], times: Times = (), at: int | None = None
    ) -> np.ndarray:
        """float32 [users, width]; the product with an item's vector is its score."""
        blocks = (vectors for _, vectors in self._encoded(histories, times, at))
        return np.concatenate([np.empty((0, self.vectors.shape[1]), np.float32), *blocks])

    def rows(self, items: Ids) -> np.ndarray:
        """int64 places in ``self.items`` of the known ones of these items, in their order."""
        if isinstance(items, (str, bytes)):
            raise TypeError(f"item ids must be a list, not the text {items!r}")
        found = (self._rows.get(str(item).strip()) for item in items)
        return np.array([row for row in found if row is not None], np.int64)

    def _encoded(
        self, histories: Sequence[Ids], times: Times, at: int | None
    ) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Blocks of users: rows of their known items, and the users' vectors."""
        known = [self.rows(history) for history in histories]
        longest = self.config["flags"]["max_len"] - 1  # one position is the mask token's
        users = max(1, min(_USERS, _SCORES // len(self.items)))
        for low in range(0, len(known), users):
            block = known[low : low + users]
            recent = [rows[max(0, len(rows) - longest) :] for rows in block]
            padded = np.zeros((len(block), max(1, *map(len, recent))), np.int64)
            for line, rows in zip(padded, recent, strict=True):
                line[len(line) - len(rows) :] = rows + 1  # 0 is padding
            inputs = {"histories": padded}
            if "times" in self.config:  # of the item before the line, the line, the request
                inputs["times"] = np.full((len(block), padded.shape[1] + 2), _UNKNOWN)
                for user, line in enumerate(inputs["times"] if len(times) else (), low):
                    pairs = zip(histories[user], times[user], strict=True)
                    of_items = [time for item, time in pairs if str(item).strip() in self._rows]
                    newest = max([self.config["times"]["newest"], *of_items[-1:]])
                    moments = [*of_items, newest if at is None else at][-len(line) :]
                    line[len(line) - len(moments) :] = moments
            yield block, self._session.run(None, inputs)[0]

    def _best(self, scores: np.ndarray, usable: np.ndarray, k: int) -> Found:
        """The highest finite scores of usable items; equal ones in the catalog's order."""
        scores[~usable] = -np.inf
        kth = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
        rows = np.flatnonzero((scores >= kth) & (scores > -np.inf))
        rows = rows[np.argsort(-scores[rows], kind="stable")[:k]]
        return [(self.items[row], float(scores[row])) for row in rows]


def _written(folder: Path) -> tuple[int, int]:
    """Identifies an export: its weights are removed before another is written, and written last."""
    weights = (folder / "model.safetensors").stat()
    return weights.st_ino, weights.st_mtime_ns


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
