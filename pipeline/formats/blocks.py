"""Cut a text file into blocks of whole records.

A record is a line, or several where quotation marks enclose line ends. A quotation mark encloses
only at the beginning of a field (as for Arrow and Python's csv); elsewhere it is text.
"""

import re
from collections.abc import Iterator

import numpy as np

from pipeline.errors import UserError
from pipeline.formats.layout import QUOTING
from pipeline.formats.source_file import SourceFile

BLOCK_BYTES = 1 << 24  # text parsed at a time: about half a million ratings
BOM = b"\xef\xbb\xbf"
_LINE_FEED = b"\n"
_FIELD_BYTES = 1 << 10  # looked at behind a mark


def read_blocks(file: SourceFile, separator: str) -> Iterator[tuple[int, bytes]]:
    """Whole records, about BLOCK_BYTES at a time, and the number of their first line."""
    with file.open() as stream:
        tail, line, unpacked = b"", 1, 0
        while True:
            read = stream.read(BLOCK_BYTES)
            unpacked += len(read)
            file.check_unpacked(unpacked)
            block = (tail + read).removeprefix(BOM) if line == 1 else tail + read
            if b"\0" in block:
                if line == 1 and block[:2].count(0) == 1:
                    raise UserError(
                        f"{file} looks like UTF-16 without a byte order mark: convert it to UTF-8"
                    )
                raise UserError(f"{file} is not a text file; known formats: docs/data.md")
            if not read:
                break
            end = _last_end(block, separator)
            if not end and len(block) > BLOCK_BYTES:
                hint = "; is a quotation mark left open?" if is_open(block, separator) else ""
                raise UserError(f"{file}:{line}: a line of more than {BLOCK_BYTES:,} bytes{hint}")
            block, tail = block[:end], block[end:]
            if block:
                _check_closing(file, line, block, separator)
                yield line, block
                line += block.count(b"\n")
        if is_open(block, separator):
            raise UserError(f"{file}:{line}: a quotation mark is opened and not closed")
        if block:
            _check_closing(file, line, block, separator)
            yield line, block


def _check_closing(file: SourceFile, line: int, block: bytes, separator: str) -> None:
    """UserError if text follows a closing quotation mark: Arrow would join both."""
    if not encloses(separator) or b'"' not in block:
        return
    closing = _enclosing_marks(block, separator)[1::2]
    after = np.frombuffer(block + b"\n", np.uint8)[closing + 1]
    for at in closing[~np.isin(after, bytearray(f'{separator}\r\n"'.encode()))].tolist():
        rest = block[at + 1 : at + 1 + _FIELD_BYTES].split(b"\n")[0].split(separator.encode())[0]
        if rest.strip():
            raise UserError(
                f"{file}:{line + block.count(_LINE_FEED, 0, at)}: text follows a closing quotation "
                'mark: a mark inside of a quoted value is written as ""'
            )


def _last_end(block: bytes, separator: str) -> int:
    if not encloses(separator) or b'"' not in block:
        return block.rfind(b"\n") + 1
    ends = record_ends(block, separator)
    return int(ends[-1]) if len(ends) else 0


def record_ends(block: bytes, separator: str) -> np.ndarray:
    """int64: the place after each line feed that ends a record; a record begins the block."""
    line_feeds = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    marks = _enclosing_marks(block, separator)
    if len(marks):
        line_feeds = line_feeds[np.searchsorted(marks, line_feeds) % 2 == 0]
    return line_feeds + 1


def is_open(block: bytes, separator: str) -> bool:
    """Whether a quotation mark in the block is opened and not closed."""
    return len(_enclosing_marks(block, separator)) % 2 == 1


def encloses(separator: str) -> bool:
    """Whether quotation marks enclose fields in a file with this separator."""
    return separator != "" and separator in QUOTING


def _enclosing_marks(block: bytes, separator: str) -> np.ndarray:
    """int64: places of the quotation marks that open (even ones) and close (odd ones)."""
    if not encloses(separator) or b'"' not in block:
        return np.zeros(0, np.int64)
    text = np.frombuffer(block, np.uint8)
    marks = np.flatnonzero(text == ord('"'))
    # A doubled mark is a text's mark: it closes and opens again. If each opening mark either does
    # so or begins a field, then all marks enclose, and they open and close in turns.
    opening = marks[::2]
    begins = np.isin(text[opening - 1], bytearray(f"{separator}\r\n".encode())) | (opening == 0)
    begins[1:] |= opening[1:] == marks[1:-1:2] + 1
    if begins.all():
        return marks
    field = rb'(?<![^%s\r\n])"[^"]*(?:""[^"]*)*("?)' % re.escape(separator.encode())
    places = []
    for found in re.finditer(field, block):
        places += [found.start(), found.end() - 1] if found[1] else [found.start()]
    return np.array(places, np.int64)


def records_in(block: bytes, separator: str, whole: bool) -> list[str]:
    """The records of a file's beginning that are not blank, without line ends.

    Args:
        whole: the block is the whole file; else its last record is left out unless it ends.
    """
    ends = record_ends(block, separator).tolist()
    if whole and [len(block)] != ends[-1:]:
        ends.append(len(block))
    bounds = zip([0, *ends], ends, strict=False)
    found = (block[start:end].rstrip(b"\r\n").decode(errors="replace") for start, end in bounds)
    return [record for record in found if record.strip()]
