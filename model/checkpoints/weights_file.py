"""A safetensors file that is written part by part: its tensors are never together in memory."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.batches.attributes import ItemAttributes

_KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16"}
_BLOCK = 16 << 20  # bytes of a tensor that are copied at once


class Part(NamedTuple):
    """Values of a tensor from ``offsets`` on, which has a number for each dimension."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor


class WeightsFile:
    """A new file, of the bytes that safetensors writes for the same tensors.

    Args:
        weights: names, shapes and types of vectors and matrices, which may be on "meta".
        metadata: texts of the header; those of :meth:`replace_metadata` must be as long.

    Raises:
        OSError: the file cannot be written; also raised by the methods.
    """

    def __init__(
        self, path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        self._weights, self._starts, end = weights, dict[str, int](), 0
        # As safetensors does it: wider types first, so that all numbers are aligned.
        for name in sorted(weights, key=lambda name: (-weights[name].itemsize, name)):
            self._starts[name] = end
            end += weights[name].nbytes
        header = self._header(metadata)
        self._data = len(header)  # where tensors begin
        self._file = path.open("w+b")
        self._file.write(header)
        self._file.truncate(self._data + end)

    def __enter__(self) -> "WeightsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def put(self, part: Part) -> None:
        """Write a part of a tensor, which may be cut by rows and by columns."""
        fits = zip(part.offsets, part.values.shape, self._weights[part.name].shape, strict=True)
        assert all(start + size <= end for start, size, end in fits)
        row, column = (*part.offsets, 0)[:2]
        values = part.values.view(len(part.values), -1)
        for block in row_blocks(values):
            place, rows = self._rows(part.name, row + block.start, row + block.stop)
            if values.shape[1] < rows.shape[1]:  # other columns keep their values
                self._read(place, rows)
            rows[:, column : column + values.shape[1]] = values[block]
            self._file.seek(place)
            self._file.write(_bytes(rows))

    def change(self, name: str, change: Callable[[slice, Tensor], None]) -> None:
        """Call ``change`` with each block of a tensor's rows, which it changes, and write them."""
        for block in row_blocks(self._weights[name]):
            place, rows = self._rows(name, block.start, block.stop)
            self._read(place, rows)
            change(block, rows)
            self._file.seek(place)
            self._file.write(_bytes(rows))

    def fingerprint(self) -> str:
        """Hash of names, shapes, types and values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._weights.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            for block in row_blocks(tensor):
                place, rows = self._rows(name, block.start, block.stop)
                self._read(place, rows)
                digest.update(_bytes(rows))
        return digest.hexdigest()[:16]

    def replace_metadata(self, metadata: Mapping[str, str]) -> None:
        """Write other texts into the header."""
        header = self._header(metadata)
        assert len(header) == self._data
        self._file.seek(0)
        self._file.write(header)

    def _rows(self, name: str, first: int, end: int) -> tuple[int, Tensor]:
        """Place of some rows in the file, and a matrix for them, uninitialised."""
        tensor = self._weights[name]
        width = tensor.shape[1:].numel()
        place = self._data + self._starts[name] + first * width * tensor.itemsize
        return place, torch.empty(end - first, width, dtype=tensor.dtype)

    def _read(self, place: int, rows: Tensor) -> None:
        self._file.seek(place)
        self._file.readinto(_bytes(rows))

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        content: dict[str, object] = {"__metadata__": metadata}
        for name, start in self._starts.items():
            tensor = self._weights[name]
            about = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape)}
            content[name] = about | {"data_offsets": [start, start + tensor.nbytes]}
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class AddedRows:
    """Rows of attributes at the end of a stored table, to be added to those of their items.

    Args:
        table: without them.
    """

    def __init__(self, name: str, table: Tensor, attributes: ItemAttributes) -> None:
        self.name, self._rows = name, len(table)
        self._places, self._own = map(torch.from_numpy, (attributes.places, attributes.own))
        # The last row is that of no attribute.
        self._added = torch.zeros(attributes.count + 1, table.shape[1])
        self.stored = table.new_empty(len(table) + attributes.count, table.shape[1], device="meta")

    def without_attributes(self, part: Part) -> Part:
        """A part of the stored table without the attributes' rows, which are kept."""
        if part.name != self.name:
            return part
        row, column = part.offsets
        own = max(0, min(len(part.values), self._rows - row))
        rest = part.values[own:]
        first = row + own - self._rows
        self._added[first : first + len(rest), column : column + rest.shape[1]] = rest.float()
        return part._replace(offsets=(min(row, self._rows), column), values=part.values[:own])

    def add(self, block: slice, rows: Tensor) -> None:
        """Add them to a block of the table's rows; all parts are known."""
        sums = torch.where(self._own[block, None], rows.float(), 0.0)
        for place in self._places[block].unbind(1):
            sums += self._added.index_select(0, place)
        rows.copy_(sums)


def row_blocks(tensor: Tensor) -> Iterator[slice]:
    """Rows of a tensor, as many as are copied at once."""
    step = max(1, _BLOCK // (tensor.shape[1:].numel() * tensor.itemsize))
    for low in range(0, len(tensor), step):
        yield slice(low, min(low + step, len(tensor)))


def _bytes(rows: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return rows.view(-1).view(torch.uint8).numpy().data
