"""The encoding of a text file: UTF-8, or else CP1252 with a warning."""

from collections.abc import Callable

from pipeline.errors import UserError


class Encoding:
    """UTF-8, or CP1252 (Latin-1) for the whole file, with a warning."""

    def __init__(self, where: str, tell: Callable[[str], None]) -> None:
        self.where, self.tell = where, tell  # the file's name in errors; called with the warning
        self._is_utf8 = self._is_latin = False  # by the first text that is not ASCII

    def as_utf8(self, block: bytes, first_line: int) -> bytes:
        """A block of whole lines in UTF-8.

        Raises:
            UserError: it is not UTF-8, and other text of the file is UTF-8 that is not ASCII.
        """
        if block.isascii():
            return block
        if not self._is_latin:
            try:
                block.decode()
                self._is_utf8 = True
                return block
            except UnicodeDecodeError as error:
                line = first_line + block.count(b"\n", 0, error.start)
                start = block.rfind(b"\n", 0, error.start) + 1
                end = block.find(b"\n", error.start)
                shown = block[start : end if end >= 0 else None].rstrip(b"\r")[:40]
                if self._is_utf8 or not block[: error.start].isascii():
                    raise UserError(f"{self.where}:{line}: not UTF-8 text: {shown!r}") from error
                self._is_latin = True
                self.tell(
                    f"{self.where}:{line}: not UTF-8 text: the file is read as CP1252 (Latin-1): "
                    f"{as_cp1252(shown)!r}; if that is wrong, convert it to UTF-8"
                )
        return as_cp1252(block).encode()


def as_cp1252(text: bytes) -> str:
    """Text of Windows; where it has bytes without a meaning there, Latin-1."""
    try:
        return text.decode("cp1252")
    except UnicodeDecodeError:  # five bytes have no meaning there
        return text.decode("latin-1")
