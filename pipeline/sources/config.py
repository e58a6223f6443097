"""Flags of the data: the source of the ratings and their filters."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, flag
from pipeline.errors import UserError
from pipeline.remote import RemotePath, is_url
from pipeline.tables.names import check_columns

MOVIELENS = ("ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-32m")
_NAME_LENGTH = 50  # characters of a name from a file's: folders add to it
DATASET_NAMES = ("synthetic", "random", *MOVIELENS)
# Flags of ratings that are read.
_OF_FILES = ("columns", "separator", "where", "items_path", "duplicates", "file_order")


@dataclass(frozen=True)
class SyntheticConfig:
    """Sizes and shape of the synthetic data."""

    num_users: int = 3000
    num_items: int = 500
    min_length: int = 20  # history lengths are drawn uniformly
    max_length: int = 40
    successors: int = 6  # number of favourite successors of an item
    decay: float = 0.7  # probability of a favourite divided by that of the one before it
    noise: float = 0.3  # share of next items drawn only by popularity
    zipf: float = 1.0  # popularity of the r-th most popular item ~ r ** -zipf
    seed: int = 0

    def __post_init__(self) -> None:
        assert 3 <= self.min_length <= self.max_length
        # No item repeats in a history, and its last item still needs unseen successors.
        assert self.num_users >= 1 and self.num_items >= 2 * self.max_length
        assert 1 <= self.successors < self.num_items


def _random(default: int, help: str) -> int:
    return flag(default, help, at_least=1, at_most=(1 << 31) - 1)


@dataclass(frozen=True)
class DataConfig(Config):
    """The source of the ratings, and their filters."""

    dataset_name: str = flag(
        "synthetic", f"data set: {', '.join(DATASET_NAMES)}, or a name for --dataset_path"
    )
    dataset_path: str = flag(
        "",
        "ratings file, or folder or zip that holds one or its parts; also s3://, gs://, https:// "
        "(default: generated or downloaded data)",
    )
    columns: str = flag(
        "", 'columns: "user,item[,rating[,timestamp]]", names or numbers (default: known names)'
    )
    separator: str = flag("", 'column separator, e.g. ";" or "tab" (default: by file extension)')
    where: str = flag(
        "", "only rows for which this holds: \"event == 'purchase' and price > 0\" (default: all)"
    )
    items_path: str = flag(
        "", "table of the items: their titles and attributes (default: GroupLens' or RecBole's)"
    )
    duplicates: str = flag(
        "keep", "rows with the user, item and time of another one", choices=("keep", "drop")
    )
    file_order: str = flag(
        "oldest_first",
        "order in the file of a user's ratings with equal times, or without times",
        choices=("oldest_first", "newest_first"),
    )
    split: str = flag(
        "auto",
        "which ratings are held out; auto: time or file with --split_time or --split_path, else "
        "leave_one_out",
        choices=("auto", "leave_one_out", "time", "file"),
    )
    split_time: str = flag(
        "",
        "dates, or numbers in the data's unit: all before the first trains, all from the second on "
        "tests; of more, train.py trains once for each two neighbours (no default)",
    )
    split_until: str = flag(
        "", "a point after those of --split_time: ratings from it on are left out (no default)"
    )
    split_path: str = flag(
        "",
        "ratings with a column split (train, validation, test), or a folder or zip of files with "
        "these words in their names; in place of --dataset_path (no default)",
    )
    min_rating: float | None = flag(
        None, "filter 1: drop ratings below this value (default: keep all)"
    )
    min_item_count: int = flag(0, "filter 2: drop items with fewer ratings than this", at_least=0)
    min_user_count: int = flag(5, "filter 3: drop users with fewer ratings than this", at_least=0)
    random_user_count: int = _random(10, "number of users of --dataset_name random")
    random_item_count: int = _random(30, "number of items of --dataset_name random")
    random_size: int = _random(300, "number of ratings of --dataset_name random")
    random_skew: float = flag(
        0.0,
        "exponent s of --dataset_name random: the share of item k falls as k ** -s (Zipf's law)",
        at_least=0,
        at_most=4,
    )
    synthetic_user_count: int = flag(
        SyntheticConfig.num_users,
        "number of users of --dataset_name synthetic",
        at_least=1,
        at_most=10**7,
        reason="the data are generated in memory",
    )
    synthetic_item_count: int = flag(
        SyntheticConfig.num_items,
        "number of items of --dataset_name synthetic",
        at_least=2 * SyntheticConfig.max_length,
        at_most=10**7,
        reason=f"no item repeats in a history of up to {SyntheticConfig.max_length} items, and the "
        "data are generated in memory",
    )
    data_seed: int = flag(0, "seed of the synthetic and random data sets", at_least=0)
    memory_gb: float | None = flag(
        None,
        "GiB that preparation may take; ratings beyond it are in --cache_dir for a while (default: "
        "half of the machine's or the container's memory)",
        above=0,
    )
    cache_dir: str = flag("", "folder for downloads and prepared data (default: ~/.cache/bert4rec)")

    def check(self) -> None:
        if self.columns:
            check_columns(self.columns)
        if not re.fullmatch(r"[\w.-]+", self.dataset_name):
            raise UserError(
                f"--dataset_name must be made of letters, digits, '.', '_' and '-', not "
                f"{self.dataset_name!r}; a file goes into --dataset_path"
            )
        for flag_name in ("dataset_path", "split_path", "items_path", "cache_dir"):
            if "\0" in getattr(self, flag_name):
                raise UserError(f"--{flag_name} holds a null character, as no path may")
        if self.dataset_name == "random" and self.ratings_path:
            raise UserError("--dataset_name random is generated: leave --dataset_path out")
        if self.dataset_name not in DATASET_NAMES and not self.ratings_path:
            raise UserError(
                f"--dataset_name {self.dataset_name!r} is none of {', '.join(DATASET_NAMES)}: for "
                "data of your own give the file with --dataset_path"
            )

        for flag_name in _OF_FILES if self.generated else ():
            if getattr(self, flag_name) != getattr(DataConfig, flag_name):
                raise UserError(f"--{flag_name} is for --dataset_path, not for generated data")
        self._check_split()

    def _check_split(self) -> None:
        if self.split_path and self.dataset_path:
            raise UserError("--split_path names the ratings, too: leave --dataset_path out")
        for flag_name, kind in (("split_time", "time"), ("split_path", "file")):
            if getattr(self, flag_name) and self.split not in ("auto", kind):
                raise UserError(f"--{flag_name} is for --split {kind}, not {self.split}")
            if self.split == kind and not getattr(self, flag_name):
                raise UserError(f"--split {kind} needs --{flag_name}")
        if self.split_time and self.split_path:
            raise UserError("--split_path has its own split: leave --split_time out")
        if self.split_until and not self.split_time:
            raise UserError("--split_until needs --split_time")

    @property
    def split_by(self) -> str:
        """What splits the ratings: "leave_one_out", "time" or "file"."""
        if self.split != "auto":
            return self.split
        return "time" if self.split_time else "file" if self.split_path else "leave_one_out"

    @property
    def generated(self) -> str:
        """The name of generated data, "" for other data."""
        is_generated = self.dataset_name in ("synthetic", "random") and not self.ratings_path
        return self.dataset_name if is_generated else ""

    @property
    def ratings_path(self) -> str:
        """Where the ratings are, "" if they are generated or downloaded."""
        return self.split_path or self.dataset_path

    @property
    def name(self) -> str:
        """The data set's name, or the file's if only --dataset_path was given."""
        if self.ratings_path and self.dataset_name == "synthetic":
            name = Path(self.ratings_path).name.split(".")[0][:_NAME_LENGTH]
            return re.sub(r"[^\w.-]", "_", name) or "ratings"
        return self.dataset_name

    @property
    def cache_folder(self) -> Path:
        if self.cache_dir:
            return expanded("cache_dir", self.cache_dir)
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if base else Path.home() / ".cache") / "bert4rec"

    def synthetic(self) -> SyntheticConfig:
        """Sizes and seed of --dataset_name synthetic."""
        return SyntheticConfig(
            self.synthetic_user_count, self.synthetic_item_count, seed=self.data_seed
        )


def expanded_place(flag_name: str, path: str) -> Path | RemotePath:
    """A URL, or ``path`` with ``~`` replaced by the home folder."""
    return RemotePath(path) if is_url(path) else expanded(flag_name, path)


def expanded(flag_name: str, path: str) -> Path:
    """``path`` with ``~`` replaced by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"--{flag_name} {path}: there is no such user's home folder") from error
