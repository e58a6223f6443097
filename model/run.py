"""A run: all its flags, its folder, and the parts that train.py and eval.py both build from them.

config = RunConfig()                                   or FlagParser(..., RunConfig).parse(argv)
store = prepare(config.data)
model = build_model(config, store.num_items, ranks)    sharded, with the seed's initial weights
"""

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torchrec.distributed import DistributedModelParallel

from model.bert4rec import BERT4Rec, ModelConfig
from model.checkpoint import CheckpointConfig
from model.encoder import EncoderConfig
from model.evaluation import Result, evaluate
from model.export import WEIGHTS
from model.flags import flatten
from model.head import CatalogSlice, HeadConfig, catalog_slice
from model.profile import ProfileConfig
from model.ranks import Ranks, from_first_rank
from model.recipes import CHOICES
from model.run_log import read_config, write_config
from model.sharding import OptimizerConfig, ShardingConfig, shard, unwrap
from model.training import TrainingConfig
from pipeline.datasets import DataConfig
from pipeline.errors import UserError
from pipeline.holdout import EvalLoader, HoldoutConfig
from pipeline.loader import LoaderConfig, TrainLoader
from pipeline.masking import MaskConfig
from pipeline.negatives import NegativeSampler, NegativesConfig
from pipeline.store import SequenceStore
from pipeline.windows import WindowConfig

# Tables above this many bytes are never built whole on one host: each rank makes its own shard.
WHOLE_TABLE_BYTES = 4 << 30
ACCELERATIONS = ("auto", "none", "graphs", "compile")


