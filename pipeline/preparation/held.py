"""Ratings that a stage holds until a total is known: in memory, beyond a limit on disk.

    held = Held(memory)
    for chunk in self.source: held.add(chunk)         # and count
    for chunk in held.drained(): ...                  # the same chunks in the same order

Chunks are dataclasses of NumPy arrays, some of which may be None. `HeldByUser` gives back, in place
of the chunks, the ratings of some users at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from pipeline.preparation.memory import Memory, SpillFile

Chunk = TypeVar("Chunk")
_CELL_BITS = 16  # of the highest bits of a user, by which a chunk is sorted: radix sort has 16


@dataclass(frozen=True)
class _Spilled(Generic[Chunk]):
    """A chunk in a file."""

    kind: type[Chunk]
    file: SpillFile
    columns: dict[str, tuple[int, np.dtype]]  # place and type of each array
    rows: int

    @classmethod
    def write(cls, chunk: Chunk, file: SpillFile) -> "_Spilled[Chunk]":
        arrays = _arrays(chunk)
        columns = {name: (file.write(array), array.dtype) for name, array in arrays.items()}
        return cls(type(chunk), file, columns, len(next(iter(arrays.values()))))

    def read(self, start: int, stop: int) -> Chunk:
        return self.kind(**{name: self.column(name, start, stop) for name in self.columns})

    def column(self, name: str, start: int, stop: int) -> np.ndarray:
        place, dtype = self.columns[name]
        return self.file.read(place + start * dtype.itemsize, dtype, stop - start)

    @property
    def bytes_a_row(self) -> int:
        return sum(dtype.itemsize for _, dtype in self.columns.values())


class Held(Generic[Chunk]):
    """Chunks for one more pass."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._spilled: list[_Spilled[Chunk]] = []
        self._chunks: list[Chunk] = []
        self._bytes = 0

    def add(self, chunk: Chunk) -> None:
        """Hold a chunk; beyond the memory's limit all held ones are written to a file."""
        self._chunks.append(chunk)
        self._bytes += _bytes(chunk)
        if self._bytes > self.memory.limit:
            self._spill()

    def drained(self) -> Iterator[Chunk]:
        """The chunks in their order; each is given up when the next one is asked for."""
        self._spilled.reverse()
        while self._spilled:
            spilled = self._spilled.pop()
            yield spilled.read(0, spilled.rows)
            if not self._spilled or self._spilled[-1].file is not spilled.file:
                spilled.file.close()
        yield from drained(self._chunks)

    def _spill(self) -> None:
        file = self.memory.file()
        self._spilled += [_Spilled.write(chunk, file) for chunk in drained(self._chunks)]
        self._bytes = 0


class HeldByUser(Held[Chunk]):
    """Chunks with a column ``user``; `parts` yields all ratings of a range of users at a time.

    Beyond the limit each chunk is sorted by the highest bits of the user, so that the rows of a
    range are together in the file.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self._file: SpillFile | None = None
        self._shift = 0
        self._names: dict[str, None] = {}  # of the columns that any chunk has
        self.lengths = np.zeros(0, np.int64)  # ratings of each user

    def add(self, chunk: Any) -> None:
        self.lengths = added(self.lengths, chunk.user)
        self._names |= dict.fromkeys(_arrays(chunk))
        super().add(chunk)

    def parts(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns of about the limit, at least of one user: the users ascend from part to part.

        The ratings of a user are in the order in which they were added. All in memory are one part.
        """
        if not self._spilled:
            if self._chunks:
                chunks, self._chunks = self._chunks, []
                yield self._columns(chunks)
            return
        self._spill()
        bounds = self._bounds()
        cuts = []
        for spilled in self._spilled:
            cells = spilled.column("user", 0, spilled.rows) >> self._shift
            cuts.append(np.searchsorted(cells, bounds >> self._shift).tolist())
        for at in range(len(bounds) - 1):
            pieces = zip(self._spilled, cuts, strict=True)
            found = [each.read(*cut[at : at + 2]) for each, cut in pieces if cut[at] < cut[at + 1]]
            if found:
                yield self._columns(found)
        assert self._file is not None
        self._file.close()

    def _spill(self) -> None:
        if self._file is None:
            self._file = self.memory.file()
        for chunk in drained(self._chunks):
            self._spilled.append(_Spilled.write(self._in_cells(chunk), self._file))
        self._bytes = 0

    def _in_cells(self, chunk: Any) -> Any:
        """The chunk's rows by cells of users, stable."""
        users = chunk.user
        if not (users[1:] < users[:-1]).any():
            return chunk
        shift = max(int(users.max()).bit_length() - _CELL_BITS, 0)
        self._shift = max(self._shift, shift)
        order = np.argsort((users >> shift).astype(np.uint16), kind="stable")
        return type(chunk)(**{name: array[order] for name, array in _arrays(chunk).items()})

    def _bounds(self) -> np.ndarray:
        """int64 [P+1]: the first user of each part, and the number of users (rounded up)."""
        size = 1 << self._shift
        ends = np.cumsum(np.add.reduceat(self.lengths, np.arange(0, len(self.lengths), size)))
        most = self.memory.limit // max(each.bytes_a_row for each in self._spilled)
        bounds = [0]
        while bounds[-1] < len(ends):
            before = ends[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(max(int(np.searchsorted(ends, before + most, "right")), bounds[-1] + 1))
        return np.array(bounds) * size

    def _columns(self, chunks: list[Any]) -> dict[str, np.ndarray]:
        """The columns of several chunks, which are given up; one that some lack is 0 there."""
        columns = {}
        for name in self._names:
            parts = [getattr(chunk, name) for chunk in chunks]
            pairs = zip(parts, chunks, strict=True)
            parts = [np.zeros(len(chunk.user)) if part is None else part for part, chunk in pairs]
            columns[name] = np.concatenate(parts)
        chunks.clear()
        return columns


class Joined:
    """Arrays one after the other as one: in memory, beyond the limit mapped from a file."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._parts: list[np.ndarray] = []
        self._bytes = 0
        self._file: SpillFile | None = None

    def add(self, array: np.ndarray) -> None:
        self._parts.append(array)
        self._bytes += array.nbytes
        if len(self._parts) > 1 and self._bytes > self._memory.limit:
            self._spill()

    def array(self) -> np.ndarray:
        """All that was added, at least one array."""
        dtype = self._parts[-1].dtype
        if self._file is None:
            return self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts)
        self._spill()
        return self._file.mapped(dtype)

    def _spill(self) -> None:
        """Write all but the last array, which tells the type."""
        self._file = self._file or self._memory.file()
        for part in self._parts:
            self._file.write(part)
        self._parts = [self._parts[-1][:0]]
        self._bytes = 0


def added(counts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int64 counts of codes, enlarged if needed, with these codes counted too."""
    counts = enlarged(counts, codes)
    np.add.at(counts, codes, 1)
    return counts


def enlarged(array: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The array with zeros at its end, if needed, so that each code has an entry."""
    size = int(codes.max(initial=-1)) + 1
    if size <= len(array):
        return array
    more = np.zeros(max(size, 2 * len(array)) - len(array), array.dtype)
    return np.concatenate([array, more])


def drained(chunks: list[Chunk]) -> Iterator[Chunk]:
    """Yield the elements and remove each from the list, to free its memory."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


def _arrays(chunk: Any) -> dict[str, np.ndarray]:
    return {name: array for name, array in vars(chunk).items() if array is not None}


def _bytes(chunk: Any) -> int:
    return sum(array.nbytes for array in _arrays(chunk).values())
