"""All flags of train.py and eval.py, in the groups of their rooms."""

from dataclasses import dataclass, field, replace

from model.board.config import BoardConfig
from model.checkpoints.config import CheckpointConfig
from model.network.config import EncoderConfig, HeadConfig, TeachersConfig
from model.settings.recipes import CHOICES
from model.step.config import OptimizerConfig
from model.tables.config import ShardingConfig
from model.training.config import ProfileConfig, TrainingConfig
from pipeline.config import Config, flag
from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from pipeline.sources.config import DataConfig, expanded_place
from pipeline.training.config import LoaderConfig, MaskConfig, NegativesConfig, WindowConfig

# Positions of a step, which kernels count in 32 bits, two for each item of two streams.
MAX_POSITIONS = 1 << 30
WINDOW = "window-{}"  # the folder of one of several windows of --split_time, from 1
# Flags that `train.py --help` shows, in this order; `--help-all` shows all.
MAIN_FLAGS = (
    *("dataset_path", "dataset_name", "columns", "run_dir", "resume", "export_root", "recipe"),
    *("mode", "max_len", "emb_dim", "num_layers", "loss", "num_epochs", "train_batch_size"),
    *("lr", "seed"),
)


@dataclass(frozen=True)
class OutputConfig(Config):
    """Files, precision and evaluation batches."""

    run_dir: str = flag(
        "", "folder of the run's files (default: runs/<data set>-<date>-<time>)", is_path=True
    )
    resume: str = flag(
        "never", "auto: continue the run in --run_dir, if there is one", choices=("never", "auto")
    )
    export_root: str = flag(
        "", "folder to export the model to, ready to serve (default: none)", is_path=True
    )
    with_users: bool = flag(False, "export the users' original ids too (users.parquet)")
    precision: str = flag(
        "auto",
        "encoder precision; auto: bf16 on CUDA, fp32 on CPU",
        choices=("auto", "bf16", "fp32"),
    )
    acceleration: str = flag(
        "auto", "auto: bf16 steps as CUDA graphs, none: kernel by kernel", choices=("auto", "none")
    )
    val_batch_size: int = flag(
        256, "users per validation batch and rank", at_least=1, limit=1 << 24
    )
    test_batch_size: int = flag(256, "users per test batch and rank", at_least=1, limit=1 << 24)

    def check(self) -> None:
        if self.resume == "auto" and not self.run_dir:
            raise UserError("--resume auto needs --run_dir: the folder of the run to go on with")


