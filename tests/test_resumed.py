"""A resume that changes the learning rates, or other flags, says so, with the rates by hand."""

from pathlib import Path

import pytest

from model.checkpoints.position import Position
from model.run.resumed import changed_flags, changed_rates
from model.settings.config import RunConfig
from model.settings.flags import build, flatten
from tests.conftest import TINY, RunMain

BEFORE = {"num_epochs": 4, "lr": 0.1, "embedding_lr": 0.2, "warmup_share": 0.0}
POSITION = Position(step=30, epoch=3, sample=0)  # three quarters of four epochs


def change(position: Position = POSITION, epoch_samples: int = 100, **now: object) -> str | None:
    """Of a run that was trained with the flags BEFORE and goes on with some others."""
    manifest = {"recorded": {"flags": flatten(build(RunConfig, BEFORE))}}
    config = build(RunConfig, {**BEFORE, **now})
    return changed_rates(manifest, config, "adam", position, epoch_samples)


@pytest.mark.parametrize(
    ("now", "text"),
    [
        # 3 of 4 epochs are over: a quarter of 0.1; of 12 epochs: three quarters.
        (
            {"num_epochs": 12},
            "is 0.075, not 0.025 (tables: 0.15, not 0.05): --num_epochs is 12, not 4",
        ),
        ({"lr": 0.4}, "is 0.1, not 0.025 (tables: 0.05, not 0.05): --lr is 0.4, not 0.1"),
        (
            {"embedding_lr": 0.8},
            "is 0.025, not 0.025 (tables: 0.2, not 0.05): --embedding_lr is 0.8, not 0.2",
        ),
        (
            {"lr_schedule": "constant", "gamma": 0.5, "decay_step": 3},
            "is 0.05, not 0.025 (tables: 0.1, not 0.05): --lr_schedule is constant, not linear, "
            "--decay_step is 3, not 25, --gamma is 0.5, not 1.0",
        ),
    ],
)
def test_both_rates_and_the_flags_are_named(now: dict[str, object], text: str) -> None:
    assert change(**now) == f"--resume auto: the learning rate after step 30 {text}"


def test_a_rate_that_changes_only_later_is_told() -> None:
    line = change(Position(step=5, epoch=0, sample=50), num_epochs=4, gamma=0.5, decay_step=2)
    assert line is not None and "--gamma is 0.5, not 1.0" in line
    # Half of the epochs are over, and gamma counts once.
    assert "the learning rate in epoch 3 is 0.025, not 0.05 (tables: 0.05, not 0.1)" in line


@pytest.mark.parametrize(
    "now",
    [
        {},
        {"train_batch_size": 7, "max_steps": 50, "patience": 2, "weight_decay": 0.3},
        {"decay_step": 7},  # gamma is 1
        {"num_epochs": 3},  # over
    ],
)
def test_the_same_rates_are_not_told(now: dict[str, object]) -> None:
    assert change(**now) is None


@pytest.mark.parametrize("recorded", [{}, [], {"flags": {"positions": "bias"}}, {"flags": 3}])
def test_flags_of_another_version_are_not_compared(recorded: object) -> None:
    manifest = {"recorded": recorded}
    assert changed_rates(manifest, build(RunConfig, BEFORE), "adam", POSITION, 100) is None


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            {"teachers": "a,b", "beta2": 0.9},
            "--teachers is a,b, not none, --beta2 is 0.9, not 0.98",
        ),
        ({"weight_decay": 0.0}, "--weight_decay is 0.0, not 0.01"),
        (
            {"train_batch_size": 7, "patience": 2},
            "--train_batch_size is 7, not 128, --patience is 2",
        ),
        ({"precision": "bf16"}, "--precision is bf16, not auto"),
        ({"eval_negatives": 7}, "--eval_negatives is 7, not 100"),
        ({"run_dir": "a", "resume": "auto", "keep_last": 4, "log_every": 1, "max_steps": 9}, None),
        ({"lr": 1.0, "num_epochs": 12, "gamma": 0.1, "val_batch_size": 3, "profile": 1}, None),
    ],
)
def test_other_flags_are_told(now: dict[str, object], told: str | None) -> None:
    flags = flatten(build(RunConfig, BEFORE))
    config = build(RunConfig, {**BEFORE, **now})
    line = changed_flags({"recorded": {"flags": flags}}, config, POSITION)
    if told is None:
        assert line is None
    else:
        assert line is not None
        assert line.startswith(f"--resume auto: training goes on otherwise than before: {told}")
    over = Position(step=40, epoch=config.training.num_epochs)
    assert changed_flags({"recorded": {"flags": flags}}, config, over) is None
    assert changed_flags({"recorded": {"flags": 3}}, config, POSITION) is None


def test_train_warns_once(run_main: RunMain, run_dir: Path, cache_dir: Path) -> None:
    flags = [*TINY, f"--cache_dir={cache_dir}", f"--run_dir={run_dir}", "--resume=auto"]
    for epochs, warned in ((2, False), (2, False), (4, True)):
        more = f"--num_epochs={epochs}", f"--beta2={0.9 if warned else 0.8}"
        outcome = run_main("train", *flags, *more, "--warmup_share=0", "--lr=1")
        assert outcome.code == 0, outcome.err
        lines = [line for line in outcome.err.splitlines() if "learning rate" in line]
        assert len(lines) == warned, outcome.err
        assert ("than before: --beta2 is 0.9, not 0.8\n" in outcome.err) == warned
    assert lines[0].startswith(
        "warning: --resume auto: the learning rate after step 10 is 0.5, not 0 (tables: "
    )
