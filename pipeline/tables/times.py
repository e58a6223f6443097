"""Times written as dates -> nanoseconds, in UTC if they have a zone.

    2014-04-07                       2014-04-07T10:51:09.277Z       2014/04/07 10:51:09 +02:00
    Mon, 07 Apr 2014 10:51:09 GMT    Mon Apr  7 10:51:09 2014       07/Apr/2014:10:51:09 +0000

Dates whose day and month could be exchanged (07/04/2014), and zones by other names than UTC, are
refused.
"""

import re

import pyarrow as pa
import pyarrow.compute as pc

NANOSECONDS = pa.timestamp("ns")
ZONED = pa.timestamp("ns", "UTC")
FIRST_DATE, LAST_DATE = "1677-09-22", "2262-04-11"
OUT_OF_RANGE = f"is not between {FIRST_DATE} and {LAST_DATE}: 64 bits of nanoseconds end there"

_MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
_MONTH = f"(?P<name>{'|'.join(_MONTHS)})[a-z]*"
_DAY, _YEAR = "(?P<day>[0-9]{1,2})", "(?P<year>[0-9]{4})"
_CLOCK = "(?P<hour>[0-9]{1,2})(?P<minute>:[0-9]{2})(?P<second>:[0-9]{2})?(?:[.,](?P<rest>[0-9]+))?"
_ZONE = r"(?P<zone>Z|(?:UTC|GMT|UT)?[+-][0-9]{2}(?::?[0-9]{2})?|UTC|GMT|UT)?(?: \(.*\))?"
_WEEKDAY = "(?:[A-Z][a-z]{2,8},? +)?"
_FORMS = [
    f"^{_YEAR}[-/.](?P<month>[0-9]{{1,2}})[-/.]{_DAY}(?:(?:T| +){_CLOCK} *{_ZONE})?$",
    f"^{_WEEKDAY}{_DAY}[ /-]{_MONTH}[ /-]{_YEAR}(?:[ :]+{_CLOCK} *{_ZONE})?$",
    f"^{_WEEKDAY}{_MONTH} +{_DAY},? +{_YEAR}(?:,? +{_CLOCK} *{_ZONE})?$",
    f"^{_WEEKDAY}{_MONTH} +{_DAY} +{_CLOCK} *{_ZONE} *{_YEAR}$",
]
_NOT_WRITTEN = "is not written like 2015-01-31 23:59:59.123456789"
_UNKNOWN = "is neither a number nor a date like 2015-01-31 or 2015-01-31 23:59:59"
MIXED = "some times have a zone and others have none"


def read_dates(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """`NANOSECONDS` if no date has a zone, `ZONED` if all have one; nulls stay.

    Raises:
        ValueError: some have a zone and others have none, or a text is no date that is read
            (`date_mistake` says why).
    """
    text = pc.utf8_trim_whitespace(text.cast(pa.string()))
    parts = [pc.extract_regex(text, form) for form in _FORMS]
    iso = pc.coalesce(*map(_in_iso, parts))
    if iso.null_count > text.null_count:
        raise ValueError("a timestamp is no date")
    zoned = pc.match_substring_regex(iso, "T.*(Z|[+-])")
    if pc.any(zoned).as_py() and not pc.all(zoned).as_py():
        raise ValueError(MIXED)
    return iso.cast(ZONED if pc.any(zoned).as_py() else NANOSECONDS)


def _in_iso(parts: pa.ChunkedArray) -> pa.ChunkedArray:
    """The dates whose `parts` were found, written like 2014-04-07T10:51:09.277+02:00; else null."""
    kind = parts.type

    def part(name: str, default: str = "") -> pa.ChunkedArray:
        found = pc.struct_field(parts, name)
        return pc.if_else(pc.equal(found, ""), default, found) if default else found

    if kind.get_field_index("name") >= 0:
        names = pa.array(_MONTHS)
        month = pc.add(pc.index_in(part("name"), names), 1).cast(pa.string())
    else:
        month = part("month")
    day, hour = pc.utf8_lpad(part("day"), 2, "0"), pc.utf8_lpad(part("hour", "00"), 2, "0")
    month = pc.utf8_lpad(month, 2, "0")
    zone = pc.replace_substring_regex(part("zone"), "^(?:UTC|GMT|UT)$", "Z")
    zone = pc.replace_substring_regex(zone, "^(?:UTC|GMT|UT)", "")
    date = pc.binary_join_element_wise(part("year"), month, day, "-")
    clock = [hour, part("minute", ":00"), part("second", ":00"), ".", part("rest", "0"), zone, ""]
    return pc.binary_join_element_wise(date, pc.binary_join_element_wise(*clock), "T")


def date_mistake(text: str) -> str:
    """What is wrong with a text as a date, "" if nothing is."""
    text = text.strip()
    try:
        read_dates(pa.chunked_array([[text]]))
        return ""
    except ValueError:
        pass
    if any(re.match(form, text) for form in _FORMS):
        year = re.search("[0-9]{4}", text)
        assert year is not None
        inside = FIRST_DATE[:4] < year[0] < LAST_DATE[:4] or FIRST_DATE <= text[:10] <= LAST_DATE
        return _NOT_WRITTEN if inside else OUT_OF_RANGE
    if re.match(r"[0-9]{1,2}([./-])[0-9]{1,2}\1[0-9]{2,4}", text):
        return "does not tell the day from the month: write it like 2015-01-31"
    if re.search(r"[0-9] ?[AaPp]\.?[Mm]\b", text):
        return "is of a 12-hour clock, which is not read: write it like 2015-01-31 23:59:59"
    if zone := re.search(r":[0-9:.,]+ +(?!(?:UTC|GMT|UT)\b)([A-Z][A-Za-z/_]+)( [0-9]{4})?$", text):
        return f"has the time zone {zone[1]}, which is not read: convert the times to UTC"
    return _UNKNOWN
