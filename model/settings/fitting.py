"""Flags that fit the data: what ``--recipe auto`` sets beside those that were given.

    python train.py --dataset_path mine.csv                    all of them
    python train.py --dataset_path mine.csv --emb_dim 128      the others fit 128

    given flags, prepared data, machine  ->  flags, the reasons in a few lines

There are two cases, short and long histories; steps, batch, width and loss follow the sizes. The
constants were chosen on validation, on six data sets (``benchmarks/ABLATIONS.md``, "The default").
Above 54,542 items and 40,226 users nothing was measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from model.distributed import Ranks
from model.network.initial_rows import MOST_VALUES
from model.settings.config import RunConfig
from model.settings.flags import build
from model.settings.recipes import width_of_heads, with_recipe
from pipeline.batches.times import has_times
from pipeline.preparation.store import SequenceStore
from pipeline.training.config import WindowConfig
from pipeline.training.windows import WindowTable

SHORT = 30  # items of a training history on average; no set was measured between 11 and 89
EVALUATIONS = 20  # of a whole training
# Steps without a better evaluation that end a training: a share of all, and at least as many.
PATIENT_SHARE, PATIENT_STEPS = 7 / 20, 1200
# Windows up to which the passes are constant; the fewest and the most windows of a global batch.
MANY_WINDOWS, LEAST_BATCH, MOST_BATCH = 100_000, 32, 1024
# What the batch is divided by: on a CPU a small step costs little more for each window.
BATCH_DIVISOR = {"cuda": 1, "cpu": 4}
EXACT_ITEMS = {"cuda": 100_000, "cpu": 5_000}  # above, a sampled softmax
WIDTHS, LEAST_HEAD = {"cuda": (256, 128, 64), "cpu": (64,)}, 32
# The part of a rank's memory for its shard of the table: weights and two moments, all fp32.
TABLE_SHARE, BYTES_A_WEIGHT = 1 / 3, 12


@dataclass(frozen=True)
class Machine:
    """What the model is trained on; memory in bytes a rank."""

    device: str = "cpu"
    memory: int = 1 << 34
    ranks: int = 1

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.device}"

    @classmethod
    def of(cls, ranks: Ranks) -> "Machine":
        if ranks.device.type == "cpu":
            return cls(ranks=ranks.world_size)
        memory = torch.cuda.get_device_properties(ranks.device).total_memory
        return cls("cuda", memory, ranks.world_size)


def fitted(
    given: Mapping[str, Any], store: SequenceStore, machine: Machine
) -> tuple[RunConfig, list[str]]:
    """The config of the flags given and, with ``--recipe auto``, of those that fit; the reasons."""
    flags = with_recipe(given)
    if flags["recipe"] != "auto":
        return build(RunConfig, flags), []
    lengths = store.parts.training_end - store.parts.begin
    mean = float(lengths[lengths > 0].mean()) if lengths.any() else 0.0
    short = mean < SHORT
    for_lengths = _for_lengths(short, given)
    for_catalog = _for_catalog(store.num_items, machine, given)
    windows = _windows(store, {**for_lengths, **given})
    for_size = _for_size(windows, machine, 60 if short else 100, given)
    parts = {
        f"{'short' if short else 'long'} histories, {mean:.1f} items on average": for_lengths,
        f"{store.num_items:,} items, {machine.device}": for_catalog,
        f"{windows:,} windows, {machine}": for_size,
    }
    lines = []
    for reason, part in parts.items():
        chosen = {name: value for name, value in part.items() if name not in given}
        flags |= chosen
        if chosen:
            shown = " ".join(f"--{name} {_text(value)}" for name, value in chosen.items())
            lines.append(f"  {reason}: {shown}")
    if lines:
        lines.insert(0, "flags that fit the data (give others to override, config.json has all):")
    if "use_times" not in given and has_times(store):
        lines.append("the data have times, which --use_times reads (not chosen by itself)")
    return build(RunConfig, flags), lines


def _for_lengths(short: bool, given: Mapping[str, Any]) -> dict[str, Any]:
    """Windows, masks and dropout."""
    flags = {"max_len": 100, "left_context_share": 0.25}
    flags["learned_positions"] = given.get("positions") == "none"  # else the order is lost
    if short:  # few targets each: predict every item of a window, and regularise
        flags |= {"two_stream": True, "mask_prob": 0.4, "dropout": 0.4}
    else:
        flags |= {"two_stream": False, "mask_prob": 0.3, "dropout": 0.2}
    if given.get("teachers"):  # whose probabilities of all items reduce overfitting
        flags |= {"dropout": 0.1 if short else 0.0, "teacher_share": 0.9}
    if given.get("left_context_share") == 0:
        flags["two_stream"] = False
    return flags


def _for_catalog(items: int, machine: Machine, given: Mapping[str, Any]) -> dict[str, Any]:
    """Width, loss and rates."""
    shards = 1 if given.get("mode") == "ddp" else machine.ranks
    room = TABLE_SHARE * machine.memory * shards / BYTES_A_WEIGHT
    widths = WIDTHS[machine.device]
    width = next((each for each in widths if each * items <= room), widths[-1])
    width = given.get("emb_dim", width_of_heads(given.get("nhead", 1), width))
    exact = items <= EXACT_ITEMS[machine.device] or bool(given.get("teachers"))
    lr = given.get("lr", 1e-3)
    flags = {"emb_dim": width, "nhead": _heads(width), "num_layers": 2}
    flags |= {"loss": "softmax" if exact else "sampled_softmax", "lr": lr}
    together = items * width <= MOST_VALUES and given.get("logit_temperature") != 0
    flags["table_init"] = "cooccurrence" if together else "normal"
    return flags | ({"embedding_lr": 3 * lr} if _has_adam(given) else {})


def _heads(width: int) -> int:
    """The most heads, up to 8, that are wide enough and divide the width."""
    fitting = (n for n in (8, 4, 2) if width % n == 0 and width // n >= LEAST_HEAD)
    return next(fitting, 1)


def _has_adam(given: Mapping[str, Any]) -> bool:
    """Whether the tables have Adam, as ``sharding_plan.table_optimizer`` decides."""
    optimizer = given.get("embedding_optimizer", "auto")
    if optimizer == "auto":
        return given.get("table_precision") != "fp16"
    return optimizer == "adam" or given.get("mode") == "ddp"


def _windows(store: SequenceStore, flags: Mapping[str, Any]) -> int:
    names = ("max_len", "window_stride", "train_on_validation")
    config = WindowConfig(**{name: flags[name] for name in names if name in flags})
    return len(WindowTable.build(store, config, shared=lambda _: []))  # cuts none


def _for_size(
    windows: int, machine: Machine, passes: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """Batch, passes and evaluations: both batch and steps grow with the root of the windows.

    An end without a better evaluation comes after as many steps, however often one evaluates.
    """
    batch = 2 ** round(math.log2(max(1, 2 * windows)) / 2)
    batch = min(max(batch, LEAST_BATCH), MOST_BATCH) // BATCH_DIVISOR[machine.device]
    epochs = round(passes * min(1.0, math.sqrt(MANY_WINDOWS / max(1, windows))))
    flags = {"train_batch_size": max(1, batch // machine.ranks), "num_epochs": max(1, epochs)}
    epochs = given.get("num_epochs", flags["num_epochs"])
    flags["eval_every"] = max(1, round(epochs / EVALUATIONS))
    if given.get("train_on_validation"):
        return flags
    together = given.get("train_batch_size", flags["train_batch_size"]) * machine.ranks
    steps = math.ceil(max(1, windows * given.get("dupe_factor", 1)) / together)  # of a pass
    patient = max(PATIENT_SHARE * epochs * steps, PATIENT_STEPS)
    every = given.get("eval_every", flags["eval_every"]) * steps
    return flags | {"patience": max(1, round(patient / every))}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# All flags that a fit can set.
FITTED = (
    *("max_len", "left_context_share", "learned_positions", "two_stream", "mask_prob"),
    *("dropout", "teacher_share", "emb_dim", "nhead", "num_layers", "loss", "lr", "embedding_lr"),
    *("table_init", "train_batch_size", "num_epochs", "eval_every", "patience"),
)
