"""All flags of train.py, in the groups of their rooms; nothing here needs torch."""

from dataclasses import dataclass, field

from model.checkpoints.checkpoints import CheckpointConfig
from model.network.distillation import TeachersConfig
from model.network.encoder import EncoderConfig
from model.network.head import HeadConfig
from model.run.recipes import CHOICES
from model.step.optimizers import OptimizerConfig
from model.tables.sharding_plan import ShardingConfig
from model.training.profile import ProfileConfig
from model.training.schedule import TrainingConfig
from pipeline.errors import UserError
from pipeline.evaluation.holdout import HoldoutConfig
from pipeline.sources.datasets import DataConfig
from pipeline.training.cloze import MaskConfig
from pipeline.training.loader import LoaderConfig
from pipeline.training.negatives import NegativesConfig
from pipeline.training.windows import WindowConfig

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
    teaching: TeachersConfig = field(default_factory=TeachersConfig)
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
        if self.teaching.teachers and self.head.loss != "softmax":
            raise UserError(
                f"--teachers needs --loss softmax, not {self.head.loss}: teachers have something "
                "to say of all items"
            )
        if self.mask.two_stream and self.encoder.positions == "bias":
            raise UserError(
                "--two_stream has no place for the distances of --positions bias: use rotary or "
                "none"
            )