@dataclass(frozen=True)
class RunConfig(Config):
    """All flags of train.py."""

    recipe: str = flag(
        "auto",
        "flags to start from; auto: flags that fit the data, none: the defaults shown here",
        choices=CHOICES,
    )
    data: DataConfig = field(default_factory=DataConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    teaching: TeachersConfig = field(default_factory=TeachersConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    profiling: ProfileConfig = field(default_factory=ProfileConfig)
    board: BoardConfig = field(default_factory=BoardConfig)

    def check(self) -> None:
        positions = self.windows.max_len * self.loader.train_batch_size
        if positions >= MAX_POSITIONS:
            raise UserError(
                f"--max_len x --train_batch_size must be below {MAX_POSITIONS:,} positions, not "
                f"{positions:,}: lower one of them"
            )
        if self.holdout.targets == "all" and self.data.split_by == "leave_one_out":
            raise UserError("--targets all needs --split_time or --split_path: else there is one")
        if self.windows.train_on_validation and self.training.patience is not None:
            raise UserError(
                "--patience needs validation items that are not trained on: leave out --patience "
                "or --train_on_validation"
            )
        if self.encoder.item_attributes and not self.data.items_path:
            raise UserError("--item_attributes names columns of --items_path: give that, too")
        if self.encoder.item_attributes and self.head.head != "tied":
            raise UserError(
                "--item_attributes needs --head tied: the attributes belong to the one table that "
                "encodes and scores items"
            )
        if self.teaching.teachers and self.head.loss != "softmax":
            raise UserError(
                f"--teachers needs --loss softmax, not {self.head.loss}: teachers give "
                "probabilities of all items"
            )

    def of_each_window(self) -> list["RunConfig"]:
        """A config for each two neighbours of --split_time, tested until the next one; or itself.

        Raises:
            UserError: there are several, and no folder for their runs or one for their export.
        """
        points = self.data.split_time.split(",")
        if len(points) <= 2:
            return [self]
        flag, output, found = f"--split_time {self.data.split_time}", self.output, []
        if not output.run_dir:
            raise UserError(f"{flag} trains {len(points) - 1} times: give --run_dir")
        if output.export_root:
            raise UserError(f"{flag} trains several models: leave --export_root out")
        ends = [*points[2:], self.data.split_until]
        for number, (first, second, end) in enumerate(zip(points, points[1:], ends, strict=False)):
            data = replace(self.data, split_time=f"{first},{second}", split_until=end)
            folder = f"{output.run_dir}/{WINDOW.format(number + 1)}"
            found.append(replace(self, data=data, output=replace(output, run_dir=folder)))
        return found


@dataclass(frozen=True)
class EvalFlags(Config):
    """All flags of eval.py."""

    checkpoint: str = flag(
        "", "run folder (its best checkpoint) or exported model (no default)", is_path=True
    )
    split: str = flag("test", "held-out items to rank", choices=("test", "validation"))
    dataset_path: str = flag("", "path of the ratings (default: as in training)")
    items_path: str = flag("", "path of the table of the items (default: as in training)")
    cache_dir: str = flag("", "folder for downloads and prepared data (default: as in training)")
    batch_size: int | None = flag(
        None, "users per batch and rank (default: as in training)", at_least=1, limit=1 << 24
    )
    popularity_discount: float = flag(
        0.0,
        "weight of log(training count) subtracted from scores; 0: rank by likelihood, 1: by lift",
        at_least=0,
        at_most=1,
    )
    seen: str = flag(
        "trained",
        "a user's earlier items in the ranking, as --seen of train.py; trained: as in training",
        choices=("trained", "drop", "keep", "auto"),
    )
    targets: str = flag(
        "trained",
        "a user's held-out items, as --targets of train.py; trained: as in training",
        choices=("trained", "next", "all"),
    )
    compare: tuple[str, ...] = flag(
        (),
        "two run folders or exported models to compare, no --checkpoint (no default)",
        values=2,
        is_path=True,
    )
    per_user: str = flag(
        "", "Parquet file to write with every user's target and rank (no default)", is_path=True
    )
    metrics_at: str = flag(
        "", "lengths k of HR@k and NDCG@k, with commas (default: as in training)"
    )

    def check(self) -> None:
        if not self.checkpoint and not self.compare:
            raise UserError("--checkpoint is needed: the --run_dir of a training run")
        if self.checkpoint and self.compare:
            raise UserError("--compare names both models: leave --checkpoint out")
        if self.per_user and self.compare:
            raise UserError("--per_user needs --checkpoint, not --compare: it is of one model")
        if self.per_user and not self.per_user.endswith(".parquet"):
            raise UserError(f"--per_user must end with .parquet, not {self.per_user}")
        if self.metrics_at:
            HoldoutConfig(metrics_at=self.metrics_at)
        if self.dataset_path:  # may become the run's --split_path, which is not typed
            expanded_place("dataset_path", self.dataset_path)


@dataclass(frozen=True)
class ExportFlags(Config):
    """All flags of export.py."""

    checkpoint: str = flag(
        "", "run folder (its best checkpoint) or exported model (no default)", is_path=True
    )
    output: str = flag(
        "", "folder to write; an exported model in it is replaced (no default)", is_path=True
    )
    with_users: bool = flag(False, "export the users' original ids too (users.parquet)")

    def check(self) -> None:
        for name in ("checkpoint", "output"):
            if not getattr(self, name):
                raise UserError(f"--{name} is needed: see --help")
