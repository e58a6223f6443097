"""A trained model on disk, for whatever uses one: eval.py's flags, the folder, the weights.

run = TrainedRun(EvalFlags(checkpoint="runs/ml-1m"))
store = prepare(run.config.data)
run.check_catalog(store)
model = run.model(ranks)
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torchrec.distributed import DistributedModelParallel

from model.bert4rec import BERT4Rec
from model.checkpoints.checkpoints import PORTABLE, Checkpoints
from model.checkpoints.export import WEIGHTS, load_exported
from model.distributed import Ranks, alone
from model.network.distillation import Teacher, Teachers
from model.run.build import WHOLE_TABLE_BYTES, build_model, build_plain_model, scored_slice
from model.run.config import RunConfig
from model.run.flags import build
from model.training.run_log import read_config
from pipeline.errors import UserError
from pipeline.preparation.store import SequenceStore


@dataclass(frozen=True)
class EvalFlags:
    """Every flag of eval.py."""

    checkpoint: str = field(
        default="", metadata={"help": "folder of a run (its best checkpoint) or exported model"}
    )
    split: str = field(
        default="test",
        metadata={"help": "which held-out items to rank", "choices": ("test", "validation")},
    )
    dataset_path: str = field(
        default="", metadata={"help": "where the ratings are now, if they were moved"}
    )
    cache_dir: str = field(default="", metadata={"help": "downloads and prepared data"})
    batch_size: int | None = field(
        default=None, metadata={"help": "users a rank evaluates at once; as in training without it"}
    )
    popularity_discount: float = field(
        default=0.0,
        metadata={
            "help": "lower logits by this times the logarithm of an item's count in training: 0 "
            "asks what comes next, 1 what comes next more than it does elsewhere"
        },
    )

    def __post_init__(self) -> None:
        if not 0 <= self.popularity_discount <= 1:
            raise UserError(
                f"--popularity_discount must be in [0, 1], not {self.popularity_discount}"
            )
        if not self.checkpoint:
            raise UserError("--checkpoint is needed: the --run_dir of a training run")
        if self.split not in ("test", "validation"):
            raise UserError(f"--split must be test or validation, not {self.split!r}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch_size must be at least 1, not {self.batch_size}")


class TrainedRun:
    """A trained model on disk: a run folder with checkpoints, or an exported model.

    Raises:
        UserError: the folder is neither.
    """

    def __init__(self, flags: EvalFlags) -> None:
        self.folder = Path(flags.checkpoint)
        recorded = read_config(self.folder)
        self._num_items, self._fingerprint = recorded["num_items"], recorded["catalog"]
        settings = dict(recorded["flags"])
        settings |= {k: v for k in ("dataset_path", "cache_dir") if (v := getattr(flags, k))}
        if flags.batch_size:
            settings |= dict.fromkeys(("val_batch_size", "test_batch_size"), flags.batch_size)
        try:
            self.config = build(RunConfig, settings)
        except UserError as error:
            raise UserError(f"{self.folder / 'config.json'}: {error}") from error
        if flags.split == "validation" and self.config.windows.train_on_validation:
            raise UserError(
                f"{self.folder} was trained on the validation items (--train_on_validation): only "
                "--split test tells anything about it"
            )

    def check_catalog(self, store: SequenceStore) -> None:
        """Refuse data whose items are not those the model was trained on.

        Raises:
            UserError: they differ.
        """
        if store.catalog_fingerprint != self._fingerprint:
            raise UserError(
                f"{self.folder} was trained on {self._num_items} items that are not the "
                f"{store.num_items} of this data: give the ratings of training by --dataset_path"
            )

    def model(self, ranks: Ranks) -> DistributedModelParallel:
        """The trained model, sharded over the ranks.

        Raises:
            UserError: there are no weights, or they do not fit.
        """
        if exported := self._exported():
            config = _possible(self.config, ranks.device)
            model = build_model(config, self._num_items, ranks)
            load_exported(exported, model)
            return model
        checkpoints = Checkpoints(self.folder, ranks)
        step = checkpoints.best_step()
        if step is None:
            raise UserError(
                f"{self.folder} has no checkpoint yet: train until the first evaluation"
            )
        model = build_model(self.config, self._num_items, ranks)
        checkpoints.load_weights(model, step)
        return model

    def plain_model(self) -> BERT4Rec:
        """The exported model, unsharded on CPU.

        Raises:
            UserError: there is none, it does not fit, or it is too large for that.
        """
        exported = self._exported()
        if exported is None:
            raise UserError(f"{self.folder} has no exported model: training writes it when it ends")
        cpu = torch.device("cpu")
        output = replace(self.config.output, precision="fp32")
        config = replace(_possible(self.config, cpu), output=output)
        model = build_plain_model(config, self._num_items, alone(cpu))
        if any(parameter.is_meta for parameter in model.parameters()):
            raise UserError(
                f"{self.folder} has a table of more than {WHOLE_TABLE_BYTES >> 30} GiB: too large "
                "to be held whole by a rank"
            )
        load_exported(exported, model)
        return model

    def _exported(self) -> Path | None:
        """Where the portable form is, if it is."""
        folders = (self.folder, self.folder / PORTABLE)
        return next((folder for folder in folders if (folder / WEIGHTS).exists()), None)


def load_teachers(config: RunConfig, store: SequenceStore, ranks: Ranks) -> Teachers | None:
    """The models that ``--teachers`` names, each whole on this rank's device; None: it names none.

    Raises:
        UserError: a folder holds no finished model, one of another catalog or of shorter rows, one
            that knows what this run is validated by, or one too large to be held whole.
    """
    models = []
    for folder in config.teaching.folders:
        run = TrainedRun(EvalFlags(checkpoint=folder))
        run.check_catalog(store)
        if run.config.windows.max_len < config.windows.max_len:
            raise UserError(
                f"--teachers {folder} knows rows of {run.config.windows.max_len} items at most: "
                "give no larger --max_len"
            )
        if run.config.windows.train_on_validation and not config.windows.train_on_validation:
            raise UserError(
                f"--teachers {folder} was trained on the validation items, which are to choose "
                "this run's best model: take another, or --train_on_validation here too"
            )
        plain = run.plain_model()
        half = ranks.device.type == "cuda" and config.output.precision != "fp32"
        dtype = torch.bfloat16 if half else torch.float32
        catalog = scored_slice(config, store.num_items, ranks)
        models.append(Teacher(plain, catalog, ranks.device, dtype))
    return Teachers(models, config.teaching.teacher_share) if models else None


def _possible(config: RunConfig, device: torch.device) -> RunConfig:
    """The config with tables as the device can have them: what CUDA trained, a CPU evaluates."""
    if device.type == "cuda":
        return config
    return replace(config, sharding=replace(config.sharding, compute_kernel="fused"))
