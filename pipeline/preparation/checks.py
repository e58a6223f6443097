"""What in the ratings may mean something else: warnings, and an error for mixed units of time."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError, warn
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.held import Joined
from pipeline.preparation.memory import Memory, blocks
from pipeline.preparation.store import SequenceStore
from pipeline.remote import is_url

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
FINER = 10**6  # parts of a unit, where times are not whole
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Times between 1990 and 2050, in seconds.
_FROM, _TO = 631_152_000, 2_524_608_000
# Numbers of 64 bits beyond these are in one unit only, whenever it was: seconds from 1973 to 5138.
_FIRST, _LAST = 10**8, 10**11
_LAST_TIME = (1 << 63) - 1
# Missing values as pandas, R, SQL, MySQL, Hive and JavaScript write them.
_MISSING = r"^(nan|NaN|NA|<NA>|N/A|None|null|NULL|\\N|undefined|__HIVE_DEFAULT_PARTITION__)$"


def time_unit(times: np.ndarray, name: str) -> str:
    """Unit of times (int64) since 1970: "s", "ms", "us", "ns", or "" if they are no such times.

    Raises:
        UserError: some are times of our days in one unit and all others in another.
    """
    count, low, high = 0, _LAST_TIME, 0
    ours, first = dict.fromkeys(UNITS, 0), dict.fromkeys(UNITS, _LAST_TIME)
    for (part,) in blocks(times):
        sizes = part[part >= _FIRST]
        count += len(sizes)
        low, high = min(low, sizes.min(initial=low)), max(high, sizes.max(initial=high))
        for unit, scale in UNITS.items():
            found = sizes[(_FROM * scale <= sizes) & (sizes < _TO * scale)]
            ours[unit] += len(found)
            first[unit] = min(first[unit], int(found.min(initial=_LAST_TIME)))
    if not count:
        return ""
    for unit, scale in UNITS.items():
        if _FIRST * scale <= low <= high < _LAST * scale:
            return unit
    if sum(ours.values()) == count:
        parts = ", ".join(
            f"{number:,} in {_NAMES[unit]} (as {first[unit]})"
            for unit, number in ours.items()
            if number
        )
        raise UserError(
            f"the times of {name} are in several units: {parts}; write all in one, or choose rows "
            "with --where"
        )
    return ""


def in_int64(
    times: np.ndarray, fractions: np.ndarray | None, unit: str, memory: Memory
) -> tuple[np.ndarray, str]:
    """int64 [R]: the times, in millionths of their unit where some are not whole; and their unit.

    The order of the whole times is kept; if the millionths do not fit, only whole parts are.
    """
    limit = (1 << 63) // FINER - 1
    low, high = ends(times)
    if fractions is None or not -limit < low <= high < limit:
        return times, unit
    finer = {"s": "us", "ms": "ns"}.get(unit, f"1e-6 {unit}".strip())
    joined = Joined(memory)
    for whole, rest in blocks(times, fractions):
        joined.add(whole * FINER + np.round(rest * FINER).astype(np.int64))
    return joined.array(), finer


def ends(times: np.ndarray) -> tuple[int, int]:
    """The first and the last of at least one time."""
    parts = [(int(part.min()), int(part.max())) for (part,) in blocks(times)]
    return min(low for low, _ in parts), max(high for _, high in parts)


def shown_time(time: int, unit: str) -> str:
    """A time as a date, or as a number if the unit is unknown."""
    return str(np.datetime64(time // UNITS[unit], "s")) if unit in UNITS else f"{time:,}"


def warn_of_missing(times: np.ndarray, name: str) -> None:
    """Warn of times since 1970 (int64) that other programs write for a missing one: 0 and -1."""
    count = sum(np.count_nonzero((part == 0) | (part == -1)) for (part,) in blocks(times))
    if count:
        warn(
            f"{count:,} ratings of {name} have the time 0 or -1, in 1970: if it stands for a "
            "missing one, leave them out with --where"
        )


def warn_of_order(grouped: GroupByUser, name: str) -> None:
    """Warn if equal times keep the order of a file that seems to begin with the newest."""
    if grouped.ties and grouped.is_newest_first and not grouped.newest_first:
        warn(
            f"{name} begins with the newest ratings, and {grouped.ties:,} ratings share a user and "
            "a time with another one: they are taken in the order of the file; if the newest of "
            "them is the first, give --file_order newest_first"
        )


def warn_of_look_alikes(ids: pa.StringArray, role: str, name: str) -> None:
    """Warn of ids that other programs write for a missing value, and of ids that differ little."""
    for missing in ids.filter(pc.match_substring_regex(ids, _MISSING)).to_pylist():
        warn(
            f"the {role} id {missing} of {name} is an id like any other: if it stands for a "
            "missing one, leave its rows out with --where"
        )
    plain = pc.replace_substring_regex(pc.utf8_lower(ids), r"[\s\pZ]+", "")
    plain = pc.replace_substring_regex(plain, r"^(-?[0-9]+)\.0$", r"\1")
    encoded = plain.dictionary_encode()
    count = len(ids) - len(encoded.dictionary)
    if not count:
        return
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    first = order[np.flatnonzero(codes[order][1:] == codes[order][:-1])[0] + np.arange(2)]
    examples = " and ".join(repr(ids[int(at)].as_py()) for at in first)
    warn(
        f"{count:,} {role} ids of {name} differ from others only in the case of letters, in "
        f"blanks or in a final .0, for example {examples}: they are different "
        f"{role}s; if they are not, write them in one way"
    )


def warn_of_change(store: SequenceStore) -> None:
    """Warn if a large source file changed after the store was made, but kept its size and time.

    Files up to 64 MiB have a checksum, by which another store is made; of others the system knows
    when they were last changed or renamed.
    """
    if store.path is None or int(os.environ.get("RANK", 0)):
        return
    made = (store.path / "manifest.json").stat().st_mtime_ns
    stamps = store.fingerprint["source"]
    for path, *_, checksum in (each for each in stamps if isinstance(each, list)):
        if checksum is None and not is_url(path) and Path(path).stat().st_ctime_ns > made:
            warn(
                f"{path} was changed or renamed after {store.path} was prepared from it, but has "
                "the size and time of before: if its content is another one, delete that folder"
            )
