"""A run: all its flags, its folder, and the parts that train.py and eval.py both build from them.

config = RunConfig()                                   or FlagParser(..., RunConfig).parse(argv)
store = prepare(config.data)
model = build_model(config, store.num_items, ranks)    sharded, with the seed's initial weights
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torchrec.distributed import DistributedModelParallel

from model.bert4rec import BERT4Rec, ModelConfig
from model.checkpoints.checkpoints import CheckpointConfig
from model.distributed import Ranks
from model.evaluation.evaluate import Result, evaluate
from model.network.distillation import TeachersConfig
from model.network.encoder import EncoderConfig
from model.network.head import CatalogSlice, HeadConfig, catalog_slice
from model.run.recipes import CHOICES
from model.step.optimizers import OptimizerConfig, shard, unwrap
from model.tables.gathered_rows import agreement
from model.tables.sharding_plan import ShardingConfig
from model.tables.table_shard import Lookup, choose_lookup
from model.training.profile import ProfileConfig
from model.training.schedule import TrainingConfig
from pipeline.errors import UserError
from pipeline.evaluation.holdout import EvalLoader, HoldoutConfig
from pipeline.preparation.store import SequenceStore
from pipeline.sources.datasets import DataConfig
from pipeline.training.cloze import MaskConfig
from pipeline.training.loader import LoaderConfig, TrainLoader
from pipeline.training.negatives import NegativesConfig, SharedNegatives
from pipeline.training.windows import WindowConfig

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
        scored_slice(config, num_items, ranks),
        seed=config.loader.seed,
        autocast=autocast,
        table_device="meta" if huge and config.sharding.mode == "dmp" else "cpu",
        left_only=config.mask.left_context_share == 1,
    )


def build_model(config: RunConfig, num_items: int, ranks: Ranks) -> DistributedModelParallel:
    """The model, sharded or replicated over the ranks."""
    model = shard_model(config, build_plain_model(config, num_items, ranks), ranks)
    if unwrap(model).autocast and config.output.acceleration != "none":
        # A replicated table gets its gradients from autograd, not from what the graphs write.
        hooked = config.sharding.mode == "ddp"
        alone = ranks.world_size == 1 and not hooked
        compiled = config.output.acceleration == "compile"
        shard = unwrap(model).table_shard
        capturable = shard is not None and shard.is_capturable
        unwrap(model).dense_step.accelerate(compiled, alone, hooked, capturable)
    return model


def shard_model(config: RunConfig, plain: BERT4Rec, ranks: Ranks) -> DistributedModelParallel:
    """``plain`` sharded or replicated over the ranks, as the config says."""
    rows = config.loader.train_batch_size
    lookup = _lookup(config, plain.head.num_items, ranks)
    return shard(plain, config.sharding, config.optimizer, rows, ranks, lookup)


def _lookup(config: RunConfig, num_items: int, ranks: Ranks) -> Lookup:
    longest = config.windows.max_len * (1 + config.mask.two_stream)
    positions, drawn = config.loader.train_batch_size * longest, 0
    if config.head.loss != "softmax":  # every position's target, and the negatives
        drawn = positions + config.negatives.train_negatives
    width = config.encoder.emb_dim
    given = config.sharding, config.head, num_items, width, positions, drawn
    return choose_lookup(*given, ranks)


def train_loader(config: RunConfig, store: SequenceStore, ranks: Ranks) -> TrainLoader:
    """This rank's training batches, each with the candidates that the rank scores."""
    catalog = scored_slice(config, store.num_items, ranks)
    low, high = catalog.low, catalog.high
    lookup = _lookup(config, store.num_items, ranks)
    if lookup.in_place:
        high = low  # nothing to look up: the table itself is scored
    return TrainLoader(
        store,
        config.windows,
        config.mask,
        config.loader,
        rank=ranks.rank,
        world_size=ranks.world_size,
        candidate_range=(low, high),
        negatives=_negatives(config, store),
        agree=agreement(ranks) if lookup.gathered else None,
    )


def _negatives(config: RunConfig, store: SequenceStore) -> SharedNegatives | None:
    """What draws the negatives of the loss, if it wants any."""
    if config.head.loss == "softmax":
        return None
    # One more of each: an item that nobody rated in training must be drawn sometimes.
    weights = store.train_item_counts[1:-1] + 1 if config.head.loss != "gbce" else None
    count, seed = config.negatives.train_negatives, config.loader.seed
    return SharedNegatives(count, store.num_items, seed, weights)


def scored_slice(config: RunConfig, num_items: int, ranks: Ranks) -> CatalogSlice:
    """The items that this rank scores."""
    sharded = config.sharding.mode == "dmp"
    return catalog_slice(num_items, ranks.rank, ranks.world_size, sharded)


def evaluator(
    config: RunConfig,
    model: DistributedModelParallel,
    store: SequenceStore,
    split: str,
    ranks: Ranks,
    discount: float = 0.0,
) -> Callable[..., Result]:
    """A function that evaluates ``model`` as it is when called, on every user of ``split``.

    Its argument, if given, is put around the batches, to do something between them. ``discount`` is
    that of popularity, see :func:`~model.evaluation.evaluate.evaluate`.
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
    popularity = torch.from_numpy(store.train_item_counts)
    earlier: list[Result] = []

    def run(around: Callable[..., Any] = iter) -> Result:
        known = earlier[-1] if earlier else None
        result = evaluate(model, around(loader), popularity, discount=discount, earlier=known)
        earlier[:] = [result]
        return result

    return run
