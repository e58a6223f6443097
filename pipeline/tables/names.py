"""The columns of a source: well-known names, --columns, and what else the user wants.

`--columns` names user, item[, rating[, timestamp]] in this order, e.g. "customer,asin,stars,date".
An empty name skips a column ("user,item,,time"); numbers are places, from 1, in a file without a
header ("1,2,4,3"). Without the flag, columns are found by the well-known names below.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:  # it loads Arrow, which --help must not wait for
    from pipeline.tables.where import Where

ROLES = ("user", "item", "rating", "timestamp")
# Compared without case, blanks, "_", "-" and "."; the first that a file has is taken.
_KNOWN = {
    "user": "user_id user uid reviewer_id customer_id visitor_id session_id author_id buyer_id "
    "client_id account_id member_id user_name customer client username reviewer author session",
    "item": "item_id item movie_id iid sid parent_asin asin product_id business_id book_id "
    "artist_id track_id article_id news_id song_id video_id anime_id game_id app_id recipe_id "
    "beer_id gmap_id stock_code product_code variant_id sku isbn product "
    "venue_id place_id poi_id location_id "
    # lists, one a user
    "item_ids items item_id_list item_list item_sequence movie_ids product_ids asins history "
    "sequence",
    "rating": "rating ratings stars overall score review_overall user_rating",
    "timestamp": "timestamp time ts unixreviewtime unix_timestamp time_ms utc_timestamp "
    "date datetime event_time event_timestamp created_at time_stamp invoice_date order_date "
    "review_time review_date event_date click_time rated_at date_added timestamps times "
    "timestamp_list time_list",
}
LISTS = "itemids items itemidlist itemlist itemsequence movieids productids asins history sequence"

# What to do about a column of ratings that holds something else.
OTHER_RATING = 'choose another one with --columns, or none: "user,item,,time"'
_TIME_LIKE = re.compile(
    "(?<!up)(?<!candi)(?<!play)(?<!life)(?<!run)(date|time)(?!zone)|stamp|da?t$|day$"
)


@dataclass(frozen=True)
class Wanted:
    """What the user wants of each file."""

    columns: str | None = ""  # --columns; None: a table in memory, whose user cannot give it
    separator: str = ""  # --separator
    rows: "Where | None" = None  # --where
    needs_rating: bool = True  # False: a rating may be missing
    # Of the rows of one part of --split_path, by its column split: what there may be in its place.
    of_split: str = ""

    def no_column(self, where: str, name: str, names: Sequence[str]) -> str:
        """The error of a column that --where, or a split, needs and ``names`` lack."""
        flag, other = "--where", ""
        if self.of_split and name == "split":
            flag, other = "--split_path", f"; {self.of_split}"
        return f"{where}: no column {name!r} ({flag}); there are {list_names(names)}{other}"


class NoRatings(UserError):
    """There are no ratings in the files, or none that are wanted."""


def check_columns(columns: str) -> dict[str, str]:
    """Name or number of each role's column by --columns."""
    names = [name.strip() for name in columns.split(",")]
    if not 2 <= len(names) <= len(ROLES) or not all(names[:2]):
        raise UserError(
            f"--columns must name user,item[,rating[,timestamp]], not {columns!r}: "
            'for example "user_id,item_id,rating,timestamp"'
        )
    given = [name for name in names if name]
    if len(set(given)) < len(given):
        raise UserError(f"--columns {columns!r} names a column twice: give each another one")
    return {role: name for role, name in zip(ROLES, names, strict=False) if name}


def find_columns(
    where: str, names: Sequence[str], columns: str | None, own: int | None = None
) -> dict[str, int]:
    """Place of each role, from 0, among column names; ``columns``: None for a table in memory.

    The first `own` names are the file's; the others, of folders, count only where these do not do.
    """
    wanted = check_columns(columns) if columns else {}
    places = {}
    for role in wanted or ROLES:
        if wanted:
            column = wanted[role]
            matches = [at for at, name in enumerate(names) if column in (name, untyped(name))]
        else:
            matches = known_places(role, names[:own]) or known_places(role, names)
        if matches:
            places[role] = matches[0]
            if names.count(names[matches[0]]) > 1:
                raise UserError(several(where, names[matches[0]], columns))
        elif wanted:
            raise UserError(
                f"{where}: no column {column!r} (--columns); there are {list_names(names)}"
            )
        elif role in ("user", "item"):
            cause = f"{where}: cannot tell the {role} column among {list_names(names)}; "
            if columns is None:
                raise UserError(f"{cause}rename them to user, item[, rating[, timestamp]]")
            raise UserError(
                f'{cause}name them with --columns "user,item[,rating[,timestamp]]", or by numbers '
                '("1,2,3,4") if the file has no header'
            )
    return places


def unread_time(names: Sequence[str], roles: Mapping[str, str], columns: str | None) -> list[str]:
    """A line for the user if no column is the time, unless --columns said so, but one may be it.

    Args:
        roles: the column of each role.
    """
    if "timestamp" in roles:
        return []
    if columns and known_places("timestamp", [rating := roles.get("rating", "")]):
        return [
            f"--columns {columns!r} takes {rating!r} for the rating, and the order of the rows for "
            'that of time; if it is the time, give --columns "user,item,,time" with the names of '
            "the columns"
        ]
    found = [name for name in names if _TIME_LIKE.search(canonical(name))]
    if columns or not found:
        return []
    advice = "rename it to timestamp" if columns is None else 'give --columns "user,item,,time"'
    return [
        "no column is known as the time, so the order of the rows is taken for that of time; if "
        f"{list_names(found)} is the time, {advice} with the names of the columns"
    ]


def several(where: str, name: str, columns: str | None) -> str:
    """The error of a name that several columns have."""
    other = "" if columns is None else ", or choose others with --columns"
    return f"{where}: several columns are called {name!r}: rename them{other}"


def known_places(role: str, names: Sequence[str]) -> list[int]:
    """Places, from 0, of the names that are well known for a role, the best known first."""
    plain = [canonical(name) for name in names]
    return [plain.index(name) for name in map(canonical, _KNOWN[role].split()) if name in plain]


def canonical(name: str) -> str:
    """A column's name as well-known names are compared: "User ID" and "user_id:token" are one."""
    return re.sub(r"[\s_.-]", "", untyped(name).lower())


def untyped(name: str) -> str:
    """RecBole's ``user_id:token`` without the type."""
    return name.split(":")[0]


def list_names(names: Sequence[str]) -> str:
    shown = ", ".join(re.sub(r"[^\x20-\x7e]", "?", name)[:40] for name in names[:20])
    return shown + (", ..." if len(names) > 20 else "")
