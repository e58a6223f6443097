"""Flags of recommend.py."""

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.config import Config, flag
from pipeline.errors import UserError
from pipeline.sources.config import expanded_place

EXTENSIONS = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class Choice(Config):
    """Which items may be recommended, and how many."""

    k: int = flag(10, "items to recommend to each user", at_least=1)
    seen: str = flag(
        "trained",
        "items of the user's own history; trained: as the run ranked them",
        choices=("trained", "drop", "keep"),
    )
    cold: str = flag("drop", "items without a training rating", choices=("drop", "keep"))
    popularity_discount: float = flag(
        0.0,
        "weight of log(training count) subtracted from scores; 0: rank by likelihood, 1: by lift",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True)
class RecommendFlags(Config):
    """All flags of recommend.py."""

    checkpoint: str = flag(
        "", "run folder (its best checkpoint) or exported model (no default)", is_path=True
    )
    user: str | None = flag(None, "recommend to this user of the training data (original id)")
    history: str | None = flag(None, 'recommend after these items, oldest first, as "id,id,id"')
    histories: str = flag("", "recommend to the users of this ratings file")
    all: bool = flag(False, "recommend to all users of the training data")
    similar: str | None = flag(None, "items most similar to this one (original id)")
    choice: Choice = field(default_factory=Choice)
    allow: str = flag("", "text file of item ids, one a line: recommend only these", is_path=True)
    deny: str = flag("", "text file of item ids, one a line: never recommend these", is_path=True)
    output: str = flag(
        "", f"file to write: {', '.join(EXTENSIONS)} (default: a printed table)", is_path=True
    )
    columns: str = flag("", "columns of --histories, as for train.py (default: known names)")
    separator: str = flag("", "column separator of --histories (default: by file extension)")
    at: str = flag(
        "",
        "with --use_times: date or number, when users are recommended to (default: newest known)",
    )
    dataset_path: str = flag("", "path of the training ratings (default: as in training)")
    items_path: str = flag("", "path of the table of the items (default: as in training)")
    cache_dir: str = flag("", "folder for downloads and prepared data (default: as in training)")
    batch_size: int | None = flag(
        None,
        "users per batch and rank (default: 262,144 positions on CUDA, 4,096 on CPU)",
        at_least=1,
    )

    def check(self) -> None:
        if not self.checkpoint:
            raise UserError("--checkpoint is needed: the --run_dir of a training run")
        asked = [self.user is not None, self.history is not None, bool(self.histories)]
        asked += [self.all, self.similar is not None]
        if sum(asked) != 1:
            raise UserError(
                "give one of --user, --history, --histories, --all and --similar, not "
                f"{sum(asked) or 'none'} of them"
            )
        if self.output and Path(self.output).suffix.lower() not in EXTENSIONS:
            raise UserError(
                f"--output {self.output} must end in {', '.join(EXTENSIONS[:-1])} or "
                f"{EXTENSIONS[-1]}"
            )
        if not self.output and (self.all or self.histories):
            given = "--all" if self.all else "--histories"
            raise UserError(f"{given} needs --output: the file to write the recommendations to")
        for name, plain in (("popularity_discount", 0.0), ("seen", "trained")):
            if self.similar is not None and getattr(self.choice, name) != plain:
                raise UserError(f"--{name} ranks items for users: leave --similar out")
        if self.at and (self.similar is not None or self.history is not None):
            given = "--similar" if self.history is None else "--history"
            raise UserError(f"--at needs histories with times, which {given} has not: leave it out")
        if (self.columns or self.separator) and not self.histories:
            raise UserError("--columns and --separator describe --histories: leave them out")
        if self.histories:
            expanded_place("histories", self.histories)
