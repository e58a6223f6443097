"""Recommender("exported").recommend([["1193", "661"]], k=10), by numpy and onnxruntime alone."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

_USERS, _SCORES = 64, 1 << 24  # most users and scores of a block
Ids = Iterable[object]
Many = Sequence[Ids]  # histories, oldest item first
Times = Sequence[Sequence[int]]  # of each item; empty, or a user's empty: unknown
Block = tuple[list[np.ndarray], np.ndarray]
Found = list[tuple[str | int, float]]  # ids and their scores, best first


class Recommender:
    """Best items for histories of ids as in items.json; several threads may call it.

    OSError, RuntimeError or ValueError if a new export is replacing this one, or it is damaged.
    """

    def __init__(self, folder: str | Path = Path(__file__).parent, threads: int = 1) -> None:
        self._folder, folder = Path(folder), Path(folder).resolve()  # a link may change meanwhile
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
        # Validation counts are there if the model was trained on them, too.
        self.trained = self.train_counts + np.array(known.get("validation_counts", 0)) > 0
        temperature = self.config["flags"]["logit_temperature"] or 1  # 0: logits are the scores
        logs = np.log1p(self.train_counts, dtype=np.float32)
        # An item of count 0 is lowered like the most popular one.
        self._popularity = temperature * np.where(self.train_counts > 0, logs, logs.max())
        self._rows = {str(item): row for row, item in enumerate(self.items)}

    def outdated(self) -> bool:
        """Whether the folder holds another export by now; False while one is being written."""
        try:
            return _written(self._folder) != self._written
        except FileNotFoundError:
            return False

    def recommend(
        self,
        histories: Many,
        k: int = 10,
        seen: str = "trained",
        allow: Ids | None = None,
        deny: Ids = (),
        popularity_discount: float = 0.0,
        times: Times = (),
        at: int | None = None,
    ) -> list[Found]:
        """The best trained items of each history (oldest first).

        One without known items gets the most popular, with their training counts as scores.

        Args:
            seen: of the history's items; trained: as the run. popularity_discount: as in eval.py.
            allow, deny: the only items to choose from (None: all), and items to leave out.
            times, at: seconds since 1970 of the histories' items and of the request, if it has any.
        """
        if seen not in ("trained", "drop", "keep") or not 0 <= popularity_discount <= 1:
            raise ValueError("seen is trained, drop or keep, popularity_discount 0 to 1")
        keep = (self.config["flags"].get("seen") if seen == "trained" else seen) == "keep"
        usable = self.trained.copy()
        usable &= allow is None or np.isin(np.arange(len(usable)), self.rows(allow))
        usable[self.rows(deny)] = False
        lowered, best = popularity_discount * self._popularity, []
        for block, vectors in self._encoded(histories, times, at):
            for rows, scores in zip(block, vectors @ self.vectors.T - lowered, strict=True):
                scores[rows[:0] if keep else rows] = -np.inf
                best.append(self._best(scores if len(rows) else 1.0 * self.train_counts, usable, k))
        return best

    def similar(self, item: object, k: int = 10) -> Found:
        """The items with the highest cosine to an item; KeyError if it is unknown."""
        row, usable = self._rows[self._key(item)], self.trained.copy()
        lengths = np.maximum(np.linalg.norm(self.vectors, axis=1), 1e-12)
        usable[row] = False
        return self._best(self.vectors @ (self.vectors[row] / lengths[row]) / lengths, usable, k)

    def user_vectors(self, histories: Many, times: Times = (), at: int | None = None) -> np.ndarray:
        """float32 [users, width]; the product with an item's vector is its score."""
        return np.vstack([self.vectors[:0], *(v for _, v in self._encoded(histories, times, at))])

    def rows(self, items: Ids) -> np.ndarray:
        """int64 places in ``self.items`` of the known ones of these items, in their order."""
        if isinstance(items, (str, bytes)):
            raise TypeError(f"item ids must be a list, not the text {items!r}")
        return np.array([self._rows[k] for k in map(self._key, items) if k in self._rows], np.int64)

    def _key(self, item: object) -> str:  # blanks around an id count where the catalog has them
        return str(item) if str(item) in self._rows else str(item).strip()

    def _encoded(self, histories: Many, times: Times, at: int | None) -> Iterator[Block]:
        """Blocks of users: rows of their known items, and the users' vectors."""
        known = [self.rows(history) for history in histories]
        lists = len(known) if "times" in self.config else -1
        if (len(times) or at is not None) and len(times) != lists:
            raise ValueError("times: one list a history, for a model with times; at needs them")
        for history, given in zip(histories, map(np.asarray, times), strict=False):
            if given.size and (given.shape != (len([*history]),) or given.dtype.kind != "i"):
                raise ValueError("times: whole seconds since 1970, one an item or none at all")
        longest = self.config["flags"]["max_len"] - 1  # one position is the mask token's
        users = max(1, min(_USERS, _SCORES // len(self.items)))
        for low in range(0, len(known), users):
            block = known[low : low + users]
            recent = [rows[max(0, len(rows) - longest) :] for rows in block]
            padded = np.zeros((len(block), max(1, *map(len, recent))), np.int64)
            for line, rows in zip(padded, recent, strict=True):
                line[len(line) - len(rows) :] = rows + 1  # 0 is padding
            inputs = {"histories": padded}
            if "times" in self.config:  # -2^62: unknown
                inputs["times"] = np.full((len(block), padded.shape[1] + 2), -(2**62))
                for user, line in enumerate(inputs["times"] if len(times) else (), low):
                    pairs = zip(histories[user], times[user], strict=False)
                    of_items = [time for item, time in pairs if self._key(item) in self._rows]
                    newest = max([self.config["times"]["newest"], *of_items[-1:]])
                    moments = of_items and [*of_items, newest if at is None else at][-len(line) :]
                    line[len(line) - len(moments) :] = moments
            yield block, self._session.run(None, inputs)[0]

    def _best(self, scores: np.ndarray, usable: np.ndarray, k: int) -> Found:
        """The highest finite scores of usable items; equal ones in the catalog's order."""
        if k < 1:
            raise ValueError("k is at least 1")
        scores[~usable] = -np.inf
        kth = np.partition(scores, -k)[-k] if k < len(scores) else -np.inf
        rows = np.flatnonzero((scores >= kth) & (scores > -np.inf))
        rows = rows[np.argsort(-scores[rows], kind="stable")[:k]]
        return [(self.items[row], float(scores[row])) for row in rows]


def _written(folder: Path) -> tuple[int, int]:
    """Identifies an export: its weights are removed before another is written, and written last."""
    return (weights := (folder / "model.safetensors").stat()).st_ino, weights.st_mtime_ns