@dataclass(frozen=True)
class OutputConfig:
    """What is written where, and in which precision to compute."""

    run_dir: str = field(
        default="",
        metadata={"help": "folder of this run; without it runs/<data set>-<date>-<time>"},
    )
    resume: str = field(
        default="never",
        metadata={
            "help": "auto: go on from the newest checkpoint of --run_dir, if there is one",
            "choices": ("never", "auto"),
        },
    )
    export_root: str = field(
        default="", metadata={"help": "also write the best model here: safetensors and catalog"}
    )
    precision: str = field(
        default="auto",
        metadata={
            "help": "of the encoder: bf16 or fp32; auto: bf16 on CUDA, fp32 on CPU",
            "choices": ("auto", "bf16", "fp32"),
        },
    )
    acceleration: str = field(
        default="auto",
        metadata={
            "help": "of the encoder's training in bf16 on CUDA: none; graphs: CUDA graphs; "
            "compile: those of torch.compile's code, after a minute of compiling; auto: graphs",
            "choices": ACCELERATIONS,
        },
    )
    val_batch_size: int = field(
        default=256, metadata={"help": "users a rank evaluates at once on validation"}
    )
    test_batch_size: int = field(
        default=256, metadata={"help": "users a rank evaluates at once on test"}
    )

    def __post_init__(self) -> None:
        if self.resume not in ("never", "auto"):
            raise UserError(f"--resume must be never or auto, not {self.resume!r}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise UserError(f"--precision must be auto, bf16 or fp32, not {self.precision!r}")
        if self.acceleration not in ACCELERATIONS:
            raise UserError(f"--acceleration must be one of {', '.join(ACCELERATIONS)}")
        for name in ("val_batch_size", "test_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.resume == "auto" and not self.run_dir:
            raise UserError("--resume auto needs --run_dir: the folder of the run to go on with")


@dataclass(frozen=True)
class RunConfig:
    """Every flag of train.py."""

    recipe: str = field(
        default="auto",
        metadata={
            "help": "flags to start from; auto: the recipe named like the data set, if any",
            "choices": CHOICES,
        },
    )
    data: DataConfig = field(default_factory=DataConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    negatives: NegativesConfig = field(default_factory=NegativesConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    profiling: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if self.windows.train_on_validation and self.training.patience is not None:
            raise UserError(
                "--patience needs validation items that are not trained on: leave it out, or "
                "--train_on_validation"
            )


def build_plain_model(config: RunConfig, num_items: int, ranks: Ranks) -> BERT4Rec:
    """An unsharded model with the seed's initial weights, the same on every rank."""
    model_config = ModelConfig(
        num_items,
        config.windows.max_len,
        config.encoder,
        config.head,
        config.sharding.table_precision,
    )
    precision = config.output.precision
    autocast = precision == "bf16" or (precision == "auto" and ranks.device.type == "cuda")
    if autocast and ranks.device.type != "cuda":
        raise UserError("--precision bf16 needs CUDA: leave it out on CPU, where it is slower")
    huge = 4 * (num_items + 2) * config.encoder.emb_dim > WHOLE_TABLE_BYTES
    return BERT4Rec(
        model_config,
        _catalog(config, num_items, ranks),
        seed=config.loader.seed,
        autocast=autocast,
        table_device="meta" if huge and config.sharding.mode == "dmp" else "cpu",
    )


def build_model(config: RunConfig, num_items: int, ranks: Ranks) -> DistributedModelParallel:
    """The model, sharded or replicated over the ranks."""
    model = shard_model(config, build_plain_model(config, num_items, ranks), ranks)
    if unwrap(model).autocast and config.output.acceleration != "none":
        compiled = config.output.acceleration == "compile"
        unwrap(model).encoder.accelerate(compiled, hooked=ranks.world_size > 1)
    return model


def shard_model(config: RunConfig, plain: BERT4Rec, ranks: Ranks) -> DistributedModelParallel:
    """``plain`` sharded or replicated over the ranks, as the config says."""
    rows = config.loader.train_batch_size
    return shard(plain, config.sharding, config.optimizer, rows, ranks)


def train_loader(config: RunConfig, store: SequenceStore, ranks: Ranks) -> TrainLoader:
    """This rank's training batches, each with the candidates that the rank scores."""
    catalog = _catalog(config, store.num_items, ranks)
    return TrainLoader(
        store,
        config.windows,
        config.mask,
        config.loader,
        rank=ranks.rank,
        world_size=ranks.world_size,
        candidate_range=(catalog.low, catalog.high),
        negatives=_negatives(config, store),
    )


def _negatives(config: RunConfig, store: SequenceStore) -> NegativeSampler | None:
    """What draws the negatives of the loss, if it wants any."""
    if config.head.loss == "softmax":
        return None
    # One more of each: an item that nobody rated in training must be drawn sometimes.
    weights = store.train_item_counts()[1:-1] + 1 if config.head.loss != "gbce" else None
    count, seed = config.negatives.train_negatives, config.loader.seed
    return NegativeSampler(count, store.num_items, seed, weights)


def _catalog(config: RunConfig, num_items: int, ranks: Ranks) -> CatalogSlice:
    sharded = config.sharding.mode == "dmp"
    return catalog_slice(num_items, ranks.rank, ranks.world_size, sharded)


def evaluator(
    config: RunConfig,
    model: DistributedModelParallel,
    store: SequenceStore,
    split: str,
    ranks: Ranks,
) -> Callable[..., Result]:
    """A function that evaluates ``model`` as it is when called, on every user of ``split``.

    Its argument, if given, is put around the batches, to do something between them.
    """
    output = config.output
    loader = EvalLoader(
        store,
        split,
        config=config.holdout,
        max_len=config.windows.max_len,
        batch_size=output.val_batch_size if split == "validation" else output.test_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        candidate_range=(1, 1),  # the table wants both features; candidates are looked up once
    )
    popularity = torch.from_numpy(store.train_item_counts())
    return lambda around=iter: evaluate(model, around(loader), popularity)


class RunFolder:
    """The folder of one run, held by one run at a time.

    Args:
        config: its ``--run_dir``, or ``runs/<data set>-<date>-<time>``.
        store: its data, which a resumed run must have been trained on.

    Raises:
        UserError: another run holds it, it cannot be written, or it has a run already and
            ``--resume auto`` was not given or was given with flags or data that make it another.
    """

    def __init__(self, config: RunConfig, ranks: Ranks, store: SequenceStore) -> None:
        self._lock: IO[str] | None = None
        self._ranks, self._store = ranks, store
        self._facts = {
            "num_items": store.num_items,
            "num_ratings": len(store.items),
            "catalog": store.catalog.fingerprint,
        }
        self.path = from_first_rank(ranks, lambda: self._claim(config))

    def record(self, config: RunConfig) -> None:
        """Write config.json and the catalog.

        Raises:
            UserError: (on all ranks) they cannot be written.
        """
        from_first_rank(self._ranks, lambda: self._record(config))

    def _record(self, config: RunConfig) -> None:
        try:
            write_config(self.path, flatten(config), self._facts)
            self._store.catalog.write_to(self.path)
        except OSError as error:
            raise _unwritable("--run_dir", self.path, error) from error

    def _claim(self, config: RunConfig) -> Path:
        if not config.output.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
            raise UserError("--run_dir is needed with --max_restarts: a restart must find it again")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(config.output.run_dir or f"runs/{config.data.name}-{stamp}")
        if config.output.export_root:
            _check_export(Path(config.output.export_root), path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise _unwritable("--run_dir", path, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"--run_dir {path} is in use by another run: wait for it or choose another folder"
            ) from error
        if (path / WEIGHTS).exists():
            raise UserError(f"--run_dir {path} is an exported model: choose another folder")
        if (path / "config.json").exists():
            _check_same_run(config, path, self._facts)
        elif any((path / "checkpoints").glob("step-*")):
            raise UserError(
                f"--run_dir {path} has checkpoints, but config.json is missing: restore it, or "
                "choose another folder"
            )
        return path


def _unwritable(flag: str, folder: Path, error: OSError) -> UserError:
    return UserError(f"{flag} {folder} cannot be written: {error.strerror or error}")


def _check_export(folder: Path, run_dir: Path) -> None:
    """Find out before training, not after it."""
    if folder.resolve() == run_dir.resolve() or (folder / "checkpoints").exists():
        raise UserError(f"--export_root {folder} is the folder of a run: choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable("--export_root", folder, error) from error


def _check_same_run(config: RunConfig, path: Path, facts: dict[str, Any]) -> None:
    if config.output.resume == "never" and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        raise UserError(
            f"--run_dir {path} already holds a run: go on with it by --resume auto, or choose "
            "another folder"
        )
    recorded = read_config(path)
    before = recorded["flags"]
    groups = (
        config.data,
        config.windows,
        config.mask,
        config.encoder,
        config.head,
        config.negatives,
    )
    now = {name: value for group in groups for name, value in flatten(group).items()}
    now["seed"] = config.loader.seed
    now["table_precision"] = config.sharding.table_precision
    for name in now.keys() - {"cache_dir", "dataset_path"}:
        if before.get(name, now[name]) != now[name]:
            raise UserError(
                f"--resume auto: {path} was trained with --{name} {before[name]}, not "
                f"{now[name]}: give the same value, or choose another --run_dir"
            )
    for name, value in facts.items():
        if recorded.get(name, value) != value:
            raise UserError(
                f"--resume auto: {path} was trained on other data ({name} {recorded[name]}, not "
                f"{value}): give the ratings of that run, or choose another --run_dir"
            )
