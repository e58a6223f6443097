"""Markdown for TensorBoard's text page. Ids and titles are data: they cannot become markup."""

from collections.abc import Iterable, Mapping, Sequence

from pipeline.errors import printable

_LONGEST = 60  # characters shown of an id or a title


def shortened(text: str) -> str:
    """One printable line of at most 60 characters."""
    line = printable(text[: _LONGEST + 1])
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def escaped(text: str) -> str:
    """Shortened text in which no character has a meaning for Markdown or HTML."""
    return "".join(
        c if c.isalnum() or c == " " or ord(c) > 127 else f"&#{ord(c)};" for c in shortened(text)
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def as_written(text: str) -> str:
    """Lines as they are, in a block of code."""
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))


def sections(parts: Mapping[str, str]) -> str:
    """Each text under its heading."""
    return "\n\n".join(f"### {title}\n\n{as_written(text)}" for title, text in parts.items())


def metrics_table(title: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    """A line of numbers for each label; one that a line lacks is blank."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = (
        [label, *(f"{row[name]:.4f}" if name in row else "" for name in names)]
        for label, row in rows.items()
    )
    return table([title, *names], lines)
